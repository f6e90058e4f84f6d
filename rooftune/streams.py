"""Standard output and error as a program meets them that is piped, redirected, or started with neither.

A reader that leaves (`| head`) is no failure: the verb goes on, its records are kept, and its exit code is its
verdict, not that of a pipe. Data that cannot be written (a full disk) is an error in one line; talk that cannot is
lost, as there is nowhere to say so.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from rooftune.core import UsageError


class _Raw(io.FileIO):
    """The file descriptor of a standard stream; once it cannot be written to, what follows is dropped."""

    def __init__(self, fd: int, talk: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self._talk = talk

    def write(self, data: Any) -> int:
        try:
            while (done := super().write(data)) is None:  # its other user made it non-blocking, and it is full
                select.select([], [self], [])
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            if not self._talk and not isinstance(error, BrokenPipeError):
                raise UsageError(f"cannot write to standard output: {error.strerror}") from error
            return len(data)
        return done


def _guard(stream: TextIO, talk: bool) -> io.TextIOWrapper:
    errors = getattr(stream, "errors", None)
    errors = "backslashreplace" if errors in (None, "strict") else errors  # an escaped letter, not a lost table
    stream.flush()
    raw = io.BufferedWriter(_Raw(stream.fileno(), talk))
    return io.TextIOWrapper(raw, stream.encoding, errors, line_buffering=talk or stream.isatty())


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Both streams as above, inside the block; those that somebody else put in their place stay as they are."""
    if sys.stderr is None:  # `2>&-`: a file opened later would get its number, and the talk
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - lives as long as we
    before = sys.stdout, sys.stderr
    if sys.stdout is not None and sys.stdout is sys.__stdout__:
        sys.stdout = _guard(before[0], talk=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guard(before[1], talk=True)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(UsageError):  # whoever cares for the exit code has flushed already
                if stream is not None:
                    stream.flush()
        sys.stdout, sys.stderr = before


def put(text: str) -> None:
    """Data for a program: the same bytes on standard output, whatever its encoding is, as in a file."""
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # a stream that takes text only
        sys.stdout.write(text)
    else:
        raw.write(text.encode("utf-8", "surrogateescape"))
        raw.flush()
