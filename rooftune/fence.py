"""The output that a kernel writes into: poison between guard bands."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

GUARD = 256  # elements on each side of an output: 1 KiB in fp32, more than any vector store overshoots
POISON_BYTE = 0xFF  # all ones is a NaN in every float format here, and -1 in the integers
OTHER_POISON = 0x7F  # huge, or NaN in fp16: a place that no call writes differs between two poisons


class Fenced:
    """An output tensor between two guard bands, filled with poison.

    The bands hold a byte drawn anew each time, never that of zeros: who knew it could write it there.
    """

    def __init__(self, shape: Sequence[int], dtype: str, device: str = "cpu") -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        size, item = math.prod(shape), self.dtype.itemsize
        self.raw = torch.empty((size + 2 * GUARD) * item, dtype=torch.uint8, device=device)
        self.low, self.high = self.raw[: GUARD * item], self.raw[(GUARD + size) * item :]
        self.middle = self.raw[GUARD * item : (GUARD + size) * item]
        self.tensor = self.middle.view(self.dtype).view(tuple(shape))
        self.poison()

    def poison(self, byte: int = POISON_BYTE) -> None:
        """Nothing is written any more, and no band either."""
        self.band = random.SystemRandom().randrange(1, POISON_BYTE)
        self.middle.fill_(byte)
        for band in (self.low, self.high):
            band.fill_(self.band)

    def damage(self) -> str:
        """Which guard band was written, or nothing."""
        for band, name in ((self.low, "before"), (self.high, "after")):
            if not bool((band == self.band).all()):
                return f"wrote {name} the output's bounds"
        return ""


def bits(x: Any) -> Any:
    """A tensor's bits, so that NaNs compare equal to themselves; eight bytes at a time where they divide it."""
    import torch

    flat = x.contiguous().view(-1)
    eight = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    return flat.view(torch.int64 if eight else torch.uint8) if x.numel() else x
