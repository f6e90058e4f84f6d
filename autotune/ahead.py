"""What a config's machine code tells before it costs device time: it does not launch, it spills, it is known already.

Where the device is a GPU and the competitor can be compiled without one, a config is compiled by a process on
the host's cores first. Neighbours of the best, and what a model expects most of, are compiled meanwhile by further
processes, while the device measures: a search often goes to one of them, and finds its binary in the compiler's
cache. On a CPU device there is nothing of the kind: a compiler beside a timing would disturb it.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rooftune.autotune.journal import Trial, canonical
from rooftune.core import Config, Problem, Status
from rooftune.device_cpu import cores
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl

COMPILE_S = 300.0  # deadline of one compilation; ptxas on a spilling attention kernel takes a minute
CORES_LEFT = 2  # for the process that times and its parent
MAX_WORKERS = 12  # each holds a compiler of some 300 MB
REGISTERS = 65536  # of a multiprocessor, from compute capability 3.7 on
# Bytes of shared memory a block may have (CUDA C++ Programming Guide, table of technical specifications).
SHARED = {"sm_80": 166912, "sm_86": 101376, "sm_89": 101376, "sm_90a": 232448, "sm_100a": 232448, "sm_120a": 101376}
ANEW = ("numba_cuda",)  # languages whose launches compile for themselves: waiting for a verdict is twice the time
LOOK_AHEAD = 24  # configs in the queue at most: those of an older proposal are not worth a core any more


class Ahead:
    """Compiles configs of one competitor on one problem. Use as a context manager: leaving ends its processes.

    Attributes:
        arch: what is compiled for; empty where nothing is, and `why` says so.
    """

    def __init__(
        self, lab: Lab, impl: Impl, problem: Problem, default: Config, make: Callable[[], Lab] = lambda: Lab("cpu", 1)
    ) -> None:
        self.impl, self.problem, self.default, self._make = impl, problem, default, make
        self.arch, self.why = architecture(lab, impl)
        self.found: dict[str, Reply] = {}
        self.binaries: dict[str, Config] = {}
        self._queue: queue.LifoQueue[Config] = queue.LifoQueue()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._own: Lab | None = None

    def __enter__(self) -> Ahead:
        if not self.arch:
            return self
        self._own = self._make()
        reply = self._compile(self._own, self.default)
        if not reply.ok:  # such as an architecture that the compiler's wrapper does not know
            self.arch, self.why = "", f"the default config does not compile for {self.arch}: {reply.reason}"
            self.__exit__()
            return self
        self._ended.clear()
        spare = min(MAX_WORKERS, cores() - CORES_LEFT)
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(max(0, spare))]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._threads = []
        if self._own is not None:
            self._own.close()
            self._own = None

    def judge(self, config: Config, trials: Mapping[str, Trial]) -> Trial | None:
        """The outcome that needs no device, or None: measure it.

        The default is always measured: it is what all others are compared with.
        """
        if not self.arch or config == self.default or self._own is None:
            return None
        key = canonical(config)
        with self._lock:
            reply = self.found.get(key)
        if reply is None and self.impl.language in ANEW:
            return None
        if reply is None:
            reply = self._compile(self._own, config)
        if not reply.ok:
            gone = reply.status in (Status.SKIPPED, Status.FAILED_COMPILE)
            return Trial(config, reply.status, f"for {self.arch}: {reply.reason}") if gone else None
        if why := _unfit(reply.data, self.arch):
            return Trial(config, Status.SKIPPED, why)
        if (binary := reply.data.get("binary")) and binary in self.binaries:
            twin = self.binaries[binary]
            known = trials.get(canonical(twin))
            if known is not None and twin != config:
                same = f"the same machine code as {canonical(twin)}"
                return replace(known, config=config, reason=known.reason or same, spent_s=0.0)
        if binary:
            self.binaries.setdefault(binary, config)
        return None

    def expect(self, configs: Iterable[Config]) -> None:
        """Compile the first of these that are not yet, in their order; what was expected before and not begun is
        dropped."""
        if not self._threads:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        new = (config for config in configs if canonical(config) not in self.found)
        for config in reversed(list(itertools.islice(new, LOOK_AHEAD))):
            self._queue.put(config)

    def _serve(self) -> None:
        """A thread with a compiling process of its own."""
        with self._make() as own:
            while not self._ended.is_set():
                try:
                    config = self._queue.get(timeout=0.2)
                except queue.Empty:
                    continue
                if canonical(config) not in self.found:
                    self._compile(own, config)

    def _compile(self, lab: Any, config: Config) -> Reply:
        reply: Reply = lab.ask(
            self.impl, "compile", COMPILE_S, "compile", problem=str(self.problem), config=config, arch=self.arch
        )
        with self._lock:
            self.found[canonical(config)] = reply
        return reply


def _unfit(found: Mapping[str, Any], arch: str) -> str:
    """Why code will not launch, or be slow for sure; nothing if it may be good."""
    if spilled := found.get("spill_bytes"):
        return f"spills {spilled} bytes of registers on {arch}"
    shared, limit = found.get("shared_bytes") or 0, SHARED.get(arch)
    if limit is not None and shared > limit:
        return f"needs {shared} bytes of shared memory, {arch} has {limit} for a block"
    block = (found.get("registers") or 0) * (found.get("threads") or 0)
    return f"needs {block} registers for a block, {arch} has {REGISTERS}" if block > REGISTERS else ""


def architecture(lab: Lab, impl: Impl) -> tuple[str, str]:
    """(what to compile for, why nothing is compiled)."""
    if lab.kind == "cpu":
        return "", "none; on a CPU a compiler beside a timing would disturb it, so configs are compiled in turn"
    if lab.kind != "cuda" or not impl.compiles:
        return "", f"none; {impl.key} cannot be compiled without its device"
    from rooftune import device

    index = lab.device.partition(":")[2]
    major = device.find(f"cuda:{index}" if index else "cuda").fingerprint().get("compute_capability")
    number = str(major or "").replace(".", "")
    if not number:
        return "", "none; the device's compute capability cannot be read"
    return f"sm_{number}" + ("a" if number in ("90", "100", "103", "120", "121") else ""), ""
