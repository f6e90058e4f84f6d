"""Input data shared by the operators: random, never zeros, reproducible from a generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rooftune.core import PRECISIONS


def normal(shape: Sequence[int], precision: str, generator: Any, device: str) -> Any:
    """N(0, 1) rounded to the precision's storage; int8: uniform whole numbers from -127 to 127."""
    import torch

    dtype = getattr(torch, PRECISIONS[precision].storage)
    if precision == "int8":
        return torch.randint(-127, 128, tuple(shape), generator=generator, device=device, dtype=torch.int8)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).to(dtype)


def take(x: Any, rows: Sequence[int] | None) -> Any:
    """Rows of a two-dimensional tensor, or all of it."""
    return x if rows is None else x[list(rows)]
