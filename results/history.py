"""Stored runs as series: one a problem and competitor, in order of time, and where they may have changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rooftune.core import Evidence, UsageError
from rooftune.results import store
from rooftune.results.changes import Change, changes
from rooftune.results.record import Record, from_json

SHORTEST = 8  # runs: fewer cannot show a change at the probability that is asked for


@dataclass(frozen=True)
class Point:
    """One run's value: `value` is seconds, or the time of the best torch call over ours (its inverse is what grows)."""

    run: str
    commit: str
    unix_time: float
    value: float


@dataclass
class Series:
    """What one device said of one competitor on one problem, always timed the same way.

    `by` is `vs torch` where every run has a ratio to torch's best call, of one version of torch, in the same race: it
    keeps the machine's state out. Else `time`.
    """

    problem: str
    impl: str
    device: str
    by: str = "time"
    points: list[Point] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.impl.partition("/")[2] or self.impl

    def changes(self) -> list[Change]:
        """Candidates; a ratio above 1 is slower, whatever the series is of."""
        sign = -1.0 if self.by != "time" else 1.0
        return changes([sign * math.log(p.value) for p in self.points])


@dataclass(frozen=True)
class Run:
    """A stored run: `commit` of the kernels, if it is known, with `-dirty` where they were edited since."""

    name: str
    commit: str
    records: list[Record]


def load(paths: Iterable[Path]) -> list[Run]:
    """Runs in order of time. Files without a time (a tuning, evidence, a damaged file, a newer schema) are left out."""
    found = []
    for path in paths:
        commit, records = "", []
        for line in store.Log(path).read()[0]:
            if line.get("kind") == "session":
                commit = str(line.get("commit") or "")
            elif line.get("kind", "result") == "result" and line.get("evidence") == Evidence.MEASURED:
                try:
                    records.append(from_json(line, str(path)))
                except UsageError:
                    continue  # of a schema that is newer than ours
        if records := [r for r in records if r.time_s is not None]:
            found.append(Run(path.stem, commit, records))
    return sorted(found, key=lambda run: run.records[0].unix_time)


def series(runs: Sequence[Run]) -> list[Series]:
    """One per device, problem, competitor (with its call, or its tuned config) and way of timing."""
    cells: dict[tuple[Any, ...], dict[str, tuple[Run, Record]]] = {}
    for run in runs:
        for record in run.records:
            cells.setdefault(_key(record), {})[run.name] = run, record  # the last of a run counts
    return [_series(list(cell.values())) for cell in cells.values()]


def _key(record: Record) -> tuple[Any, ...]:
    config = "" if record.default else str(sorted(record.config.items()))
    how = (record.regime.get(k) for k in ("clock", "cache", "threads"))
    return (_identity(record.device), *record.cell, config, *how)


def _identity(device: Mapping[str, Any]) -> str:
    return str(sorted((device.get("identity") or {"name": device.get("name")}).items()))


def _series(cell: Sequence[tuple[Run, Record]]) -> Series:
    first = cell[0][1]
    torch = {record.versions.get("torch") for _, record in cell}
    ratios = all(record.ratio_to_torch not in (None, 1.0) for _, record in cell) and len(torch) == 1
    made = Series(first.problem, first.cell[1], str(first.device.get("name") or ""), "vs torch" if ratios else "time")
    for run, record in cell:
        value = record.ratio_to_torch if ratios else record.time_s
        if value is not None:
            made.points.append(Point(run.name, run.commit, record.unix_time, value))
    return made
