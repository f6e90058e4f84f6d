"""Jobs: Numba kernels of one task each, and the one parallel loop that runs the tasks of all of them.

Numba makes a function of its own of every `prange`: 0.7 of the 1.0 s that it took to compile a softmax, 2.2 of
the 3.2 s of a product. Here the loop is compiled once (and kept on disk); kernels are plain C functions that it
calls by their addresses. A tuner compiles some hundred kernels, so this is most of what a search takes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba
from llvmlite import ir
from numba import prange
from numba.core import types
from numba.core.types.containers import Tuple
from numba.extending import intrinsic

WORD = 8  # bytes of an argument in memory
KINDS = {"int64": ("q", ir.IntType(64)), "float32": ("f4x", ir.FloatType())}
OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}

Job = Any  # numba's C function of (address of the arguments, task)


def job(function: Callable[[Any, Any], None]) -> Job:
    """Compile function(arguments, task) now: `arguments` is an address that `arguments_of` reads."""
    return numba.cfunc("void(int64, int64)", **OPTIONS)(function)


@cache
def arguments_of(*kinds: str) -> Any:
    """A Numba function from the address that a job gets to the arguments of these types ("int64", "float32")."""
    result = Tuple([getattr(types, kind) for kind in kinds])

    @intrinsic
    def load(context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
            places = (builder.add(values[0], ir.Constant(ir.IntType(64), WORD * i)) for i in range(len(kinds)))
            pointers = [builder.inttoptr(p, KINDS[k][1].as_pointer()) for p, k in zip(places, kinds, strict=True)]
            loaded = [builder.load(p, typ=KINDS[k][1]) for p, k in zip(pointers, kinds, strict=True)]
            return context.make_tuple(builder, result, loaded)

        return result(types.int64), generate

    return load


@intrinsic
def _call(context: Any, function: Any, arguments: Any, task: Any) -> Any:
    """Call the C function void(int64, int64) at an address."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [word, word])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


_step = arguments_of("int64", "int64")


def _run(steps: Any, count: Any, arguments: Any) -> None:
    """Each step is the address of a job and the number of its tasks; the next begins when all are done."""
    for number in range(count):
        function, tasks = _step(steps + 16 * number)
        for task in prange(tasks):
            _call(function, arguments, task)


@cache
def _loop() -> Any:
    make = numba.njit("void(int64, int64, int64)", parallel=True, nogil=True, cache=True, **OPTIONS)
    try:
        return make(_run)
    except RuntimeError as error:  # no folder that may be written to: 0.7 s a process
        if "cannot cache" not in str(error):
            raise
        return numba.njit("void(int64, int64, int64)", parallel=True, nogil=True, **OPTIONS)(_run)


def parallel(kinds: Sequence[str], *steps: tuple[Job, int]) -> Callable[..., None]:
    """A function of arguments of these types that runs jobs one after another, each over so many tasks in parallel.

    Several threads may call it at once, if the jobs' own memory allows it.
    """
    pack_into = struct.Struct("=" + "".join(KINDS[kind][0] for kind in kinds)).pack_into
    loop, count = _loop(), len(steps)
    table = (ctypes.c_int64 * (2 * count))(*(word for made, tasks in steps for word in (made.address, tasks)))
    place = ctypes.addressof(table)
    spare: list[tuple[Any, int]] = []  # memory for the arguments: making it anew would take 0.3 us of each call

    def call(*arguments: Any) -> None:
        try:
            memory, address = spare.pop()
        except IndexError:  # the first call, or one beside another
            memory = (ctypes.c_int64 * len(kinds))()
            address = ctypes.addressof(memory)
        pack_into(memory, 0, *arguments)
        loop(place, count, address)
        spare.append((memory, address))

    call.keeps = steps, table  # type: ignore[attr-defined]  # their addresses are in use
    return call
