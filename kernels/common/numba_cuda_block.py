"""A CUDA thread block on a CPU: OS threads of which exactly one runs, handing over at barriers.

Scheduling only; what kernels call on top of it is in `numba_cuda_sim.py`. About 1 ms per barrier of 128
threads. Numba's own simulator polls instead (5 ms) and has no warp operations.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

WARP = 32


class _Abandoned(BaseException):
    """Unwinds the threads of a block in which another one failed."""


class _Thread:
    """One CUDA thread of the running block, carried by a pooled OS thread."""

    def __init__(self, worker: _Worker, x: int) -> None:
        self.worker = worker
        self.x = x
        self.shared_calls = 0
        self.copies: list[tuple[Any, int, Any, int, int, bool]] = []  # issued, not yet in a group
        self.groups: deque[list[tuple[Any, int, Any, int, int, bool]]] = deque()


class _Worker(threading.Thread):
    """A pooled OS thread: waits for its turn, runs a CUDA thread to its end, waits again."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.turn = threading.Lock()
        self.turn.acquire()
        self.task: Callable[[], None] | None = None
        self.start()

    def run(self) -> None:
        np.seterr(all="ignore")  # NaN and infinity are data here, as on the device
        while True:
            self.turn.acquire()
            assert self.task is not None
            self.task()


_pool: list[_Worker] = []
_block: _Block | None = None


class _Block:
    """One thread block: who may run, who waits where, and its shared memory."""

    def __init__(self, index: int, blocks: int, threads: int, reverse: bool) -> None:
        while len(_pool) < threads:
            _pool.append(_Worker())
        self.index, self.blocks, self.size = index, blocks, threads
        self.threads = [_Thread(_pool[x], x) for x in range(threads)]
        self.ready = deque(reversed(self.threads) if reverse else self.threads)
        self.now = self.threads[0]
        self.waiting: dict[int, list[_Thread]] = {}  # -1 is the block, others are warps
        self.given: dict[int, dict[int, Any]] = {}
        self.taken: dict[int, Any] = {}
        self.shared: list[Any] = []
        self.left = threads
        self.error: BaseException | None = None
        self.done = threading.Lock()

    def run(self, kernel: Callable[..., None], args: Sequence[Any]) -> None:
        def task() -> None:
            me = self.now
            try:
                if self.error is None:
                    kernel(*args)
            except _Abandoned:
                pass
            except BaseException as error:  # noqa: BLE001 - raised again by run(), in the launching thread
                error.add_note(f"in thread {me.x} of block {self.index}")
                self.fail(error)
            self.left -= 1
            self.hand_over()

        for thread in self.threads:
            thread.worker.task = task
        self.done.acquire()
        self.hand_over()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def fail(self, error: BaseException) -> None:
        """Keep the first error and let every waiting thread unwind."""
        self.error = self.error or error
        for group in self.waiting.values():
            self.ready.extend(group)
            group.clear()

    def hand_over(self) -> None:
        """Let the next thread run; called by the one that stops running."""
        if not self.ready and self.left:
            where = {("block" if k < 0 else f"warp {k}"): len(v) for k, v in self.waiting.items() if v}
            self.fail(RuntimeError(f"block {self.index}: threads wait for others that never come: {where}"))
        if not self.left:
            self.done.release()
            return
        self.now = self.ready.popleft()
        self.now.worker.turn.release()

    def meet(self, key: int, size: int, value: Any, combine: Callable[[dict[int, Any]], Any] | None) -> Any:
        """Wait until `size` threads came; returns what the last one made of all their values."""
        me = self.now
        given = self.given.setdefault(key, {})
        given[me.x % WARP if key >= 0 else me.x] = value
        group = self.waiting.setdefault(key, [])
        if len(group) + 1 == size:
            self.taken[key] = combine(given) if combine else None
            self.given[key] = {}
            self.ready.extend(group)
            group.clear()
        else:
            group.append(me)
            self.hand_over()
            me.worker.turn.acquire()
            if self.error is not None:
                raise _Abandoned
        return self.taken[key]


_launches = itertools.count()


def launch(kernel: Callable[..., None], blocks: int, threads: int, args: Sequence[Any]) -> None:
    """Run a kernel function on flat numpy arrays, one block after the other.

    Raises:
        RuntimeError: a barrier that not all threads reach. Whatever the kernel raises passes through.
    """
    global _block
    if threads % WARP or not 0 < threads <= 1024:
        raise ValueError(f"a block has whole warps and at most 1024 threads, not {threads}")
    reverse = next(_launches) % 2 == 1
    for index in range(blocks):
        _block = _Block(index, blocks, threads, reverse)
        try:
            _block.run(kernel, args)
        finally:
            _block = None


def running() -> _Block:
    if _block is None:
        raise RuntimeError("called outside a kernel")
    return _block


def warp(value: Any, combine: Callable[[dict[int, Any]], Any]) -> Any:
    block = running()
    return block.meet(block.now.x // WARP, WARP, value, combine)


def lane_number() -> int:
    return running().now.x % WARP


# --- the names of `numba.cuda` that kernels use ------------------------------------------------------


def _shared_array(shape: int, dtype: Any, alignment: int | None = None) -> Any:
    """Shared array number i of a thread is shared array number i of the block; filled with NaNs."""
    block = running()
    number = block.now.shared_calls
    block.now.shared_calls += 1
    if number == len(block.shared):
        raw = np.full(shape * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        block.shared.append(raw.view(dtype))
    return block.shared[number]


class _Index:
    def __init__(self, read: Callable[[_Block], int]) -> None:
        self._read = read

    @property
    def x(self) -> int:
        return self._read(running())


cuda = SimpleNamespace(
    threadIdx=_Index(lambda block: block.now.x),
    blockIdx=_Index(lambda block: block.index),
    shared=SimpleNamespace(array=_shared_array),
    selp=lambda condition, a, b: a if condition else b,
    local=SimpleNamespace(array=lambda shape, dtype: [None] * shape),
    syncthreads=lambda: running().meet(-1, running().size, None, None),
)
