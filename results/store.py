"""The store: one append-only log format for runs, tuning journals and tables; and where runs live.

A log is JSON Lines. The last key of every line is `crc`: the CRC-32 (zlib) of the line's bytes before
`,"crc":`, in 8 hex digits. CRC-32 detects every single-bit error, so a line is either whole or skipped:
a file cut at any byte, or with flipped bits, gives back only lines that were written.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rooftune.core import UsageError
from rooftune.results.record import Record, from_json

MAX_LINE = 64 * 2**20  # a record with 1,000 rounds of 100 samples takes 2 MiB; more than this is not a line of ours
SUFFIX = ".jsonl"
SAME_SOURCES = Path(__file__).resolve().parent / "reference" / "same_sources.json"
_TAIL = re.compile(rb',"crc":"([0-9a-f]{8})"}')
_TAIL_BYTES = 18


def seal(data: dict[str, Any]) -> str:
    """One line of a log, without the newline.

    Raises:
        ValueError: empty, holds the key `crc`, or something JSON has no word for (NaN, tensors); names the field.
    """
    if not data or "crc" in data:
        raise ValueError("a line of a log needs a field, and none may be called 'crc'")
    if where := _not_finite(data):
        raise ValueError(f"field '{where}' is not a finite number")
    try:
        body = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)[:-1]
        raw = body.encode("utf-8")
    except TypeError as error:
        raise ValueError(f"not plain data: {error}") from error
    except UnicodeEncodeError:  # lone surrogates, as in file names that are not UTF-8
        body = json.dumps(data, separators=(",", ":"), allow_nan=False)[:-1]
        raw = body.encode("ascii")
    return f'{body},"crc":"{zlib.crc32(raw):08x}"}}'


def unseal(line: bytes) -> dict[str, Any] | None:
    """The data of a line (without `crc`), or None if the line is damaged or was not written by `seal`."""
    body, tail = line[:-_TAIL_BYTES], line[-_TAIL_BYTES:]
    match = _TAIL.fullmatch(tail)
    if not match or int(match[1], 16) != zlib.crc32(body):
        return None
    try:
        data = json.loads(body + b"}", parse_constant=_refuse)
    except (ValueError, RecursionError):  # a right checksum around something that is not JSON: not ours
        return None
    return data if isinstance(data, dict) else None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _not_finite(value: Any, path: str = "") -> str:
    """Where the first NaN or infinity is, for example `rounds[0][2]`; or nothing."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else path or "value"
    items: Iterator[tuple[str, Any]] = iter(())
    if isinstance(value, dict):
        items = ((f"{path}.{k}" if path else str(k), v) for k, v in value.items())
    elif isinstance(value, list | tuple):
        items = ((f"{path}[{i}]", v) for i, v in enumerate(value))
    return next((found for where, v in items if (found := _not_finite(v, where))), "")


def _cannot(doing: str, path: Path, error: OSError) -> UsageError:
    return UsageError(f"cannot {doing} {path}: {error.strerror or error}")


class Log:
    """An append-only log. Several processes may append to one file: each line is one `write` under a lock.

    Args:
        path: the file; it and its folder are made at the first append.
        sync_s: lines may wait this many seconds before they are forced to the disk (0: every line is);
            they survive the end of the process in any case, only a power failure can take them.
    """

    def __init__(self, path: Path | str, sync_s: float = 0.0) -> None:
        self.path = Path(path)
        self.sync_s = sync_s
        self._synced = -math.inf

    def append(self, data: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            UsageError: no space, no permission, not a file; the file then holds what it held before.
            ValueError: the data is not plain JSON (see `seal`).
        """
        line = seal(data).encode("utf-8") + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not self.path.exists()
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                _write(fd, line)
                if time.monotonic() - self._synced >= self.sync_s:
                    os.fsync(fd)
                    self._synced = time.monotonic()
            finally:
                os.close(fd)  # also unlocks
            if fresh:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise _cannot(f"write {len(line)} bytes to", self.path, error) from error

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """All whole lines in order, and how many were damaged.

        Raises:
            UsageError: missing, a folder, or not readable.
        """
        found = [data for _, data in _scan(self.path)]
        lines = [data for data in found if data is not None]
        return lines, len(found) - len(lines)


def _write(fd: int, line: bytes) -> None:
    """Append under the caller's lock. A line that was cut by a crash is first closed, so that it cannot
    swallow ours; a write that fails half-way (disk full) is taken back."""
    size = os.fstat(fd).st_size
    if size and os.pread(fd, 1, size - 1) != b"\n":
        line = b"\n" + line
    try:
        done = os.write(fd, line)
        while done < len(line):  # a full disk first writes short, then raises
            done += os.write(fd, line[done:])
    except OSError:
        with contextlib.suppress(OSError):  # not a regular file: readers skip the rest of a line anyway
            os.ftruncate(fd, size)
        raise


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _scan(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line number, data or None if damaged). Memory stays below `MAX_LINE` whatever the file is."""
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                part = line
                while part and not part.endswith(b"\n"):  # too long, or the last line
                    part = file.readline(MAX_LINE)
                    line = b"" if part else line
                if line.strip() or not line:
                    data = unseal(line.rstrip(b"\n"))
                    if data is not None and isinstance(source := data.get("source_hash"), str):
                        data["source_hash"] = _same_sources().get(source, source)
                    yield number, data
    except OSError as error:
        raise _cannot("read", path, error) from error


@cache
def _same_sources() -> dict[str, str]:
    """Source hash on record -> hash of the very same files by today's rule, of records made when what judges a
    competitor was part of its hash. Made by hashing one commit both ways."""
    found: dict[str, str] = json.loads(SAME_SOURCES.read_text(encoding="utf-8"))
    return found


def talk(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr)


def load_run(path: Path | str, say: Callable[[str], None] = talk) -> list[Record]:
    """The results in a log, in order. Lines of other kinds (headers, tuning trials) are left out.

    Args:
        say: gets one line of text if damaged lines were dropped; standard error if not given.
    Raises:
        UsageError: one line: missing, a folder, no permission, empty, binary, not UTF-8, not JSON, the
            wrong JSON type, NaN, not ours, a schema from the future, or damaged with no result left.
    """
    path = Path(path)
    records, kinds, damaged = [], set(), 0
    for number, data in _scan(path):
        if data is None:
            damaged += 1
        elif data.get("kind", "result") == "result":
            records.append(from_json(data, f"{path}: line {number}"))
        else:
            kinds.add(str(data["kind"]))
    if not records:
        raise _diagnose(path, kinds, damaged)
    if damaged:
        say(f"{path}: {damaged} damaged or cut line{'s' * (damaged > 1)} dropped, {len(records)} results kept")
    return records


def _diagnose(path: Path, kinds: set[str], damaged: int) -> UsageError:
    """Why there is no result in a file that could be read."""
    if kinds:
        lost = f", {damaged} damaged lines" if damaged else ""
        return UsageError(f"{path}: no results, only lines of kind {', '.join(sorted(kinds))}{lost}")
    with path.open("rb") as file:
        head = file.read(2**16)
    if not head:
        return UsageError(f"{path}: is empty; a run that wrote no result leaves nothing to read")
    if b"\0" in head:
        return UsageError(f"{path}: is binary (holds zero bytes), not a rooftune run")
    first = next((line for line in head.splitlines() if line.strip()), b"")
    try:
        text = first.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(first) - 4 or len(head) < 2**16:
            return UsageError(f"{path}: is not UTF-8 text (byte {error.start} is 0x{first[error.start]:02x})")
        text = first[: error.start].decode("utf-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if text.startswith('{"'):
            return UsageError(f"{path}: damaged or cut ({damaged} lines), no whole record is left")
        return UsageError(f"{path}: is not JSON Lines, so not a rooftune run")
    if not isinstance(value, dict):
        names = {list: "a list", type(None): "null", str: "a string", bool: "a truth value"}
        return UsageError(f"{path}: holds {names.get(type(value), 'a number')}, not a record; not a rooftune run")
    if where := _not_finite(value):
        return UsageError(f"{path}: field '{where}' is not a finite number")
    try:
        from_json(value, f"{path}: line 1")
    except UsageError as error:
        return error
    return UsageError(f"{path}: line 1 has no valid checksum ('crc'): it was damaged or edited after it was written")


def atomic_write(path: Path | str, text: str) -> None:
    """Replace a file by new text, or leave the old one: never a half.

    Raises:
        UsageError: no space, no permission, or the path is a folder.
    """
    target = Path(path).resolve()  # through a link: replace what it points to
    data = text.encode("utf-8")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
    except OSError as error:
        raise _cannot(f"write {len(data)} bytes to", target, error) from error


# --- where runs live -----------------------------------------------------------------------------------------------

REFERENCE = Path(__file__).resolve().parent / "reference"  # committed records


def user_dir() -> Path:
    """Our folder for data of this user (XDG base directory specification): $XDG_DATA_HOME/rooftune."""
    base = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(base):  # the specification says that a relative one is to be ignored
        return Path(base) / "rooftune"
    try:
        return Path.home() / ".local" / "share" / "rooftune"
    except RuntimeError as error:
        raise UsageError("no home directory: set ROOFTUNE_RESULTS_DIR to where results shall go") from error


def results_dir() -> Path:
    """Where runs are kept: $ROOFTUNE_RESULTS_DIR; results/runs in a checkout; else the user's data folder."""
    if given := os.environ.get("ROOFTUNE_RESULTS_DIR"):
        return Path(given).expanduser()
    root = Path(__file__).resolve().parent.parent
    if (root / "pyproject.toml").is_file() and (root / "bench.py").is_file():
        return root / "results" / "runs"
    return user_dir() / "runs"


def new_run_path(name: str = "run") -> Path:
    """A path no other run has; its stem is the run's id. The name is reduced to letters, digits, `-`, `_`."""
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:60] or "run"
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return results_dir() / f"{stamp}-{clean}-{uuid.uuid4().hex[:6]}{SUFFIX}"


def list_runs(folder: Path | None = None) -> list[Path]:
    """Runs in the results folder (or another), the one written last first."""
    place = folder or results_dir()
    try:
        found = [(p.stat().st_mtime_ns, p.name, p) for p in place.glob(f"*{SUFFIX}") if p.is_file()]
    except OSError as error:
        raise _cannot("list", place, error) from error
    return [path for _, _, path in sorted(found, reverse=True)]


def latest_run(back: int = 0) -> Path:
    """The run with results that was written last, or the one `back` before it. A tuning, or a run that was
    interrupted before its first result, has none to show; a file that is no run of ours does count, to be told of."""
    found = 0
    for path in list_runs():
        if _without_results(path):
            continue
        if found == back:
            return path
        found += 1
    raise UsageError(f"no run {'latest' if not back else f'latest~{back}'}: {results_dir()} holds {found} with results")


def _without_results(path: Path) -> bool:
    """Whether a file has whole lines of ours, and none of them is a result."""
    kinds = set()
    for _, data in _scan(path):
        kind = "" if data is None else data.get("kind", "result")
        if kind == "result":
            return False
        kinds.add(kind)
    return bool(kinds - {""})


def resolve(text: str) -> Path:
    """A run given as a path, `latest`, `latest~1` (the one before), or an id (or its unambiguous beginning)
    in the results folder or among the committed reference records.

    Raises:
        UsageError: there is none, or the beginning fits several.
    """
    if Path(text).exists():
        return Path(text)
    if match := re.fullmatch(r"latest(?:~(\d+))?", text):
        return latest_run(int(match[1] or 0))
    runs = {path.stem: path for path in (*list_runs(REFERENCE), *list_runs())}  # a run in both folders is one run
    if text in runs:
        return runs[text]
    close = [name for name in runs if name.startswith(text)]
    if len(close) == 1:
        return runs[close[0]]
    shown = ", ".join((close or sorted(runs, reverse=True))[:5]) or "none"
    problem = f"run '{text}' fits {len(close)}" if close else f"no run '{text}'"
    raise UsageError(f"{problem}; give a path, 'latest', or an id: {shown}")
