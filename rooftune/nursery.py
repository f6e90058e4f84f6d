"""Where the workers of a CPU come from: a process that has imported what they need, and forks.

Importing torch and Numba takes 4 to 8 s of a core, and a race of three starts four processes. Here they are imported
once for all workers of one environment; each is still a process of its own, which may crash, hang or lie. Only
imports are shared: no operator ran before the fork, so there are no thread pools that a fork would lose.

Forked siblings have the same addresses of libraries. So whoever wants processes that differ in all that processes may
differ in (`Lab.retire`, and with it `--launches`) gets one that was executed. So do workers beside a GPU: forking
there was not tried on hardware.

The parent asks over a socket; every child has a socket of its own, on which the nursery says its pid and how it
ended. A child is reaped when the parent closes that socket, so its pid is nobody else's before.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

NURSERIES = 4  # that are kept, one an environment; each holds some 300 MB, most of it shared with its children
LATE = ("ROOFTUNE_", "PYTEST_", "TMPDIR")  # beginnings of variables that no import depends on: a child has its own
REAPED_S = 2.0  # until a nursery has reaped a child
LENGTH = struct.Struct("!I")  # of a request
PR_SET_PDEATHSIG = 1  # prctl(2)

# "Die with the parent" means the parent *thread* (prctl(2), PR_SET_PDEATHSIG): a child that a pool's thread
# started would be killed when the pool ends, so one thread that lives as long as we do starts them all.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="rooftune-starter")


class Process(Protocol):
    """A worker's process, as `subprocess.Popen` has it, in a session (process group) of its own."""

    returncode: int | None

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def signal_group(self, signum: int) -> None:
        """Send a signal to the process and to what it started."""

    def close(self) -> None:
        """Forget it; only after it ended."""


class Executed(subprocess.Popen[bytes]):
    """A process that begins with nothing."""

    def signal_group(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    def close(self) -> None:
        pass


class Forked:
    """A process that a nursery forked, or will when it has imported what this one needs."""

    def __init__(self, voice: socket.socket) -> None:
        self.returncode: int | None = None
        self._voice, self._heard, self._pid = voice, b"", 0

    @property
    def pid(self) -> int:
        while not self._pid and self.returncode is None:
            self._listen(None)
        return self._pid

    def _listen(self, timeout: float | None) -> bool:
        """Take in what the nursery says; whether it said anything in time."""
        if self._voice.fileno() < 0 or not select.select([self._voice], [], [], timeout)[0]:
            return False
        with contextlib.suppress(ConnectionError):
            try:
                said = self._voice.recv(1 << 12, socket.MSG_DONTWAIT)
            except BlockingIOError:  # another thread heard it: at Ctrl-C the main one ends what others wait for
                return True
            if said:
                *lines, self._heard = (self._heard + said).split(b"\n")
                for line in lines:
                    word, _, number = line.decode().partition(" ")
                    if word == "pid":
                        self._pid = int(number)
                    else:
                        self.returncode = int(number)
                return True
        if self.returncode is None:
            self.returncode = -signal.SIGKILL  # the nursery is gone, and its children die with it
        return True

    def poll(self) -> int | None:
        while self.returncode is None and self._listen(0.0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if until is None else until - time.monotonic()
            if not self._listen(None if left is None else max(0.0, left)) and self.returncode is None:
                raise subprocess.TimeoutExpired("rooftune.worker", timeout or 0.0)
        return self.returncode

    def signal_group(self, signum: int) -> None:
        if self._voice.fileno() < 0:  # reaped: its pid may be another's
            return
        self.poll()
        if self._pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signum)
        elif self.returncode is None:  # not born yet, and not wanted any more
            self.close()
            self.returncode = -signum

    def close(self) -> None:
        if self._voice.fileno() >= 0:
            with contextlib.suppress(OSError):  # the nursery is gone
                self._voice.shutdown(socket.SHUT_WR)
                self._voice.settimeout(REAPED_S)
                while self._voice.recv(1 << 12):
                    pass
            self._voice.close()


class Nursery:
    """The parent's side of one nursery."""

    def __init__(self, env: Mapping[str, str], log: int) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-P", "-m", "rooftune.nursery", str(theirs.fileno()), str(os.getpid())]
            self.process = _execute(command, env, (theirs.fileno(),), log)
        self._lock = threading.Lock()

    def bear(self, request: Mapping[str, Any], fds: Sequence[int], log: int) -> Forked:
        """Ask for a child; returns at once."""
        ours, theirs = socket.socketpair()
        text = json.dumps(request).encode()
        with self._lock, theirs, contextlib.suppress(ConnectionError):  # a dead nursery: the child's end says so
            socket.send_fds(self._control, [LENGTH.pack(len(text))], [theirs.fileno(), log, *fds])
            self._control.sendall(text)
        return Forked(ours)

    def close(self) -> None:
        """It ends when its last child has."""
        self._control.close()


_nurseries: OrderedDict[tuple[Any, ...], Nursery] = OrderedDict()
_nurseries_lock = threading.Lock()


def start(
    arguments: Sequence[str], env: Mapping[str, str], fds: tuple[int, int], log: int, imports: Sequence[str] | None
) -> Process:
    """A worker (`rooftune.worker`) in a session of its own.

    Args:
        arguments: of `rooftune.worker`, between its two pipes and its parent.
        fds: its pipes for requests and replies.
        log: file descriptor of its output.
        imports: modules that are there when it begins; None if it is to be executed.
    """
    if imports is None or sys.platform != "linux":
        command = [sys.executable, "-P", "-m", "rooftune.worker", *map(str, fds), *arguments, str(os.getpid())]
        return _execute(command, env, fds, log)
    key = (sys.executable, *sorted((name, value) for name, value in env.items() if not name.startswith(LATE)))
    with _nurseries_lock:
        found = _nurseries.pop(key, None)
        if found is not None and found.process.poll() is not None:
            found.close()
            found = None
        _nurseries[key] = found = found or Nursery(env, log)
        if len(_nurseries) > NURSERIES:
            _nurseries.popitem(last=False)[1].close()
    request = {"arguments": list(arguments), "env": dict(env), "folder": os.getcwd(), "imports": list(imports)}
    return found.bear(request, fds, log)


def _execute(command: list[str], env: Mapping[str, str], fds: Sequence[int], log: int) -> Executed:
    def run() -> Executed:
        return Executed(
            command, env=env, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )

    return _STARTER.submit(run).result()


def die_with_parent(parent: int) -> None:
    """Even if it is killed with -9, or was before we could say so. In a container it may be process 1."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# --- the nursery's own side -----------------------------------------------------------------------------------------


class _Home:
    """The process that forks."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._events = selectors.DefaultSelector()
        self._children: dict[int, socket.socket] = {}  # pid -> where we say how it ended
        self._ended: set[int] = set()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        self._missing: set[str] = set()  # modules that raised: children import them themselves, and say why

    def run(self) -> None:
        """Serve until the parent hung up and no child is left."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._events.register(self._control, selectors.EVENT_READ)
        self._events.register(self._wake_read, selectors.EVENT_READ)
        while self._control.fileno() >= 0 or self._children:
            for key, _ in self._events.select():
                if key.fileobj is self._control:
                    self._request()
                elif key.fileobj == self._wake_read:
                    with contextlib.suppress(BlockingIOError):
                        os.read(self._wake_read, 1 << 12)
                elif key.data in self._children:
                    self._let_go(key.data)
            self._look()

    def _request(self) -> None:
        head, fds, _, _ = socket.recv_fds(self._control, LENGTH.size, 4)
        while head and len(head) < LENGTH.size and (more := self._control.recv(LENGTH.size - len(head))):
            head += more
        if len(head) < LENGTH.size:
            self._events.unregister(self._control)
            self._control.close()
            return
        text, length = b"", LENGTH.unpack(head)[0]
        while len(text) < length and (more := self._control.recv(length - len(text))):
            text += more
        for fd in fds:
            os.set_inheritable(fd, False)
        request, voice = json.loads(text), socket.socket(fileno=fds[0])
        _say_to(fds[1])
        for name in request["imports"]:
            self._import(name)
        if not select.select([voice], [], [], 0)[0]:  # still wanted
            self._fork(request, voice, fds)
        else:
            voice.close()
        for fd in fds[1:]:
            os.close(fd)

    def _import(self, name: str) -> None:
        if name in sys.modules or name in self._missing:
            return
        try:
            module = importlib.import_module(name)
            if name == "numba":  # its first function takes 1 s more than others: it loads all that types functions
                module.cfunc("void(int64)")(lambda _: None)
        except Exception:  # noqa: BLE001 - children import it themselves, and fail as they would without us
            traceback.print_exc()
            self._missing.add(name)

    def _fork(self, request: dict[str, Any], voice: socket.socket, fds: Sequence[int]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        gc.collect()
        gc.freeze()  # so that no collection of a child copies what all share
        home, pid = os.getpid(), os.fork()
        if pid == 0:
            code = 1
            try:
                os.setsid()
                die_with_parent(home)
                voice.sendall(f"pid {os.getpid()}\n".encode())
                self._leave(voice)
                code = _live(request, fds, home, anew=bool(self._missing.intersection(request["imports"])))
            except BaseException:  # noqa: BLE001 - a child that cannot begin ends, and its log says why
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        self._children[pid] = voice
        self._events.register(voice, selectors.EVENT_READ, pid)

    def _leave(self, voice: socket.socket) -> None:
        """In a child: give up what is the nursery's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._events.close()
        for fd in (self._wake_read, self._wake_write):
            os.close(fd)
        for connection in (self._control, voice, *self._children.values()):
            connection.close()

    def _look(self) -> None:
        """Say who ended, and how; they stay until the parent lets them go."""
        for pid in set(self._children) - self._ended:
            found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is not None:
                code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
                self._ended.add(pid)
                with contextlib.suppress(ConnectionError):
                    self._children[pid].sendall(f"code {code}\n".encode())

    def _let_go(self, pid: int) -> None:
        """The parent closed its end: reap."""
        if pid not in self._ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._ended.discard(pid)
        voice = self._children.pop(pid)
        self._events.unregister(voice)
        voice.close()


def _say_to(log: int) -> None:
    """Output goes to the log of the worker that is being made."""
    for fd in (1, 2):
        os.dup2(log, fd)


def _live(request: dict[str, Any], fds: Sequence[int], home: int, anew: bool) -> int:
    """A child's life: what `rooftune.worker` does, with what is imported, or anew where an import failed."""
    arguments = [*map(str, fds[2:]), *request["arguments"], str(home)]
    os.chdir(request["folder"])
    if anew:
        for fd in fds[2:]:
            os.set_inheritable(fd, True)
        os.execve(sys.executable, [sys.executable, "-P", "-m", "rooftune.worker", *arguments], request["env"])
    os.environ.clear()
    os.environ.update(request["env"])
    tempfile.tempdir = None  # it is looked up once
    from rooftune import worker

    worker.main(arguments)
    return 0


def main(arguments: Sequence[str]) -> None:
    """`python -m rooftune.nursery SOCKET_FD PARENT`."""
    die_with_parent(int(arguments[1]))
    control = socket.socket(fileno=int(arguments[0]))
    control.set_inheritable(False)
    importlib.import_module("rooftune.worker")
    # Python 3.12 warns of threads that a child lacks: here they are OpenBLAS's, which ends them before a fork
    warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
    _Home(control).run()
    os._exit(0)  # nothing to take down: no library was used


if __name__ == "__main__":
    main(sys.argv[1:])
