"""Compiled jobs, kept on disk for other processes: typing and compiling one takes 0.5 to 4 s, loading it 0.02.

Numba keeps functions too, but not ours: what a job calls is made by functions of ours from Python objects (sizes,
formats, emitters), and Numba's key of such an object differs in every process. Here a job is known by all that its
machine code depends on: the sources of all kernels, and of its own function and of every function in its closure the
name and the bytecode, with the closure's values; besides them the CPU, its features, the versions of Python, Numba and
LLVM and Numba's variables. Where a closure holds anything that is not described completely, or a function from another
folder, nothing is kept.

In a test only workers keep: it may have put other functions into our modules, which no key would see.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import pickle
import secrets
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np
from llvmlite import ir
from numba.core import compiler, registry, serialize, types
from numba.core.bytecode import FunctionIdentity
from numba.core.dispatcher import Dispatcher
from numba.extending import _Intrinsic

from rooftune.core import cache_folder
from rooftune.kernels.common.numba_cpu import features

KERNELS = Path(__file__).resolve().parents[1]
PLAIN = (bool, int, float, str, bytes, np.generic, ir.Type, types.Type, BuiltinFunctionType)  # repr says all
SMALL = 1 << 32  # a number from here on may be an address, which in another process is that of something else
LIMIT = 256 << 20  # bytes of all files; above it the oldest half goes


# Numba numbers functions from 1 in every process, and tells symbols apart by that: what another process made would be
# taken for ours of the same number. No two processes draw the same numbers here.
FunctionIdentity._unique_ids = itertools.count(secrets.randbits(60) + SMALL)


class _Unknown(Exception):
    """Something that no text describes completely."""


def told(value: Any, seen: frozenset[int] = frozenset()) -> str:
    """All that a compiled function may depend on, as text.

    Raises:
        _Unknown: it may depend on something else.
    """
    if isinstance(value, int) and abs(value) >= SMALL:
        raise _Unknown(value)
    if value is None or isinstance(value, PLAIN):
        return f"{type(value).__name__}:{value!r}"
    if isinstance(value, ModuleType):
        return value.__name__
    if id(value) in seen:
        return "again"
    seen |= {id(value)}
    if isinstance(value, tuple | list):
        return f"({','.join(told(each, seen) for each in value)})"
    if isinstance(value, set | frozenset):
        return f"{{{','.join(sorted(told(each, seen) for each in value))}}}"
    if isinstance(value, Mapping):
        return f"{{{','.join(told(k, seen) + '=' + told(v, seen) for k, v in value.items())}}}"
    if isinstance(value, Dispatcher):
        return f"jit{told(value.targetoptions, seen)}{told(value.py_func, seen)}"
    if isinstance(value, _Intrinsic):
        return f"intrinsic{told(value._defn, seen)}"
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, type) and Path(sys.modules[value.__module__].__file__ or "").is_relative_to(KERNELS):
        return f"{value.__module__}.{value.__qualname__}"
    if is_dataclass(value):
        return f"{type(value).__qualname__}{told([getattr(value, f.name) for f in fields(value)], seen)}"
    if wrapped := getattr(value, "__wrapped__", None):  # of functools.cache, or a job
        return told(wrapped, seen)
    raise _Unknown(type(value))


def _function(function: FunctionType, seen: frozenset[int]) -> str:
    code = function.__code__
    if not Path(code.co_filename).resolve().is_relative_to(KERNELS):
        raise _Unknown(code.co_filename)
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError as error:  # not filled yet
        raise _Unknown(function.__qualname__) from error
    given = [function.__defaults__, function.__kwdefaults__]
    name = f"{function.__module__}.{function.__qualname__}:{code.co_firstlineno}"
    return f"{name}:{hashlib.sha256(code.co_code).hexdigest()}{told([*cells, *given], seen)}"


@cache
def _sources() -> str:
    """Digest of every source that a kernel's code may come from."""
    digest = hashlib.sha256()
    for path in [Path(cache_folder.__code__.co_filename), *sorted(KERNELS.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _around() -> str:
    """What is the same for all jobs of a process."""
    chosen = sorted(v for v in os.environ.items() if v[0].startswith("NUMBA_") and v[0] != "NUMBA_NUM_THREADS")
    codegen = registry.cpu_target.target_context.codegen()
    return repr(
        (sys.version, numba.__version__, llvmlite.__version__, codegen.magic_tuple(), sorted(features()), chosen)
    )


class Kept:
    """The cache of one job, as Numba's C functions use theirs."""

    def __init__(self, key: str) -> None:
        self.path = cache_folder("numba") / f"{hashlib.sha256(key.encode()).hexdigest()}.job"

    def load_overload(self, _: Any, target: Any) -> Any:
        """The compiled function, or None: not kept, or not whole."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return None
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)
        target.refresh()
        return compiler.CompileResult._rebuild(target, *pickle.loads(body))

    def save_overload(self, _: Any, made: Any) -> None:
        """Keep it, unless its code holds addresses of this process, or there is no room to write."""
        if made.library.has_dynamic_globals or made.lifted:
            return
        body = serialize.dumps(made._reduce())
        part = self.path.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):  # a full disk, a folder that may not be written to: the job is there anyway
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(hashlib.sha256(body).digest() + body)
            part.replace(self.path)
            _make_room(self.path.parent)


def _make_room(place: Path) -> None:
    """Remove the oldest files, if there are too many bytes."""
    found = sorted((s.st_mtime, s.st_size, path) for path in place.iterdir() if (s := path.stat()))
    total = sum(size for _, size, _ in found)
    if total > LIMIT:
        for _, size, path in found:
            path.unlink(missing_ok=True)
            total -= size
            if total <= LIMIT // 2:
                break


def of(function: Any) -> Kept | None:
    """Where a job is kept; None if it is not."""
    if "PYTEST_CURRENT_TEST" in os.environ and os.environ.get("ROOFTUNE_WORKER") != "1":
        return None
    try:
        return Kept("\n".join((_sources(), _around(), told(function))))
    except (_Unknown, RuntimeError):  # a user without a home folder
        return None
