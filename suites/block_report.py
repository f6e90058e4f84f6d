"""What became of a layer: plain data, and the tables that show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rooftune.core import Config, Status
from rooftune.results.report import format_time
from rooftune.suites.block_plan import Shape

if TYPE_CHECKING:
    from rich.console import Console

GLUE = "glue"  # the name of what torch does between operators, in every composition


@dataclass
class StepResult:
    """A step's time inside the layer. `share`: of the whole. `floor_s`: what the measured ceilings allow.

    Glue has neither problem nor floor: a fused layer would not need it.
    """

    name: str
    problem: str
    impl: str
    config: Config | None
    note: str
    time_s: float | None = None
    time_ci_s: list[float] | None = None
    share: float | None = None
    floor_s: float | None = None
    floor_why: str = ""


@dataclass
class CompositionResult:
    """How a composition did. Times in seconds a pass; None where it has none, and then `reason` says why.

    Attributes:
        error: figures of the check: rel_fro and worst_row with their bounds, worst_step.
        tflops: model FLOP of products and attention over the time. roof: sum of floors over the time.
        gap_s: whole passes minus the sum of the steps (their passes carry a clock reading a step).
        wall_s: GPU: with launches, as the host sees it. None on a CPU, where time_s is that.
        energy: per token, as `Energy` prints itself. ratio_to_torch: torch's time over ours.
    """

    name: str
    status: str = str(Status.OK)
    reason: str = ""
    error: dict[str, Any] | None = None
    steps: list[StepResult] = field(default_factory=list)
    time_s: float | None = None
    time_ci_s: list[float] | None = None
    wall_s: float | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    roof: float | None = None
    gap_s: float | None = None
    ratio_to_torch: float | None = None
    ratio_ci: list[float] | None = None
    tie: bool = False
    energy: dict[str, Any] | None = None
    rounds: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class BlockResult:
    """A layer's compositions. `floor_s`: sum of the operators' floors, None with `floor_why`."""

    shape: Shape
    title: str
    layers: int
    tokens: int
    flops: float
    bytes: float
    floor_s: float | None
    floor_why: str
    device: str
    threads: int
    seed: int
    compositions: list[CompositionResult]

    @property
    def use(self) -> tuple[str, str]:
        """(composition for production, why). It leaves all-torch only for what is faster with confidence as a
        whole: winners of steps raced alone can lose together, where two thread pools share the cores."""
        timed = [c for c in self.compositions if c.time_s is not None]
        sure = [c for c in timed if c.ratio_ci is not None and c.ratio_ci[0] > 1.0]
        if not timed:
            return "", "no composition could be timed"
        if not sure:
            return "torch", "no other composition is faster than all-torch with confidence"
        best = min(sure, key=lambda c: c.time_s or 0.0)
        return best.name, f"{best.ratio_to_torch:.2f}x all-torch{_ends(best.ratio_ci)}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        name, why = self.use
        return {"kind": "block", "schema": 1, **asdict(self), "use": {"composition": name or None, "why": why}}


def tables(result: BlockResult, console: Console) -> None:
    """Print the compositions, then their steps side by side, then the reasons and the error model."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    unicode = (console.encoding or "").lower().startswith("utf")

    def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal and unicode else box.ASCII2, show_edge=False)
        for number, name in enumerate(header):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            table.add_row(*(Text(cell if unicode else cell.replace("µ", "u")) for cell in row))
        console.print(Text(title, style="bold"))
        console.print(table)

    show(result.title, _HEADER, [_row(c) for c in result.compositions])
    done = [c for c in result.compositions if c.time_s is not None]
    if done:
        show("time of each step inside the layer, and its share of the whole", *_steps(done))
    name, why = result.use
    console.print(Text(f"  use: {name or 'nothing'} ({why})", style="green"), soft_wrap=True)
    for text in _notes(result):
        console.print(Text(f"  {text}", style="dim"), soft_wrap=True)


_HEADER = ("composition", "time", "tokens/s", "TFLOP/s", "of floors", "vs torch", "J/token", "error (bound)")


def _row(c: CompositionResult) -> list[str]:
    error = c.error or {}
    checked = f"{error['rel_fro']:.1e} ({error['bound']:.1e})" if error.get("rel_fro") is not None else ""
    if c.time_s is None:
        return [c.name, c.status, *[""] * 5, checked]
    joules = (c.energy or {}).get("joules")
    return [
        c.name + (" *" if c.tie else ""),
        format_time(c.time_s) + _half(c.time_s, c.time_ci_s),
        f"{c.tokens_per_s:,.0f}",
        f"{c.tflops:.3g}",
        "" if c.roof is None else f"{c.roof:.0%}",
        "" if c.ratio_to_torch is None else f"{c.ratio_to_torch:.3f}x" + _ends(c.ratio_ci),
        "n/a" if joules is None else f"{joules:.3g}",
        checked,
    ]


def _ends(interval: list[float] | None) -> str:
    """The interval's ends: where it lies to 1 is what counts of a ratio."""
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


def _half(value: float, interval: list[float] | None) -> str:
    return "" if interval is None else f" +-{max(interval[1] - value, value - interval[0]) / value:.1%}"


def _steps(done: Sequence[CompositionResult]) -> tuple[list[str], list[list[str]]]:
    """Rows: operators with what ran, then glue, gap and the whole."""
    rows = []
    for index, step in enumerate(done[0].steps):
        row = [step.name if step.problem else f"{step.name} ({GLUE})"]
        for c in done:
            mine = c.steps[index]
            who = "" if not mine.problem else mine.impl.partition("/")[2] or mine.impl
            call = (mine.config or {}).get("call")
            row.append(f"{who}{f':{call}' if call else ''} {_part(mine.time_s, mine.share)}".strip())
        rows.append(row)
    for label, seconds in (
        ("all operators", [_sum(c, False) for c in done]),
        (f"all {GLUE}", [_sum(c, True) for c in done]),
        ("gap (whole - steps)", [c.gap_s for c in done]),
        ("whole", [c.time_s for c in done]),
    ):
        rows.append(
            [label, *(_part(s, s / c.time_s) for s, c in zip(seconds, done, strict=True) if s is not None and c.time_s)]
        )
    return ["step", *(c.name for c in done)], rows


def _sum(c: CompositionResult, glue: bool) -> float:
    return sum(s.time_s or 0.0 for s in c.steps if (s.impl == GLUE) == glue)


def _part(seconds: float | None, share: float | None) -> str:
    if seconds is None or share is None:
        return ""
    sign = "-" if seconds < 0 else ""
    return f"{sign}{format_time(abs(seconds), 3)} {share:4.0%}"


def _notes(result: BlockResult) -> list[str]:
    """Why something is missing, what the figures mean."""
    notes = [f"{c.name}: {c.status}: {c.reason}" for c in result.compositions if c.time_s is None]
    for c in result.compositions:
        fallbacks: dict[str, list[str]] = {}
        for step in c.steps:
            if step.note:
                fallbacks.setdefault(step.note, []).append(step.name)
        notes += [f"{c.name}: {', '.join(names)}: {note}" for note, names in fallbacks.items()]
        notes += [f"{c.name}: {note}" for note in c.notes]
    models = {c.error["model"] for c in result.compositions if c.error}
    notes += [f"error: relative to a float64 layer (Frobenius); bound: {model}" for model in sorted(models)]
    if result.floor_s is None:
        notes.append(f"no share of the floors: {result.floor_why}")
    else:
        notes.append(
            f"sum of the operators' floors {format_time(result.floor_s)}; glue has none: it could be fused away"
        )
    reasons = {c.energy["reason"] for c in result.compositions if c.energy and c.energy["joules"] is None}
    notes += [f"no J/token: {reason}" for reason in sorted(reasons)]
    walls = [f"{c.name} {format_time(c.wall_s)}" for c in result.compositions if c.wall_s is not None]
    notes += [f"with launches, on the host's clock: {', '.join(walls)}"] if walls else []
    notes.append(f"tokens/s of one layer; the model has {result.layers}. * nobody is faster with confidence")
    return notes
