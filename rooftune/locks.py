"""One timing at a time on a device: a lock file that every rooftune on this machine takes for a round."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rooftune.core import UsageError

POLL_S = 0.02  # between two looks at a lock that may be waited for until a moment only


@contextlib.contextmanager
def held(path: Path, device: str, until: float = math.inf) -> Iterator[bool]:
    """Hold the lock; True, or False if another run kept it until after the (monotonic) moment `until`."""
    with _opened(path) as handle:
        mine = _taken(handle)
        if not mine:
            print(f"rooftune: waiting for another run on {device} to finish its round", file=sys.stderr)
            if until == math.inf:
                fcntl.flock(handle, fcntl.LOCK_EX)
                mine = True
            while not mine and time.monotonic() < until:
                time.sleep(POLL_S)
                mine = _taken(handle)
        try:
            yield mine
        finally:
            if mine:
                fcntl.flock(handle, fcntl.LOCK_UN)


def _taken(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def path_of(device: str) -> Path:
    """The lock file of a device, by torch's name for it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if device != "cpu" else ""
    name = "".join(c if c.isalnum() else "-" for c in f"{device}{'-' + visible if visible else ''}")
    return temporary() / f"rooftune-{name}.lock"


def temporary() -> Path:
    """Where temporary files go, such as locks, workers' output and copies of revisions.

    Raises:
        UsageError: nowhere, as in a container with a read-only file system.
    """
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError as error:
        raise UsageError(f"{error.strerror}; next: set TMPDIR to a folder that can be written to") from error


def _opened(path: Path) -> IO[str]:
    """Open the lock of a device for everyone.

    Raises:
        UsageError: it belongs to someone else and cannot be opened: timing without it would overlap.
    """
    try:
        if not path.exists():
            with contextlib.suppress(FileExistsError):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
                os.chmod(path, 0o666)
        return open(path, "r+")
    except OSError as error:
        raise UsageError(
            f"the device lock {path} cannot be opened ({error.strerror}); remove it or set TMPDIR"
        ) from error
