"""`list` and `doctor`: what is here, why the rest is not, and what to do about it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import time

from rooftune import device, evidence, registry
from rooftune.core import ExitCode

HINTS = {
    "torch": "pip install torch",
    "numba": "pip install numba",
    "triton": "pip install triton",
    "cupy": "in the checkout: pip install '.[cuda13]' (with a GPU) or '.[offline]' (to compile without one)",
    "numba_cuda": "pip install numba-cuda",
}


def overview(chosen: argparse.Namespace) -> ExitCode:
    """Operators, competitors, suites, devices, and the next command. Imports no backend."""
    from rich.console import Console
    from rich.table import Table

    from rooftune.suites import catalogue

    out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    kinds = {d.kind for d in device.devices()}
    for found in device.devices():
        out.print(f"device [bold]{found}[/bold]  {found.name}")
    for kind, why in device.absent().items():
        out.print(f"no {kind}: {why}", style="dim")
    out.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("operator", "competitor", "precisions", "here", "best evidence on record", "source", "what it is"):
        table.add_column(column, overflow="fold")
    every = [impl for name in registry.op_names() for impl in registry.impls(name)]
    standing = evidence.on_record(every)
    missing: set[str] = set()
    for name in registry.op_names():
        first = True
        for impl in registry.impls(name):
            here = (
                "runs"
                if kinds & set(impl.devices)
                else "proven only"
                if impl.emulates or impl.compiles
                else "no device"
            )
            if impl.missing:
                here = impl.missing
                missing.update(p for p in impl.requires if p in impl.missing)
            known = standing[impl.key]
            row = (name if first else "", impl.name, " ".join(impl.precisions), here, known.said)
            table.add_row(*row, known.source_hash[:8], impl.summary, style="yellow" if known.stale else None)
            first = False
    out.print(table)
    out.print(f"\nsuites: {', '.join(catalogue.names())}")
    for package in sorted(missing):
        out.print(f"{package} is missing: {HINTS.get(package, f'pip install {package}')}", markup=False)
    out.print("next: python bench.py run --suite quick        (--help lists every verb)", style="dim")
    return ExitCode.OK


def doctor(chosen: argparse.Namespace) -> ExitCode:
    """Fingerprint, toolchain, energy sensor, a noise reading, and what would make results better."""
    from rich.console import Console
    from rich.table import Table

    from rooftune import sensors
    from rooftune.commands.common import device_name
    from rooftune.energy import Energy
    from rooftune.session import versions

    out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if chosen.environment:
        variables = Table("variable", "sets", "read by", "now", box=None, pad_edge=False, header_style="dim")
        for name, (text, verbs) in chosen.variables().items():
            variables.add_row(name, text, verbs, os.environ.get(name, ""))
        out.print(variables)
        return ExitCode.OK
    here = device.find(device_name(chosen))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in here.fingerprint().items():
        table.add_row(key, "not readable" if value is None else str(value))
    out.print(f"[bold]{here}[/bold] {here.name}")
    out.print(table)
    out.print("\n[bold]toolchain[/bold]")
    out.print("  ".join(f"{k} {v}" for k, v in versions().items()), markup=False)
    for tool in ("g++", "nvcc", "nvidia-smi", "ptxas"):
        out.print(f"{tool}: {shutil.which(tool) or 'not found'}", markup=False)
    sensor = sensors.find_sensor(here)
    energy = (
        f"unavailable({sensor.reason})" if isinstance(sensor, Energy) else f"{type(sensor).__name__}, {sensor.scope}"
    )
    out.print(f"energy: {energy}", markup=False)
    out.print(f"\n[bold]noise[/bold]  {_noise()}")
    advice = [f"{i.key}: {i.missing}" for n in registry.op_names() for i in registry.impls(n) if i.missing]
    for text in sorted(set(advice)):
        out.print(f"missing: {text}", markup=False)
    try:
        importlib.metadata.version("pytest-benchmark")
    except importlib.metadata.PackageNotFoundError:
        out.print(
            "missing: pytest-benchmark (pip install pytest-benchmark) for times by kernel_benchmark", markup=False
        )
    return ExitCode.OK


def _noise(samples: int = 400) -> str:
    """How much a fixed piece of work varies here, in one second: a first idea of what can be told apart."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        sum(range(20_000))
        times.append(time.perf_counter() - start)
    times.sort()
    low, middle, high = times[samples // 10], times[samples // 2], times[samples * 9 // 10]
    above = [f"{(t / low - 1) * 100:.1f} %" for t in (middle, high)]
    return f"the same loop {samples} times: median {above[0]} and p90 {above[1]} above p10"
