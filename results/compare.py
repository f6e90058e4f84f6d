"""Two runs, cell by cell: what got slower, what broke, and what these numbers cannot say.

Rounds of one interleaved session are paired and tested exactly: `slower` and `faster` are then claims with
an error rate. Two *stored* sessions are not: process, clocks and temperature differ between them by an amount
that neither contains, so their strongest word is `suspect` (simulated: with 1 % between sessions and the rules of
other tools, 57 to 100 % of the builds of 200 unchanged cells are red). A wrong result is an error anywhere.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from rooftune.core import Evidence, ExitCode, Status
from rooftune.results import statistics
from rooftune.results.record import Record

SUSPECT = 0.05  # two sessions of the same binary often differ by less than this, rarely by more
REGIME = ("clock", "cache", "threads", "power_capped")  # how a time was taken; unlike ones do not compare
SUITE = "all paired cells"


class Verdict(StrEnum):
    """On one cell. The order is that of reports: worst first."""

    BROKEN = "broken"  # the result is wrong now, or it was ok and fails now
    SLOWER = "slower"  # confirmed: paired rounds
    SUSPECT_SLOWER = "suspect-slower"
    INCOMPARABLE = "incomparable"
    INCONCLUSIVE = "inconclusive"
    GONE = "gone"
    SUSPECT_FASTER = "suspect-faster"
    FASTER = "faster"
    FIXED = "fixed"
    NEW = "new"
    UNSEEN = "no-change-seen"  # neither shown to be the same nor with room for a change worth knowing: `duel`
    SAME = "same"
    UNMEASURED = "unmeasured"  # no time on either side


ERRORS = {Verdict.BROKEN, Verdict.SLOWER}
OPEN = {Verdict.SUSPECT_SLOWER, Verdict.INCOMPARABLE, Verdict.INCONCLUSIVE, Verdict.GONE}
COMPARED = {
    *(Verdict.SLOWER, Verdict.FASTER, Verdict.SUSPECT_SLOWER, Verdict.SUSPECT_FASTER),
    *(Verdict.SAME, Verdict.UNSEEN, Verdict.INCONCLUSIVE),
}


@dataclass(frozen=True)
class Cell:
    """One competitor on one problem in two runs.

    Times are seconds; `ratio` is candidate time / base time (above 1: slower now) with its 95 % interval;
    `p` and `mde` (smallest change these rounds would find, 0.02 = 2 %) exist for paired rounds only.
    `changed` says what else differs: source, toolchain, config. `how`: the options that time it the same way again.
    """

    problem: str
    impl: str
    verdict: Verdict
    reason: str = ""
    evidence: str = Evidence.MEASURED
    base_s: float | None = None
    candidate_s: float | None = None
    ratio: float | None = None
    lo: float | None = None
    hi: float | None = None
    p: float | None = None
    mde: float | None = None
    rounds: int = 0
    paired: bool = False
    changed: tuple[str, ...] = field(default=())
    how: tuple[str, ...] = field(default=())


def compare(
    run_a: Sequence[Record],
    run_b: Sequence[Record],
    margin: float = 0.005,
    same: float = 0.02,
    alpha: float = 0.01,
) -> list[Cell]:
    """Judge run b (candidate) against run a (base), worst cells first.

    Args:
        margin: a paired change must exceed this (0.005 = 0.5 %).
        same: `same` means that the whole 95 % interval of the ratio lies within 1 +- this.
        alpha: chance of one or more false `slower` among all paired cells (Holm); the suite's mean, an extra
            cell where there are two or more paired ones, is a test of its own at the same level.
    """
    cells: list[Cell] = []
    paired: dict[int, tuple[statistics.Rounds, statistics.Rounds]] = {}
    launches: dict[int, int] = {}
    for base, candidate in _match(run_a, run_b):
        cell = _judge(base, candidate, same)
        if cell.paired and base and candidate and base.rounds and candidate.rounds:
            paired[len(cells)] = (base.rounds, candidate.rounds)
            launches[len(cells)] = _launches(candidate)
        cells.append(cell)
    for index, decision in statistics.decide(paired, margin, same, alpha, launches).items():
        cells[index] = _decided(cells[index], decision)
    if len(paired) > 1 and len({len(a) for a, _ in paired.values()}) == 1:
        mean = tuple(statistics.suite_rounds([pair[side] for pair in paired.values()]) for side in (0, 1))
        whole = Cell(SUITE, "geometric mean", Verdict.SAME, paired=True)
        least = {0: min(launches.values())}
        cells.append(_decided(whole, statistics.decide({0: (mean[0], mean[1])}, margin, same, alpha, least)[0]))
    return worst_first(cells)


def worst_first(cells: Iterable[Cell]) -> list[Cell]:
    """By verdict, then by how much slower."""
    order = list(Verdict)
    return sorted(cells, key=lambda c: (order.index(c.verdict), -(c.ratio or 1.0), c.problem, c.impl))


def _decided(cell: Cell, found: statistics.Decision) -> Cell:
    reason = "" if found.verdict != Verdict.INCONCLUSIVE else f"{found.rounds} rounds do not decide"
    return replace(
        cell,
        verdict=Verdict(found.verdict),
        reason=reason,
        ratio=found.ratio,
        lo=found.lo,
        hi=found.hi,
        p=found.p,
        mde=found.mde,
        rounds=found.rounds,
    )


def _match(run_a: Iterable[Record], run_b: Iterable[Record]) -> list[tuple[Record | None, Record | None]]:
    """Pairs with the same problem, competitor and evidence. A default meets a default and a tuned config a
    tuned one; where a run has only one of the two, they meet each other. A later record replaces an earlier."""
    sides: list[dict[tuple[str, str, str], dict[bool, Record]]] = [{}, {}]
    for side, run in zip(sides, (run_a, run_b), strict=True):
        for record in run:
            side.setdefault((*record.cell, record.evidence), {})[record.default] = record
    pairs: list[tuple[Record | None, Record | None]] = []
    for key in dict.fromkeys((*sides[0], *sides[1])):
        a, b = sides[0].get(key, {}), sides[1].get(key, {})
        if len(a) == len(b) == 1:
            pairs.append((next(iter(a.values())), next(iter(b.values()))))
        else:
            pairs += [(a.get(default), b.get(default)) for default in (True, False) if default in a or default in b]
    return pairs


def _judge(base: Record | None, candidate: Record | None, same: float) -> Cell:
    """Everything but the paired test; a cell that needs it comes back with `paired` set."""
    known = candidate or base
    assert known is not None
    name = known.cell[1] + ("" if known.default or "call" in known.config else " (tuned)")  # torch's calls are not
    cell = Cell(known.problem, name, Verdict.UNMEASURED, evidence=known.evidence, how=_how(base or known))
    if base and candidate:
        cell = replace(cell, base_s=base.time_s, candidate_s=candidate.time_s, changed=_changes(base, candidate))
    if candidate and candidate.status == Status.WRONG:
        before = "" if base and base.status == Status.OK else "as before: " if base else "new: "
        return replace(cell, verdict=Verdict.BROKEN, reason=f"{before}{candidate.reason or 'wrong result'}")
    verdict, reason = _presence(base, candidate)
    if verdict or base is None or candidate is None:
        return replace(cell, verdict=verdict or Verdict.UNMEASURED, reason=reason)
    if base.time_s is None or candidate.time_s is None:
        if base.time_s is candidate.time_s:
            return replace(cell, verdict=Verdict.SAME, reason=f"ok as before ({candidate.evidence})")
        return replace(cell, reason=f"no time in the {'base' if base.time_s is None else 'candidate'}")
    if together := _one_session(base, candidate):
        return replace(cell, paired=True)
    if unlike := _unlike(base, candidate):
        return replace(cell, verdict=Verdict.INCOMPARABLE, reason="; ".join(unlike))
    return _stored(cell, base, candidate, same, together is None)


def _presence(base: Record | None, candidate: Record | None) -> tuple[Verdict | None, str]:
    """The verdict that needs no times, if there is one."""
    if base is None or candidate is None:
        there = candidate or base
        assert there is not None
        if there.status != Status.OK:  # it was, or is, listed only to say why it did not run
            return Verdict.UNMEASURED, f"{there.status} in the {'candidate' if candidate else 'base'} only"
        return (Verdict.NEW if candidate else Verdict.GONE), ""
    was, now = base.status == Status.OK, candidate.status == Status.OK
    text = f"{candidate.status}: {candidate.reason}" if candidate.reason else candidate.status
    if was and now:
        return None, ""
    if was:
        return (Verdict.GONE if candidate.status == Status.SKIPPED else Verdict.BROKEN), text
    if now:
        reason = f"was {base.status}" + (f": {base.reason}" if base.reason else "")
        return (Verdict.NEW if base.status == Status.SKIPPED else Verdict.FIXED), reason
    return Verdict.UNMEASURED, text


def _one_session(base: Record, candidate: Record) -> bool | None:
    """Are these rounds of one interleaved session? None: one session, but the rounds do not pair."""
    sessions = base.regime.get("session"), candidate.regime.get("session")
    if not (base.run and base.run == candidate.run) and not (sessions[0] and sessions[0] == sessions[1]):
        return False
    return True if base.rounds and candidate.rounds and len(base.rounds) == len(candidate.rounds) else None


def _how(record: Record) -> tuple[str, ...]:
    """Options of `run` for what is not its default: without them the new run would be incomparable."""
    regime, found = record.regime, list[str]()
    found += ["--cache", "cold"] if regime.get("cache") == "cold" else []
    found += ["--clock", "cpu"] if regime.get("clock") == "cpu" else []
    if record.device.get("kind") == "cpu":  # where there is a GPU too, the default is that
        found += ["--device", "cpu", *(["--threads", str(regime["threads"])] if regime.get("threads") else [])]
    return tuple(found)


def _launches(record: Record) -> int:
    """How many processes, one after another, its rounds were taken in."""
    found = record.regime.get("launches")
    return found if isinstance(found, int) and 0 < found <= len(record.rounds or ()) else 1


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    def short(value: Any) -> str:
        text = "unknown" if value is None else str(value)
        return text if len(text) <= 40 else text[:37] + "..."

    keys = [k for k in dict.fromkeys((*a, *b)) if a.get(k) != b.get(k)]
    return [f"{k} {short(a.get(k))} -> {short(b.get(k))}" for k in keys]


def _unlike(base: Record, candidate: Record) -> list[str]:
    """Fields of device and regime that differ, so that the two times are not about the same thing."""
    identity = _differences(base.device.get("identity") or {}, candidate.device.get("identity") or {})
    regime = [{k: r.regime[k] for k in REGIME if k in r.regime} for r in (base, candidate)]
    return identity + _differences(*regime)


def _changes(base: Record, candidate: Record) -> tuple[str, ...]:
    """What may be the cause: the kernel's source, the toolchain, the config."""
    source = ["kernel source"] if base.source_hash != candidate.source_hash else []
    configs = _differences(base.config, candidate.config)
    return (*source, *_differences(base.versions, candidate.versions), *configs)


def _stored(cell: Cell, base: Record, candidate: Record, same: float, lost: bool) -> Cell:
    """Two sessions: at most a suspicion, and only beyond 5 % and beyond the interval."""
    assert base.time_s is not None
    assert candidate.time_s is not None
    ratio, lo, hi = candidate.time_s / base.time_s, None, None
    rounds = 0
    if base.rounds and candidate.rounds:
        ratio, lo, hi = statistics.unpaired_ratio(candidate.rounds, base.rounds)
        rounds = min(len(base.rounds), len(candidate.rounds))
    cell = replace(cell, ratio=ratio, lo=lo, hi=hi, rounds=rounds)
    note = "one session, but its rounds do not pair; " if lost else ""
    if ratio > 1 + SUSPECT and (lo is None or lo > 1):
        reason = f"{note}two sessions cannot confirm it: measure again"
        return replace(cell, verdict=Verdict.SUSPECT_SLOWER, reason=reason)
    if ratio < 1 / (1 + SUSPECT) and (hi is None or hi < 1):
        return replace(cell, verdict=Verdict.SUSPECT_FASTER, reason=f"{note}two sessions cannot confirm it")
    if lo is None or hi is None:
        why = "too few rounds for an interval" if rounds else "no samples stored"
    elif 1 - same < lo and hi < 1 + same:
        return replace(cell, verdict=Verdict.SAME)
    elif lo <= 1 <= hi:
        why = "the interval is too wide"
    else:
        why = f"two sessions may differ by {SUSPECT:.0%} without a cause"
    return replace(cell, verdict=Verdict.INCONCLUSIVE, reason=note + why)


def gate(cells: Iterable[Cell], inconclusive: ExitCode = ExitCode.INCONCLUSIVE) -> ExitCode:
    """Exit code of a comparison: 1 if anything is broken or confirmed slower; `inconclusive` (3, or what the
    user chose) if anything is suspect, undecided, gone or incomparable, or if nothing was compared; else 0."""
    verdicts = {cell.verdict for cell in cells}
    if verdicts & ERRORS:
        return ExitCode.REGRESSION
    return inconclusive if verdicts & OPEN or not verdicts & COMPARED else ExitCode.OK


def remeasure(cells: Iterable[Cell], rounds: int = 32) -> str:
    """The command that measures again what is open, or nothing if nothing is. At 32 rounds the smallest
    change found at alpha .01 / 200 is the margin plus 1.1 standard deviations of a round."""
    again = (Verdict.SUSPECT_SLOWER, Verdict.INCONCLUSIVE, Verdict.SLOWER, Verdict.BROKEN)
    chosen = [c for c in cells if c.verdict in again and c.problem != SUITE and c.evidence == Evidence.MEASURED]
    if not chosen:
        return ""
    commands = []
    for how in dict.fromkeys(c.how for c in chosen):
        mine = [c for c in chosen if c.how == how]
        names = dict.fromkeys(c.impl.partition(" ")[0].partition(":")[0].partition("/")[2] for c in mine)
        flags = [part for problem in dict.fromkeys(c.problem for c in mine) for part in ("--problem", problem)]
        text = ["python", "bench.py", "run", *flags, "--only", ",".join(names), "--rounds", str(rounds), *how]
        commands.append(shlex.join(text))
    return " && ".join(commands)


def explain(cells: Sequence[Cell], margin: float = 0.005, same: float = 0.02, alpha: float = 0.01) -> list[str]:
    """What was tested and how, what was not compared and why, and the command that measures again.

    The arguments are those given to `compare`.
    """
    timed = [c for c in cells if c.verdict in COMPARED and c.ratio is not None and c.problem != SUITE]
    paired, stored = [c for c in timed if c.paired], [c for c in timed if not c.paired]
    lines = [f"{len(timed)} cells compared: {len(paired)} in paired rounds, {len(stored)} between two sessions."]
    if paired:
        lines.append(
            f"Paired: exact signed-rank on round differences; slower/faster by more than {margin:.1%}; chance of "
            f"any false 'slower' at most {alpha:.0%} (Holm over {len(paired)} cells), and {alpha:.0%} for their "
            f"mean; same: 95 % interval within ±{same:.0%}."
        )
        effects = sorted(c.mde for c in paired if c.mde is not None)
        if effects:
            lines.append(f"Smallest change found with 95 % power: {effects[0]:.1%} to {effects[-1]:.1%}.")
        if len(effects) < len(paired):
            few = len(paired) - len(effects)
            lines.append(f"{few} of the paired cells have too few rounds to find a change of any size.")
    if stored:
        lines.append(
            f"Between sessions: the interval holds within-session noise only; beyond {SUSPECT:.0%} and the interval "
            f"a cell is suspect, never confirmed; same: interval within ±{same:.0%}."
        )
    if untimed := sum(c.verdict == Verdict.SAME and c.ratio is None for c in cells):
        lines.append(f"{untimed} results without a time (emulated, compiled) are ok as before.")
    lines += not_compared(cells)
    if command := remeasure(cells):
        lines.append(f"Measure again: {command}")
    return lines


def not_compared(cells: Sequence[Cell]) -> list[str]:
    """What has no verdict on its time, and why: a line for each reason."""
    lines: list[str] = []
    for verdict in (Verdict.INCOMPARABLE, Verdict.GONE, Verdict.NEW, Verdict.UNMEASURED):
        reasons = Counter(c.reason or f"in the {'base' if verdict == Verdict.GONE else 'candidate'} only"
                          for c in cells if c.verdict == verdict)  # fmt: skip
        lines += [f"Not compared, {verdict}: {count} ({reason})." for reason, count in reasons.most_common()]
    return lines
