"""Which competitor computes which step of a layer: all-torch, one language, or the best that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rooftune import registry
from rooftune.core import Config, Status
from rooftune.registry import Impl
from rooftune.results.record import Record
from rooftune.suites.block_plan import Step, problems

Measured = Mapping[str, tuple[str, Config]]  # printed problem -> (competitor, config)


@dataclass(frozen=True)
class Choice:
    """What computes a step: a competitor's key, its config (None: the default), and why, where that needs saying."""

    impl: str
    config: Config | None = None
    note: str = ""


@dataclass(frozen=True)
class Composition:
    """A choice for every operator step by name; a `reason` without choices says why there are none."""

    name: str
    choices: Mapping[str, Choice] = field(default_factory=dict)
    reason: str = ""


def fastest_torch(records: Iterable[Record]) -> dict[str, tuple[str, Config]]:
    """The fastest torch call of each raced problem, for an all-torch layer that is as good as it can be."""
    best: dict[str, Record] = {}
    for r in records:
        if r.status != Status.OK or r.time_s is None or not registry.impl(r.impl).baseline:
            continue
        held = best.get(r.problem)
        if held is None or held.time_s is None or r.time_s < held.time_s:
            best[r.problem] = r
    return {problem: (r.impl, r.config) for problem, r in best.items()}


def compose(name: str, steps: Sequence[Step], kind: str, measured: Measured | None = None) -> Composition:
    """Choose a competitor for every operator of a layer.

    Args:
        name: `torch`, `best`, or a language: all four operators from its competitors, or none at all.
        kind: cpu, cuda or rocm.
        measured: what `best` takes (`dispatch.winners`), or the calls of `torch` (`fastest_torch`).
    """
    choices: dict[str, Choice] = {}
    for step in steps:
        if not step.problem:
            continue
        op = registry.problem(step.problem).op
        found = (measured or {}).get(step.problem)
        if found is not None and name in ("best", "torch"):
            choices[step.name] = Choice(*found)
        elif name == "best":
            choices[step.name] = Choice(f"{op}/torch", note="torch: no right and timed competitor was raced here")
        elif name == "torch":
            choices[step.name] = Choice(f"{op}/torch")
        else:
            impl, reason = _speaker(name, step, kind)
            if impl is None:
                return Composition(name, reason=f"step {step.name}: {reason}")
            choices[step.name] = Choice(impl.key)
    return Composition(name, choices)


def _speaker(language: str, step: Step, kind: str) -> tuple[Impl | None, str]:
    """The language's competitor for a step: the one of that very name, else a variant; or why there is none."""
    problem = registry.problem(step.problem)
    mine = [i for i in registry.impls(problem.op) if i.name == language or i.name.startswith(f"{language}_")]
    reasons = []
    for impl in sorted(mine, key=lambda i: len(i.name)):
        if kind not in impl.devices:
            reasons.append(f"{impl.key} runs on {', '.join(impl.devices)}, not on {kind}")
        elif problem.precision not in impl.precisions:
            reasons.append(f"{impl.key} does not do {problem.precision} (only {', '.join(impl.precisions)})")
        elif impl.missing:
            reasons.append(impl.missing)
        else:
            return impl, ""
    return None, (reasons or [f"no competitor of {problem.op} is written in {language}"])[0]


def languages(steps: Sequence[Step], kind: str) -> list[str]:
    """Names that `compose` can make a whole layer of here, without torch: `numba` on a CPU, `triton`... on a GPU."""
    every = [i for op in {p.op for p in problems(list(steps))} for i in registry.impls(op)]
    names = sorted({i.name for i in every if not i.baseline and kind in i.devices and i.requires != ("torch",)})
    return [name for name in names if compose(name, steps, kind).choices]
