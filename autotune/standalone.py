"""Which kernel runs for which tensors: the winners of `table.json` where they were measured, torch elsewhere.

This is the dispatch of an exported package (`bench.py export`). A winner runs for exactly the problem it won,
on a device of the name it won on, with the packages it was built with; otherwise torch's own call does, and
`why` of the kernel says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rooftune.autotune.runtime import Kernel, Layout, Place, keeping_settings, same_threads, typed
from rooftune.core import Problem, UsageError

_kernels: dict[Any, Kernel] = {}


@cache
def table() -> dict[str, Any]:
    """The winners with their evidence, and how the operators' tensors look."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("table.json").read_text(encoding="utf-8"))
    return found


def call(op: str, *tensors: Any, out: Any = None, precision: str | None = None, **flags: str | bool) -> Any:
    """The operator's result, in `out` or in a new tensor. No gradients."""
    found = best(op, *tensors, precision=precision, **flags)
    tensors = tuple(t if t.is_contiguous() else t.contiguous() for t in tensors)
    if out is None:
        return found.fresh(*tensors)
    found(out, *tensors)
    return out


def best(op: str, *tensors: Any, precision: str | None = None, **flags: str | bool) -> Kernel:
    """The kernel for these tensors; found by their shapes and types after the first call.

    Raises:
        UsageError: tensors that do not fit, or flags or a precision that were not exported.
    """
    key = (op, precision, threading.get_ident(), *flags.items())
    for tensor in tensors:
        key += (tensor.shape, tensor.dtype, tensor.device)
    if key not in _kernels:
        _kernels[key] = _choose(op, tensors, precision, flags)
    return _kernels[key]


def _choose(op: str, tensors: Sequence[Any], precision: str | None, flags: dict[str, str | bool]) -> Kernel:
    if op not in table()["operators"]:
        raise UsageError(f"{op} was not exported; there is: {', '.join(table()['operators'])}")
    forms = table()["operators"][op]["forms"]
    asked = {k: "1" if v is True else str(v) for k, v in flags.items() if v not in (False, None)}
    kind = str(tensors[0].dtype).removeprefix("torch.") if tensors else ""
    for form in forms:
        # tf32 is for those who ask for it: its tensors are float32, as fp32's are
        plain = form["inputs"][0][0] == kind and form["precision"] != "tf32"
        named = form["precision"] == precision if precision else plain
        if named and form["flags"] == asked:
            break
    else:
        known = ", ".join(f"{f['precision']} {f['flags'] or ''}".strip() for f in forms)
        raise UsageError(f"{op} of {precision or kind} with {asked or 'no flags'} was not exported; there is: {known}")
    output = None if form["output"] is None else _place(form["output"])
    layout = Layout(tuple(_place(p) for p in form["inputs"]), output)
    sizes = {dim: int(size) for dim, size in layout.sizes(op, tensors).items()}
    dims = tuple((d, sizes[d]) for d in table()["operators"][op]["dims"])
    problem = Problem(op, dims, form["precision"], tuple(sorted(asked.items())))
    winner = table()["winners"].get(str(problem))
    reason = "not among the tuned problems" if winner is None else _stale(winner, tensors[0])
    places = [*([] if output is None else [output]), *layout.inputs]
    shapes = [(place.shape(sizes), place.dtype) for place in places]
    if winner is not None and not reason:
        return _build(problem, winner, winner["config"], winner["why"], shapes, winner.get("output"))
    if output is None:
        raise UsageError(f"{problem}: {reason}; how large its result is, is known for exported problems only")
    safe = table()["operators"][op]["torch"]
    return _build(problem, safe, None, f"torch: {reason}", shapes, None)


def _place(data: Sequence[Any]) -> Place:
    return Place(data[0], tuple(data[1]))


def _build(
    problem: Problem, what: dict[str, Any], config: Any, why: str, shapes: list[Any], output: Sequence[Any] | None
) -> Kernel:
    module = importlib.import_module("." + what["module"], __package__)
    same_threads()
    chosen = dict(config) if config is not None else module.SPACE.default_for(problem)
    tensors = typed([*([] if output is None else [(tuple(output[1]), output[0])]), *shapes])
    if what["torch"]:
        products = problem.precision in ("fp32", "tf32") and what["products"]
        run = keeping_settings(lambda: module.build(problem, chosen), products)
    else:
        run = module.build(problem, chosen)
    return Kernel(problem, what["impl"], chosen, why, run, tensors)


def _stale(winner: dict[str, Any], tensor: Any) -> str:
    """Why a winner must not be used here, or nothing."""
    import torch

    here = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else processor()
    if winner["device"] != here:
        return f"tuned on {winner['device']}, this is {here}"
    if not tensor.is_cuda and winner["threads"] != torch.get_num_threads():
        return f"tuned with {winner['threads']} threads, this process has {torch.get_num_threads()}"
    for package, version in winner["toolchain"].items():
        try:
            present = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed"
        if present != version:
            return f"tuned with {package} {version}, here is {present}"
    return ""


@cache
def processor() -> str:
    """The CPU's product name, as Linux has it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()
