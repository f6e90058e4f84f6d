"""`export`: the winners as a package without rooftune, or recorded tunings in another tool's format."""

from __future__ import annotations

import argparse
from pathlib import Path

from rooftune import device as devices
from rooftune import registry
from rooftune.commands import common
from rooftune.core import ExitCode, UsageError

PACKAGE = "package"


def export(chosen: argparse.Namespace) -> ExitCode:
    """Write what `--format` says."""
    if chosen.format != PACKAGE:
        return _recorded(chosen)
    return _package(chosen)


def _package(chosen: argparse.Namespace) -> ExitCode:
    """Every problem named, or every one measured on this device, with the competitor that `best` would use."""
    from rooftune.autotune import export as exporting

    found = devices.find(common.device_name(chosen))
    threads = chosen.threads
    if threads is None:
        threads = found.cores if found.kind == "cpu" else 1
    named = [registry.problem(text) for text in chosen.what if "[" in text]
    ops = [registry.op(text).name for text in chosen.what if "[" not in text]
    problems = named
    if ops or not named:
        known = exporting.known_problems(found, threads)
        problems += [p for p in known if (not ops or p.op in ops) and p not in named]
    choices, left = exporting.winners(problems, found, threads)
    console = common.console(chosen)
    for what, why in left.items():
        console.print(f"left out {what}: {why}", style="dim", markup=False)
    target = exporting.write(Path(chosen.out), choices, found, threads, chosen.name)
    for choice in choices:
        console.print(f"  {choice.problem}: {choice.use.impl}", markup=False)
    console.print(f"{len(choices)} problems in {target}; import it with PYTHONPATH={target.parent}", markup=False)
    return ExitCode.OK


def _recorded(chosen: argparse.Namespace) -> ExitCode:
    """Convert recorded tunings: our journals, Kernel Tuner caches, T4, Triton's autotune files."""
    from rooftune.autotune import formats, written

    if not chosen.what:
        raise UsageError(f"export --format {chosen.format} takes files with recorded tunings: journals, caches, T4")
    tunings = [found for text in chosen.what for found in formats.load(Path(text))]
    files = written.write(chosen.format, tunings, Path(chosen.out))
    console = common.console(chosen)
    for tuning in tunings:
        if why := written.unfit(chosen.format, tuning):
            console.print(f"left out {tuning.source}: {tuning.kernel}: {why}", style="dim", markup=False)
    for path in files:
        console.print(str(path), markup=False)
    return ExitCode.OK
