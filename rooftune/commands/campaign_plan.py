"""What a campaign has: its time, dealt out to phases, and its folder, which remembers every finished step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rooftune.core import UsageError
from rooftune.results import store
from rooftune.results.record import SCHEMA, Record, from_json

# Phases in order, and their shares of the time. What a phase leaves over goes to those after it.
SHARES = {"probe": 0.05, "check": 0.2, "race": 0.22, "tune": 0.3, "final": 0.14, "energy": 0.09}
LEAST_GRACE_S = 10.0  # of a step that is under way when its phase is over
LIMIT_BYTES = 16 * 2**20  # of the folder: what is carried home
LEAN_BYTES = 11 * 2**20  # from here on records keep no raw rounds
FULL_BYTES = 14 * 2**20  # from here on nothing is tuned any more
DIGITS = 5  # of a stored sample: a clock's noise begins at the third


class Plan:
    """A budget that began when this was made; phases are entered in the order of `SHARES`.

    Args:
        without: a phase that there will not be; its share goes to the others.
        clock: seconds that only grow; simulated in tests.
    """

    def __init__(self, budget_s: float, without: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_s, self.clock, self.begin = budget_s, clock, clock()
        self.shares = {phase: 0.0 if phase == without else share for phase, share in SHARES.items()}
        self.end = self.begin + budget_s
        self.phase, self.entered, self.until = "", self.begin, self.begin
        self._kept: tuple[str, float] = ("", 0.0)
        self._reserved = 0.0  # of it, in the phase that runs

    def keep(self, phase: str, seconds: float) -> None:
        """See to it that a later phase has that long, as far as half of what is left when another begins allows."""
        self._kept = (phase, seconds)

    def enter(self, phase: str) -> float:
        """Begin a phase; returns the seconds it may take."""
        names = list(self.shares)
        mine = {name: self.shares[name] for name in names[names.index(phase) :]}
        left = max(0.0, self.end - self.clock())
        kept, seconds = self._kept
        self._reserved = 0.0
        if kept in mine and kept != phase:
            seconds = min(seconds, left / 2)
            if seconds * sum(mine.values()) > left * mine[kept]:  # more than its share
                left, self._reserved = left - seconds, seconds
                del mine[kept]
        ahead = sum(mine.values())
        allowed = left * mine[phase] / ahead if ahead else 0.0
        self.phase, self.entered = phase, self.clock()
        self.until = self.entered + allowed
        return allowed

    def break_off(self) -> float:
        """The moment at which a step that is under way is broken off: when its phase has taken as long again, but
        no more than half of what the later phases have without what is kept for one of them."""
        later = max(0.0, self.end - self.until - self._reserved)
        return self.until + min(max(self.until - self.entered, LEAST_GRACE_S), later / 2 if later else 0.0)

    def left(self) -> float:
        """Seconds of this phase."""
        return self.until - self.clock()

    def spent(self) -> float:
        """Seconds since the campaign began."""
        return self.clock() - self.begin


class Home:
    """The folder: one log with every step and record, tuning journals, the tuned table, the summary.

    A step that was finished, whatever came of it, is found again by its key and not repeated.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        try:
            (folder / "tune").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--out {folder}: cannot be made ({error.strerror})") from error
        logs = sorted(folder.glob("*-campaign-*.jsonl"))
        self.path = logs[0] if logs else folder / store.new_run_path("campaign").name
        self.log = store.Log(self.path)
        self.steps: dict[str, dict[str, Any]] = {}
        self.records: list[Record] = []
        self.ceilings: dict[str, Any] | None = None
        self.identity: dict[str, Any] | None = None
        self.lean = False
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        lines, damaged = self.log.read()
        for line in lines:
            if line.get("kind") == "step":
                self.steps[line["key"]] = line
            elif line.get("kind") == "ceilings":
                self.ceilings = line["ceilings"]
            elif line.get("kind") == "campaign":
                self.identity = line["identity"]
            elif line.get("kind", "result") == "result":
                self.records.append(from_json(line, str(self.path)))
        if damaged:
            self.say(f"{self.path.name}: {damaged} damaged or cut lines dropped; their steps are taken again")

    def open(self, run: str, identity: dict[str, Any]) -> None:
        """Note whose folder this is.

        Raises:
            UsageError: it holds another device's campaign.
        """
        if self.identity is not None and self.identity != identity:
            raise UsageError(
                f"--out {self.folder} holds a campaign of {self.identity.get('name')}; give another folder"
            )
        if self.identity is None:
            self.log.append({"kind": "campaign", "schema": SCHEMA, "run": run, "identity": identity})
            self.identity = identity

    def done(self, key: str) -> dict[str, Any] | None:
        """A finished step, if it is one."""
        return self.steps.get(key)

    def finish(self, key: str, phase: str, status: str, **data: Any) -> dict[str, Any]:
        """A step is over, for good: a kernel that hung once is not given the chance to hang again."""
        line = {"kind": "step", "schema": SCHEMA, "key": key, "phase": phase, "status": status, **data}
        self.log.append(line)
        self.steps[key] = line
        return line

    def of(self, phase: str) -> list[dict[str, Any]]:
        """Finished steps of a phase, in order."""
        return [line for line in self.steps.values() if line["phase"] == phase]

    def compact(self, records: Iterable[Record]) -> list[Record]:
        """Records as they are stored here: samples with `DIGITS` digits, or none once the folder is nearly full."""
        kept = list(records)
        if not self.lean and self.used() > LEAN_BYTES:
            self.lean = True
            self.say(f"{self.folder} is above {LEAN_BYTES >> 20} MiB: records keep no raw rounds from here on")
        for record in kept:
            if self.lean:
                record.rounds = None
            elif record.rounds is not None:
                record.rounds = [[_rounded(sample) for sample in each] for each in record.rounds]
        self.records += kept
        return kept

    def used(self) -> int:
        """Bytes in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def full(self) -> bool:
        """Whether there is no room for another tuning journal."""
        return self.used() > FULL_BYTES

    def fit(self) -> None:
        """Keep the limit: the largest tuning journals go first, and it is said which."""
        journals = sorted((self.folder / "tune").glob("*"), key=lambda p: p.stat().st_size)
        while self.used() > LIMIT_BYTES and journals:
            path = journals.pop()
            self.say(f"{self.folder} is above {LIMIT_BYTES >> 20} MiB: {path.name} ({path.stat().st_size} B) removed")
            path.unlink()
        if self.used() > LIMIT_BYTES:
            self.say(f"{self.folder} holds {self.used() / 2**20:.1f} MiB, more than the {LIMIT_BYTES >> 20} intended")


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else value


def shares_of(missing: Mapping[Any, float], seconds: float, least_s: float) -> list[tuple[Any, float]]:
    """Deal seconds out by what is missing, most first; whoever would get less than `least_s` goes without."""
    ranked = sorted(missing.items(), key=lambda item: -item[1])
    ranked = [item for item in ranked if item[1] > 0][: max(0, int(seconds // least_s))]
    while ranked:
        total = sum(value for _, value in ranked)
        dealt = [(key, seconds * value / total) for key, value in ranked]
        if dealt[-1][1] >= least_s or len(dealt) == 1:
            return dealt
        ranked.pop()
    return []
