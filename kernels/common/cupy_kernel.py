"""What describes a CUDA C++ kernel: source, macros, threads, shared memory; and where its binaries are kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rooftune.core import PRECISIONS, Config, Problem, Unavailable, UsageError
from rooftune.sources import included

Launch = Callable[..., None]  # launch(grid, *args): args: tensor, None (no pointer), int (int32), float, TensorMap

HEADERS = Path(__file__).parent / "cuda"
PRECISION_CODE = {"fp32": 0, "tf32": 1, "fp16": 2, "bf16": 3, "int8": 4, "fp8": 5}  # rt::Precision
SHARED_LIMIT = 232448  # bytes a block may have on compute capability 9.0 and 10.0; 8.0: 166912
SHARED_PORTABLE = 101376  # 99 KiB: what compute capability 8.6, 8.9 and 12.0 allow; defaults stay below
REGISTERS = 65536  # 32-bit registers of a multiprocessor, on every architecture from 8.0 on
ALIGNMENT = 16  # bytes; kernels use 16-byte loads where the sizes allow them


@dataclass(frozen=True)
class Kernel:
    """One CUDA kernel with its compile-time settings. `shared_bytes` is dynamic shared memory."""

    source: Path
    entry: str
    macros: tuple[tuple[str, int], ...]
    threads: int
    shared_bytes: int = 0

    @property
    def defines(self) -> list[str]:
        """Compiler options for the macros."""
        return [f"-D{name}={value}" for name, value in self.macros]

    def key(self, *extra: str) -> str:
        """Hash of everything a compiler's result depends on."""
        digest = hashlib.sha256("\0".join([self.entry, *self.defines, *extra]).encode())
        for path in (self.source, *included(self.source, (HEADERS,))):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:32]


def chunk(count: int, itemsize: int, limit: int = ALIGNMENT) -> int:
    """Elements that one load may take: the largest power of two up to `limit` bytes that divides `count`."""
    elements = limit // itemsize
    while count % elements:
        elements //= 2
    return elements


def axes(config: Config, **names: str) -> dict[str, int]:
    """Macros from a config: `BLOCK_M="block_m"` becomes BLOCK_M with the config's value."""
    return {macro: int(config[axis]) for macro, axis in names.items()}


def cache_dir() -> Path:
    """Where compiled kernels are kept: $ROOFTUNE_CACHE_DIR, else rooftune/cuda in the user's cache folder.

    Raises:
        Unavailable: the folder cannot be made.
    """
    chosen = os.environ.get("ROOFTUNE_CACHE_DIR")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rooftune"
    folder = base / "cuda"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be made ({error.strerror}); set ROOFTUNE_CACHE_DIR") from error
    return folder


def put(path: Path, data: bytes) -> None:
    """Write a whole file or none: workers share the folder."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    Path(name).replace(path)


def pointer(tensor: Any) -> int:
    """Address of a tensor's data. Raises UsageError if a kernel could not read it as it does."""
    address = int(tensor.data_ptr())
    if address % ALIGNMENT or not tensor.is_contiguous():
        raise UsageError(f"a tensor of shape {tuple(tensor.shape)} must be contiguous and aligned to {ALIGNMENT} bytes")
    return address


def first_errors(log: str) -> str:
    """The first messages of a compiler, on one line."""
    errors = [line.strip() for line in log.splitlines() if "error" in line.lower()]
    return "; ".join((errors or log.strip().splitlines())[:3])


def bytes_in(problem: Problem) -> int:
    """Bytes of an input element."""
    return PRECISIONS[problem.precision].bytes_in
