"""What the verbs share: which problems, which competitors, how to time, where the output goes."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rooftune import device, race, registry, streams
from rooftune.core import PRECISIONS, Problem, UsageError, unknown
from rooftune.registry import Impl
from rooftune.results.record import Record
from rooftune.spaces import NoConfig
from rooftune.suites import catalogue

if TYPE_CHECKING:
    from rich.console import Console

    from rooftune.session import Session

DEFAULT_PRECISIONS = ("fp32", "bf16")


def names(text: str) -> list[str]:
    """A comma-separated option as a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def device_name(chosen: argparse.Namespace) -> str:
    """`--device`; `auto` is the first GPU, else the CPU. One that is not here is found out by whoever uses it.

    Raises:
        UsageError: no such kind of device.
    """
    name = str(chosen.device).strip().lower()
    if name == "auto":
        return str(next((d for d in device.devices() if d.kind != "cpu"), "cpu"))
    if name.partition(":")[0] not in device.VENDORS:
        device.find(name)
    return name


def precisions(chosen: argparse.Namespace) -> list[str]:
    """`--precision`, checked against the table."""
    asked = names(chosen.precision) or list(DEFAULT_PRECISIONS)
    for name in asked:
        if name not in PRECISIONS:
            raise unknown("precision", name, list(PRECISIONS))
    return asked


def problems(chosen: argparse.Namespace, kind: str, users: Sequence[Impl]) -> list[Problem]:
    """The problems asked for, in order: written-out ones, else the suite's for the operators named.

    Raises:
        UsageError: unknown operator, suite or precision, a bad problem, or none for a user's file.
    """
    precisions(chosen), catalogue.summary(chosen.suite)  # a name that is not needed must be right all the same
    texts = [*(w for w in chosen.what if "[" in w), *chosen.problem]
    ops = [w for w in chosen.what if "[" not in w]
    for name in ops:
        registry.op(name)
    found = []
    for text in texts:
        given = registry.problem(text)
        explicit = given.precision in text.partition("[")[2].rstrip("]").replace(" ", "").split(",")
        wanted = [given.precision] if explicit else precisions(chosen)
        found += [registry.problem(given.replace(precision=p)) for p in wanted]
    if not texts or ops:
        if not ops:
            ops = sorted({u.op for u in users}) or list(registry.op_names())
        found += catalogue.problems(chosen.suite, ops, precisions(chosen), kind)
    check_wanted(users, found)
    return list(dict.fromkeys(found))


def check_wanted(users: Sequence[Impl], problems: Sequence[Problem]) -> None:
    """A user's file without a problem would be left out, and nobody would know.

    Raises:
        UsageError: there is one.
    """
    for user in users:
        if all(user.op != problem.op for problem in problems):
            raise UsageError(f"--load {user.path} computes {user.op}, and no problem of it is asked for")


def users(chosen: argparse.Namespace) -> list[Impl]:
    """The files given with `--load`; one that is given twice counts once.

    Raises:
        UsageError: not a kernel file, or two of one name: their records could not be told apart.
    """
    found = list(dict.fromkeys(registry.user_impl(Path(path)) for path in chosen.load))
    for number, impl in enumerate(found):
        if any(impl.key == other.key for other in found[:number]):
            raise UsageError(f"--load {impl.path}: another file is called {impl.key} too; rename one")
    return found


def impls(chosen: argparse.Namespace, op: str, loaded: Sequence[Impl]) -> list[Impl]:
    """Competitors of an operator after `--only` and `--skip`, user files last.

    Raises:
        UsageError: a name that no operator's competitor has, or one of torch's calls by itself; a user's file of a
            name that is ours.
    """
    for user in loaded:
        if any(user.key == ours.key for ours in registry.impls(user.op)):  # stored records tell them apart by name
            raise UsageError(f"--load {user.path}: {user.key} is a competitor that is here already; rename the file")
    every = {i.name for name in registry.op_names() for i in registry.impls(name)} | {u.name for u in loaded}
    only, skip = names(chosen.only), names(chosen.skip)
    for name in (*only, *skip):
        known, call, _ = name.partition(":")
        if known not in every:
            raise unknown("competitor", name, sorted(every))
        if call:
            raise UsageError(f"'{name}': the calls of {known} race together; write {known}")
    mine = [*registry.impls(op), *(u for u in loaded if u.op == op)]
    return [i for i in mine if (not only or i.name in only or i in loaded) and i.name not in skip]


def field(chosen: argparse.Namespace, problems: Sequence[Problem], loaded: Sequence[Impl]) -> dict[str, list[Impl]]:
    """The competitors of every problem's operator.

    Raises:
        UsageError: nobody is left, or a name that no competitor has.
    """
    found = {op: impls(chosen, op, loaded) for op in dict.fromkeys(p.op for p in problems)}
    if found and not any(found.values()):
        known = ", ".join(sorted({i.name for op in found for i in registry.impls(op)}))
        raise UsageError(f"--only and --skip leave no competitor of {', '.join(found)}; known: {known}")
    return found


def options(chosen: argparse.Namespace) -> race.Options:
    """How to time.

    Raises:
        UsageError: a number out of range.
    """
    for name in ("rounds", "launches", "samples", "min_sample_ms"):
        if not 0 < getattr(chosen, name) < math.inf:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, not {getattr(chosen, name)}")
    shared = "confirm" if hasattr(chosen, "confirm") else "rounds"  # of two revisions, the screen is one launch
    if chosen.launches > getattr(chosen, shared):
        raise UsageError(f"--launches {chosen.launches} needs at least as many --{shared} ({getattr(chosen, shared)})")
    if chosen.clock == "cpu" and chosen.threads != 1:
        raise UsageError("--clock cpu counts the CPU time of the whole process: it needs --threads 1")
    return race.Options(
        rounds=chosen.rounds,
        launches=chosen.launches,
        samples=chosen.samples,
        min_sample_s=chosen.min_sample_ms / 1e3,
        cache=chosen.cache,
        clock=chosen.clock,
        seed=secrets.randbits(31) if chosen.seed is None else chosen.seed,
        energy=getattr(chosen, "energy", False),
    )


def to_stdout(chosen: argparse.Namespace) -> bool:
    """Whether data were asked for on stdout: then tables go to stderr."""
    return any(getattr(chosen, form, None) == "-" for form in ("json", "csv", "md", "junit"))


def console(chosen: argparse.Namespace) -> Console:
    """Where tables are printed."""
    from rooftune.results import report

    return report.make_console(stderr=to_stdout(chosen))


def write(chosen: argparse.Namespace, records: Sequence[Record]) -> None:
    """The forms asked for: `--json`, `--csv`, `--md`, `--junit`.

    Raises:
        UsageError: a file cannot be written.
    """
    from rooftune.results import export, store

    makers: dict[str, Any] = {
        "json": export.to_json_lines,
        "csv": export.to_csv,
        "md": export.to_markdown,
        "junit": export.junit,
    }
    for form, make in makers.items():
        target = getattr(chosen, form, None)
        if target == "-":
            streams.put(make(records))
        elif target:
            store.atomic_write(target, make(records))


def check_targets(chosen: argparse.Namespace) -> None:
    """Complain about an output file before anything is measured, not after.

    Raises:
        UsageError: its folder is missing or may not be written, or it is a folder itself.
    """
    for form in ("json", "csv", "md", "junit", "save"):
        target = getattr(chosen, form, None)
        if target and target != "-":
            folder = Path(target).resolve().parent
            if not folder.is_dir():
                raise UsageError(f"--{form} {target}: there is no folder {folder}")
            if Path(target).is_dir():
                raise UsageError(f"--{form} {target}: is a folder; give a file in it")
            if not os.access(folder, os.W_OK) or (Path(target).exists() and not os.access(target, os.W_OK)):
                raise UsageError(f"--{form} {target}: no permission to write there")


@contextlib.contextmanager
def keeping(chosen: argparse.Namespace, records: list[Record]) -> Iterator[None]:
    """Whatever ends the block, the records so far are written in the forms asked for.

    A file of earlier results is not replaced by nothing where the command was refused, or stopped before its first.
    """
    try:
        yield
    except BaseException:
        if records:
            write(chosen, records)
        raise
    write(chosen, records)


def tuned_entrants(
    session: Session, problems: Sequence[Problem], impls: Sequence[Impl] | None = None
) -> dict[Problem, list[race.Entrant]]:
    """Tuned configs of this device, from the table, join the race of their problem; of its neighbours by the rule."""
    from rooftune.autotune.table import Table

    table = Table()
    extra: dict[Problem, list[race.Entrant]] = {}
    for problem in problems:
        for impl in registry.impls(problem.op) if impls is None else impls:
            if (
                impl.op == problem.op
                and session.device.kind in impl.devices
                and problem.precision in impl.precisions
                and not impl.baseline
            ):
                found = table.lookup(impl, problem, session.about["identity"], session.threads)
                config = found.entry.config if found.entry is not None else None
                if config is None and impl.missing is None:
                    config = table.neighbour(impl, problem, session.about["identity"], session.threads).config
                    if config is not None and not _has(session, impl, problem, config):
                        config = None
                if config is not None:
                    extra.setdefault(problem, []).append(race.Entrant(impl, config, False))
    return extra


def _has(session: Session, impl: Impl, problem: Problem, config: dict[str, Any]) -> bool:
    """Whether a config of another shape is valid here."""
    try:
        return config in session.lab.space(impl, problem)["configs"]
    except NoConfig:
        return False
