"""What production should use for a problem, and why: chosen from stored records, never slower than torch.

A competitor is preferred only if records of this very device show it faster than the best torch call with
confidence; otherwise torch is the answer. Choosing reads files and imports no GPU library;
`production.best` then builds the choice in the calling process.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rooftune import device as devices
from rooftune import registry
from rooftune.autotune.journal import canonical, toolchain
from rooftune.autotune.table import Entry, Table
from rooftune.core import Config, Evidence, Problem, Status, UsageError
from rooftune.results import statistics, store
from rooftune.results.record import Record

MAX_RUNS = 200  # run files looked at, the newest first
ALPHA = 0.05  # chance that any of a problem's challengers is wrongly called faster than torch


@dataclass(frozen=True)
class Candidate:
    """Something that could be used: measured as it is, or a tuned config whose default was measured.

    Attributes:
        time_s: seconds per call; for a tuned config in the rounds of its own final.
        ratio: best torch call's time over its own, `ratio_ci` its interval; None for torch itself.
        reason: why it was not chosen.
    """

    impl: str
    config: Config | None
    source: str  # "measured", "tuned", "nearest" (tuned at another shape), "default"
    time_s: float | None = None
    ratio: float | None = None
    ratio_ci: tuple[float, float] | None = None
    run: str = ""
    why: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Choice:
    """The answer: what to use, and all that was considered."""

    problem: str
    device: str
    use: Candidate
    considered: list[Candidate] = field(default_factory=list)
    next: str = ""  # the command that would improve the answer

    def as_json(self) -> dict[str, Any]:
        """Plain data: the fields of what to use, and the rest."""
        chosen = asdict(self.use)
        chosen["ratio_to_torch"] = chosen.pop("ratio")
        chosen.pop("reason")
        others = [asdict(c) for c in self.considered]
        return {"problem": self.problem, "device": self.device, **chosen, "considered": others, "next": self.next}


def winners(records: Iterable[Record]) -> dict[str, Record]:
    """Per problem, the record to use: the one fastest over torch with confidence, else the fastest torch call.

    Records should come from one run: then all times share their rounds. A problem on which no torch call
    was measured has no winner.
    """
    by_problem: dict[str, list[Record]] = {}
    for record in records:
        if _timed(record):
            by_problem.setdefault(record.problem, []).append(record)
    found: dict[str, Record] = {}
    for problem, group in by_problem.items():
        torch = min(filter(_is_baseline, group), key=lambda r: r.time_s or 0.0, default=None)
        if torch is None:
            continue
        rivals = [r for r in group if not _is_baseline(r)]
        faster = [r for r in rivals if (ci := _against(r, torch, len(rivals))) is not None and ci[0] > 1.0]
        found[problem] = max(faster, key=lambda r: r.ratio_to_torch or 0.0, default=torch)
    return found


def _timed(record: Record) -> bool:
    return record.status == Status.OK and record.evidence == Evidence.MEASURED and record.time_s is not None


def _is_baseline(record: Record) -> bool:
    try:
        return registry.impl(record.impl).baseline
    except UsageError:  # a user's own file, or a competitor that is gone
        return False


def _against(record: Record, torch: Record, rivals: int) -> tuple[float, float] | None:
    """Interval of torch's time over the record's: from paired rounds of one run, sharpened for the number of
    rivals (Bonferroni), else as it was stored."""
    mine, theirs = record.rounds, torch.rounds
    if mine and theirs and record.run == torch.run and len(mine) == len(theirs):
        _, low, high = statistics.ratio(theirs, mine, ALPHA / max(rivals, 1))
        return None if low is None or high is None else (low, high)
    return None if record.ratio_ci is None else (record.ratio_ci[0], record.ratio_ci[1])


def choose(problem: Problem | str, device: str = "cpu", threads: int | None = None) -> Choice:
    """Choose from the newest records of this device (one's own runs, then the committed ones) and the tuned table.

    Args:
        threads: CPU threads the records must have been made with; those of the newest record if not given.
    Raises:
        UsageError: no such problem or device, no threads, or an operator without torch's call.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be positive, not {threads}")
    asked = registry.problem(problem)
    found = devices.find(device)
    identity = found.identity()
    usable, passed_over = _records(asked, identity, threads)
    how = f"--device {found}" + (f" --threads {threads}" if threads else "")  # what is measured must count here
    run_it = f'python bench.py run "{asked}" {how}'
    torch = min((r for r in usable if _is_baseline(r)), key=lambda r: r.time_s or 0.0, default=None)
    if torch is None:
        safe = registry.baseline(asked.op)
        who = "torch was not" if usable or passed_over else "nothing was"
        known = f"{who} measured for this problem on this device"
        known = next((c.reason for c in passed_over if c.impl == safe.key), known)  # not another's reason
        use = Candidate(safe.key, None, "default", why=f"{known}; torch is the safe choice")
        return Choice(str(asked), str(found), use, passed_over, run_it)
    base = Candidate(torch.impl, torch.config, "measured", torch.time_s, run=torch.run)
    rivals = [r for r in usable if not _is_baseline(r)]
    field_ = [_measured(r, torch, len(rivals)) for r in rivals]
    tuned, stale = _tuned(asked, identity, threads or torch.regime.get("threads"), rivals, field_, Table())
    faster = [c for c in (*field_, *tuned) if c.ratio_ci is not None and c.ratio_ci[0] > 1.0]
    use = max(faster, key=lambda c: c.ratio or 0.0, default=base)
    if use is base:
        best = max(field_, key=lambda c: c.ratio or 0.0, default=None)
        seen = "nothing else was measured"
        if best:
            seen = f"nothing beats torch with confidence ({best.impl}: {_shown(best)})"
        use = replace(base, why=seen)
    lost = [c for c in (base, *field_, *tuned) if (c.impl, c.config) != (use.impl, use.config)]
    others = [replace(c, reason=_beaten(c, use)) for c in lost]
    todo = run_it if not rivals else f'python bench.py tune "{asked}" {how}' if not tuned else ""
    return Choice(str(asked), str(found), use, [*others, *stale, *passed_over], todo)


def _records(problem: Problem, identity: dict[str, Any], threads: int | None) -> tuple[list[Record], list[Candidate]]:
    """(usable records, newest per competitor and config; those passed over with the reason)."""
    usable: dict[tuple[str, str], Record] = {}
    passed: dict[tuple[str, str], Candidate] = {}
    vetoed: set[tuple[str, str]] = set()
    regime: tuple[Any, ...] | None = None
    for path in [*store.list_runs(), *store.list_runs(store.REFERENCE)][:MAX_RUNS]:
        try:
            records = store.load_run(path, say=lambda text: None)
        except UsageError:  # not a run, or damaged: `compare` and `report` say what is wrong with it
            continue
        for record in reversed(records):
            if record.problem != str(problem) or record.evidence != Evidence.MEASURED:
                continue
            key = (record.impl, canonical(record.config))
            if key in usable or key in vetoed:
                continue
            mine = (record.regime.get("threads"), record.regime.get("cache"), record.regime.get("clock"))
            reason = _foreign(record, identity)
            if not reason and (threads if regime is None else regime[0]) not in (None, mine[0]):
                reason = f"measured with {mine[0]} threads"
            if not reason and regime is not None and mine != regime:
                reason = f"measured under another regime ({', '.join(map(str, mine))})"
            if not reason and (record.status != Status.OK or record.time_s is None):
                reason = f"{record.status} {record.reason}".strip()
                vetoed.add(key)  # newer than any success of the same source here
            if reason:
                passed.setdefault(key, Candidate(record.impl, record.config, "measured", run=record.run, reason=reason))
            else:
                regime = regime or mine
                usable[key] = record
    passed = {key: value for key, value in passed.items() if key not in usable}
    return list(usable.values()), list(passed.values())


def _foreign(record: Record, identity: dict[str, Any]) -> str:
    """Why a record says nothing about this device, source and toolchain, or nothing."""
    if (seen := record.device.get("identity")) != identity:
        return f"measured on another device ({record.device.get('name') or json.dumps(seen)})"
    try:
        impl = registry.impl(record.impl)
    except UsageError:
        return "its file is not here"
    if record.source_hash != impl.source_hash:
        return "its source changed since it was measured"
    kit = toolchain(impl)
    changed = [f"{k} {record.versions[k]} -> {v}" for k, v in kit.items() if record.versions.get(k, v) != v]
    return f"measured with another toolchain ({', '.join(changed)})" if changed else ""


def _measured(record: Record, torch: Record, rivals: int) -> Candidate:
    interval = _against(record, torch, rivals)
    found = Candidate(
        record.impl, record.config, "measured", record.time_s, record.ratio_to_torch, interval, record.run
    )
    return replace(found, why=f"{_shown(found)} in {record.run or 'a stored run'}")


def _tuned(
    problem: Problem,
    identity: dict[str, Any],
    threads: int | None,
    rivals: Sequence[Record],
    measured: Sequence[Candidate],
    table: Table,
) -> tuple[list[Candidate], list[Candidate]]:
    """(tuned configs with their ratio to torch, those not usable with the reason).

    A tuned config that was not raced itself has the ratio of its default times its speedup over it; the
    interval multiplies the ends of both, which covers at least what either does.
    """
    found: list[Candidate] = []
    stale: list[Candidate] = []
    for impl in registry.impls(problem.op):
        looked = table.lookup(impl, problem, identity, threads)
        entry: Entry | None = looked.entry
        if entry is None:
            if "not used" in looked.why:
                stale.append(Candidate(impl.key, None, "tuned", reason=looked.why))
            elif (near := _near(impl, problem, identity, threads, rivals, measured, table)) is not None:
                found.append(near)
            continue
        if any(c.impl == impl.key and c.config == entry.config for c in measured):
            continue  # raced as it is: that record counts
        default = next((c for c in measured if c.impl == impl.key and c.config == entry.default), None)
        candidate = Candidate(impl.key, entry.config, "tuned", entry.time_s)
        if default is None or default.ratio is None or default.ratio_ci is None:
            stale.append(replace(candidate, reason=f"{looked.why}, but its default was not raced against torch"))
            continue
        low, high = (a * b for a, b in zip(default.ratio_ci, entry.speedup_ci, strict=True))
        candidate = replace(candidate, ratio=default.ratio * entry.speedup, ratio_ci=(low, high), run=default.run)
        found.append(replace(candidate, why=f"{_shown(candidate)}: its default {_shown(default)}, {looked.why}"))
    return found, stale


def _near(
    impl: registry.Impl,
    problem: Problem,
    identity: dict[str, Any],
    threads: int | None,
    rivals: Sequence[Record],
    measured: Sequence[Candidate],
    table: Table,
) -> Candidate | None:
    """A neighbour's config for a shape that was not tuned: its default's ratio to torch, times what the rule gained
    at least on held-out shapes."""
    plain = next((r.config for r in rivals if r.impl == impl.key and r.default), None)
    default = next((c for c in measured if c.impl == impl.key and c.config == plain), None)
    if threads is None or default is None or default.ratio is None or default.ratio_ci is None:
        return None
    near = table.neighbour(impl, problem, identity, threads)
    if near.config is None or near.config == default.config:
        return None
    low, high = (end * near.gain for end in default.ratio_ci)
    made = Candidate(impl.key, near.config, "nearest", None, default.ratio * near.gain, (low, high), default.run)
    return replace(made, why=f"{_shown(made)}: its default {_shown(default)}, {near.why}")


def _shown(candidate: Candidate) -> str:
    if candidate.ratio is None:
        return "not compared with torch"
    interval = candidate.ratio_ci
    shown = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else " (no interval)"
    return f"{candidate.ratio:.2f}x torch's speed{shown}"


def _beaten(candidate: Candidate, winner: Candidate) -> str:
    if candidate.ratio_ci is not None and candidate.ratio_ci[0] > 1.0:
        return f"{_shown(candidate)}, {winner.impl} is faster"
    return _shown(candidate) if candidate.ratio is not None else "the baseline"
