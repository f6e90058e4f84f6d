"""What runs a chosen kernel in a user's process: tensors are checked, torch's global settings stay the user's.

`bench.py export` writes this module out beside the winners, so it imports `rooftune.core` only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from rooftune.check import joined
from rooftune.core import Config, Problem, UsageError

Run = Callable[..., Any]  # run(out, *inputs); a torch call that can only allocate returns its result instead


@dataclass(frozen=True)
class Place:
    """One tensor of an operator: torch's name of its type, and per dimension the size's name or a number."""

    dtype: str
    dims: tuple[str | int, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True)
class Layout:
    """The tensors of an operator in one precision and with one set of flags.

    `output` is None where its shape is no list of sizes (several results in one buffer).
    """

    inputs: tuple[Place, ...]
    output: Place | None

    def sizes(self, op: str, tensors: Sequence[Any]) -> dict[str, int]:
        """The operator's sizes, read off its input tensors.

        Raises:
            UsageError: not as many tensors, of another type, on several devices, or shapes that contradict the operator
                or each other. A kernel that is found by them trusts them.
        """
        if len(self.inputs) != len(tensors):
            raise UsageError(f"{op} takes {len(self.inputs)} tensors with these flags, not {len(tensors)}")
        sizes: dict[str, int] = {}
        for number, (place, tensor) in enumerate(zip(self.inputs, tensors, strict=True)):
            wanted = f"torch.{place.dtype}", tensors[0].device
            if (str(tensor.dtype), tensor.device) != wanted:
                given = f"{tensor.dtype} on {tensor.device}"
                raise UsageError(f"{op}: tensor {number} is {given}, expected {wanted[0]} on {wanted[1]}")
            if len(place.dims) != tensor.dim():
                raise UsageError(f"{op}: tensor {number} has {tensor.dim()} dimensions, expected {len(place.dims)}")
            for dim, size in zip(place.dims, tensor.shape, strict=True):
                if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                    raise UsageError(f"{op}: tensor {number} has {dim}={size}, another has {sizes[dim]}")
        return sizes


@dataclass(frozen=True)
class Kernel:
    """A built competitor. Call it as `kernel(out, *inputs)`.

    It may own workspaces, so it serves one thread and one stream at a time; `best` builds one for each thread.

    Attributes:
        impl, config: what runs; `why` it was chosen, in one line.
        run: the bare kernel. It trusts the addresses it gets.
        tensors: (shape, type) of the output and the inputs.
        spare: what `fresh` keeps between calls.
    """

    problem: Problem
    impl: str
    config: Config
    why: str
    run: Run = field(repr=False)
    tensors: tuple[tuple[Any, Any], ...] = field(repr=False, default=())
    spare: dict[str, Any] = field(repr=False, compare=False, default_factory=dict)

    def __call__(self, out: Any, *inputs: Any) -> None:
        given = (out, *inputs)
        if len(given) != len(self.tensors):
            raise UsageError(f"{self.problem} takes out and {len(self.tensors) - 1} inputs, not {len(given)} tensors")
        for (shape, dtype), tensor in zip(self.tensors, given, strict=True):
            # A kernel writes to addresses: a wrong tensor would be silent damage, and this costs 0.3 us each.
            if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous():
                raise UsageError(f"{self.problem}: {_seen(tensor)}, expected contiguous {list(shape)} {dtype}")
        result = self.run(out, *inputs)
        if result is not None:
            out.copy_(joined(result, out))

    def fresh(self, *inputs: Any) -> Any:
        """A new output tensor with the result. The inputs are not checked."""
        spare = self.spare.get("out")
        out = inputs[0].new_empty(self.tensors[0][0], dtype=self.tensors[0][1]) if spare is None else spare
        result = self.run(out, *inputs)
        if result is None:
            return out
        if spare is None:  # it allocates its result: from now on it gets an empty tensor of that type
            self.spare["out"] = out[:0]
        return joined(result, out)


def _seen(tensor: Any) -> str:
    kind = "contiguous" if tensor.is_contiguous() else "a view that is not contiguous:"
    return f"got {kind} {list(tensor.shape)} {tensor.dtype}"


def typed(tensors: Sequence[tuple[Sequence[int], str]]) -> tuple[tuple[Any, Any], ...]:
    """(shape, name of a type) -> what `Kernel.tensors` holds."""
    import torch

    return tuple((torch.Size(shape), getattr(torch, dtype)) for shape, dtype in tensors)


def same_threads() -> None:
    """Numba gets torch's number of CPU threads, in this thread; call it after a competitor is imported.

    When Numba starts its OpenMP threads it sets the number for the whole process, torch's too: that is put back.
    """
    import torch

    if (numba := sys.modules.get("numba")) is not None:
        users = torch.get_num_threads()
        numba.set_num_threads(min(users, numba.config.NUMBA_NUM_THREADS))  # starts them
        if torch.get_num_threads() != users:
            torch.set_num_threads(users)


# --- torch's global settings ----------------------------------------------------------------------------------------

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # read, write


def _settings() -> list[Setting]:
    """Every setting that a torch competitor changes for its process."""
    import torch
    from torch.backends import cuda

    reductions = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    return [
        (torch.is_grad_enabled, torch.set_grad_enabled),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        *((partial(getattr, cuda.matmul, name), partial(setattr, cuda.matmul, name)) for name in reductions),
    ]


def keeping_settings(build: Callable[[], Run], rounds_products: bool) -> Run:
    """Build a torch competitor and wrap its run, so that both leave the process's settings as they were.

    A competitor in a worker owns the process and sets what it needs for good (no gradients, exact fp32
    products, one backend of attention); in a user's process the same would change the user's results.
    What the build sets is set for each call, what the first call changes is put back after each; to look at
    all eight every time costs 14 us.

    Args:
        rounds_products: the result depends on how fp32 products are rounded, whatever the build changed.
    """
    settings = _settings()
    users = [read() for read, _ in settings]
    try:
        run = build()
    finally:
        ours = [read() for read, _ in settings]
        _restore(settings, users)
    needed = [
        (read, write, value)
        for number, ((read, write), value, before) in enumerate(zip(settings, ours, users, strict=True))
        # not the first, gradients: what needs them goes through the custom op, and they are off inside it
        if number and (value != before or (rounds_products and number == 1))
    ]
    moved: list[Setting] | None = None

    def guarded(out: Any, *inputs: Any) -> Any:
        nonlocal moved
        undo = [(write, read()) for read, write in (settings if moved is None else moved)]
        for read, write, value in needed:
            if (now := read()) != value:
                undo.append((write, now))
                write(value)
        if not undo:
            return run(out, *inputs)
        try:
            return run(out, *inputs)
        finally:
            if moved is None:
                moved = [pair for pair, (_, before) in zip(settings, undo, strict=False) if pair[0]() != before]
            for write, before in undo:
                write(before)

    return guarded


def _restore(settings: Sequence[Setting], wanted: Sequence[Any]) -> None:
    for (read, write), value in zip(settings, wanted, strict=True):
        if read() != value:
            write(value)
