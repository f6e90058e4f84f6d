"""Results for programs: JSON Lines, CSV, Markdown, JUnit, GitHub annotations and step summary.

Everything returns text; nothing here prints. Times are seconds, as in the record.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any
from xml.etree import ElementTree

from rooftune.core import Evidence, Status
from rooftune.results import goals
from rooftune.results.compare import COMPARED, ERRORS, OPEN, Cell, Verdict, explain
from rooftune.results.record import Record
from rooftune.results.report import format_time, name_of
from rooftune.results.store import seal

COLUMNS = (
    *("problem", "op", "shape", "precision", "impl", "config", "default", "status", "reason", "evidence"),
    *("time_s", "time_lo_s", "time_hi_s", "ratio_to_torch", "ratio_lo", "ratio_hi", "tie", "tflops", "gbps", "roof"),
    *("ratio_at_roof", "goal"),
    *("rel_fro", "max_error", "joules", "energy_method", "device", "run", "id", "source_hash"),
)
MAX_ANNOTATIONS = 10  # GitHub shows this many of a level a step
MAX_SUMMARY_BYTES = 1000 * 1024  # GitHub drops a step summary above 1,024 KiB
MAX_SUMMARY_ROWS = 200


def to_json_lines(records: Iterable[Record]) -> str:
    """One record a line, as stored and with its checksum: `compare` and `report` read such a file as a run."""
    return "".join(seal(record.to_json()) + "\n" for record in records)


def _flat(record: Record) -> dict[str, Any]:
    time_lo, time_hi = record.time_ci_s or (None, None)
    ratio_lo, ratio_hi = record.ratio_ci or (None, None)
    error, energy = record.error or {}, record.energy or {}
    special = {
        "config": json.dumps(record.config, sort_keys=True, separators=(",", ":")),
        "default": str(record.default).lower(),
        "tie": str(record.tie).lower(),
        "status": str(record.status),
        "evidence": str(record.evidence),
        "time_lo_s": time_lo,
        "time_hi_s": time_hi,
        "ratio_lo": ratio_lo,
        "ratio_hi": ratio_hi,
        "rel_fro": error.get("rel_fro"),
        "max_error": error.get("max_error"),
        "joules": energy.get("joules"),
        "energy_method": energy.get("method"),
        "device": record.device.get("name"),
    }
    return {key: special[key] if key in special else getattr(record, key) for key in COLUMNS}


def to_csv(records: Iterable[Record]) -> str:
    """With a header (`COLUMNS`); not measured is an empty field."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_flat(record) for record in records)
    return out.getvalue()


def _cell(text: object) -> str:
    """Text that cannot leave its table cell."""
    plain = " ".join(str(text).split())
    return plain.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> str:
    """A GitHub table; columns named in `right` are aligned right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("--:" if h in right else ":--" for h in header) + "|"]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def to_markdown(records: Iterable[Record]) -> str:
    """Measured results as a table for documents, then the emulated and the compiled ones, each by itself."""
    by_evidence: dict[str, list[Record]] = {}
    for record in records:
        by_evidence.setdefault(str(record.evidence), []).append(record)
    parts = []
    if measured := by_evidence.get(Evidence.MEASURED):
        figures = ("time", "TFLOP/s", "GB/s", "roof", "vs torch (95 %)", "error")
        rows = [_measured_row(r) for r in measured]
        columns = ["problem", "competitor", "status", *figures]
        if any(r.goal is not None for r in measured):  # whether it is reached, and the ratio at the roof
            columns[-1:-1] = ["at roof", "goal"]
            beside: dict[tuple[str, str], list[Record]] = {}
            for r in measured:
                beside.setdefault((r.run, r.problem), []).append(r)
            for row, r in zip(rows, measured, strict=True):
                row[-1:-1] = [
                    "" if r.ratio_at_roof is None else f"{r.ratio_at_roof:.2f}x",
                    "" if r.goal is None else f"{r.goal:g}x {goals.outcome(r, beside[r.run, r.problem])}".strip(),
                ]
        parts.append(markdown(columns, rows, ("at roof", *figures)))
    for evidence in (Evidence.EMULATED, Evidence.COMPILED):
        if found := by_evidence.get(evidence):
            error = ("error",) if evidence == Evidence.EMULATED else ()
            header = ("problem", "competitor", "source", "status", *error, "note")
            rows = [_unmeasured_row(r) for r in found]
            parts.append(f"{str(evidence).capitalize()}, not run on hardware:\n\n{markdown(header, rows)}")
    return "\n".join(parts)


def _measured_row(record: Record) -> list[str]:
    ok = record.status == Status.OK
    mark = " (fastest, or not to be told from it)" if record.tie else ""
    time = "" if record.time_s is None else format_time(record.time_s)
    low, high = record.ratio_ci or (None, None)
    ratio = "" if record.ratio_to_torch is None else f"{record.ratio_to_torch:.3f}x{_interval(low, high)}"
    rel_fro = (record.error or {}).get("rel_fro")
    return [
        record.problem,
        name_of(record),
        f"ok{mark}" if ok else f"{record.status}: {record.reason}",
        time,
        "" if record.tflops is None else f"{record.tflops:.3g}",
        "" if record.gbps is None else f"{record.gbps:.3g}",
        "" if record.roof is None else f"{record.roof:.1%}",
        ratio,
        "" if rel_fro is None else f"{rel_fro:.1e}",
    ]


def _unmeasured_row(record: Record) -> list[str]:
    who = [record.problem, record.cell[1], record.source_hash[:8], str(record.status)]
    if record.evidence == Evidence.EMULATED:
        rel_fro = (record.error or {}).get("rel_fro")
        error = "" if rel_fro is None else f"{rel_fro:.1e}"
        return [*who, error, record.reason]
    notes = [
        f"{row.get('arch')}: {row.get('registers')} registers, {row.get('spill_bytes')} B spilled, "
        f"{', '.join(row.get('tensor_core') or ()) or 'no tensor core'}"
        for row in record.resources or ()
        if row.get("status", Status.OK) == Status.OK
    ]
    return [*who, record.reason or "; ".join(notes)]


# --- continuous integration ----------------------------------------------------------------------------------------

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def _outcome(item: Record | Cell) -> tuple[str, str]:
    """JUnit's word for it (failure, error, skipped or nothing) and the message."""
    if isinstance(item, Record):
        if item.status == Status.OK:
            return "", ""
        kind = {Status.WRONG: "failure", Status.SKIPPED: "skipped"}.get(Status(item.status), "error")
        return kind, f"{item.status}: {item.reason}" if item.reason else str(item.status)
    text = f"{item.verdict}: {_finding(item)}"
    if item.verdict == Verdict.BROKEN:
        return "error", text
    if item.verdict == Verdict.SLOWER:
        return "failure", text
    return ("skipped", text) if item.verdict in OPEN or item.verdict not in COMPARED else ("", "")


def junit(items: Iterable[Record | Cell], name: str = "rooftune") -> str:
    """JUnit XML of results (wrong = failure, failed = error) or of a comparison (slower = failure, broken =
    error, undecided or not compared = skipped). A test case is one competitor on one problem."""
    suite = ElementTree.Element("testsuite", name=_xml(name))
    counts = {"failure": 0, "error": 0, "skipped": 0}
    total = 0.0
    for item in items:
        impl = name_of(item) if isinstance(item, Record) else item.impl
        seconds = (item.time_s if isinstance(item, Record) else item.candidate_s) or 0.0
        total += seconds
        label = impl if item.evidence == Evidence.MEASURED else f"{impl} ({item.evidence})"
        case = ElementTree.SubElement(suite, "testcase", classname=_xml(item.problem), name=_xml(label))
        case.set("time", f"{seconds:.9f}")
        kind, message = _outcome(item)
        if kind:
            counts[kind] += 1
            ElementTree.SubElement(case, kind, message=_xml(message)).text = _xml(message)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(counts["failure"]))
    suite.set("errors", str(counts["error"]))
    suite.set("skipped", str(counts["skipped"]))
    suite.set("time", f"{total:.9f}")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _finding(cell: Cell) -> str:
    """`1.083x [1.071, 1.094], 10.2 µs -> 11.0 µs`, and the reason."""
    parts = []
    if cell.ratio is not None:
        parts.append(f"{cell.ratio:.3f}x{_interval(cell.lo, cell.hi)}")
    if cell.base_s is not None and cell.candidate_s is not None:
        parts.append(f"{format_time(cell.base_s)} -> {format_time(cell.candidate_s)}")
    return ", ".join([*parts, *([cell.reason] if cell.reason else [])]) or str(cell.verdict)


def _escape(text: str, is_property: bool = False) -> str:
    """GitHub's workflow commands are one line each, and properties end at `,` and `:`."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text


def github_annotations(cells: Iterable[Cell]) -> list[str]:
    """Workflow commands for the worst 10 cells: errors for broken and slower, warnings for what is open. Print
    them on stdout, one a line. `cells` come worst first, as `compare` returns them."""
    order = list(Verdict)
    chosen = sorted((c for c in cells if c.verdict in ERRORS | OPEN), key=lambda c: order.index(c.verdict))
    lines = []
    for cell in chosen[:MAX_ANNOTATIONS]:
        level = "error" if cell.verdict in ERRORS else "warning"
        title = _escape(f"{cell.verdict}: {cell.impl} {cell.problem}", is_property=True)
        lines.append(f"::{level} title={title}::{_escape(_finding(cell))}")
    return lines


def step_summary(cells: Sequence[Cell], lines: Sequence[str] | None = None) -> str:
    """Markdown for $GITHUB_STEP_SUMMARY: the worst 200 rows, says so if there are more, and stays below GitHub's
    limit of 1,024 KiB. Lines: what was tested and how, if not what `explain` says."""
    shown = [c for c in cells if c.verdict != Verdict.UNMEASURED]
    notes = "\n".join(f"- {_cell(line)}" for line in (explain(cells) if lines is None else lines))
    count = min(len(shown), MAX_SUMMARY_ROWS)
    while True:
        rows = [(c.verdict, c.problem, c.impl, _finding(c), ", ".join(c.changed)) for c in shown[:count]]
        cut = f"\nThe worst {count} of {len(shown)} rows are shown.\n" if count < len(shown) else ""
        table = markdown(("verdict", "problem", "competitor", "finding", "changed"), rows) if rows else ""
        text = f"### rooftune\n\n{table}{cut}\n{notes}\n"
        if len(text.encode("utf-8", "replace")) <= MAX_SUMMARY_BYTES:
            return text
        if not count:
            return text.encode("utf-8", "replace")[:MAX_SUMMARY_BYTES].decode("utf-8", "ignore")
        count //= 2
