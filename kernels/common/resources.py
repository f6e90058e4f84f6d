"""Resources of a competitor that is several kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rooftune.core import Resources


def worst(found: Sequence[Resources]) -> Resources:
    """The most that one of the kernels takes of each, and the matrix instructions of all."""

    def most(values: Iterable[int | None]) -> int | None:
        return max((v for v in values if v is not None), default=None)

    return replace(
        found[0],
        registers=most(r.registers for r in found),
        spill_bytes=most(r.spill_bytes for r in found),
        shared_bytes=most(r.shared_bytes for r in found),
        threads=most(r.threads for r in found),
        tensor_core=tuple(sorted({i for r in found for i in r.tensor_core})),
    )
