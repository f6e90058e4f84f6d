"""Jobs and the one loop that runs them: order of steps, every task once, slots that help each other, typed arguments, a
folder without writing."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

numba = pytest.importorskip("numba")

from rooftune.kernels.common import numba_parallel  # noqa: E402
from rooftune.kernels.common.numba_parallel import arguments_of, job, parallel  # noqa: E402

KINDS = ("int64", "int64", "float32", "int64")


@pytest.fixture
def all_threads() -> Iterator[int]:
    """How many threads numba has, all of them in use: another test of this process may have left fewer."""
    before, most = numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(most)
    yield most
    numba.set_num_threads(before)


@pytest.fixture(scope="module")
def steps() -> tuple[Any, Any]:
    """(x, out, factor, n): x[i] += 1 for each task i; then out[0] = n * factor * sum of x."""
    read, write, load = _memory()

    @job
    def count(given, task, _):  # type: ignore[no-untyped-def]
        x, _, _, _ = load(given)
        write(x + 4 * task, read(x + 4 * task) + numba.float32(1.0))

    @job
    def add(given, task, _):  # type: ignore[no-untyped-def]
        x, out, factor, n = load(given)
        total = numba.float32(0.0)
        for i in range(n):
            total += read(x + 4 * i)
        write(out + 4 * task, factor * total)

    return count, add


def _memory() -> tuple[Any, Any, Any]:
    from numba.core import types

    from rooftune.kernels.common.numba import F32, intrinsic

    read = intrinsic([types.int64], lambda e, place: e.load_raw(place, F32, 4), types.float32)
    write = intrinsic([types.int64, types.float32], lambda e, place, value: e.store_raw(value, place, 4))
    return read, write, arguments_of(*KINDS)


def test_each_task_runs_once_and_steps_follow_one_another(steps: tuple[Any, Any]) -> None:
    count, add = steps
    x, out = torch.zeros(1000), torch.zeros(3)
    run = parallel(KINDS, (count, 1000), (add, 2))
    for calls in (1, 2, 3):
        run(x.data_ptr(), out.data_ptr(), 0.5, 1000)
        assert x.eq(calls).all()
        assert out.tolist() == [500.0 * calls, 500.0 * calls, 0.0]


def test_a_slot_that_is_done_takes_over_what_others_have_not_begun(all_threads: int) -> None:
    """Task 0 ends when all others are done, or after two seconds: those of its slot have to run on another."""
    if all_threads < 2:
        pytest.skip("one thread: nobody else could take tasks over")
    read, write, load = _memory()
    sleep = ctypes.CDLL(None).usleep
    sleep.argtypes, sleep.restype = [ctypes.c_uint32], ctypes.c_int32

    @job
    def wait(given, task, slot):  # type: ignore[no-untyped-def]
        done, slots, _, count = load(given)
        one = numba.float32(1.0)
        if read(slots + 64 * slot) > 0:
            write(slots, numba.float32(-9.0))  # two tasks of a slot at once
        write(slots + 64 * slot, one)
        turns, others = 0, numba.float32(0.0)
        while task == 0 and turns < 2000 and others < count - 1:
            sleep(1000)
            turns += 1
            others = numba.float32(0.0)
            for i in range(1, count):
                others += read(done + 4 * i)
        write(done + 4 * task, others if task == 0 else one)
        write(slots + 64 * slot, numba.float32(0.0))

    done, slots = torch.zeros(12), torch.zeros(16 * all_threads)
    parallel(KINDS, (wait, 12))(done.data_ptr(), slots.data_ptr(), 0.0, 12)
    assert done.tolist() == [11.0, *[1.0] * 11]
    assert slots.eq(0).all()


def test_no_task_is_no_call(steps: tuple[Any, Any]) -> None:
    x, out = torch.zeros(4), torch.zeros(1)
    parallel(KINDS, (steps[0], 0))(x.data_ptr(), out.data_ptr(), 1.0, 4)
    assert x.eq(0).all()


def test_calls_beside_each_other_keep_their_own_arguments(steps: tuple[Any, Any]) -> None:
    run = parallel(KINDS, (steps[0], 50), (steps[1], 1))
    x, out = torch.zeros(50), torch.zeros(1)
    run(x.data_ptr(), out.data_ptr(), 1.0, 50)  # says which threads numba took
    if numba.threading_layer() == "workqueue":
        pytest.skip("numba's own pool of threads takes one caller at a time; there is no OpenMP here")
    results = [(torch.zeros(50), torch.zeros(1)) for _ in range(4)]

    def many(x: torch.Tensor, out: torch.Tensor) -> None:
        for _ in range(200):
            run(x.data_ptr(), out.data_ptr(), 1.0, 50)

    threads = [threading.Thread(target=many, args=pair) for pair in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(x.eq(200).all() and out.item() == 50 * 200 for x, out in results)


def test_a_wrong_number_of_arguments_is_refused(steps: tuple[Any, Any]) -> None:
    import struct

    with pytest.raises(struct.error):
        parallel(KINDS, (steps[0], 1))(0, 0, 1.0)


def test_where_nothing_may_be_written_the_loop_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def njit(*_: Any, cache: bool = False, **__: Any) -> Callable[[Any], Any]:
        def make(function: Any) -> Any:
            if cache:
                raise RuntimeError("cannot cache function '_run': no locator available for file")
            made.append(cache)
            return function

        return make

    monkeypatch.setattr(numba_parallel.numba, "njit", njit)
    numba_parallel._loop.cache_clear()
    try:
        assert numba_parallel._loop() is numba_parallel._run
    finally:
        numba_parallel._loop.cache_clear()
    assert made == [False]
