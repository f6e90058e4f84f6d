"""Tables for people: the race, the evidence gathered without a device, the comparison of two runs.

Rich is imported inside the functions. Off a terminal, or with NO_COLOR, the same tables come as plain text;
off a terminal nothing is cut or wrapped. Measured, emulated and compiled results never share a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rooftune.core import Evidence, Status
from rooftune.results import goals
from rooftune.results.compare import ERRORS, OPEN, Cell, Verdict, explain
from rooftune.results.record import Record

if TYPE_CHECKING:
    from rich.console import Console

UNCUT = 1000  # columns off a terminal: wider than any table, so that names in a log can be searched for
WIDE = 120  # from here on: whole intervals instead of ±, and energy
UNITS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9))


def make_console(file: Any = None, width: int | None = None, stderr: bool = False) -> Console:
    """A console on stdout, stderr or a file. Where that is no terminal: no colour, nothing cut or wrapped,
    whatever COLUMNS says."""
    from rich.console import Console

    console = Console(file=file, width=width, stderr=stderr, highlight=False, emoji=False)
    if width is None and not console.file.isatty():  # FORCE_COLOR gives a log colours, not the width of a terminal
        plain = None if console.is_terminal else True
        console = Console(file=file, width=UNCUT, stderr=stderr, highlight=False, emoji=False, no_color=plain)
    return console


def _can(console: Console, text: str) -> bool:
    """Whether the output's encoding has these characters."""
    try:
        text.encode(console.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(console: Console, text: str) -> str:
    """The text as the output's encoding can show it."""
    if _can(console, text):
        return text
    for sign, ascii_ in (
        ("★", "*"),
        ("≈", "="),
        ("µ", "u"),
        ("±", "+-"),
        ("–", "-"),
        ("—", "-"),
        ("→", "->"),
        ("·", "-"),
    ):
        text = text.replace(sign, ascii_)
    return text.encode(console.encoding, "backslashreplace").decode(console.encoding)


def format_time(seconds: float, digits: int = 4) -> str:
    """With the unit that leaves at least one digit before the point: `412.3 µs`."""
    unit, scale = next(((u, s) for u, s in UNITS if seconds >= s), UNITS[-1])
    return f"{_digits(seconds / scale, digits)} {unit}"


def _digits(value: float, digits: int) -> str:
    """Significant digits, without an exponent between 0.001 and a million."""
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:.{digits}g}" if value < 1e-3 else f"{value:#.{digits}g}".rstrip(".")


def _spread(value: float, interval: Sequence[float | None] | None, wide: bool, scale: float = 1.0) -> str:
    """` ±0.8%` (the larger side), or ` [409, 416]` where there is room; empty if there is no interval."""
    if interval is None or interval[0] is None or interval[1] is None:
        return ""
    lo, hi = interval[0], interval[1]
    if wide:
        return f" [{_digits(lo / scale, 4)}, {_digits(hi / scale, 4)}]"
    return f" ±{max(hi - value, value - lo) / value * 100:.2g}%"


def _time(record: Record, wide: bool) -> str:
    if record.time_s is None:
        return ""
    _, scale = next(((u, s) for u, s in UNITS if record.time_s >= s), UNITS[-1])
    return format_time(record.time_s) + _spread(record.time_s, record.time_ci_s, wide, scale)


def _ratio(value: float | None, interval: Sequence[float | None] | None, wide: bool) -> str:
    return "" if value is None else f"{value:.3f}x" + _spread(value, interval, wide)


def name_of(record: Record, short: bool = False) -> str:
    """Competitor, its call, and a tuned config: `triton block_m=64 num_warps=8`, or in short `triton bm64 nw8`."""
    name = record.cell[1].partition("/")[2] or record.cell[1]
    if record.default or record.config.get("call"):
        return name
    if short:
        return f"{name} " + " ".join("".join(w[:1] for w in k.split("_")) + str(v) for k, v in record.config.items())
    return f"{name} " + " ".join(f"{k}={v}" for k, v in record.config.items())


def unit_of(records: Sequence[Record]) -> str:
    """`TFLOP/s` where more than 10 operations are done for each byte moved, else `GB/s`."""
    rates = [(r.tflops or 0.0, r.gbps or 0.0) for r in records if r.tflops or r.gbps]
    return "TFLOP/s" if any(tflops * 1e3 > 10 * gbps for tflops, gbps in rates) else "GB/s"


@dataclass(frozen=True)
class Column:
    """`flexible`: gives up width first, by leaving out the middle of its text."""

    header: str
    right: bool = False
    flexible: bool = False


def _shorten(text: str, width: int, gap: str) -> str:
    """Head and tail, so that a problem keeps its operator and its precision."""
    if len(text) <= width:
        return text
    keep = max(width - len(gap), 2)
    return text[: keep - keep // 2] + gap + text[len(text) - keep // 2 :]


def print_table(
    console: Console, title: str, columns: Sequence[Column], rows: Sequence[tuple[Sequence[str], str]]
) -> None:
    """A title line and the rows (cells, style). Only flexible columns are cut, the widest first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    cells = [[_plain(console, cell) for cell in row] for row, _ in rows]
    widths = [max(len(c.header), *(len(row[i]) for row in cells)) for i, c in enumerate(columns)]
    flexible = [i for i, c in enumerate(columns) if c.flexible]
    spare = console.width - 3 * (len(columns) - 1) - sum(widths)
    while spare < 0 and (widest := max(flexible, key=lambda i: widths[i], default=-1)) >= 0 and widths[widest] > 8:
        widths[widest] -= 1
        spare += 1
    plain = not console.is_terminal or console.no_color
    table = Table(
        box=box.ASCII2 if plain else box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        header_style="bold",
        padding=(0, 1),
    )
    for column, width in zip(columns, widths, strict=True):
        side: Literal["right", "left"] = "right" if column.right else "left"
        table.add_column(_plain(console, column.header), justify=side, no_wrap=True, min_width=width, max_width=width)
    gap = "…" if _can(console, "…") else ".."
    for row, (_, style) in zip(cells, rows, strict=True):
        texts = [Text(_shorten(cell, width, gap)) for cell, width in zip(row, widths, strict=True)]
        table.add_row(*texts, style=style or None)
    console.print(Text(_plain(console, title), style="bold"))
    console.print(table)


def _say(console: Console, text: str, style: str = "") -> None:
    """A line below a table, indented. A terminal wraps it; in a file or a log, and for a command that is to be
    copied, it stays one line."""
    from rich.padding import Padding
    from rich.text import Text

    shown = Text(_plain(console, text), style=style)
    if console.is_terminal and "python bench.py" not in text:
        console.print(Padding(shown, (0, 0, 0, 2), expand=False))
    else:
        console.print(Text("  ") + shown, soft_wrap=True)


def grouped(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """By device and problem, in order of appearance."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((str(record.device.get("name") or ""), record.problem), []).append(record)
    return groups


def race_table(
    records: Iterable[Record],
    console: Console,
    standing: Mapping[str, str] | None = None,
) -> None:
    """One table a problem, of measured results only: fastest first; who was wrong or failed below, with the
    reason; who was skipped in the lines under it. `standing`: competitor -> its best evidence on record, said of
    those that were skipped."""
    measured = [r for r in records if r.evidence == Evidence.MEASURED]
    for (device, problem), group in grouped(measured).items():
        _race(group, console, problem, device, standing or {})


def _race(
    group: list[Record],
    console: Console,
    problem: str,
    device: str,
    standing: Mapping[str, str],
) -> None:
    wide, unit = console.width >= WIDE, unit_of(group)
    timed = sorted((r for r in group if r.time_s is not None), key=lambda r: r.time_s or 0.0)
    lost = [r for r in group if r.time_s is None and r.status != Status.SKIPPED]
    tied = sum(r.tie for r in timed)
    energy = wide and any(_joules(r) is not None for r in timed)
    columns = [Column("competitor", flexible=True), Column("status")]
    columns += [Column(header, right=True) for header in ("time (95 %)", unit, "roof", "vs torch (95 %)")]
    goal = next((r.goal for r in timed if r.goal is not None), None)
    columns += [Column(f"goal {goal:g}x")] if goal else []
    columns += [Column("mJ/call", right=True)] if energy else []
    columns += [Column("error", right=True)]
    rows: list[tuple[Sequence[str], str]] = []
    for record in timed:
        mark = (" ★" if tied == 1 else " ≈") if record.tie else ""
        rate = record.tflops if unit == "TFLOP/s" else record.gbps
        row = [name_of(record, short=True), record.status + mark, _time(record, wide), _number(rate)]
        row += ["" if record.roof is None else f"{record.roof * 100:.1f}%"]
        row += [_ratio(record.ratio_to_torch, record.ratio_ci, wide)]
        row += [goals.outcome(record, timed)] if goal else []
        row += [_number(_joules(record), 1e3)] if energy else []
        rows.append(([*row, _error(record)], "green" if record.tie else ""))
    for record in lost:
        empty = [""] * (len(columns) - 4)
        rows.append(([name_of(record, short=True), str(record.status), "see below", *empty, _error(record)], "red"))
    if rows:
        title = " · ".join(part for part in (problem, device, _regime(timed)) if part)
        print_table(console, title, columns, rows)
    for record in lost:
        _say(console, f"{name_of(record)}: {record.status}: {record.reason or 'no reason given'}", "red")
    _notes(group, timed, tied, console, problem, standing)
    console.print()


def _notes(
    group: list[Record],
    timed: list[Record],
    tied: int,
    console: Console,
    problem: str,
    standing: Mapping[str, str],
) -> None:
    """Who was skipped and why; what the marks mean; why a column is empty."""
    skipped: dict[str, list[str]] = {}
    for record in group:
        if record.status == Status.SKIPPED:
            known = f" [{standing[record.impl]}]" if record.impl in standing else ""
            skipped.setdefault(record.reason or "no reason given", []).append(name_of(record) + known)
    if not timed:
        _say(console, f"{problem}: nothing was timed")
    elif tied > 1:
        sure = all(r.time_ci_s for r in timed)
        _say(
            console, f"≈ no winner: these {tied} cannot be told apart" + ("" if sure else "; too few rounds (below 6)")
        )
    if timed and all(r.ratio_to_torch is None for r in timed):
        _say(console, "no ratio: " + str(timed[0].regime.get("ratio_to_torch") or "no torch call was timed"))
    if goal := goals.explain(timed):
        _say(console, goal)
    if timed and all(r.roof is None for r in timed):
        _say(console, "no roof: " + str(timed[0].regime.get("roof") or "the ceilings were not measured"))
    for reason, names in skipped.items():
        _say(console, f"skipped ({reason}): {', '.join(names)}", "dim")


def _regime(timed: Sequence[Record]) -> str:
    """`wall clock, hot cache, 2 threads, 10 rounds` of the first that was timed."""
    if not timed:
        return ""
    regime = timed[0].regime
    parts = [f"{regime[k]} {k}" for k in ("clock", "cache", "threads") if regime.get(k) is not None]
    return ", ".join([*parts, *([f"{len(timed[0].rounds)} rounds"] if timed[0].rounds else [])])


def _number(value: float | None, scale: float = 1.0) -> str:
    return "" if value is None else _digits(value * scale, 3)


def _joules(record: Record) -> float | None:
    energy = record.energy or {}
    value = energy.get("joules") if energy.get("unit", "J/call") == "J/call" else None
    return float(value) if isinstance(value, int | float) else None


def _error(record: Record) -> str:
    value = (record.error or {}).get("rel_fro")
    return f"{value:.1e}" if isinstance(value, int | float) else ""


def evidence_table(records: Iterable[Record], console: Console) -> None:
    """What was proven without the device: emulated verdicts (competitor x precision, with the relative
    Frobenius error) and compiled resources (a row per architecture). Neither is a time."""
    found = list(records)
    _emulated([r for r in found if r.evidence == Evidence.EMULATED], console)
    _compiled([r for r in found if r.evidence == Evidence.COMPILED], console)


def _emulated(records: list[Record], console: Console) -> None:
    ran = [r for r in records if r.status != Status.SKIPPED]
    if ran:
        precisions = list(dict.fromkeys(r.precision for r in ran))
        rows: list[tuple[Sequence[str], str]] = []
        for impl in dict.fromkeys(r.impl for r in ran):
            mine = sorted((r for r in ran if r.impl == impl), key=lambda r: r.status != Status.OK)
            shown = {r.precision: f"{r.status} {_error(r)}".strip() for r in mine}  # the last, so the worst one
            style = "red" if mine[-1].status != Status.OK else ""
            rows.append(([impl, *(shown.get(p, "") for p in precisions), mine[-1].source_hash[:8]], style))
        columns = [Column("competitor", flexible=True), *(Column(p) for p in precisions), Column("source")]
        print_table(
            console,
            "Emulated on a CPU, not run on hardware: right or wrong (relative error), never a time",
            columns,
            rows,
        )
    reasons(((f"{r.impl} {r.precision}", r.status, r.reason) for r in records), console)
    if records:
        console.print()


def _compiled(records: list[Record], console: Console) -> None:
    rows: list[tuple[Sequence[str], str]] = []
    problems = [(f"{r.impl} {r.precision}", r.status, r.reason) for r in records if not r.resources]
    compilers: dict[str, None] = {}
    for record, found in ((r, row) for r in records for row in r.resources or ()):
        who, source = [record.impl, record.precision, str(found.get("arch", ""))], record.source_hash[:8]
        if found.get("status", Status.OK) != Status.OK:
            rows.append(([*who, "", "", "", str(found.get("status")).partition("(")[0], source], "red"))
            problems.append((f"{who[0]} {who[1]} {who[2]}", str(found.get("status")), str(found.get("reason") or "")))
            continue
        shared, spills = found.get("shared_bytes"), found.get("spill_bytes")
        figures = [_count(found.get("registers")), _count(spills), "" if shared is None else f"{shared / 1024:.1f}"]
        units = ", ".join(found.get("tensor_core") or ()) or "no"
        compilers |= {str(found["toolchain"]): None} if found.get("toolchain") else {}
        rows.append(([*who, *figures, units, source], "yellow" if spills else ""))
    if rows:
        columns = [Column("competitor"), Column("precision"), Column("arch")]
        columns += [Column(header, right=True) for header in ("registers", "spills B", "shared KiB")]
        columns += [Column("tensor core", flexible=True), Column("source")]
        print_table(console, "Compiled, not run on hardware: from the machine code", columns, rows)
    if compilers:
        _say(console, f"compiled by: {'; '.join(compilers)}", "dim")
    reasons(problems, console)


def _count(value: Any) -> str:
    return "" if value is None else str(value)


def reasons(items: Iterable[tuple[str, str, str]], console: Console) -> None:
    """(label, status, reason) of everything that is not ok; equal reasons in one line."""
    lines: dict[str, list[str]] = {}
    for label, status, reason in items:
        if status != Status.OK:
            lines.setdefault(f"{status}: {reason or 'no reason given'}", []).append(label)
    for reason, labels in lines.items():
        _say(console, f"{', '.join(dict.fromkeys(labels))}: {reason}", "dim" if reason.startswith("skipped") else "red")


def compare_table(
    cells: Sequence[Cell],
    console: Console,
    title: str = "Candidate against base (ratio above 1: slower now)",
    lines: Sequence[str] | None = None,
) -> None:
    """Worst first, then what was tested and how, what was not compared and why (or these lines)."""
    shown = [c for c in cells if c.verdict != Verdict.UNMEASURED]
    wide = console.width >= WIDE
    rows: list[tuple[Sequence[str], str]] = []
    for cell in shown:
        times = ["" if t is None else format_time(t) for t in (cell.base_s, cell.candidate_s)]
        name = cell.impl.partition("/")[2] or cell.impl
        row = [str(cell.verdict), cell.problem, name, *times, _ratio(cell.ratio, (cell.lo, cell.hi), wide)]
        row += ["" if cell.p is None else f"{cell.p:.2g}"] if wide else []
        rows.append((row, "red" if cell.verdict in ERRORS else "yellow" if cell.verdict in OPEN else ""))
    if rows:
        columns = [Column("verdict"), Column("problem", flexible=True), Column("competitor", flexible=True)]
        headers = ("base", "candidate", "ratio (95 %)", *(("p",) if wide else ()))
        columns += [Column(header, right=True) for header in headers]
        print_table(console, title, columns, rows)
    for cell in shown:
        if cell.verdict in ERRORS | {Verdict.SUSPECT_SLOWER}:
            changed = f" (changed: {', '.join(cell.changed)})" if cell.changed else ""
            _say(console, f"{cell.impl} {cell.problem}: {cell.reason or cell.verdict}{changed}", "red")
    for line in explain(cells) if lines is None else lines:
        _say(console, line)
