"""What a tuning run leaves on disk: every config's outcome as it was measured, under the key it is valid for.

Lines of kind `tune` in an append-only log (`results.store.Log`): a `start` line spells out the key, then a
`config` line per outcome, forced to the disk before the next config is tried, then a `final` line. A run
with the same key goes on from there; lines under another key stay as history and are not used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from rooftune.core import Config, Problem, Status
from rooftune.registry import Impl
from rooftune.results import store

SCHEMA = 1


@dataclass
class Trial:
    """Outcome of one config.

    Attributes:
        ratio: its time over the default's, in rounds that both ran (below 1: faster); None if the default
            did not run.
        time_s: seconds per call, median over its rounds; None unless `status` is ok.
        rel_fro: relative Frobenius error of the check, against float64 of the same inputs.
        cut: stopped after its first round, which was far behind the leader's.
        spent_s: what it cost: build, check and rounds.
    """

    config: Config
    status: str = Status.OK
    reason: str = ""
    ratio: float | None = None
    time_s: float | None = None
    rel_fro: float | None = None
    rounds: list[list[float]] = field(default_factory=list)
    cut: bool = False
    spent_s: float = 0.0

    @property
    def value(self) -> float | None:
        """What the search minimises."""
        return self.time_s if self.ratio is None else self.ratio


def canonical(config: Config) -> str:
    """A config as a dictionary key."""
    return _SORTED.encode(config)


_SORTED = json.JSONEncoder(sort_keys=True)  # made once: a large space has 100,000 configs


def digest(data: Any) -> str:
    """16 hex digits that stand for plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


@cache
def _distributions() -> dict[str, list[str]]:
    return {name: sorted(set(found)) for name, found in importlib.metadata.packages_distributions().items()}


def toolchain(impl: Impl) -> dict[str, str]:
    """Versions of what turns this competitor into machine code: its packages, and torch that runs it."""
    found: dict[str, str] = {}
    for package in (*impl.requires, "torch"):
        for name in _distributions().get(package.partition(".")[0], ()):
            found[name] = importlib.metadata.version(name)
    return found


def default_path(impl: Impl, problem: Problem) -> Path:
    """Where the journal of a competitor and problem lives: the same place every time, so it is found again."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{impl.key} {problem.shape} {problem.precision}".lower()).strip("-")
    return store.results_dir() / "tune" / f"{name}.jsonl"


class Journal:
    """The journal of one tuning run, with what an earlier run under the same key left in it.

    Args:
        what: everything the measurements depend on, as plain data; it becomes the key.
        say: gets a line of text about what was found.
    """

    def __init__(self, path: Path, what: dict[str, Any], say: Callable[[str], None]) -> None:
        self.path, self.what, self.key = path, what, digest(what)
        self.log = store.Log(path)
        self.trials: dict[str, Trial] = {}
        self.final: dict[str, Any] | None = None
        lines, damaged = self.log.read() if path.exists() else ([], 0)
        ours = [x for x in lines if x.get("kind") == "tune" and x.get("key") == self.key]
        for line in ours:
            if line.get("event") == "config" and isinstance(line.get("trial"), dict):
                trial = Trial(**line["trial"])
                self.trials[canonical(trial.config)] = trial
                self.final = None  # a config after the final: that final is no longer about all of them
            elif line.get("event") == "final":
                self.final = line["result"]
        self.resumed = len(self.trials)
        if damaged:
            say(f"{path}: {damaged} cut or damaged line{'s' * (damaged > 1)} skipped")
        if ours:
            say(f"{path}: {self.resumed} configs measured before are not measured again")
        elif other := self._other(lines):
            say(f"{path}: starts afresh, earlier outcomes are for {other}")
        if not any(line.get("event") == "start" for line in ours):  # none yet, or it was damaged: readers look for it
            start = {"kind": "tune", "event": "start", "schema": SCHEMA, "key": self.key, "what": what}
            self.log.append(start | {"unix_time": time.time()})

    def _other(self, lines: list[dict[str, Any]]) -> str:
        """What differs from the last run under another key: `another source_hash, seed`."""
        starts = [x["what"] for x in lines if x.get("kind") == "tune" and isinstance(x.get("what"), dict)]
        if not starts:
            return ""
        changed = [k for k in self.what if starts[-1].get(k) != self.what[k]]
        return f"another {', '.join(changed) or 'set of fields'}"

    def add(self, trial: Trial) -> None:
        """Keep an outcome; on the disk when this returns."""
        data = asdict(trial) | {"status": str(trial.status)}
        self.log.append({"kind": "tune", "event": "config", "key": self.key, "trial": data, "unix_time": time.time()})
        self.trials[canonical(trial.config)] = trial
        self.final = None

    def finish(self, result: dict[str, Any]) -> None:
        """Keep the verdict; where the journal lies is not part of it, for it may be moved."""
        result = {name: value for name, value in result.items() if name != "journal"}
        self.log.append({"kind": "tune", "event": "final", "key": self.key, "result": result, "unix_time": time.time()})
        self.final = result

    @property
    def spent_s(self) -> float:
        """Seconds all outcomes took, in this run and before."""
        return sum(trial.spent_s for trial in self.trials.values())
