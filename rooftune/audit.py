"""What a competitor could do to look fast or right once it knows that it is being timed, and how it shows.

A worker runs the competitor in its own process, so nothing here is a wall: it is what has been seen in the wild.
Answers are remembered by what the inputs look like; work goes on after the call has returned; inputs are changed so
that another answer is right; the clock, the judge or what the judge calls is replaced.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

FIRST_FACTOR = 5.0  # a first call on new contents may take so many times as long as the next ones, whose caches are
FIRST_SLACK_S = 5e-4  # warm and whose threads are awake, and this longer
PAIRS = 8  # the cheapest first call is compared with the cheapest later one: what disturbs only adds
CLOCKS = ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "process_time_ns")
OURS = ("rooftune.check", "rooftune.clock", "rooftune.fence", "rooftune.audit", "rooftune.worker")
JUDGES = ("rooftune.check", "rooftune.fence", "rooftune.worker")

_now, _cpu = time.perf_counter_ns, time.process_time_ns


class Originals:
    """Functions that times and verdicts rest on, as they were before a competitor was loaded."""

    def __init__(self) -> None:
        self._owners: set[str] = set()
        self._found: list[tuple[str, Any, str, Any, Any]] = []
        for name in OURS:
            self._take(name, importlib.import_module(name))
        self._take("time", time, CLOCKS)

    def remember(self, op: Any) -> None:
        """Those of torch and of an operator too: to be called before a competitor's file is imported."""
        module = sys.modules[op.reference.__module__]
        if f"operator {op.name}" in self._owners:
            return
        self._take(f"operator {op.name}", op)
        self._take(module.__name__, module)
        with contextlib.suppress(ImportError):  # without torch nothing is judged
            import torch

            # By name, for torch.compile replaces some of torch's own.
            names = set[str]().union(*(_names(sys.modules[m]) for m in (*JUDGES, module.__name__))) - {"manual_seed"}
            self._take("torch", torch, names)
            self._take("torch.Tensor", torch.Tensor, names | {n for n in dir(torch.Tensor) if n.startswith("__")})

    def _take(self, label: str, owner: Any, names: Iterable[str] = ()) -> None:
        self._owners.add(label)
        for name in sorted(names) or list(vars(owner)):
            value = _look(owner, name)
            if value is not None and value is _look(owner, name):  # what is made anew by every look has no identity
                self._found.append((label, owner, name, value, getattr(value, "__code__", None)))

    def replaced(self) -> str:
        """The first that is another now, or nothing."""
        for label, owner, name, value, code in self._found:
            now = _look(owner, name)
            if now is not value or getattr(now, "__code__", None) is not code:
                return f"replaced {label}.{name}"
        return ""


def _names(module: types.ModuleType) -> set[str]:
    """What the functions of a module and of its classes call by name."""
    values = [*vars(module).values()]
    values += [v for kind in values if isinstance(kind, type) for v in vars(kind).values()]
    codes = [v.__code__ for v in values if isinstance(v, types.FunctionType) and v.__module__ == module.__name__]
    found: set[str] = set()
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found


def _look(owner: Any, name: str) -> Any:
    """A function, method or class by its name; None for anything else."""
    value = getattr(owner, name, None) if isinstance(owner, type) else vars(owner).get(name)
    return value if callable(value) and not isinstance(value, types.ModuleType) else None


@dataclass(frozen=True)
class Cost:
    """Of one call, with the device idle before and after: seconds, and CPU seconds of all threads."""

    wall_s: float
    cpu_s: float


def cost(call: Callable[[], Any], sync: Callable[[], None]) -> tuple[Cost, Any]:
    """What a call costs, and what it returned."""
    sync()
    wall, cpu = _now(), _cpu()
    result = call()
    sync()
    return Cost((_now() - wall) / 1e9, (_cpu() - cpu) / 1e9), result


def remembers(first_s: float, next_s: float, pair: Callable[[], tuple[Cost, Cost]], device: str) -> str:
    """Whether the first call on new contents takes so much longer than the next ones that those cannot do its work.

    `pair` makes other contents and gives the costs of the first call on them and of a later one; it is asked only
    where there is a suspicion. On a CPU it is work that counts, in CPU seconds: waiting for a core is none.
    """
    if not _longer(first_s, next_s):
        return ""
    pairs = [pair() for _ in range(PAIRS)]
    first, later = ((min(c.cpu_s if device == "cpu" else c.wall_s for c in side)) for side in zip(*pairs, strict=True))
    if not _longer(first, later):
        return ""
    return (
        f"a call takes {first / max(later, 1e-9):,.0f} times as long where the contents are new: answers are remembered"
    )


def _longer(first_s: float, next_s: float) -> bool:
    return first_s > FIRST_FACTOR * next_s + FIRST_SLACK_S
