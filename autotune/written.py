"""Recorded tunings, written: Kernel Tuner's caches, T4 and vLLM's tables. `formats.py` reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rooftune.autotune.formats import ERRORS, Row, Tuning
from rooftune.core import Problem, Status, UsageError, unknown
from rooftune.results import store


def write(form: str, tunings: Sequence[Tuning], out: Path) -> list[Path]:
    """Write tunings in a format into a folder, a file each (vLLM: a file per kernel, device and fixed sizes).

    Raises:
        UsageError: unknown format, or nothing that the format can hold.
    """
    if form not in WRITERS:
        raise unknown("format", form, list(WRITERS))
    written = []
    for name, data in WRITERS[form]([t for t in tunings if not unfit(form, t)]):
        path = out / name
        store.atomic_write(path, json.dumps(data, indent=1, allow_nan=False) + "\n")
        written.append(path)
    if not written:
        raise UsageError(f"nothing to write as {form}: {unfit(form, tunings[0]) if tunings else 'no tuning'}")
    return written


def unfit(form: str, tuning: Tuning) -> str:
    """Why a format cannot hold a tuning, or nothing."""
    if form != "vllm":
        return ""
    try:
        sizes = Problem.parse(tuning.problem).dims
    except UsageError:  # of another tool
        sizes = ()
    if not sizes:
        return f"a table is named by sizes, which '{tuning.problem}' does not name as softmax[m=64,n=512]"
    return "" if tuning.chosen or tuning.best else "no config of it ran"


def _name(tuning: Tuning, suffix: str) -> str:
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{tuning.kernel} {tuning.problem} {tuning.device}").strip("-")
    return f"{words or 'tuning'}{suffix}"


def _unique(pairs: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """Two tunings of one name get a number: a journal holds one for every key."""
    seen: dict[str, int] = {}
    for name, data in pairs:
        seen[name] = seen.get(name, 0) + 1
        stem, dot, suffix = name.partition(".")
        yield (name if seen[name] == 1 else f"{stem}-{seen[name]}{dot}{suffix}"), data


def _stamp(row: Row) -> dict[str, str]:
    """When a config was recorded, as both tools write it; nothing where the record does not say."""
    if row.unix_time is None:
        return {}
    try:
        when = datetime.fromtimestamp(row.unix_time, UTC)
    except (OverflowError, TypeError, ValueError):  # the year 0, or a word: no date
        return {}
    return {"timestamp": when.isoformat(sep=" ", timespec="microseconds")}


def _as_kernel_tuner(tunings: Sequence[Tuning]) -> Iterable[tuple[str, Any]]:
    """Its schema 1.1.0, milliseconds. What it spent on a config is what a simulation under a time limit adds up: ours
    cannot tell compiling, checking and timing apart, so all of it is under `benchmark_time`."""
    errors = {Status.SKIPPED: "InvalidConfig", Status.FAILED_COMPILE: "CompilationFailedConfig"}

    def entry(row: Row) -> dict[str, Any]:
        times = row.times_s or ((row.time_s,) if row.time_s is not None else ())
        spent = {
            "compile_time": row.compile_s or 0.0,
            "benchmark_time": sum(times) if row.spent_s is None else row.spent_s,
        }
        about: dict[str, Any] = {name: seconds * 1e3 for name, seconds in spent.items()}
        about |= {"verification_time": 0, "strategy_time": 0, "framework_time": 0, **_stamp(row)}
        if row.time_s is None:
            wrong = errors.get(Status(row.status), "RuntimeFailedConfig")
            return {**row.config, "time": wrong, "__error__": wrong, **about}
        return {**row.config, "time": row.time_s * 1e3, "times": [t * 1e3 for t in times], **about}

    for tuning in tunings:
        keys = list(tuning.axes)
        cache = {",".join(str(row.config.get(k)) for k in keys): entry(row) for row in tuning.rows}
        dated = all(map(_stamp, tuning.rows))  # the schema wants it of all
        head = {"schema_version": "1.1.0"} if dated else {}
        size = tuning.about.get("problem_size", tuning.problem)  # it resumes only what has a number where it has one
        head |= {"device_name": tuning.device, "kernel_name": tuning.kernel, "problem_size": size}
        yield _name(tuning, ".json"), {
            **head, "tune_params_keys": keys, "tune_params": tuning.axes, "objective": "time", "cache": cache,
        }  # fmt: skip


def _as_t4(tunings: Sequence[Tuning]) -> Iterable[tuple[str, Any]]:
    known = {v: k for k, v in ERRORS.items() if k.islower()}

    def result(row: Row) -> dict[str, Any]:
        times = {"compilation_time": (row.compile_s or 0.0) * 1e3, "runtimes": [t * 1e3 for t in row.times_s]}
        out = {"configuration": row.config, "times": times, "objectives": ["time"]}
        invalid = "correct" if row.time_s is not None else known.get(Status(row.status), "runtime")
        measured = [] if row.time_s is None else [{"name": "time", "value": row.time_s * 1e3, "unit": "ms"}]
        return {
            **_stamp(row),
            **out,
            "invalidity": invalid,
            "correctness": float(row.time_s is not None),
            "measurements": measured,
        }

    for tuning in tunings:
        about = {"kernel": tuning.kernel, "problem": tuning.problem, "device": tuning.device}
        results = [result(row) for row in tuning.rows]
        yield _name(tuning, ".t4.json"), {"schema_version": "1.0.0", "results": results, "metadata": about}


SPELLINGS = {"block_m": "BLOCK_SIZE_M", "block_n": "BLOCK_SIZE_N", "block_k": "BLOCK_SIZE_K", "group_m": "GROUP_SIZE_M"}


def _as_vllm(tunings: Sequence[Tuning]) -> Iterable[tuple[str, Any]]:
    """A table per kernel, device and all sizes but the first, which is its key; what each tuning decided for."""
    tables: dict[str, dict[str, Any]] = {}
    for tuning in tunings:
        best = tuning.best
        config = tuning.chosen or (best.config if best else {})
        problem = Problem.parse(tuning.problem)
        (_, first), *rest = problem.dims
        parts = [f"{name.upper()}={size}" for name, size in rest]
        parts += [f"{name}={value}" for name, value in problem.flags]
        parts += [f"device_name={tuning.device}", f"dtype={problem.precision}"]
        folder = tuning.kernel.replace("/", "-").strip(".") or problem.op  # a file says it: `..` is no place for ours
        name = f"{folder}/{re.sub('[ /]', '_', ','.join(parts))}.json"
        versions = tuning.about.get("toolchain") or {}
        table = tables.setdefault(name, {"triton_version": versions["triton"]} if "triton" in versions else {})
        table[str(first)] = {SPELLINGS.get(axis, axis): value for axis, value in config.items()}
    for name, table in tables.items():
        head = {k: v for k, v in table.items() if not k.isdigit()}
        yield name, head | {k: table[k] for k in sorted((k for k in table if k.isdigit()), key=int)}


WRITERS: Mapping[str, Callable[[Sequence[Tuning]], Iterable[tuple[str, Any]]]] = {
    "kernel-tuner": lambda tunings: _unique(_as_kernel_tuner(tunings)),
    "t4": lambda tunings: _unique(_as_t4(tunings)),
    "vllm": _as_vllm,
}
