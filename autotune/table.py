"""The tuned table: configs that were shown to beat the default, and what they are valid for.

One JSON file: `$ROOFTUNE_TABLE`, else `tuned.json` in the results folder. An entry answers for exactly the
problem, device, kernel source and toolchain it was measured with; one that does not match is not used, and
the lookup says why. A config that wins at one size may lose at the next, so other shapes are `neighbour`'s
business: it follows a rule that was judged on shapes that were held out (`nearest`).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rooftune.autotune import nearest
from rooftune.autotune.journal import toolchain
from rooftune.core import Config, Problem, UsageError
from rooftune.registry import Impl
from rooftune.results import store

SCHEMA = 1


@dataclass(frozen=True)
class Entry:
    """A tuned config with its evidence.

    Attributes:
        source_hash, toolchain, device, threads: what it was measured with, besides problem and competitor.
        time_s, default_time_s: seconds per call in the deciding rounds; `speedup` and its 95 % interval are
            from the same rounds, paired.
        rel_fro: relative Frobenius error in the thorough check.
        journal: the file with every outcome of the search.
    """

    op: str
    problem: str
    precision: str
    impl: str
    source_hash: str
    toolchain: dict[str, str]
    device: dict[str, Any]
    threads: int
    config: Config
    default: Config
    time_s: float
    default_time_s: float
    speedup: float
    speedup_ci: list[float]
    rel_fro: float | None
    journal: str
    unix_time: float

    def key(self) -> tuple[Any, ...]:
        """Two entries with the same key answer the same question."""
        kit, where = json.dumps(self.toolchain, sort_keys=True), json.dumps(self.device, sort_keys=True)
        return self.problem, self.impl, self.source_hash, kit, where, self.threads

    def stale(self, impl: Impl, device: dict[str, Any], threads: int | None = None) -> str:
        """Why it must not be used here and now, or nothing."""
        if self.source_hash != impl.source_hash:
            return f"the kernel's source changed ({self.source_hash} -> {impl.source_hash})"
        if changed := _changed(self.toolchain, toolchain(impl)):
            return f"the toolchain changed ({changed})"
        if changed := _changed(self.device, device):
            return f"tuned on another device ({changed})"
        if threads is not None and threads != self.threads:
            return f"tuned with {self.threads} threads, not {threads}"
        return ""


def _changed(old: dict[str, Any], new: dict[str, Any]) -> str:
    keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    return ", ".join(f"{k} {old.get(k)} -> {new.get(k)}" for k in keys)


@dataclass(frozen=True)
class Found:
    """Result of a lookup: the entry, or None; `why` explains either."""

    entry: Entry | None
    why: str


def default_path() -> Path:
    """$ROOFTUNE_TABLE, or tuned.json in the results folder."""
    given = os.environ.get("ROOFTUNE_TABLE")
    return Path(given).expanduser() if given else store.results_dir() / "tuned.json"


class Table:
    """Entries in a file. Reading and replacing the file is safe beside other processes."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or default_path()

    def entries(self) -> list[Entry]:
        """All entries, oldest first; none if there is no file.

        Raises:
            UsageError: not readable, not JSON, or not a table of ours; names the field.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"tuned table {self.path} cannot be read: {error}") from error
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"tuned table {self.path} is not JSON ({error}); move it away to start afresh") from error
        if not isinstance(data, dict) or not isinstance(data.get("entries"), list):
            raise UsageError(f"tuned table {self.path} has no list 'entries'; move it away to start afresh")
        if not isinstance(data.get("schema"), int) or data["schema"] > SCHEMA:
            raise UsageError(f"tuned table {self.path}: schema {data.get('schema')!r} is not ours ({SCHEMA})")
        return [_entry(line, f"tuned table {self.path}: entry {i}") for i, line in enumerate(data["entries"])]

    def put(self, entry: Entry) -> None:
        """Add an entry; it replaces one with the same key."""
        with self._locked():
            kept = [e for e in self.entries() if e.key() != entry.key()]
            self._write([*kept, entry])

    def drop(self, entry: Entry) -> None:
        """Take an entry out again, if it is still as given: its config did not beat the default another time."""
        with self._locked():
            entries = self.entries()
            if entry in entries:
                self._write([e for e in entries if e != entry])

    def _write(self, entries: Sequence[Entry]) -> None:
        body = {"schema": SCHEMA, "entries": [asdict(e) for e in entries]}
        store.atomic_write(self.path, json.dumps(body, indent=1, allow_nan=False) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            handle = lock.open("w")
        except OSError as error:
            raise UsageError(f"tuned table {self.path} cannot be written: {error.strerror}") from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def lookup(self, impl: Impl, problem: Problem, device: dict[str, Any], threads: int | None = None) -> Found:
        """The entry to use for a competitor on exactly this problem, here and now; the newest if several."""
        mine = [e for e in self.entries() if e.problem == str(problem) and e.impl == impl.key]
        if not mine:
            return Found(None, "not tuned for this problem")
        reasons: list[str] = []
        for entry in sorted(mine, key=lambda e: -e.unix_time):
            if not (why := entry.stale(impl, device, threads)):
                low, high = entry.speedup_ci
                day = time.strftime("%Y-%m-%d", time.gmtime(entry.unix_time))
                text = f"tuned {day}: {entry.speedup:.2f}x the default's speed ({low:.2f} to {high:.2f})"
                return Found(entry, text)
            reasons.append(why)
        return Found(None, "a tuned entry is not used: " + reasons[0])

    @property
    def rules(self) -> nearest.Rules:
        """The rules for shapes between the tuned ones, beside the table."""
        return nearest.Rules(self.path.with_name(f"{self.path.stem}.rules{store.SUFFIX}"))

    def neighbour(self, impl: Impl, problem: Problem, device: dict[str, Any], threads: int) -> Neighbour:
        """What the nearest tuned shape's config is good for here, by a rule that was never slower where tested."""
        rule = self.rules.find(impl.key, problem, rule_key(impl, device, threads))
        if rule is None:
            return Neighbour(None, "no rule for shapes in between")
        if not rule.sound:
            return Neighbour(None, "the rule for shapes in between was slower than the default on held-out shapes")
        config, why = rule.choose(problem)
        return Neighbour(config, why, rule.gain)


@dataclass(frozen=True)
class Neighbour:
    """A config from another shape, or None and why; `gain`: the least speed-up over the default to expect."""

    config: Config | None
    why: str
    gain: float = 1.0


def rule_key(impl: Impl, device: dict[str, Any], threads: int) -> dict[str, Any]:
    """What a rule is valid for."""
    return {
        "impl": impl.key,
        "source_hash": impl.source_hash,
        "toolchain": toolchain(impl),
        "device": device,
        "threads": threads,
    }


MOST, YEAR_9999 = 1e300, 253402300800  # beyond are no figures of ours, nor dates
_NUMBERS = ("time_s", "default_time_s", "speedup")
_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("op", "problem", "precision", "impl", "source_hash", "journal"), str),
    **dict.fromkeys(("toolchain", "device", "config", "default"), dict),
    **dict.fromkeys((*_NUMBERS, "unix_time"), (int, float)),
    "threads": int,
    "speedup_ci": list,
}


def _entry(data: Any, where: str) -> Entry:
    if not isinstance(data, dict):
        raise UsageError(f"{where} is {data!r:.40}, not an entry")
    for key, kind in _TYPES.items():
        if not isinstance(data.get(key), kind) or isinstance(data.get(key), bool):
            raise UsageError(f"{where}: field '{key}' is {data.get(key)!r:.40}")
    if not 0 <= data["unix_time"] < YEAR_9999:
        raise UsageError(f"{where}: field 'unix_time' is {data['unix_time']!r:.40}")
    for key in _NUMBERS:
        if not 0 < data[key] < MOST:
            raise UsageError(f"{where}: field '{key}' is {data[key]!r:.40}, expected a positive number")
    try:
        Problem.parse(data["problem"])
    except UsageError as error:
        raise UsageError(f"{where}: field 'problem': {error}") from error
    interval = data["speedup_ci"]
    if len(interval) != 2 or not all(isinstance(x, int | float) and abs(x) < MOST for x in interval):
        raise UsageError(f"{where}: field 'speedup_ci' is {interval!r:.40}, expected two numbers")
    return Entry(**{"rel_fro": None, **{k: v for k, v in data.items() if k in {f.name for f in fields(Entry)}}})
