"""Recorded tunings, read: ours, Kernel Tuner's caches, T4 and Triton's autotune files. `written.py` writes them.

A recorded tuning is what a search can be replayed on, and what it can start from on another device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rooftune.autotune.journal import SCHEMA, canonical
from rooftune.core import Config, Status, UsageError
from rooftune.results import store

MAX_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Row:
    """A config's outcome.

    Attributes:
        time_s: None unless it ran.
        value: what a search minimises (time, or our ratio).
        times_s: single readings, or a summary of each round.
        compile_s: of the compiler, where the record tells it apart.
        spent_s: what measuring it cost besides `compile_s`.
        unix_time: when it was recorded.
    """

    config: Config
    time_s: float | None
    value: float | None
    status: str = Status.OK
    reason: str = ""
    times_s: tuple[float, ...] = ()
    compile_s: float | None = None
    spent_s: float | None = None
    unix_time: float | None = None


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
        trials = {canonical(x["trial"]["config"]): x for x in mine if x.get("event") == "config"}
        rows = []
        for line in trials.values():
            trial = line["trial"]
            value = trial["time_s"] if trial["ratio"] is None else trial["ratio"]
            samples = tuple(min(samples) for samples in trial["rounds"] if samples)
            row = Row(trial["config"], trial["time_s"], value, trial["status"], trial["reason"], samples)
            rows.append(replace(row, spent_s=trial.get("spent_s"), unix_time=line.get("unix_time")))
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

    Values that are equal are one value (True, 1 and 1.0: writers mix them), so a config has one spelling. A list or an
    object is known by its JSON text.
    """
    seen: dict[str, dict[Any, Any]] = {name: {v: v for v in map(_plain, values)} for name, values in declared.items()}
    spelled: list[Row] = []
    for row in rows:
        config = {}
        for name, given in row.config.items():
            value = _plain(given)
            if value != value:  # NaN equals nothing
                raise UsageError(f"{path}: {name} is {value!r:.40}, which is no value that could be searched")
            config[name] = seen.setdefault(name, {}).setdefault(value, value)
        spelled.append(replace(row, config=config))
    axes = {name: _sorted(list(values)) for name, values in seen.items()}
    return Tuning(kernel, problem, device, axes, spelled, str(path), chosen, about or {})


def _plain(value: Any) -> Any:
    return json.dumps(value, sort_keys=True) if isinstance(value, list | dict) else value


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
            row = Row(config, None, None, status, str(wrong or f"time is {time_ms!r:.40}"))
        else:
            times = tuple(t * 1e-3 for t in entry.get("times") or () if _positive(t))
            row = Row(config, time_ms * 1e-3, time_ms * 1e-3, Status.OK, "", times)
        spent = (_milli(entry.get("verification_time")), _milli(entry.get("benchmark_time")))
        spent_s = None if None in spent else sum(s or 0.0 for s in spent)
        when = _unix_time(entry.get("timestamp"))
        rows.append(replace(row, compile_s=_milli(entry.get("compile_time")), spent_s=spent_s, unix_time=when))
    declared = {k: list(data.get("tune_params", {}).get(k) or ()) for k in keys}
    kernel, size, device = (str(data.get(k, "")) for k in ("kernel_name", "problem_size", "device_name"))
    about = {"problem_size": data["problem_size"]} if "problem_size" in data else {}
    return _tuning(path, kernel, size, device, rows, declared, about=about)


def _milli(value: Any) -> float | None:
    """Seconds of a duration in milliseconds; None for what is none."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < FAILURE
    return value * 1e-3 if number else None


def _unix_time(stamp: Any) -> float | None:
    """Of an ISO date with its zone; None for what is none."""
    try:
        when = datetime.fromisoformat(stamp)
    except (TypeError, ValueError):
        return None
    return when.timestamp() if when.tzinfo else None


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
        compile_s = _milli(times.get("compilation_time", times.get("compilation")))
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
