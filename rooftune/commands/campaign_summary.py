"""What a campaign found: one row a problem, then what failed, what was not reached, what was saved."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from rooftune.commands.campaign_tune import missing_roof, tune_key
from rooftune.core import Problem, Status
from rooftune.results import export, report, store
from rooftune.results.record import Record

if TYPE_CHECKING:
    from rich.console import Console

    from rooftune.commands.campaign_work import Campaign


def show(work: Campaign, console: Console) -> None:
    """Leave the summary in the folder as summary.json and summary.md, and print it, the table last."""
    rows = [row(work, problem) for problem in work.problems]
    lines: list[tuple[list[str], str]] = [(cells(r), "green" if r["faster"] else "") for r in rows]
    columns = [
        report.Column(name, name in RIGHT, name in ("problem", "best of ours", "best torch call")) for name in HEADER
    ]
    told = notes(work, rows)
    data = {"device": work.session.about, "run": work.session.run, "problems": rows, "notes": told}
    store.atomic_write(work.home.folder / "summary.json", json.dumps(data, indent=1) + "\n")
    store.atomic_write(work.home.folder / "summary.md", markdown(work, rows, told))
    console.print()
    for text in told:
        console.print(f"  {text}", markup=False)
    size = work.home.used() / 2**20
    kept = f"{work.home.folder}: {size:.2f} MiB; to keep it on record: cp {work.home.path} results/reference/"
    console.print(f"  {kept}", markup=False, style="dim", soft_wrap=True)
    if (table := work.home.folder / "tuned.json").exists():
        console.print(
            f"  tuned configs are used with ROOFTUNE_TABLE={table}", markup=False, style="dim", soft_wrap=True
        )
    console.print()
    report.print_table(console, f"Campaign on {work.session.device.name}, {work.plan.spent():.0f} s", columns, lines)


HEADER = (
    "problem",
    "best of ours",
    "time",
    "vs best torch (95 %)",
    "best torch call",
    "time",
    "roof",
    "tuned",
    "source",
)
RIGHT = ("time", "vs best torch (95 %)", "roof", "tuned")
SHOWN = 4  # names of what was cut


def row(work: Campaign, problem: Problem) -> dict[str, Any]:
    """The best of ours and of torch on a problem, from its final race if there was one, else from the first."""
    records = work.latest(problem)
    timed = [r for r in records if r.time_s is not None]
    mine = min((r for r in timed if not work.is_torch(r.impl)), key=_time, default=None)
    torch = min((r for r in timed if work.is_torch(r.impl)), key=_time, default=None)
    gains = [s["result"]["speedup"] for s in _tunings(work) if s.get("result", {}).get("better")
             and s["problem"] == str(problem)]  # fmt: skip
    low = mine.ratio_ci[0] if mine is not None and mine.ratio_ci else None
    return {
        "problem": str(problem),
        "best": None if mine is None else report.name_of(mine, short=True),
        "config": None if mine is None else mine.config,
        "time_s": None if mine is None else mine.time_s,
        "ratio_to_torch": None if mine is None else mine.ratio_to_torch,
        "ratio_ci": None if mine is None else mine.ratio_ci,
        "roof": None if mine is None else mine.roof,
        "source_hash": None if mine is None else mine.source_hash,
        "evidence": None if mine is None else str(mine.evidence),
        "torch": None if torch is None else report.name_of(torch),
        "torch_time_s": None if torch is None else torch.time_s,
        "torch_calls": {report.name_of(r): r.time_s or r.reason for r in records if work.is_torch(r.impl)},
        "tuned_speedup": max(gains, default=None),
        "phase": records[0].regime.get("phase") if records else None,
        "faster": low is not None and low > 1.0,
    }


def _time(record: Record) -> float:
    return record.time_s if record.time_s is not None else math.inf


def cells(found: dict[str, Any]) -> list[str]:
    """A row for people; a problem that was not reached says so."""
    if found["best"] is None and found["torch"] is None:
        why = "not reached" if found["phase"] is None else "nothing ran"
        return [found["problem"], why, "", "", "", "", "", "", ""]
    ratio, ci = found["ratio_to_torch"], found["ratio_ci"]
    shown = "" if ratio is None else f"{ratio:.2f}x" + (f" [{ci[0]:.2f}, {ci[1]:.2f}]" if ci else "")
    times = ["" if t is None else report.format_time(t) for t in (found["time_s"], found["torch_time_s"])]
    roof = "" if found["roof"] is None else f"{found['roof'] * 100:.0f}%"
    tuned = "" if found["tuned_speedup"] is None else f"{found['tuned_speedup']:.2f}x"
    source = (found["source_hash"] or "")[:8]
    return [
        found["problem"],
        found["best"] or "none",
        times[0],
        shown,
        found["torch"] or "none",
        times[1],
        roof,
        tuned,
        source,
    ]


def notes(work: Campaign, rows: list[dict[str, Any]]) -> list[str]:
    """One line each about checks, tuning, energy, and what the time did not reach."""
    home = work.home
    checks = [s for s in home.of("check") if s["source_hash"] == work.sources.get(s["impl"])]
    right = sum(s["status"] == Status.OK for s in checks)
    told = [f"checked: {right} of {len(checks)} competitors x precisions are right on this device"]
    told += [f"{s['impl']} {s['precision']}: {s['status']}: {s['reason']}" for s in checks if s["status"] != Status.OK]
    tuned = _tunings(work)
    if tuned:
        better = sum(bool(s.get("result", {}).get("better")) for s in tuned)
        told.append(f"tuned: {len(tuned)} competitors x problems, {better} configs better than their default")
        told += [f"tuning {s['impl']} {s['problem']}: {s['status']}: {s['reason']}" for s in tuned if "reason" in s]
    for s in home.of("energy"):
        if s["status"] == "unavailable":
            told.append(f"energy: unavailable({s['reason']})")
        else:
            joules, method = s["energy"].get("joules"), s["energy"].get("method")
            value = (
                f"{joules * 1e3:.4g} mJ/call ({method})" if joules else str(s["energy"].get("reason") or s["reason"])
            )
            told.append(f"energy {s['impl']} {s['problem']}: {value}")
    if missed := cut(work, rows):
        told += [f"cut by the budget: {each}" for each in missed]
        told.append("the same command goes on from here")
    return told


def _tunings(work: Campaign) -> list[dict[str, Any]]:
    """Finished tunings of today's sources."""
    return [s for s in work.home.of("tune") if s["key"].endswith(work.sources.get(s["impl"], " gone"))]


def cut(work: Campaign, rows: list[dict[str, Any]]) -> list[str]:
    """What the time did not reach, phase by phase; what cannot be done here is not missed."""
    done, energy = work.home.done, {s.get("problem") for s in work.home.of("energy")}
    checks = [(impl, precision) for impl, precisions in work.to_check() for precision in precisions]
    over = {s["problem"] for phase in ("race", "final") for s in work.home.of(phase) if s["status"] == "skipped"}
    raced = [r for r, p in zip(rows, work.problems, strict=True) if work.healthy(p) and r["problem"] not in over]
    pairs = list(missing_roof(work))
    phases = {
        "checks": (len(checks), [f"{i.key} {p}" for i, p in checks if not done(work.check_key(i, p))]),
        "first races": (len(raced), [r["problem"] for r in raced if r["phase"] is None]),
        "tunings": (len(pairs), [f"{i.key} {p}" for i, p in pairs if not done(tune_key(i, p))]),
        "final races": (len(raced), [r["problem"] for r in raced if r["phase"] != "final"]),
    }
    if not done("energy"):  # there is a sensor
        finals = [r["problem"] for r in raced if r["phase"] == "final"]
        phases["energy readings"] = (len(finals), [p for p in finals if p not in energy])
    return [f"{len(left)} of {total} {name} ({_some(left)})" for name, (total, left) in phases.items() if left]


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def markdown(work: Campaign, rows: list[dict[str, Any]], told: list[str]) -> str:
    """The summary, and every race in full."""
    text = f"# Campaign on {work.session.device.name}\n\nEvery time below was measured there.\n\n"
    text += export.markdown(HEADER, [cells(r) for r in rows], RIGHT) + "\n"
    text += "".join(f"- {line}\n" for line in told) + "\n"
    return text + export.to_markdown([r for p in work.problems for r in work.latest(p)])
