"""The record: one line per candidate, problem and run. What is stored is exactly what a program reads.

A record is a flat JSON object with the keys below; `None` always means *not measured*, and then
`reason` (or the energy's own reason) says why. Floats are seconds, joules, fractions: see the names.
"""

from __future__ import annotations

import math
import reprlib
import time
import uuid
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from rooftune.core import Evidence, Status, UsageError

SCHEMA = 1


@dataclass
class Record:
    """One result.

    Attributes:
        problem: printed problem; `op`, `shape`, `precision` are its parts.
        impl: `gemm/numba`; `config` its axes; `default` true if that is the untuned config.
        time_s: median over rounds of the round's 25 % order statistic; `time_ci_s` its 95 % interval.
        ratio_to_torch: best torch call's time over ours (above 1: faster than torch), with `ratio_ci`.
        roof: share of the measured roof, 1 = at the roof. `tie`: in the set that no one beats.
        ratio_at_roof: the best torch call's time over the roof's floor: the ratio of a kernel at the roof.
        goal: the ratio to torch that the suite asks for, if it does.
        error: figures of the check (`rel_fro`, `max_error` in units of the allowed error, `cases`).
        energy: `joules`, `unit`, `method`, `reason`, ... as `rooftune.energy.Energy` prints itself.
        rounds: raw samples, seconds per call, [rounds][samples].
        regime: how it was timed (`clock`, `cache`, `threads`, `power_capped`, ...).
        resources: registers, spill_bytes, shared_bytes, tensor_core... per architecture, if compiled.
    """

    problem: str
    op: str
    shape: str
    precision: str
    impl: str
    config: dict[str, Any]
    default: bool
    status: str
    reason: str = ""
    evidence: str = Evidence.MEASURED
    time_s: float | None = None
    time_ci_s: list[float] | None = None
    ratio_to_torch: float | None = None
    ratio_ci: list[float] | None = None
    tflops: float | None = None
    gbps: float | None = None
    roof: float | None = None
    ratio_at_roof: float | None = None
    goal: float | None = None
    tie: bool = False
    error: dict[str, Any] | None = None
    energy: dict[str, Any] | None = None
    device: dict[str, Any] = field(default_factory=dict)
    resources: list[dict[str, Any]] | None = None
    rounds: list[list[float]] | None = None
    regime: dict[str, Any] = field(default_factory=dict)
    source_hash: str = ""
    judge_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    run: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    unix_time: float = field(default_factory=time.time)
    kind: str = "result"
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain data. The store refuses NaN and infinities: unmeasured is None."""
        data = asdict(self)
        data["status"], data["evidence"] = str(self.status), str(self.evidence)
        return data

    @property
    def cell(self) -> tuple[str, str]:
        """What two runs have in common: problem and competitor (an untuned entrant keeps its call)."""
        call = self.config.get("call")
        return self.problem, self.impl + (f":{call}" if call else "")


_TEXT = ("problem", "op", "shape", "precision", "impl", "status", "evidence")
_OPTIONAL_TEXT = ("reason", "source_hash", "judge_hash", "run", "id", "kind")
_NUMBERS = ("time_s", "ratio_to_torch", "tflops", "gbps", "roof", "ratio_at_roof", "goal")
_INTERVALS = ("time_ci_s", "ratio_ci")
_DICTS = ("device", "regime", "versions")
_OPTIONAL_DICTS = ("error", "energy")


def _positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0


def _is_rounds(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(r, list) and all(map(_positive, r)) for r in value)


def _wrong_field(data: dict[str, Any]) -> tuple[str, str] | None:
    """The first field that is missing or of the wrong type, and what was expected. Absent optional ones are fine."""
    known = [f.name for f in fields(Record) if f.name in data]
    optional = {f.name for f in fields(Record) if f.default is not MISSING or f.default_factory is not MISSING}
    for key in dict.fromkeys((*_TEXT, "config", "default", *known)):
        value = data.get(key)
        if key not in data and key in optional:
            continue
        if key in (*_TEXT, *_OPTIONAL_TEXT):
            fits, expected = isinstance(value, str), "text"
        elif key in ("default", "tie"):
            fits, expected = isinstance(value, bool), "true or false"
        elif key in _NUMBERS:
            fits, expected = value is None or _positive(value), "a positive number or null"
        elif key in _INTERVALS:
            pair = isinstance(value, list) and len(value) == 2 and all(map(_positive, value))
            fits, expected = value is None or pair, "two positive numbers or null"
        elif key == "rounds":
            fits, expected = value is None or _is_rounds(value), "lists of positive numbers or null"
        elif key == "resources":
            rows = isinstance(value, list) and all(isinstance(row, dict) for row in value)
            fits, expected = value is None or rows, "a list of objects or null"
        elif key == "unix_time":
            fits, expected = _positive(value), "seconds since 1970"
        elif key in ("config", *_DICTS, *_OPTIONAL_DICTS):
            fits = isinstance(value, dict) or (value is None and key in _OPTIONAL_DICTS)
            expected = "an object"
        else:
            continue
        if not fits:
            return key, expected
    return None


def from_json(data: Any, where: str = "record") -> Record:
    """Read a record written by this or an older version; unknown keys of the same schema are dropped.

    Raises:
        UsageError: not a record, a field missing or of the wrong type, or a schema from the future.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise UsageError(f"{where}: not a rooftune record (no field 'schema')")
    schema = data["schema"]
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UsageError(f"{where}: field 'schema' is {schema!r}, expected a whole number")
    if schema > SCHEMA:
        raise UsageError(f"{where}: schema {schema} is newer than ours ({SCHEMA}); update rooftune")
    if wrong := _wrong_field(data):
        key, expected = wrong
        found = f"is {reprlib.repr(data[key])}" if key in data else "is missing"
        raise UsageError(f"{where}: field '{key}' {found}, expected {expected}")
    for key, known in (("status", list(Status)), ("evidence", list(Evidence))):
        if data[key] not in known:
            raise UsageError(f"{where}: unknown {key} '{data[key]}'; known: {', '.join(known)}")
    names = {f.name for f in fields(Record)}
    return Record(**{k: v for k, v in data.items() if k in names})
