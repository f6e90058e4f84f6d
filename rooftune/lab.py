"""The Lab: the parent's side. It owns one worker process per competitor and mode, and what they may do.

A request has a deadline. A worker that crashes, hangs, or answers nonsense is replaced and becomes a
`Reply` with a status and a reason; the others go on. The parent imports no GPU library.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import rooftune
from rooftune import locks, nursery, registry
from rooftune.core import Config, Problem, Status, Unavailable, UsageError
from rooftune.registry import Impl
from rooftune.spaces import NoConfig

START_FAILURES = 3  # a worker that cannot start three times in a row stops the run
LOAD_S = 180.0  # start, or import a competitor and list its configs; 60 s were too few beside six busy processes
PREPARE_S = 240.0  # build and check; inductor and LLVM need tens of seconds on a loaded machine
TERM_S = 2.0  # from SIGTERM to SIGKILL

BEFORE = ("torch", "numba")  # imported before workers are forked (`nursery`): torch for all, others who require them


class WorkerDied(Exception):
    """The worker is gone or cannot be understood; `status` says how."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class OutOfTime(Unavailable):
    """The plan's end came before an answer: nobody's fault, so it is no outcome of the candidate."""


@dataclass
class Reply:
    """What became of a request: a status of the candidate, a reason, and the data."""

    status: Status
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.status == Status.OK


class Worker:
    """One child process with its own session (process group), pipes and log file.

    `anew`: it is executed, not forked from a process that has its imports.
    """

    def __init__(self, impl: Impl | None, mode: str, device: str, threads: int, anew: bool = False) -> None:
        self.name = f"{impl.key if impl else 'probe'} [{mode}]"
        self.log: IO[bytes] = tempfile.TemporaryFile(prefix="rooftune-worker-")  # noqa: SIM115 - lives as long as we
        request_read, self._request = os.pipe()
        self._reply, reply_write = os.pipe()
        home = str((impl and impl.home) or Path(rooftune.__file__).parent.parent)
        own = impl.env.get(mode, {}) if impl else {}
        env = {**os.environ, **_thread_env(threads), **registry.environment(mode), **own}
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
        device = _see_only(device, env)
        env["PYTHONFAULTHANDLER"] = "1"  # a crash leaves its Python line in the log
        needed = {"torch", *(impl.requires if impl else ())}
        imports = None if anew or device != "cpu" else [name for name in BEFORE if name in needed]
        try:
            self.process = nursery.start((mode, device), env, (request_read, reply_write), self.log.fileno(), imports)
        finally:
            os.close(request_read)
            os.close(reply_write)
        self._buffer = b""

    def request(self, verb: str, deadline_s: float, **arguments: Any) -> Any:
        """Ask and wait.

        Raises:
            WorkerDied: crashed, killed, past the deadline, or its answer is not one.
            UsageError: the worker says that the request itself is bad.
        """
        nonce = secrets.token_hex(8)
        message = json.dumps({"nonce": nonce, "verb": verb, "args": arguments}) + "\n"
        try:
            os.write(self._request, message.encode())
        except BrokenPipeError:
            raise self._death() from None
        line = self._read_line(time.monotonic() + deadline_s, deadline_s)
        try:
            reply = json.loads(line)
            if not isinstance(reply, dict) or reply.get("nonce") != nonce:
                raise ValueError
        except ValueError:
            self.kill()
            text = line[:80].decode(errors="replace")
            raise WorkerDied(Status.FAILED_CRASH, f"protocol: answered '{text}'") from None
        if "error" in reply:
            if reply.get("known"):
                raise UsageError(reply["error"])
            raise WorkerDied(Status.FAILED_CRASH, reply["error"])
        return reply["value"]

    def _read_line(self, until: float, deadline_s: float) -> bytes:
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            ready = select.select([self._reply], [], [], max(0.0, left))[0]
            if not ready:
                self.kill()
                raise WorkerDied(Status.TIMEOUT, f"no answer within {deadline_s:.0f} s; killed")
            chunk = os.read(self._reply, 1 << 16)
            if not chunk:
                raise self._death()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _death(self) -> WorkerDied:
        """Say how the process ended, with the end of what it printed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TERM_S)
        code = self.process.returncode
        self.kill()
        how = "ended" if code is None else f"exit code {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        tail = self.tail()
        return WorkerDied(Status.FAILED_CRASH, f"crashed: {how}" + (f"; {tail}" if tail else ""))

    def tail(self, size: int = 16384) -> str:
        """The last telling line of the worker's output: what an emulation said, else how it crashed, else the last."""
        self.log.seek(0, os.SEEK_END)
        self.log.seek(max(0, self.log.tell() - size))
        lines = [x.strip() for x in self.log.read().decode(errors="replace").splitlines() if x.strip()]
        emulated = [x for x in lines if x.startswith("rooftune emulation: ")]  # kernels/common/cuda/fibers.hpp
        fatal = [x for x in lines if x.startswith(("Fatal Python error", "LLVM ERROR", "terminate called"))]
        return (emulated or fatal or lines or [""])[-1][:200]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """SIGTERM to the group, SIGKILL two seconds later, and wait: no orphan, no zombie."""
        for signum, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, 15.0)):
            self.process.signal_group(signum)
            try:
                self.process.wait(wait_s)
            except subprocess.TimeoutExpired:
                continue
            self.process.signal_group(signal.SIGKILL)  # children it left in its group
            break
        self.process.close()
        for fd in (self._request, self._reply):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._request = self._reply = -1

    def hang_up(self) -> None:
        """Close its pipe: an idle worker ends."""
        if self._request >= 0:
            with contextlib.suppress(OSError):
                os.close(self._request)
            self._request = -1

    def close(self) -> None:
        """End an idle worker; kill it if it does not listen."""
        self.hang_up()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(TERM_S)
        self.kill()
        self.log.close()


def _see_only(device: str, env: dict[str, str]) -> str:
    """Hide every GPU but the worker's own, whatever its language calls "current". Returns torch's name for it."""
    kind, _, index = device.partition(":")
    if kind == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = env["HIP_VISIBLE_DEVICES"] = ""
        return device
    visible = [x for x in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if index and (visible or int(index)):
        env["CUDA_VISIBLE_DEVICES"] = visible[int(index)] if visible else index
    return f"{kind}:0" if index else device


def _thread_env(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "ROOFTUNE_THREADS")
    return {name: str(threads) for name in names} | {"TOKENIZERS_PARALLELISM": "false"}


class Lab:
    """Workers for one device. Use as a context manager: leaving it ends every child.

    `device` is torch's name for it (`cpu`, `cuda:0`; ROCm is called cuda there), `kind` is ours. A plan with
    an end sets `patience_s`, the longest that any one request may take, and `until`, the (monotonic) moment
    after which a request raises `OutOfTime`.
    """

    def __init__(self, device: str = "cpu", threads: int = 1, kind: str = "") -> None:
        self.device, self.threads = device, threads
        self.kind = kind or device.partition(":")[0]
        self._workers: dict[tuple[str, str], Worker] = {}
        self._starting: set[Worker] = set()
        self._retired: set[tuple[str, str]] = set()  # whose next worker is executed
        self._spaces: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.patience_s = math.inf
        self.until = math.inf
        self._start_failures = 0
        self._lock_path = locks.path_of(device)

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all at once: one after the other, those of a campaign beside a GPU took 20 s and more."""
        workers = list(self._workers.values())
        self._workers.clear()
        for worker in workers:
            worker.hang_up()
        if workers:
            with ThreadPoolExecutor(len(workers)) as pool:
                list(pool.map(Worker.close, workers))

    def halt(self) -> None:
        """Nobody waits for an answer any more: who does hears at once that the worker is gone, and asks no other."""
        self.until = -math.inf
        for worker in [*self._workers.values(), *self._starting]:
            if worker.alive:
                worker.process.signal_group(signal.SIGKILL)

    def worker(self, impl: Impl | None, mode: str = "native") -> Worker:
        """The live worker of a competitor, started if need be.

        Raises:
            Unavailable: workers do not start at all here (three times in a row).
            OutOfTime: the plan ended.
        """
        if time.monotonic() >= self.until:
            raise OutOfTime("the plan's time is over")
        key = _key(impl, mode)
        found = self._workers.get(key)
        if found is not None and found.alive:
            return found
        device = self.device if mode == "native" else "cpu"
        while True:
            started = Worker(impl, mode, device, self.threads if mode == "native" else 1, key in self._retired)
            self._starting.add(started)
            try:
                self._request(started, "hello", LOAD_S)
            except OutOfTime:
                started.close()
                raise
            except WorkerDied as death:
                self._start_failures += 1
                if self._start_failures >= START_FAILURES:
                    raise Unavailable(f"worker processes do not start: {death}") from death
                continue
            finally:
                self._starting.discard(started)
            self._start_failures = 0
            self._workers[key] = started
            return started

    def retire(self, impl: Impl | None, mode: str = "native") -> None:
        """End a competitor's worker; the next request starts a fresh one, which shares nothing with this one."""
        self._retired.add(_key(impl, mode))
        worker = self._workers.pop(_key(impl, mode), None)
        if worker is not None:
            worker.close()

    def _request(self, worker: Worker, verb: str, deadline_s: float, **arguments: Any) -> Any:
        """A worker's answer within its deadline and the plan's; raises `OutOfTime` if the plan ended first."""
        allowed, left = min(deadline_s, self.patience_s), self.until - time.monotonic()
        if left <= 0:
            raise OutOfTime("the plan's time is over")
        try:
            return worker.request(verb, min(allowed, left), **arguments)
        except WorkerDied as death:
            if death.status == Status.TIMEOUT and left < allowed:
                raise OutOfTime("the plan's time ended during a request") from death
            raise

    def ask(self, impl: Impl, verb: str, deadline_s: float, mode: str = "native", **arguments: Any) -> Reply:
        """A request about a competitor; a dead worker becomes the reply's status."""
        name = impl.module if impl.module.startswith("file:") else impl.key
        try:
            data = self._request(self.worker(impl, mode), verb, deadline_s, impl=name, **arguments)
        except WorkerDied as death:
            self.retire(impl, mode)
            return Reply(death.status, str(death))
        return Reply(Status(data.pop("status", Status.OK)), data.pop("reason", "") or "", data)

    def space(self, impl: Impl, problem: Problem, mode: str = "native") -> dict[str, Any]:
        """`axes`, valid `configs`, `default`, `entrants` of a competitor on a problem.

        Raises:
            UsageError: the file does not load, or its space is none.
            NoConfig: no config is valid for the problem.
        """
        key = (*_key(impl, mode), impl.path, impl.source_hash, str(problem))
        if key not in self._spaces:  # 10,000 configs take seconds to list, and races, models and searches all ask
            reply = self.ask(impl, "space", LOAD_S, mode, problem=str(problem))
            if reply.status == Status.SKIPPED:
                raise NoConfig(reply.reason)
            if not reply.ok:
                raise UsageError(f"{impl.key}: {reply.reason}")
            self._spaces[key] = reply.data
        return dict(self._spaces[key])

    def prepare(
        self, impl: Impl, problem: Problem, config: Config, seed: int, thorough: bool = True, mode: str = "native"
    ) -> Reply:
        """Build and check a candidate. `data` has `handle` (native, if right), `error`, `build_s`, `check_s`."""
        return self.ask(
            impl, "prepare", PREPARE_S, mode, problem=str(problem), config=config, seed=seed, thorough=thorough
        )

    def time(self, impl: Impl, handle: int, seed: int, deadline_s: float = 60.0, **options: Any) -> Reply:
        """One round of samples; `data["samples_s"]` are seconds per call. Options as `clock.time_calls`."""
        worker = self._workers.get(_key(impl, "native"))
        if worker is None or not worker.alive:
            return Reply(Status.FAILED_CRASH, "its worker is gone")
        try:
            data = self._request(worker, "time", deadline_s, handle=handle, seed=seed, **options)
        except WorkerDied as death:
            self.retire(impl)
            return Reply(death.status, str(death))
        reply = Reply(Status(data.pop("status")), data.pop("reason"), data)
        samples = data.get("samples_s")
        if reply.ok and not (
            isinstance(samples, list)
            and samples
            and all(isinstance(s, float) and math.isfinite(s) and s > 0 for s in samples)
        ):
            return Reply(Status.FAILED_CRASH, f"protocol: samples are {str(samples)[:60]}")
        return reply

    def measure_energy(self, impl: Impl, handle: int, seed: int, deadline_s: float = 300.0, **how: Any) -> Reply:
        """Joules per call; `data["energy"]` is an `Energy` as it prints itself. `how`: as `metering.measure`."""
        try:
            data = self._request(self.worker(impl), "energy", deadline_s, handle=handle, seed=seed, **how)
        except WorkerDied as death:
            self.retire(impl)
            return Reply(death.status, str(death))
        return Reply(Status.OK, "", data)

    def release(self, impl: Impl, handle: int) -> None:
        """Free a prepared candidate; nothing happens if its worker is gone."""
        worker = self._workers.get(_key(impl, "native"))
        if worker is not None and worker.alive:
            with contextlib.suppress(WorkerDied):
                worker.request("release", 30.0, handle=handle)

    def call(self, function: str, deadline_s: float = 120.0, **arguments: Any) -> Any:
        """Run a function of rooftune (`rooftune.probe:ceilings`) in a worker that belongs to no competitor."""
        return self._request(self.worker(None), "call", deadline_s, function=function, **arguments)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the device for one round of timing; another rooftune on this machine waits meanwhile.

        Raises:
            OutOfTime: it is another's until after the plan's end.
        """
        with locks.held(self._lock_path, self.device, self.until) as mine:
            if not mine:
                raise OutOfTime("the plan's time ended while another run held the device")
            yield


def _key(impl: Impl | None, mode: str) -> tuple[str, str]:
    """Whose worker it is. What is timed has a process of its own; proofs of one language share one, because
    importing the language costs more than most of them."""
    if impl is None:
        return "", mode
    if impl.module.startswith("file:"):
        return impl.module, mode
    name = impl.language if mode != "native" and impl.language else impl.key
    return (f"{impl.home}:{name}" if impl.home else name), mode
