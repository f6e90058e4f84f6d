"""What a search sees of a config: coordinates of each axis, and quantities that its axes make together. numpy only.

An axis is a table of coordinates, one row per value: a Gaussian process compares two configs axis by axis, by looking
up two values. Names, codes (0, 1, 2) and switches have no order. A size is its log2 where it spans at least a factor
of 3, else itself; hardware prefers aligned sizes, so where powers of two are mixed with others, how often 2 divides
the size, and whether it is a power, are coordinates too.

Axes that a rule ties together are known by the pairs of values that occur nowhere in the valid set. Such pairs are
what kernels multiply (threads in a block) or divide (work per thread), so their product and their ratio become axes
of their own, and so does "all sizes are powers of two", without which a power-of-two problem is not divided evenly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]

WIDTH = 3  # most coordinates of an axis: size, alignment, is a power of two
CODES = 4  # integers 0..n-1 are codes, up to this many: a count that starts at 0 tends to go on further
MAX_ALIGN = 6  # 64 bytes or lanes: more alignment gains nothing
SIDE = 0.5  # weight of alignment and powers of two beside the size, where a start has to spread
PAIRS = 12  # most derived axes, in the order of the axes: each costs the process a parameter


@dataclass(frozen=True)
class Axis:
    """One axis, given or derived: the value of each config, and the coordinates of each value.

    Attributes:
        at: [configs], positions of values.
        coords: [values, 1..WIDTH] in [0, 1]; None where values have no order.
        count: number of values.
    """

    at: Rows
    coords: Array | None
    count: int


def unit(column: Array) -> Array:
    """Scaled to [0, 1]; zeros if constant."""
    low, high = column.min(), column.max()
    return (column - low) / (high - low) if high > low else column * 0.0


def alignment(value: float) -> int:
    """How often 2 divides a whole number, up to MAX_ALIGN: 48 -> 4."""
    n, count = int(value), 0
    while n and n % 2 == 0 and count < MAX_ALIGN:
        n, count = n // 2, count + 1
    return count


def is_power(value: float) -> bool:
    """Whether a positive whole number is a power of two."""
    return value == int(value) and int(value) & (int(value) - 1) == 0


def ordered(values: Sequence[Any]) -> bool:
    """Whether values are sizes or counts; two of anything, names and codes are not."""
    numbers = all(isinstance(v, int | float | np.number) and not isinstance(v, bool) for v in values)
    return len(values) > 2 and numbers and not (len(values) <= CODES and list(values) == list(range(len(values))))


def _wide(raw: Array) -> bool:
    positive = raw[raw > 0]
    return bool(raw.min() >= 0 and len(positive) > 1 and positive.max() / positive.min() >= 3)


def coordinates(values: Sequence[Any]) -> Array | None:
    """[values, 1..WIDTH] in [0, 1], the size first, or None where values have no order."""
    if not ordered(values):
        return None
    raw = np.array([float(v) for v in values])
    size = raw
    if _wide(raw):  # a zero (off, no unrolling) is one step below the smallest
        size = np.log2(raw) if raw.min() > 0 else np.log2(1 + raw / raw[raw > 0].min())
    columns = [unit(size)]
    if len(raw) >= 4 and raw.min() > 0 and (raw == np.floor(raw)).all():
        power = np.array([float(is_power(v)) for v in raw])
        if not power.all():
            columns.append(unit(np.array([float(alignment(v)) for v in raw])))
            if len(raw) >= 8 and power.sum() >= 3:
                columns.append(power)
    return np.stack(columns, axis=1)


def _derived(column: Array) -> Axis | None:
    found, at = np.unique(np.round(column, 6), return_inverse=True)
    return None if len(found) < 2 else Axis(at.reshape(-1).astype(np.int64), unit(found)[:, None], len(found))


def _tied(a: Axis, b: Axis) -> bool:
    """Whether a rule ties two axes: some pair of their values is in no config."""
    return len(np.unique(a.at * b.count + b.at)) < a.count * b.count


def _sizes(values: Sequence[Sequence[Any]], own: list[Axis]) -> list[tuple[Axis, Array]]:
    """Axes of sizes with their log2, [configs]."""
    found: list[tuple[Axis, Array]] = []
    for axis, given in zip(own, values, strict=True):
        if axis.coords is not None:
            raw = np.array([float(v) for v in given])
            if _wide(raw) and raw.min() > 0:
                found.append((axis, np.log2(raw)[axis.at]))
    return found


class Features:
    """The axes of a space as models see them.

    Attributes:
        axes: those with more than one value, then the derived ones.
        at: [configs, axes], positions of values.
        given: how many of `axes` are the space's own.
        even: rows whose sizes are all powers of two, where some are and others are not; else none.
        spread: [configs, features], for distances between configs of the start: no derived axes.
        mixed: [configs, features], for trees: all axes, and products and ratios of more sizes.
    """

    def __init__(self, values: Sequence[Sequence[Any]], index: Rows) -> None:
        used = [i for i, v in enumerate(values) if len(v) > 1]
        own = [Axis(index[:, i], coordinates(values[i]), len(values[i])) for i in used]
        self.given = len(own)
        derived, self.even = self._derive([values[i] for i in used], own)
        self.axes = own + derived
        self.at = np.stack([a.at for a in self.axes], axis=1) if own else np.zeros((len(index), 0), np.int64)
        self.spread = self._columns(own, len(index), SIDE)
        self.mixed = np.hstack(
            [self._columns(self.axes, len(index), 1.0), *self._mixtures([values[i] for i in used], own)]
        )

    @staticmethod
    def _mixtures(values: Sequence[Sequence[Any]], own: list[Axis]) -> list[Array]:
        """Products and ratios of sizes that no rule ties; none where they are too many to tell apart."""
        sizes = _sizes(values, own)
        loose = [(x, y) for i, (a, x) in enumerate(sizes) for b, y in sizes[:i] if not _tied(a, b)]
        return [np.stack([x + y, x - y], axis=1) for x, y in loose] if 2 * len(loose) <= PAIRS else []

    @staticmethod
    def _derive(values: Sequence[Sequence[Any]], own: list[Axis]) -> tuple[list[Axis], Rows]:
        sizes = _sizes(values, own)
        powers = [np.isin(column, np.arange(64.0)) for _, column in sizes]
        found: list[Axis | None] = []
        for i, (a, size_a) in enumerate(sizes):
            for b, size_b in sizes[:i]:
                if _tied(a, b):
                    found += [_derived(size_a + size_b), _derived(size_a - size_b)]
        kept = [a for a in found if a is not None][:PAIRS]
        even = np.all(powers, axis=0) if powers else np.ones(1, bool)
        if not even.any() or even.all():
            return kept, np.zeros(0, np.int64)
        return [*kept, Axis(even.astype(np.int64), None, 2)], np.flatnonzero(even)

    @staticmethod
    def _columns(axes: list[Axis], count: int, side: float) -> Array:
        columns: list[Array] = []
        for axis in axes:
            if axis.coords is not None:
                size, *rest = axis.coords[axis.at].T
                columns += [size, *(side * column for column in rest)]
            elif axis.count == 2:
                columns.append(axis.at.astype(np.float64))
            else:  # 0.5 each, so that two names differ by 1
                columns += [0.5 * (axis.at == k) for k in range(axis.count)]
        return np.stack(columns, axis=1) if columns else np.zeros((count, 1))

    def coords(self) -> tuple[Array, npt.NDArray[np.bool_]]:
        """(coordinates padded to [axes, values, WIDTH], which of them are there [axes, WIDTH])."""
        most = max((a.count for a in self.axes), default=1)
        table, there = np.zeros((len(self.axes), most, WIDTH)), np.zeros((len(self.axes), WIDTH), dtype=bool)
        for i, axis in enumerate(self.axes):
            if axis.coords is not None:
                width = axis.coords.shape[1]
                table[i, : axis.count, :width] = axis.coords
                there[i, :width] = True
        return table, there
