"""Competitors in the calling process: reading the problem off tensors, and building a callable."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rooftune import device as devices
from rooftune import registry
from rooftune.check import Run, generator, settle
from rooftune.core import PRECISIONS, Config, Op, Problem, UsageError
from rooftune.registry import Impl


@dataclass(frozen=True)
class Kernel:
    """A built competitor. Call it as `kernel(out, *inputs)`.

    Attributes:
        impl, config: what runs; `why` it was chosen, in one line.
    """

    problem: Problem
    impl: str
    config: Config
    why: str
    run: Run

    def __call__(self, out: Any, *inputs: Any) -> None:
        settle(self.run(out, *inputs), out)  # a torch call that can only allocate returns what belongs in out


def build(problem: Problem, key: str, config: Config | None, why: str) -> Kernel:
    """Import a competitor here and build it; the default config if none is given.

    If that fails (another compiler than when it was measured), torch is built instead, with a warning
    that says why: a table must not be able to stop a program.
    """
    impl = registry.impl(key)
    try:
        return _build(problem, impl, config, why)
    except Exception as error:
        if impl.baseline and config is None:
            raise
        warnings.warn(f"rooftune: {key} was chosen for {problem} but cannot be built: {error}", stacklevel=3)
        safe = next(i for i in registry.impls(problem.op) if i.baseline)
        return _build(problem, safe, None, f"torch, because {key} cannot be built here: {error}")


def _build(problem: Problem, impl: Impl, config: Config | None, why: str) -> Kernel:
    for name, value in impl.env.get("native", {}).items():
        os.environ.setdefault(name, value)  # what its worker had; a setting of the user's own stays
    module = impl.load()
    chosen = dict(config) if config is not None else module.SPACE.default_for(problem)
    return Kernel(problem, impl.key, chosen, why, module.build(problem, chosen))


def where_is(tensors: Sequence[Any]) -> str:
    """Our name of the tensors' device; without tensors the first GPU, else the CPU."""
    kinds = [d for d in devices.devices() if d.kind != "cpu"]
    if not tensors:
        return str(kinds[0]) if kinds else "cpu"
    place = tensors[0].device
    if place.type == "cpu":
        return "cpu"
    for found in kinds:
        if found.torch == f"{place.type}:{place.index or 0}":
            return str(found)
    raise UsageError(f"tensors are on {place}, which is none of {', '.join(map(str, devices.devices()))}")


def problem_of(
    op_name: str, tensors: Sequence[Any], flags: Mapping[str, str | bool], precision: str | None = None
) -> Problem:
    """The problem that an operator with these input tensors is.

    Where each size stands in the shapes is found by asking the operator for tiny inputs of two different
    problems: a place that holds the same size's value in both is that size.

    Raises:
        UsageError: wrong number of tensors, shapes that contradict each other, or a type that is no precision.
    """
    op = registry.op(op_name)
    if not tensors:
        raise UsageError(f"{op_name} needs its input tensors, or a problem such as {op.small('fp32')[0]}")
    given = {k: "1" if v is True else str(v) for k, v in flags.items() if v is not False}
    kind = precision or _precision(op, tensors[0])
    sizes: dict[str, int] = {}
    places = _places(op, kind, given)
    if len(places) != len(tensors):
        raise UsageError(f"{op_name} takes {len(places)} tensors with these flags, not {len(tensors)}")
    for number, (dims, tensor) in enumerate(zip(places, tensors, strict=True)):
        if len(dims) != tensor.dim():
            raise UsageError(f"{op_name}: tensor {number} has {tensor.dim()} dimensions, expected {len(dims)}")
        for dim, size in zip(dims, tensor.shape, strict=True):
            if dim is not None and sizes.setdefault(dim, int(size)) != size:
                raise UsageError(f"{op_name}: tensor {number} has {dim}={size}, another has {sizes[dim]}")
    return registry.problem(Problem(op_name, tuple(sizes.items()), kind, tuple(sorted(given.items()))))


def _precision(op: Op, tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    for precision in op.precisions:
        if PRECISIONS[precision].storage == name:
            return precision
    raise UsageError(f"{op.name} does not take {name}; it does {', '.join(op.precisions)}")


def _places(op: Op, precision: str, flags: Mapping[str, str]) -> list[list[str | None]]:
    """Per input, which size each dimension is. Sizes of the two tiny problems halve from one to the next, so
    that rules such as `h is a multiple of hkv` hold; times 1 and times 3, a product of two is no size in both."""
    seen: list[list[tuple[int, ...]]] = []
    for factor in (1, 3):
        values = {dim: factor * 2 ** (len(op.dims) - i) for i, dim in enumerate(op.dims)}
        tiny = op.problem(Problem(op.name, tuple(values.items()), precision, tuple(sorted(flags.items()))))
        seen.append([tuple(t.shape) for t in op.inputs(tiny, generator("cpu", 0), "cpu", "normal")])
    first = {2 ** (len(op.dims) - i): dim for i, dim in enumerate(op.dims)}
    return [
        [first.get(a) if b == 3 * a else None for a, b in zip(one, three, strict=True)]
        for one, three in zip(*seen, strict=True)
    ]
