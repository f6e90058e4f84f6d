"""Recorded tunings, read and written: ours, Kernel Tuner's caches, T4; Triton's autotune files in, vLLM's tables out.

A recorded tuning is what a search can be replayed on, and what it can start from on another device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rooftune.autotune.journal import SCHEMA, canonical
from rooftune.core import Config, Problem, Status, UsageError, unknown
from rooftune.results import store

MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """A config's outcome. `time_s` is None unless it ran; `value` is what a search minimises (time, or our ratio)."""

    config: Config
    time_s: float | None
    value: float | None
    status: str = Status.OK
    reason: str = ""
    times_s: tuple[float, ...] = ()
    compile_s: float | None = None


@dataclass(frozen=True)
class Tuning:
    """All outcomes for one kernel, problem and device.

    `chosen` is the config its tuning decided for (with us the default, where nothing was better); None: unknown.
    """

    kernel: str
    problem: str
    device: str
    axes: dict[str, list[Any]]
    rows: list[Row]
    source: str
    chosen: Config | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Row | None:
        """The fastest."""
        ran = [row for row in self.rows if row.value is not None]
        return min(ran, key=lambda row: row.value or 0.0, default=None)


def load(path: Path, say: Callable[[str], None] = store.talk) -> list[Tuning]:
    """Every tuning in a file, whichever of the known formats it has.

    Args:
        say: gets one line of text if damaged or cut lines and entries were dropped; standard error if not given.
    Raises:
        UsageError: not readable, or none of the formats; names what is wrong.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path} is larger than {MAX_BYTES >> 20} MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        ours = path.suffix == store.SUFFIX or text.startswith('{"kind":')
        found = _journal(path, say) if ours else [_theirs(path, text, say)]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # a list where an object belongs
        raise UsageError(f"{path}: a field is not what this format has there ({error})") from error
    if not any(tuning.rows for tuning in found):
        raise UsageError(f"{path} holds no tuned config")
    return found


def _theirs(path: Path, text: str, say: Callable[[str], None]) -> Tuning:
    data = _json(path, text, say)
    if "cache" in data and "tune_params_keys" in data:
        return _kernel_tuner(path, data)
    if "results" in data:
        return _t4(path, data)
    if "configs_timings" in data:
        return _triton(path, data)
    raise UsageError(f"{path}: neither a journal, a Kernel Tuner cache, T4 results nor a Triton autotune file")


def _json(path: Path, text: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The object in a file. A Kernel Tuner cache is appended to while it tunes; an interrupted one is not closed."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        data = _closed(text) if '"cache"' in text else None
        if data is None:
            raise UsageError(f"{path} is not JSON ({error})") from error
        say(f"{path}: its end is missing; {len(dict(data).get('cache') or ())} whole entries are read")
    if not isinstance(data, dict):
        raise UsageError(f"{path} holds no object, so no recorded tuning")
    return data


def _closed(text: str) -> Any:
    """A cache whose end is missing, up to its last whole entry. Two braces close the cache and the file: after half
    an entry they are one too few, so half an entry is never taken for a whole one."""
    head = text.rstrip().rstrip(",")
    while head:
        try:
            return json.loads(head + "}}")
        except json.JSONDecodeError as error:  # whatever ends behind the place that is wrong cannot help
            head = head[: head.rfind("},", 0, error.pos) + 1]
        except (ValueError, RecursionError):
            return None
    return None


# --- ours -----------------------------------------------------------------------------------------------------------


def _journal(path: Path, say: Callable[[str], None]) -> list[Tuning]:
    lines, damaged = store.Log(path).read()
    if damaged:
        say(f"{path}: {damaged} damaged or cut line{'s' * (damaged > 1)} dropped")
    begun = [x for x in lines if x.get("kind") == "tune" and x.get("event") == "start"]
    starts = {x["key"]: x["what"] for x in begun if x.get("schema") == SCHEMA}
    found: list[Tuning] = []
    for key, what in starts.items():
        mine = [x for x in lines if x.get("kind") == "tune" and x.get("key") == key]
        # Two processes may have measured the same config: the later outcome counts, as in a resume.
        trials = {canonical(x["trial"]["config"]): x["trial"] for x in mine if x.get("event") == "config"}
        rows = []
        for trial in trials.values():
            value = trial["time_s"] if trial["ratio"] is None else trial["ratio"]
            samples = tuple(min(samples) for samples in trial["rounds"] if samples)
            rows.append(Row(trial["config"], trial["time_s"], value, trial["status"], trial["reason"], samples))
        final = next((x["result"] for x in reversed(mine) if x.get("event") == "final"), None)
        device = str((what.get("device") or {}).get("name", ""))
        chosen = final["config"] if final else None
        found.append(_tuning(path, what["impl"], what["problem"], device, rows, {}, chosen, what))
    return found


def _tuning(
    path: Path,
    kernel: str,
    problem: str,
    device: str,
    rows: Sequence[Row],
    declared: Mapping[str, Sequence[Any]],
    chosen: Config | None = None,
    about: dict[str, Any] | None = None,
) -> Tuning:
    """A tuning with its axes: values in the order of size, or as they come (declared ones first) where they have none.

    Values that are equal are one value (True, 1 and 1.0: writers mix them), so a config has one spelling.
    """
    seen: dict[str, dict[Any, Any]] = {name: {v: v for v in values} for name, values in declared.items()}
    spelled: list[Row] = []
    for row in rows:
        for name, value in row.config.items():
            if isinstance(value, list | dict) or value != value:  # NaN equals nothing
                raise UsageError(f"{path}: {name} is {value!r:.40}, which is no value that could be searched")
        config = {name: seen.setdefault(name, {}).setdefault(value, value) for name, value in row.config.items()}
        spelled.append(replace(row, config=config))
    axes = {name: _sorted(list(values)) for name, values in seen.items()}
    return Tuning(kernel, problem, device, axes, spelled, str(path), chosen, about or {})


def _sorted(values: list[Any]) -> list[Any]:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return sorted(values) if numbers else values


# --- theirs ---------------------------------------------------------------------------------------------------------

ERRORS = {  # Kernel Tuner's error classes, and T4's invalidities
    "InvalidConfig": Status.SKIPPED,
    "CompilationFailedConfig": Status.FAILED_COMPILE,
    "RuntimeFailedConfig": Status.FAILED_LAUNCH,
    "constraints": Status.SKIPPED,
    "compile": Status.FAILED_COMPILE,
    "runtime": Status.FAILED_LAUNCH,
    "timeout": Status.TIMEOUT,
    "correctness": Status.WRONG,
}
FAILURE = 1e20  # the time that Kernel Tuner gave a config without one, before it had error classes
SECONDS = {"s": 1.0, "seconds": 1.0, "ms": 1e-3, "milliseconds": 1e-3, "us": 1e-6, "microseconds": 1e-6, "ns": 1e-9}


def _kernel_tuner(path: Path, data: dict[str, Any]) -> Tuning:
    """Times are milliseconds; a failure is an error class in `__error__`, or in any field (before 1.4)."""
    keys = list(data["tune_params_keys"])
    rows = []
    for name, entry in data["cache"].items():
        if not isinstance(entry, dict) or not set(keys) <= set(entry):
            raise UsageError(f"{path}: cache entry '{name}' lacks a parameter of {', '.join(keys)}")
        config = {key: entry[key] for key in keys}
        said = (v for k, v in entry.items() if k not in keys and isinstance(v, str))  # an axis may have any word
        wrong = entry.get("__error__") or next((v for v in said if v in ERRORS), None)
        time_ms = entry.get("time")
        if wrong or time_ms is None or not _positive(time_ms):
            status = ERRORS.get(str(wrong), Status.FAILED_LAUNCH)
            rows.append(Row(config, None, None, status, str(wrong or f"time is {time_ms!r:.40}")))
            continue
        times = tuple(t * 1e-3 for t in entry.get("times") or () if _positive(t))
        compiled = entry.get("compile_time")
        compile_s = compiled * 1e-3 if isinstance(compiled, int | float) else None
        rows.append(Row(config, time_ms * 1e-3, time_ms * 1e-3, Status.OK, "", times, compile_s))
    declared = {k: list(data.get("tune_params", {}).get(k) or ()) for k in keys}
    kernel, size, device = (str(data.get(k, "")) for k in ("kernel_name", "problem_size", "device_name"))
    return _tuning(path, kernel, size, device, rows, declared)


def _positive(value: Any) -> bool:
    """Whether it can be a time."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < FAILURE


def _t4(path: Path, data: dict[str, Any]) -> Tuning:
    """The time is the objective if that is one, else the measurement `time`, else the mean of `runtimes`, in ms."""
    rows = []
    for number, result in enumerate(data["results"]):
        try:
            config, invalid, times = dict(result["configuration"]), result["invalidity"], result["times"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: result {number} lacks configuration, invalidity or times") from error
        if invalid != "correct":
            rows.append(Row(config, None, None, ERRORS.get(str(invalid), Status.FAILED_LAUNCH), str(invalid)))
            continue
        wanted = ((result.get("objectives") or ["time"])[0], "time")
        runs = tuple(t * 1e-3 for t in times.get("runtimes") or () if _positive(t))
        measured = {m.get("name"): s for m in result.get("measurements") or () if (s := _seconds(m)) is not None}
        mean = sum(runs) / len(runs) if runs else None
        time_s = next((measured[name] for name in wanted if name in measured), mean)
        compiled = times.get("compilation_time", times.get("compilation"))
        compile_s = compiled * 1e-3 if isinstance(compiled, int | float) else None
        status = Status.OK if time_s is not None else Status.FAILED_LAUNCH
        rows.append(Row(config, time_s, time_s, status, "" if time_s else "has no time", runs, compile_s))
    said = data.get("metadata")
    about: dict[str, Any] = said if isinstance(said, dict) else {}
    kernel, problem, device = (str(about.get(k, "")) for k in ("kernel", "problem", "device"))
    return _tuning(path, kernel, problem, device, rows, {})


def _seconds(measurement: dict[str, Any]) -> float | None:
    """None for what is no time: Kernel Tuner writes GFLOP/s, of which more is better, without a unit."""
    value: Any = measurement.get("value")
    timed = re.search("time|latency|duration", str(measurement.get("name")).lower())
    unit = str(measurement.get("unit") or ("ms" if timed else "")).lower()
    return value * SECONDS[unit] if unit in SECONDS and _positive(value) else None


def _triton(path: Path, data: dict[str, Any]) -> Tuning:
    """`[config, [median, 20 %, 80 %]]` in ms; infinite for what did not run. What only some configs set, others leave
    to the compiler: None."""
    rows: list[Row] = []
    for pair in data["configs_timings"]:
        try:
            said, timing = pair
            config = dict(said.get("kwargs") or {})
            config |= {
                k: said[k] for k in ("num_warps", "num_ctas", "num_stages", "maxnreg") if said.get(k) is not None
            }
            time_ms = timing[0] if isinstance(timing, list) else timing
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise UsageError(f"{path}: an entry of configs_timings is not [config, timings]") from error
        time_s = time_ms * 1e-3 if _positive(time_ms) else None
        status = Status.OK if time_s else Status.FAILED_LAUNCH
        rows.append(Row(config, time_s, time_s, status, "" if time_s else "has no time"))
    name = path.name.removesuffix(".json").removesuffix(".autotune")
    names = dict.fromkeys(axis for row in rows for axis in row.config)
    rows = [replace(row, config={axis: row.config.get(axis) for axis in names}) for row in rows]
    return _tuning(path, name, json.dumps(data.get("key", [])), "", rows, {})


# --- writing --------------------------------------------------------------------------------------------------------


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


def _as_kernel_tuner(tunings: Sequence[Tuning]) -> Iterable[tuple[str, Any]]:
    errors = {Status.SKIPPED: "InvalidConfig", Status.FAILED_COMPILE: "CompilationFailedConfig"}

    def entry(row: Row) -> dict[str, Any]:
        if row.time_s is None:
            wrong = errors.get(Status(row.status), "RuntimeFailedConfig")
            return {**row.config, "time": wrong, "__error__": wrong}
        times = [t * 1e3 for t in row.times_s or (row.time_s,)]
        return {**row.config, "time": row.time_s * 1e3, "times": times, "compile_time": (row.compile_s or 0.0) * 1e3}

    for tuning in tunings:
        keys = list(tuning.axes)
        cache = {",".join(str(row.config.get(k)) for k in keys): entry(row) for row in tuning.rows}
        head = {"device_name": tuning.device, "kernel_name": tuning.kernel, "problem_size": tuning.problem}
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
        return {**out, "invalidity": invalid, "correctness": float(row.time_s is not None), "measurements": measured}

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
