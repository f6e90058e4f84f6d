"""Rows of compile-time resources: stored as a baseline, judged against one, and shown.

A row is plain data as `rooftune.static.row` makes it. What the same compiler makes of another source can be judged
without running it; what another compiler makes cannot, so such rows are `incomparable` and the compilers are named.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rooftune.core import ExitCode, Status, UsageError
from rooftune.results import store

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = 1
KIND = "static"
Row = dict[str, Any]
COLUMNS = (
    *("impl", "problem", "precision", "config", "default", "arch", "registers", "spill_bytes", "shared_bytes"),
    *("threads", "occupancy", "blocks_per_sm", "occupancy_limit", "tensor_core_instructions", "toolchain"),
    *("source_hash", "evidence", "status", "reason"),
)
NEEDED = ("impl", "problem", "precision", "config", "default", "arch", "status", "packages", "toolchain")
# Matrix units by the instruction names of machine code and of PTX: a disassembler may be there or not.
UNITS = (
    ("tcgen05", ("UTC", "tcgen05.mma")),
    ("wgmma", ("HGMMA", "IGMMA", "QGMMA", "BGMMA", "wgmma.mma_async")),
    ("mma", ("HMMA", "IMMA", "QMMA", "DMMA", "BMMA", "OMMA", "mma.sync")),
)


# --- a baseline -----------------------------------------------------------------------------------------------------


def save(path: Path | str, rows: Sequence[Row]) -> None:
    """Write a baseline: a header and a line a row, each with its checksum."""
    header = {"kind": f"{KIND}-header", "schema": SCHEMA, "unix_time": time.time(), "rows": len(rows)}
    lines = [header, *({"kind": KIND, "schema": SCHEMA, **row} for row in rows)]
    store.atomic_write(path, "".join(store.seal(line) + "\n" for line in lines))


def load(path: Path | str) -> list[Row]:
    """Read a baseline.

    Raises:
        UsageError: not readable, not one, damaged, or from a newer version.
    """
    lines, damaged = store.Log(path).read()
    rows = [line for line in lines if line.get("kind") == KIND]
    header = next((line for line in lines if line.get("kind") == f"{KIND}-header"), None)
    if header is None or not rows:
        raise UsageError(f"{path}: not a static baseline; make one with: python bench.py static --save {path}")
    if not isinstance(header.get("schema"), int) or header["schema"] > SCHEMA:
        raise UsageError(f"{path}: schema {header.get('schema')!r} is not ours ({SCHEMA})")
    if damaged or header.get("rows") != len(rows):
        raise UsageError(
            f"{path}: {damaged} damaged lines, {len(rows)} of {header.get('rows')} rows left; make it anew"
        )
    for row in rows:
        if missing := [name for name in NEEDED if name not in row]:
            raise UsageError(f"{path}: a row has no '{missing[0]}'")
    return rows


def key(row: Row) -> tuple[str, ...]:
    """What two rows must share to be compared. The default is compared with the default, whatever its config is."""
    config = "default" if row["default"] else json.dumps(row["config"], sort_keys=True)
    return row["impl"], row["problem"], config, row["arch"]


# --- the verdict ----------------------------------------------------------------------------------------------------


class Verdict(StrEnum):
    """On one row. The order is that of reports: worst first."""

    BROKEN = "broken"  # compiled before, and does not now
    WORSE = "worse"  # more spills, less occupancy, or a matrix unit that is not used any more
    INCOMPARABLE = "incomparable"  # another compiler, or none
    GONE = "gone"
    FIXED = "fixed"
    BETTER = "better"
    NEW = "new"
    SAME = "same"


@dataclass(frozen=True)
class Change:
    """One row against its baseline: the verdict and what changed, in words. `row` is today's, or the lost one.

    `older`: the baseline's source, if it is another than today's. The figures are compared all the same: that is what
    a baseline is for.
    """

    row: Row
    verdict: Verdict
    text: str
    older: str = ""


def compare(baseline: Iterable[Row], rows: Iterable[Row]) -> list[Change]:
    """Every row of either side, worst first."""
    old, new = {key(r): r for r in baseline}, {key(r): r for r in rows}
    changes = [Change(r, Verdict.NEW, "not in the baseline") for k, r in new.items() if k not in old]
    changes += [Change(r, Verdict.GONE, "in the baseline only") for k, r in old.items() if k not in new]
    changes += [replace(_judge(old[k], r), older=_older(old[k], r)) for k, r in new.items() if k in old]
    order = list(Verdict)
    return sorted(changes, key=lambda c: order.index(c.verdict))


def gate(changes: Sequence[Change]) -> ExitCode:
    """1 for a row that got worse, else 3 where something could not be compared, else 0."""
    verdicts = {c.verdict for c in changes}
    if verdicts & {Verdict.BROKEN, Verdict.WORSE}:
        return ExitCode.REGRESSION
    return ExitCode.INCONCLUSIVE if verdicts & {Verdict.INCOMPARABLE, Verdict.GONE} else ExitCode.OK


def _older(old: Row, new: Row) -> str:
    before = str(old.get("source_hash") or "")
    return before if before != new.get("source_hash") else ""


def _judge(old: Row, new: Row) -> Change:
    if other := _other_toolchain(old, new):
        return Change(new, Verdict.INCOMPARABLE, f"other toolchain: {other}")
    was, runs = old["status"] == Status.OK, new["status"] == Status.OK
    if was and not runs:
        return Change(new, Verdict.BROKEN, f"no longer compiles: {new['status']} {new['reason']}".strip())
    if runs and not was:
        return Change(new, Verdict.FIXED, f"compiles now (was {old['status']})")
    if not runs:
        return Change(new, Verdict.SAME, str(new["status"]))
    worse: list[str] = []
    better: list[str] = []
    spills = _pair(old, new, "spill_bytes")
    if spills and spills[0] != spills[1]:
        (worse if spills[1] > spills[0] else better).append(f"spills {spills[0]} -> {spills[1]} bytes")
    held = _pair(old, new, "occupancy")
    if held and abs(held[0] - held[1]) > 1e-9:
        (worse if held[1] < held[0] else better).append(f"occupancy {held[0]:.1%} -> {held[1]:.1%}{_why(old, new)}")
    before, after = units(old), units(new)
    if lost := [u for u in before if u not in after]:
        worse.append(f"lost its tensor-core instructions: {', '.join(lost)} ({_names(old)} -> {_names(new) or 'none'})")
    elif gained := [u for u in after if u not in before]:
        better.append(f"uses {', '.join(gained)} now")
    moved = "; config changed" if old["config"] != new["config"] else ""
    if worse:
        return Change(new, Verdict.WORSE, "; ".join([*worse, *better]) + moved)
    return Change(new, Verdict.BETTER if better else Verdict.SAME, "; ".join(better) + (moved if better else ""))


def _other_toolchain(old: Row, new: Row) -> str:
    """What differs between the compilers, or nothing. A failed row has no toolchain of its own, only packages."""
    before, after = old["packages"], new["packages"]
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    if names:
        return ", ".join(f"{n} {before.get(n, 'absent')} -> {after.get(n, 'absent')}" for n in names)
    if old["status"] == new["status"] == Status.OK and old["toolchain"] != new["toolchain"]:
        return f"{old['toolchain']} -> {new['toolchain']}"
    missing = str(new.get("reason") or "")
    return missing if new["status"] == Status.SKIPPED and "not installed" in missing else ""


def _pair(old: Row, new: Row, name: str) -> tuple[Any, Any] | None:
    pair = old.get(name), new.get(name)
    return None if None in pair else pair


def _why(old: Row, new: Row) -> str:
    """The figures that moved the occupancy."""
    names = {"registers": "registers", "shared_bytes": "shared bytes", "threads": "threads"}
    moved = [(text, *pair) for n, text in names.items() if (pair := _pair(old, new, n)) and pair[0] != pair[1]]
    return f" ({', '.join(f'{text} {a} -> {b}' for text, a, b in moved)})" if moved else ""


def units(row: Row) -> list[str]:
    """Matrix units that a row's instructions belong to: `tcgen05`, `wgmma`, `mma`."""
    found = row.get("tensor_core_instructions") or ()
    return [unit for unit, starts in UNITS if any(name.startswith(starts) for name in found)]


def _names(row: Row) -> str:
    """Instructions without their variants: `HGMMA` for `HGMMA.64x256x16.F32.BF16`."""
    found = (row.get("tensor_core_instructions") or ()) if row["status"] == Status.OK else ()
    stems = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
    return ", ".join(
        dict.fromkeys(next((s for s in stems if name.startswith(s)), name.partition(".")[0]) for name in found)
    )


# --- how rows are shown ---------------------------------------------------------------------------------------------


def to_json_lines(rows: Iterable[Row]) -> str:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def to_csv(rows: Iterable[Row]) -> str:
    """With a header (`COLUMNS`); what is not known is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = row | {"config": json.dumps(row["config"], sort_keys=True, separators=(",", ":"))}
        writer.writerow(flat | {"tensor_core_instructions": " ".join(row.get("tensor_core_instructions") or ())})
    return out.getvalue()


HEADER = ("competitor", "precision", "config", "arch", "registers", "spills B", "shared KiB", "occupancy",
          "tensor core", "toolchain", "source")  # fmt: skip
RIGHT = ("registers", "spills B", "shared KiB")


def cells(row: Row) -> list[str]:
    """A row for people. A config that is not the default is spelled out."""
    config = "default" if row["default"] else " ".join(f"{k}={v}" for k, v in row["config"].items())
    who = [row["impl"], row["precision"], config, row["arch"]]
    if row["status"] != Status.OK:
        return [*who, "", "", "", str(row["status"]), "", row["toolchain"], row["source_hash"][:8]]
    shared, share = row["shared_bytes"], row["occupancy"]
    figures = ["" if row[name] is None else str(row[name]) for name in ("registers", "spill_bytes")]
    held = "" if share is None else f"{share * 100:.3g}%, {row['blocks_per_sm']} by {row['occupancy_limit']}"
    figures += ["" if shared is None else f"{shared / 1024:.1f}", held, _names(row) or "no"]
    return [*who, *figures, row["toolchain"], row["source_hash"][:8]]


def to_markdown(rows: Iterable[Row], changes: Sequence[Change] = ()) -> str:
    """A GitHub table, and what changed against the baseline."""
    from rooftune.results.export import markdown

    text = "Compiled for an architecture that need not be here; nothing ran.\n\n"
    text += markdown(HEADER, [cells(row) for row in rows], RIGHT)
    told = [c for c in changes if c.verdict != Verdict.SAME]
    if told:
        shown = [(str(c.verdict), c.row["impl"], c.row["precision"], c.row["arch"], c.text) for c in told]
        text += "\n" + markdown(("verdict", "competitor", "precision", "arch", "what changed"), shown)
    return text


def table(rows: Sequence[Row], console: Console) -> None:
    """The rows; under them the compilers, and why some have no figures. Equal reasons share a line."""
    from rooftune.results.report import Column, print_table, reasons

    left_out = {"toolchain", *({"config"} if all(row["default"] for row in rows) else ())}
    places = [n for n, name in enumerate(HEADER) if name not in left_out]
    shown: list[tuple[Sequence[str], str]] = []
    for row in rows:
        bad = row["status"] not in (Status.OK, Status.SKIPPED) or row["blocks_per_sm"] == 0
        style = "red" if bad else "dim" if row["status"] == Status.SKIPPED else "yellow" if row["spill_bytes"] else ""
        filled = cells(row)
        shown.append(([filled[n] for n in places], style))
    columns = [Column(HEADER[n], HEADER[n] in RIGHT, HEADER[n] in ("config", "tensor core")) for n in places]
    print_table(console, "Compiled, not run: what the machine code takes of a multiprocessor", columns, shown)
    made = dict.fromkeys(f"{r['toolchain']}" for r in rows if r["status"] == Status.OK)
    console.print(f"  compiled by: {'; '.join(made) or 'nothing here'}", markup=False, style="dim")
    told = [r for r in rows if r["status"] != Status.OK or r["blocks_per_sm"] == 0]
    reasons(((f"{r['impl']} {r['precision']} {r['arch']}", _label(r), r["reason"]) for r in told), console)


def _label(row: Row) -> str:
    return "cannot be launched" if row["status"] == Status.OK else str(row["status"])


def change_table(changes: Sequence[Change], console: Console) -> None:
    """What changed against the baseline, and how many rows did not."""
    from rooftune.results.report import Column, print_table

    told = [c for c in changes if c.verdict != Verdict.SAME]
    styles = {Verdict.BROKEN: "red", Verdict.WORSE: "red", Verdict.INCOMPARABLE: "yellow", Verdict.GONE: "yellow"}
    rows: list[tuple[Sequence[str], str]] = []
    for c in told:
        who = cells(c.row)[:4]
        rows.append(([str(c.verdict), *who, c.text], styles.get(c.verdict, "")))
    if rows:
        names = ("verdict", "competitor", "precision", "config", "arch", "what changed")
        columns = [Column(name, flexible=name in ("config", "what changed")) for name in names]
        print_table(console, "Against the baseline", columns, rows)
    console.print(f"{len(changes) - len(told)} of {len(changes)} rows are as in the baseline", markup=False)
    if older := [c.row["impl"] for c in changes if c.older]:
        counted = ", ".join(f"{name} ({older.count(name)})" for name in dict.fromkeys(older))
        console.print(f"  the baseline is of an older source of: {counted}", markup=False, style="dim", soft_wrap=True)
