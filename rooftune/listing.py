"""The valid configs of a competitor's space, listed fast.

Asked of one config after another, a rule takes a microsecond or two: 18 million configs, of which 300,000 are valid,
take minutes. Most rules are arithmetic that works on arrays as it stands, so each is asked about all values of its axes
at once, as an open grid; where it asks whether an array is true (`and`, `if`, `min`, `a <= b <= c`) it goes both ways,
once for those configs of which it is and once for the others. Where a rule does not take arrays, or says something else
of an array than of its elements (`config["x"] is None`), it is asked config by config, as every rule is anyway of every
config that is listed.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rooftune.core import Config, Problem, Rule, Space

CHUNK = 1 << 20  # configs that are judged at a time: 8 MB for an array of numbers
LOOKS = 200  # configs of a chunk, beside one for each value, on which a rule's word on arrays is compared with its own
BLOCK = 4096  # configs that are spelled out at a time
WAYS = 64  # ways through a rule: `and` of ten comparisons has eleven

Places = npt.NDArray[np.int64]  # [n], positions in the product of the axes
Mask = npt.NDArray[np.bool_]


def listed(space: Space, problem: Problem) -> Iterator[Config]:
    """Every valid config, in the order of `Space.configs`."""
    return spelled(space, problem, candidates(space, problem)[0])


def spelled(space: Space, problem: Problem, places: Places) -> Iterator[Config]:
    """The configs at those places that break no rule."""
    return (config for _, config in _checked(space, problem, places))


def kept(space: Space, problem: Problem, places: Places) -> Iterator[int]:
    """Those of the places whose configs break no rule."""
    return (place for place, _ in _checked(space, problem, places))


def _checked(space: Space, problem: Problem, places: Places) -> Iterator[tuple[int, Config]]:
    axes = space.axes
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        columns = np.unravel_index(block, _shape(space)) if axes else ()
        values = [[v[i] for i in column.tolist()] for v, column in zip(axes.values(), columns, strict=True)]
        for place, *line in zip(block.tolist(), *values, strict=True):
            config = dict(zip(axes, line, strict=True))
            if all(rule(config, problem) for rule in space.where):
                yield place, config


def candidates(space: Space, problem: Problem) -> tuple[Places, bool]:
    """Places of the configs that the rules which take arrays leave, in order; and whether those are all the rules."""
    rules = list(space.where)
    while True:
        found = _swept(space, problem, rules)
        if isinstance(found, np.ndarray):
            return found, len(rules) == len(space.where)
        rules.remove(found)


def _shape(space: Space) -> list[int]:
    return [len(values) for values in space.axes.values()]


def _swept(space: Space, problem: Problem, rules: Sequence[Rule]) -> Places | Rule:
    """Places that the rules leave; or the first rule that does not take arrays."""
    values, shape = list(space.axes.values()), _shape(space)
    lead = next(i for i in range(len(shape) + 1) if math.prod(shape[i:]) <= CHUNK)
    inner = shape[lead:]
    grid = [_array(v).reshape([-1 if d == i else 1 for d in range(len(inner))]) for i, v in enumerate(values[lead:])]
    rng, found = random.Random(0), [np.zeros(0, dtype=np.int64)]
    for number, first in enumerate(itertools.product(*values[:lead])):
        looks = [[rng.choice(v) for v in values[lead:]] for _ in range(LOOKS)]
        looks += [[*map(rng.choice, values[lead:i]), x, *map(rng.choice, values[i + 1 :])]
                  for i in range(lead, len(values)) for x in values[i]]  # fmt: skip
        mask = np.ones(inner, dtype=bool)
        for rule in rules:
            said = _of_arrays(rule, dict(zip(space.axes, [*first, *grid], strict=True)), problem, inner)
            if said is None or not _agrees(rule, said, space, first, looks, problem):
                return rule
            mask &= said
        found.append(np.flatnonzero(mask) + number * mask.size)
    return np.concatenate(found)


class _Grid(np.ndarray[Any, np.dtype[Any]]):  # npt.NDArray is a `type` alias since numpy 2.5, and no base
    """An array that behaves as a number does: a rule may ask whether it is true, and `x += 1` makes another."""

    def __bool__(self) -> bool:
        return bool(self.item()) if self.size == 1 else _now.way.turn(self)


def _anew(operation: Callable[[Any, Any], Any]) -> Callable[[_Grid, Any], Any]:
    return lambda self, other: operation(self, other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift", "and_", "or_", "xor"):
    setattr(_Grid, f"__i{_name.strip('_')}__", _anew(getattr(operator, _name)))


class _Way:
    """One way through a rule.

    Attributes:
        configs: those that take it.
        turns: what was answered to its questions, at first those of an earlier way.
        others: turns of the ways that branch off.
    """

    def __init__(self, shape: Sequence[int], turns: Sequence[bool]) -> None:
        self.configs: Mask = np.ones(shape, dtype=bool)
        self.turns, self.others = list(turns), list[list[bool]]()
        self._asked = 0

    def turn(self, question: npt.NDArray[Any]) -> bool:
        """The answer for this way."""
        yes = np.asarray(question).astype(bool)
        if self._asked == len(self.turns):
            some, rest = bool((self.configs & yes).any()), bool((self.configs & ~yes).any())
            if some and rest:
                self.others.append([*self.turns, False])
            self.turns.append(some)
        answer = self.turns[self._asked]
        self._asked += 1
        self.configs = self.configs & (yes if answer else ~yes)
        return answer


_now = threading.local()  # the way that is being gone


def _array(values: Sequence[Any]) -> _Grid:
    """Numbers as numbers; anything else, True and False too (two of them add up to 2), as the objects they are."""
    kinds = {type(v) for v in values}
    if kinds == {int} and all(abs(v) < 2**31 for v in values):
        return np.array(values, dtype=np.int64).view(_Grid)
    if kinds == {float}:
        return np.array(values, dtype=np.float64).view(_Grid)
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out.view(_Grid)


def _of_arrays(rule: Rule, config: Config, problem: Problem, shape: Sequence[int]) -> Mask | None:
    """What a rule says of a grid of configs, None if it cannot tell."""
    out, ways = np.zeros(shape, dtype=bool), [list[bool]()]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(WAYS):
            _now.way = way = _Way(shape, ways.pop())
            try:
                said = np.asarray(rule(config, problem)).astype(bool)
                out |= way.configs & said
            except Exception:  # noqa: BLE001  whatever its author wrote: asked config by config it says what is wrong
                return None
            ways += way.others
            if not ways:
                return out
    return None


def _agrees(
    rule: Rule, said: Mask, space: Space, first: Sequence[Any], looks: Sequence[Sequence[Any]], problem: Problem
) -> bool:
    """Whether it says the same of single configs. One that raises there says nothing: another rule may forbid it."""
    values = list(space.axes.values())[len(first) :]
    for look in looks:
        try:
            alone = bool(rule(dict(zip(space.axes, [*first, *look], strict=True)), problem))
        except Exception:  # noqa: BLE001  such as a division by a value that an earlier rule forbids
            continue
        if alone != said[tuple(v.index(x) for v, x in zip(values, look, strict=True))]:
            return False
    return True
