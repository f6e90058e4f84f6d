"""The winners as a package that needs no rooftune: kernels, their table, and torch for everything else."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rooftune
from rooftune import device as devices
from rooftune import registry
from rooftune.autotune import dispatch, standalone
from rooftune.autotune.dispatch import Candidate, Choice
from rooftune.autotune.inprocess import layout
from rooftune.autotune.journal import canonical, toolchain
from rooftune.autotune.runtime import Place
from rooftune.autotune.vendor import Package, source
from rooftune.core import Config, Evidence, Problem, UsageError
from rooftune.results import store

NAME = "tuned_kernels"
OPENING = "Kernels that won on "  # of an export's README: one that begins otherwise is the user's
PLACES = {"rooftune.autotune.runtime": "runtime", "rooftune.autotune.standalone": "dispatch"}


def known_problems(device: devices.Device, threads: int | None = None) -> list[Problem]:
    """Problems on which something was measured on this very device, in stored runs."""
    identity = device.identity()
    found: dict[Problem, None] = {}
    for path in [*store.list_runs(), *store.list_runs(store.REFERENCE)][: dispatch.MAX_RUNS]:
        try:
            records = store.load_run(path, say=lambda text: None)
        except UsageError:  # not a run: `report` says what is wrong with it
            continue
        for record in records:
            mine = record.device.get("identity") == identity and record.evidence == Evidence.MEASURED
            if mine and threads in (None, record.regime.get("threads")) and record.op in registry.op_names():
                with contextlib.suppress(UsageError):  # of an older version: an operator may have lost a flag
                    found[registry.problem(record.problem)] = None
    return sorted(found, key=str)


def winners(
    problems: Sequence[Problem], device: devices.Device, threads: int | None = None
) -> tuple[list[Choice], dict[str, str]]:
    """(what to export for each problem, what is left out and why)."""
    chosen: list[Choice] = []
    left: dict[str, str] = {}
    for problem in problems:
        try:
            registry.baseline(problem.op)
        except UsageError as error:  # one operator without torch's call does not end the export of the others
            left[str(problem)] = str(error)
            continue
        choice = dispatch.choose(problem, str(device), threads)
        if choice.use.source == "default":
            left[str(problem)] = choice.use.why
            continue
        use = choice.use
        if why := _refused(use):
            left[f"{problem} {use.impl}"] = why
            others = [c for c in choice.considered if c.ratio_ci and c.ratio_ci[0] > 1.0 and not _refused(c)]
            safe = registry.baseline(problem.op)
            torch = Candidate(safe.key, None, "default", why=f"torch: {use.impl} {why}")
            use = max(others, key=lambda c: c.ratio or 0.0, default=torch)
        chosen.append(replace(choice, use=use))
    return chosen, left


def _refused(candidate: Candidate) -> str:
    """Why a competitor's source cannot leave rooftune, or nothing."""
    impl = registry.impl(candidate.impl)
    if not impl.module.startswith("rooftune."):
        return "is not a part of rooftune: its own package holds it"
    try:
        Package().add(impl.module, "build")
    except UsageError as error:
        return str(error)
    return ""


def write(folder: Path, choices: Sequence[Choice], device: devices.Device, threads: int, name: str = NAME) -> Path:
    """Write the package into a folder; an earlier export there is replaced, anything else is refused.

    Returns:
        The package's folder.
    Raises:
        UsageError: nothing to write, a name Python cannot import, or the folder holds something else.
    """
    if not choices:
        raise UsageError("nothing to export: no problem has a measured winner on this device; run or tune first")
    if not re.fullmatch(r"[a-z]\w*", name) or name == "rooftune":
        raise UsageError(f"--name {name}: a package's name is lower-case letters, digits and underscores")
    target = folder / name
    if target.exists() and not (target / "table.json").is_file():
        raise UsageError(f"{target} exists and is no export of ours; choose another --out or --name")
    readme = folder / "README.md"
    if readme.exists() and not re.match(rf"# \w+\n\n{OPENING}", readme.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(f"{readme} exists and is no export's; choose another --out")
    package = Package(PLACES)
    package.add("rooftune.autotune.standalone", "call")
    package.add("rooftune.autotune.standalone", "best")
    table = _table(package, choices, device, threads)
    files = package.files()
    for path, text in _data(package).items():
        files.setdefault(path, text)
    files["__init__.py"] = _init(table, device)
    files["table.json"] = json.dumps(table, indent=1, allow_nan=False) + "\n"
    for old in sorted(target.rglob("*")) if target.exists() else ():
        if old.is_file():  # of the earlier export: a kernel that no longer wins must not stay
            try:
                old.unlink()
            except OSError as error:
                raise UsageError(f"cannot replace {old}: {error.strerror}") from error
    for path, text in files.items():
        store.atomic_write(target / path, text)
    store.atomic_write(readme, _readme(table, name, device))
    return target


def _table(package: Package, choices: Sequence[Choice], device: devices.Device, threads: int) -> dict[str, Any]:
    operators: dict[str, Any] = {}
    entries: dict[str, Any] = {}
    for choice in choices:
        problem = registry.problem(choice.problem)
        op, impl = registry.op(problem.op), registry.impl(choice.use.impl)
        if problem.op not in operators:
            safe = registry.baseline(problem.op)
            package.add(safe.module, "SPACE")
            fallback = _module(package, safe.module, safe.key, True, op.bound == "compute")
            operators[problem.op] = {"dims": list(op.dims), "summary": op.summary, "torch": fallback, "forms": []}
        tensors = layout(problem.op, problem.precision, problem.flags)
        form = {
            "precision": problem.precision,
            "flags": dict(problem.flags),
            "inputs": [_flat(p) for p in tensors.inputs],
            "output": None if tensors.output is None else _flat(tensors.output),
        }
        if form not in operators[problem.op]["forms"]:
            operators[problem.op]["forms"].append(form)
        shape, dtype = op.output(problem)
        use = choice.use
        entries[str(problem)] = {
            **_module(package, impl.module, impl.key, impl.baseline, op.bound == "compute"),
            "config": use.config if use.config is not None else _default(impl, problem),
            "why": use.why,
            "ratio_to_torch": use.ratio,
            "ratio_ci": use.ratio_ci,
            "time_s": use.time_s,
            "run": use.run,
            "device": standalone.processor() if device.kind == "cpu" else device.name,
            "threads": threads,
            "source_hash": impl.source_hash,
            "toolchain": toolchain(impl),
            **({} if tensors.output is not None else {"output": [dtype, list(shape)]}),
        }
    about = {"rooftune": rooftune.__version__, "unix_time": time.time(), "identity": device.identity()}
    return {"schema": 1, "about": about, "operators": operators, "winners": entries}


def _module(package: Package, module: str, impl: str, torch: bool, products: bool) -> dict[str, Any]:
    package.add(module, "build")
    return {"impl": impl, "module": ".".join(package.place(module)), "torch": torch, "products": products}


def _default(impl: registry.Impl, problem: Problem) -> Config:
    found: Config = impl.load().SPACE.default_for(problem)
    return found


def _flat(place: Place) -> list[Any]:
    return [place.dtype, list(place.dims)]


def _data(package: Package) -> dict[str, str]:
    """CUDA sources that lie beside the modules, with the headers they include."""
    out: dict[str, str] = {}
    for module in package.kept:
        found = source(module)
        assert found is not None
        if not any("__file__" in s.bare for s in package.kept[module]):
            continue
        here = "/".join(package.place(module)[:-1])
        for path in sorted(found.path.parent.glob(f"{found.path.stem}.*")):
            if path.suffix != ".py":
                out[f"{here}/{path.name}"] = path.read_text(encoding="utf-8")
        for path in sorted(found.path.parent.glob("*/*.cuh")):  # common/cuda: what a GPU's compiler includes
            out[f"{here}/{path.parent.name}/{path.name}"] = path.read_text(encoding="utf-8")
    return out


def _init(table: dict[str, Any], device: devices.Device) -> str:
    """The package's own functions: one per operator."""
    names = sorted(table["operators"])
    functions = "".join(
        f"\n\ndef {name}(*tensors: Any, out: Any = None, precision: str | None = None, **flags: str | bool) -> Any:\n"
        f'    """{table["operators"][name]["summary"]}. Into `out`, or a new tensor; no gradients."""\n'
        f'    return call("{name}", *tensors, out=out, precision=precision, **flags)\n'
        for name in names
    )
    exported = ", ".join(f'"{n}"' for n in ["best", *names])
    return (
        f'"""Kernels that won on {device.name}, and torch where nothing did. `table.json` holds the evidence.\n\n'
        f"Written by rooftune {rooftune.__version__}, of which nothing is needed here.\n"
        f'"""\n\nfrom __future__ import annotations\n\nfrom typing import Any\n\n'
        f"from .dispatch import best, call\n\n__all__ = [{exported}]\n{functions}"
    )


def _readme(table: dict[str, Any], name: str, device: devices.Device) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(table["about"]["unix_time"]))
    rows = []
    for problem, entry in table["winners"].items():
        low, high = entry["ratio_ci"] or (None, None)
        gain = (
            "baseline" if entry["ratio_to_torch"] is None else f"{entry['ratio_to_torch']:.2f} [{low:.2f}, {high:.2f}]"
        )
        rows.append(f"| `{problem}` | {entry['impl']} | `{canonical(entry['config'])}` | {gain} |")
    op, about = next(iter(table["operators"].items()))
    form = about["forms"][0]
    flags = [f"{flag}={True if value == '1' else repr(value)}" for flag, value in form["flags"].items()]
    example = f"{name}.{op}({', '.join([*'abcdefgh'[: len(form['inputs'])], *flags])})"
    return (
        f"# {name}\n\n{OPENING}{device.name} ({day}). They need torch and the packages in `table.json`, "
        f"nothing else.\n\n```python\nimport {name}\n\nout = {example}\n```\n\n"
        "A kernel runs for exactly the problem it won, on a device of that name, with the packages it was built with; "
        f"anything else runs torch's own call. `{name}.best('{op}', ...).why` says which and why.\n\n"
        "| problem | kernel | config | best torch call's time over its own [95 % interval] |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )
