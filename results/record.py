"""The record: one line per candidate, problem and run. What is stored is exactly what a program reads.

A record is a flat JSON object with the keys below; `None` always means *not measured*, and then
`reason` (or the energy's own reason) says why. Floats are seconds, joules, fractions: see the names.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import asdict, dataclass, field, fields
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
    tie: bool = False
    error: dict[str, Any] | None = None
    energy: dict[str, Any] | None = None
    device: dict[str, Any] = field(default_factory=dict)
    resources: list[dict[str, Any]] | None = None
    rounds: list[list[float]] | None = None
    regime: dict[str, Any] = field(default_factory=dict)
    source_hash: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    run: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    unix_time: float = field(default_factory=time.time)
    kind: str = "result"
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain data; NaN and infinities never get in."""
        data = asdict(self)
        data["status"], data["evidence"] = str(self.status), str(self.evidence)
        return data

    @property
    def cell(self) -> tuple[str, str]:
        """What two runs have in common: problem and competitor (an untuned entrant keeps its call)."""
        call = self.config.get("call")
        return self.problem, self.impl + (f":{call}" if call else "")


_REQUIRED = {"problem": str, "op": str, "precision": str, "impl": str, "config": dict, "status": str, "evidence": str}
_NUMBERS = ("time_s", "ratio_to_torch", "tflops", "gbps", "roof")


def from_json(data: Any, where: str = "record") -> Record:
    """Read a record written by this or an older version; unknown keys of the same schema are dropped.

    Raises:
        UsageError: not a record, a field of the wrong type, or a schema from the future.
    """
    if not isinstance(data, dict) or "schema" not in data:
        raise UsageError(f"{where}: not a rooftune record (no field 'schema')")
    if not isinstance(data["schema"], int) or data["schema"] > SCHEMA:
        raise UsageError(f"{where}: schema {data['schema']!r} is newer than ours ({SCHEMA}); update rooftune")
    for key, kind in _REQUIRED.items():
        if not isinstance(data.get(key), kind):
            raise UsageError(f"{where}: field '{key}' is {data.get(key)!r}, expected {kind.__name__}")
    for key in _NUMBERS:
        value = data.get(key)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise UsageError(f"{where}: field '{key}' is {value!r}, expected a positive number or null")
    if data["status"] not in set(Status):
        raise UsageError(f"{where}: unknown status '{data['status']}'; known: {', '.join(Status)}")
    known = {f.name for f in fields(Record)}
    return Record(**{k: v for k, v in data.items() if k in known})
