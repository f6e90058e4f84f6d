"""One sitting at one device: its Lab, its measured ceilings, its log file, and what the terminal shows."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rooftune import __version__, device, registry, revisions
from rooftune.core import Problem, Status, Unavailable, UsageError
from rooftune.lab import LOAD_S, Lab, WorkerDied
from rooftune.registry import Impl
from rooftune.results import store
from rooftune.results.record import SCHEMA, Record

PACKAGES = ("torch", "triton", "numba", "llvmlite", "numba-cuda", "cupy-cuda13x", "cupy-cuda12x", "cuda-core", "numpy")
COPIES = 4  # inputs, their pristine copies, the rotation pools, and the reference's float64 rows


def versions() -> dict[str, str]:
    """Toolchain versions, without importing anything."""
    found = {"python": platform.python_version(), "rooftune": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def threads_of(where: device.Device, asked: int | None, option: str = "--threads") -> int:
    """Threads of a competitor: those asked for, else one for each core of a CPU.

    Raises:
        UsageError: none, or more than there are cores.
    """
    if asked is not None and asked <= 0:
        raise UsageError(f"{option} must be positive, not {asked}; this process may use {where.cores} cores")
    threads = asked or (where.cores if where.kind == "cpu" else 1)
    if where.kind == "cpu" and threads > where.cores:
        raise UsageError(f"{option} {threads}: this process may use {where.cores} cores")
    return threads


class Session:
    """Context manager around a Lab and a run file. Every record is on disk as soon as it exists."""

    def __init__(
        self,
        name: str,
        device_name: str = "cpu",
        threads: int | None = None,
        quiet: bool = False,
        path: Path | None = None,
    ) -> None:
        self.device = device.find(device_name)
        self.threads = threads_of(self.device, threads)
        self.fingerprint = self.device.fingerprint()
        identity = device.identity(self.fingerprint)
        self.about: dict[str, Any] = {"name": self.device.name, "kind": self.device.kind, "identity": identity}
        self.versions = versions()
        self.path: Path = path or store.new_run_path(name)
        self.log = store.Log(self.path)
        self.lab = Lab(self.device.torch, self.threads, self.device.kind)
        self.quiet = quiet
        self._ceilings: dict[str, Any] | None = None
        self._energy: dict[str, Any] | None = None
        self._last_line = ""
        header = {"kind": "session", "schema": SCHEMA, "run": self.run, "argv": sys.argv[1:], "unix_time": time.time()}
        header["commit"] = revisions.head(registry.kernel_folder())
        header |= {"device": self.fingerprint, "versions": self.versions, "threads": self.threads}
        try:
            self.log.append(header)
        except UsageError as error:
            hint = "; next: set ROOFTUNE_RESULTS_DIR" if store.results_dir() in self.path.parents else ""
            raise UsageError(f"{error}{hint}") from error

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()
        self.lab.close()

    @property
    def run(self) -> str:
        """The run's id: its file name without the suffix."""
        return self.path.stem

    @property
    def ceilings(self) -> dict[str, Any]:
        """Measured once a session, in a process of its own, before anything is raced.

        ROOFTUNE_CEILINGS names a stored run of this device whose ceilings are taken instead; the run file says so.
        """
        if self._ceilings is None:
            earlier = os.environ.get("ROOFTUNE_CEILINGS")
            found = self._stored(store.resolve(earlier)) if earlier else self._measured()
            self.log.append({"kind": "ceilings", "schema": SCHEMA, "run": self.run, "ceilings": found})
            self._ceilings = found
        return self._ceilings

    def _measured(self) -> dict[str, Any]:
        self.say("measuring this device's ceilings: copy bandwidth and matrix rates")
        kind = self.device.kind
        try:
            with self.lab.exclusive():
                found: dict[str, Any] = self.lab.call("rooftune.probe:ceilings", device_kind=kind, threads=self.threads)
        except WorkerDied as death:
            hint = "; install torch (make setup)" if "No module" in str(death) else ""
            raise Unavailable(f"the ceilings cannot be measured: {death}{hint}") from death
        return found

    def _stored(self, path: Path) -> dict[str, Any]:
        """The ceilings of a run, if it was at this device with as many threads."""
        owner: Any = None
        found: dict[str, Any] | None = None
        for line in store.Log(path).read()[0]:
            if line.get("kind") == "session":
                owner = device.identity(line.get("device") or {})
            ceilings = line.get("ceilings") if owner == self.about["identity"] else None
            if isinstance(ceilings, dict) and ceilings.get("threads") in (None, self.threads):
                found = ceilings
        if found is None:
            raise UsageError(
                f"ROOFTUNE_CEILINGS={path}: no ceilings of {self.device.name} with {self.threads} threads there; "
                "unset it to measure them"
            )
        return found | {"from": path.stem}

    def know(self, ceilings: dict[str, Any]) -> None:
        """Ceilings that an earlier sitting at this device measured: they are not measured again."""
        self._ceilings = ceilings

    def keep(self, records: Sequence[Record]) -> None:
        """Stamp and store."""
        for record in records:
            record.run, record.device, record.versions = self.run, self.about, self.versions
            if record.energy is None:
                record.energy = self.no_energy()
            self.log.append(record.to_json())

    def no_energy(self) -> dict[str, Any]:
        """Why this record has no joules: the sensor's reason, or that no window was asked for."""
        from rooftune import sensors
        from rooftune.energy import Energy

        if self._energy is None:
            found = sensors.find_sensor(self.device)
            none = found if isinstance(found, Energy) else Energy.unavailable("not asked for: run --energy", "off")
            self._energy = none.as_json()
        return dict(self._energy)

    def check_memory(self, problem: Problem, bytes_needed: float) -> None:
        """Refuse a problem that cannot fit, and say how much it needs.

        Raises:
            UsageError: it needs more than is free.
        """
        need, have = bytes_needed * COPIES, self.device.memory_bytes().free
        if have is not None and need > have:
            raise UsageError(
                f"{problem} needs about {need / 2**30:,.1f} GiB for inputs, output and their checked copies; "
                f"{self.device.name} has {have / 2**30:,.1f} GiB free; choose smaller sizes"
            )

    def check_user_files(self, impls: Sequence[Impl], problem_of: dict[str, Problem]) -> None:
        """A user's file that does not even load is bad input, said before anything is timed. One that does not do
        this problem is skipped there like any other: it may do the next.

        Raises:
            UsageError: what it raises on import, or what is wrong with its space.
        """
        for impl in impls:
            if impl.module.startswith("file:"):
                reply = self.lab.ask(impl, "space", LOAD_S, problem=str(problem_of[impl.op]))
                if not reply.ok and reply.status != Status.SKIPPED:
                    raise UsageError(f"{impl.path}: {reply.reason}")

    def say(self, text: str) -> None:
        """One line of talk, on stderr: it replaces the last one on a terminal."""
        if self.quiet:
            return
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K" + text[:110])
            sys.stderr.flush()
        self._last_line = text

    def clear(self) -> None:
        """Wipe the line of talk before a table is printed."""
        if self._last_line and sys.stderr.isatty():
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
        self._last_line = ""
