"""Jobs: Numba kernels of one task each, and the one parallel loop that runs the tasks of all of them.

Numba makes a function of its own of every `prange`: 0.7 of the 1.0 s that it took to compile a softmax, 2.2 of
the 3.2 s of a product. Here the loop is compiled once (and kept on disk); kernels are plain C functions that it
calls by their addresses. A tuner compiles some hundred kernels, so this is most of what a search takes.

Tasks belong to slots, one for each thread: neighbouring tasks to the same slot, the same ones in every call, so what
they read is still in the cache of their core. A slot that is done takes over what others have not begun: where a core
is slower (an efficient one, one that does something else), or tasks differ in work, the others do not wait for it.
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
from numba.core import sigutils, types
from numba.core.ccallback import CFunc
from numba.core.types.containers import Tuple
from numba.extending import intrinsic

from rooftune.kernels.common import numba_kept
from rooftune.kernels.common.numba import LINE, threads

WORD = 8  # bytes of an argument in memory
KINDS = {"int64": ("q", ir.IntType(64)), "float32": ("f4x", ir.FloatType())}
OPTIONS: dict[str, Any] = {"error_model": "numpy", "boundscheck": False}
SIGNATURE = "void(int64, int64, int64, int64)"  # of the loop

Job = Any  # numba's C function of (address of the arguments, task, slot)


def slots(tasks: int) -> int:
    """How many slots so many tasks have: what a job's scratch memory is made for."""
    return min(threads(), tasks)


def job(function: Callable[[Any, Any, Any], None]) -> Job:
    """Compile function(arguments, task, slot) now: `arguments` is an address that `arguments_of` reads.

    No two tasks of a slot run at once: scratch memory is a slot's.
    """
    made: Any = CFunc(function, sigutils.normalize_signature("void(int64, int64, int64)"), {}, OPTIONS)
    if (kept := numba_kept.of(function)) is not None:
        made._cache = kept
    made.compile()
    return made


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
def call(context: Any, function: Any, arguments: Any, task: Any, slot: Any) -> Any:
    """Call the C function void(int64, int64, int64) at an address: a job's, of a job's arguments."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def write(context: Any, address: Any, value: Any) -> Any:
    """Write a word."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        builder.store(values[1], builder.inttoptr(values[0], ir.IntType(64).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _take(context: Any, address: Any) -> Any:
    """The next task of a counter, which no other thread gets; or one past its end."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        word = ir.IntType(64)
        place = builder.inttoptr(values[0], word.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(word, 1), "monotonic")

    return types.int64(types.int64), generate


@intrinsic
def _peek(context: Any, address: Any) -> Any:
    """What `_take` would return, were no other thread faster; a read costs less than a counter moved between cores."""

    def generate(context: Any, builder: Any, signature: Any, values: Sequence[Any]) -> Any:
        place = builder.inttoptr(values[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(place, "monotonic", WORD, typ=ir.IntType(64))

    return types.int64(types.int64), generate


_step, _frame = (arguments_of(*["int64"] * count) for count in (3, 4))


@numba.njit(**OPTIONS)
def _work(frame: Any, slot: Any) -> None:
    """A slot's own tasks, then what is left of the next slot's, and so on."""
    function, tasks, slots, arguments = _frame(frame)
    for turn in range(slots):
        owner = (slot + turn) % slots
        counter, stop = frame + LINE * (1 + owner), (owner + 1) * tasks // slots
        while _peek(counter) < stop:
            task = _take(counter)
            if task < stop:
                call(function, arguments, task, slot)


def _run(steps: Any, count: Any, arguments: Any, frame: Any) -> None:
    """Each step is the address of a job, the number of its tasks and of its slots; the next begins when all are done.

    The frame is all that the parallel loop is given, for each value takes it time: what `_work` needs, then counters.
    """
    for number in range(count):
        function, tasks, slots = _step(steps + 3 * WORD * number)
        write(frame, function)
        write(frame + WORD, tasks)
        write(frame + 2 * WORD, slots)
        write(frame + 3 * WORD, arguments)
        for slot in range(slots):
            write(frame + LINE * (1 + slot), slot * tasks // slots)
        if slots == 1:
            _work(frame, 0)
        else:
            for slot in prange(slots):
                _work(frame, slot)


@cache
def _loop() -> Any:
    make = numba.njit(SIGNATURE, parallel=True, nogil=True, cache=True, **OPTIONS)
    try:
        return make(_run)
    except RuntimeError as error:  # no folder that may be written to: 0.7 s a process
        if "cannot cache" not in str(error):
            raise
        return numba.njit(SIGNATURE, parallel=True, nogil=True, **OPTIONS)(_run)


def parallel(kinds: Sequence[str], *steps: tuple[Job, int]) -> Callable[..., None]:
    """A function of arguments of these types that runs jobs one after another, each over so many tasks in parallel.

    Several threads may call it at once, if the jobs' own memory allows it.
    """
    pack_into = struct.Struct("=" + "".join(KINDS[kind][0] for kind in kinds)).pack_into
    loop, count, lines = _loop(), len(steps), threads() + 2  # of a frame: what `_work` needs, counters, alignment
    words = (word for made, tasks in steps for word in (made.address, tasks, slots(tasks)))
    table = (ctypes.c_int64 * (3 * count))(*words)
    place = ctypes.addressof(table)
    spare: list[tuple[Any, int, int]] = []  # memory of a call: making it anew would take 0.3 us of each

    def call(*arguments: Any) -> None:
        try:
            memory, address, frame = spare.pop()
        except IndexError:  # the first call, or one beside another
            memory = ctypes.create_string_buffer(len(kinds) * WORD + lines * LINE)
            address = ctypes.addressof(memory)
            frame = -(-(address + len(kinds) * WORD) // LINE) * LINE
        pack_into(memory, 0, *arguments)
        loop(place, count, address, frame)
        spare.append((memory, address, frame))

    call.keeps = steps, table  # type: ignore[attr-defined]  # their addresses are in use
    return call
