"""Competitors in the calling process: reading the problem off tensors, and building a callable."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from rooftune import device as devices
from rooftune import registry
from rooftune.autotune.runtime import Kernel, Layout, Place, keeping_settings, same_threads, typed
from rooftune.check import generator
from rooftune.core import PRECISIONS, Config, Op, Problem, UsageError
from rooftune.registry import Impl


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
        safe = registry.baseline(problem.op)
        return _build(problem, safe, None, f"torch, because {key} cannot be built here: {error}")


def _build(problem: Problem, impl: Impl, config: Config | None, why: str) -> Kernel:
    for name, value in impl.env.get("native", {}).items():
        os.environ.setdefault(name, value)  # what its worker had; a setting of the user's own stays
    module = impl.load()
    same_threads()
    chosen = dict(config) if config is not None else module.SPACE.default_for(problem)
    if not module.SPACE.valid(chosen, problem):  # tuned for a neighbour, or with other rules than today's
        raise UsageError(f"{chosen} breaks a rule of {impl.key} on this problem")
    if "torch" in impl.requires and len(impl.requires) == 1:  # a torch call: it sets what it needs globally
        products = problem.precision in ("fp32", "tf32") and registry.op(problem.op).bound == "compute"
        run = keeping_settings(lambda: module.build(problem, chosen), products)
    else:
        run = module.build(problem, chosen)
    output = registry.op(problem.op).output(problem)
    return Kernel(problem, impl.key, chosen, why, run, typed([output, *shapes(problem)]))


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

    Raises:
        UsageError: wrong number of tensors, shapes that contradict each other, or a type that is no precision.
    """
    op = registry.op(op_name)
    if not tensors:
        raise UsageError(f"{op_name} needs its input tensors, or a problem such as {op.small('fp32')[0]}")
    kind = precision or _precision(op, tensors[0])
    found = layout(op_name, kind, words(flags))
    sizes = {dim: int(size) for dim, size in found.sizes(op_name, tensors).items()}
    return registry.problem(Problem(op_name, tuple(sizes.items()), kind, words(flags)))


def words(flags: Mapping[str, str | bool | None]) -> tuple[tuple[str, str], ...]:
    """Flags as a problem holds them: `causal=True` is ("causal", "1"), `causal=False`, 0 or None is nothing."""
    return tuple(sorted((k, "1" if v is True else str(v)) for k, v in flags.items() if v not in (False, None)))


def _precision(op: Op, tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    for precision in op.precisions:
        if PRECISIONS[precision].storage == name:
            return precision
    raise UsageError(f"{op.name} does not take {name}; it does {', '.join(op.precisions)}")


def shapes(problem: Problem) -> list[tuple[tuple[int, ...], str]]:
    """(shape, torch type name) of the input tensors of a problem."""
    sizes = dict(problem.dims)
    return [(p.shape(sizes), p.dtype) for p in layout(problem.op, problem.precision, problem.flags).inputs]


@lru_cache(256)
def layout(op_name: str, precision: str, flags: tuple[tuple[str, str], ...]) -> Layout:
    """Where each size stands in the shapes of an operator's tensors.

    Found by asking the operator for tiny inputs of two different problems: a place that holds the same
    size's value in both is that size. Sizes of the two halve from one to the next, so that rules such as
    `h is a multiple of hkv` hold; times 1 and times 3, a product of two is no size in both.
    """
    op = registry.op(op_name)
    seen: list[list[tuple[tuple[int, ...], str]]] = []
    for factor in (1, 3):
        values = {dim: factor * 2 ** (len(op.dims) - i) for i, dim in enumerate(op.dims)}
        tiny = op.problem(Problem(op.name, tuple(values.items()), precision, flags))
        made = op.inputs(tiny, generator("cpu", 0), "cpu", "normal")
        kinds = [(tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in made]
        seen.append([*kinds, op.output(tiny)])
    first = {2 ** (len(op.dims) - i): dim for i, dim in enumerate(op.dims)}

    def dim(one: int, three: int) -> str | int | None:
        return first.get(one) if three == 3 * one else one if one == three else None

    places = [
        (dtype, [dim(a, b) for a, b in zip(one, three, strict=True)])
        for (one, dtype), (three, _) in zip(*seen, strict=True)
    ]
    if any(None in dims for _, dims in places[:-1]):
        raise UsageError(f"{op_name}: its sizes cannot be read off its tensors; name the problem instead")
    *inputs, output = [Place(dtype, tuple(d for d in dims if d is not None)) for dtype, dims in places]
    return Layout(tuple(inputs), None if None in places[-1][1] else output)
