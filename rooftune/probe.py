"""Measured ceilings of a device: copy bandwidth by working set, matrix rate by precision; and the roof they make.

`ceilings` runs in a worker of its own, in the same session as the race it judges. `roof` is plain
arithmetic for the parent. A ceiling is the best of several samples: everything that disturbs only slows.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

from rooftune.core import UsageError

Entry = dict[str, Any]


def entry(samples: Sequence[float], unit: str, how: str) -> Entry:
    """A ceiling: the best sample; `spread` is how far the median lies below it, as a share."""
    best = max(samples)
    return {"value": best, "unit": unit, "how": how, "spread": 1 - statistics.median(samples) / best}


def missing(unit: str, reason: str) -> Entry:
    """A ceiling that could not be measured."""
    return {"value": None, "unit": unit, "how": "", "spread": None, "reason": reason}


def ceilings(device_kind: str, threads: int = 1, quick: bool = True) -> dict[str, Any]:
    """Measure a device's ceilings.

    Args:
        device_kind: `cpu`, or a GPU as `cuda`, `cuda:1`, `rocm`.
        threads: CPU threads that the competitors will get.
        quick: 4 to 5 s on two cores; False takes four times the samples and larger matrices.

    Returns:
        JSON-ready: `copy` is a list of entries with `working_set_bytes` (source and destination together),
        rising; `matrix` maps a precision to its entry; `vector` and `tiles` (AMX) likewise, from registers, CPU
        only; `datasheet` holds the vendor's promise or None. An entry has `value` (None with `reason`), `unit`
        (GB/s, TFLOP/s, TOP/s), `how` and `spread`.
    """
    if threads < 1:
        raise UsageError(f"threads must be positive, not {threads}")
    start, cpu = time.perf_counter(), time.process_time()
    if device_kind == "cpu":
        from rooftune import probe_cpu

        found = probe_cpu.ceilings(threads, quick)
    else:
        from rooftune import probe_cuda

        found = probe_cuda.ceilings(device_kind, quick)
    seconds = {"wall_s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    return {"device": device_kind, "threads": threads if device_kind == "cpu" else None, **found, **seconds}


def bandwidth(ceilings: dict[str, Any], working_set: float) -> tuple[float | None, str]:
    """Bytes a second of a copy with about this working set, and its name or why there is none.

    The nearest measured set counts (by ratio), or a larger one if that was faster: what fits a large
    set fits a small one, and small copies are slowed by the cost of the call.
    """
    known = [c for c in ceilings.get("copy") or () if c.get("value")]
    if not known:
        return None, "no copy bandwidth was measured"
    size = max(working_set, 1.0)
    nearest = min(known, key=lambda c: abs(math.log(c["working_set_bytes"] / size)))
    best = max(
        (c for c in known if c["working_set_bytes"] >= nearest["working_set_bytes"]), key=lambda c: float(c["value"])
    )
    return float(best["value"]) * 1e9, f"copy of {_size(best['working_set_bytes'])}"


def rate(ceilings: dict[str, Any], precision: str) -> tuple[float | None, str]:
    """Operations a second in a precision: the best of matrix product and register loops, and its name."""
    entries = ((kind, (ceilings.get(kind) or {}).get(precision)) for kind in ("matrix", "vector", "tiles"))
    known = [(float(e["value"]), f"{kind} rate {precision}") for kind, e in entries if e and e.get("value")]
    if known:
        best, name = max(known)
        return best * 1e12, name
    why = ((ceilings.get("matrix") or {}).get(precision) or {}).get("reason", "not measured")
    return None, f"no matrix rate for {precision}: {why}"


def roof(
    ceilings: dict[str, Any], op_bound: str, flops: float, bytes_: float, precision: str
) -> tuple[float | None, str]:
    """The shortest time that the measured ceilings allow, and which of them sets it.

    Args:
        op_bound: `compute` or `memory`. The few operations of a memory-bound operator are not matrix
            products, so the matrix rate says nothing about them: bytes alone count.
        flops, bytes_: the operator's model work.

    Returns:
        Seconds and the ceiling's name; None and the reason if one that is needed was not measured.
    """
    speed, copy_name = bandwidth(ceilings, bytes_)
    if speed is None:
        return None, copy_name
    moving = bytes_ / speed
    if op_bound == "memory":
        return moving, copy_name
    peak, rate_name = rate(ceilings, precision)
    if peak is None:
        return None, rate_name
    return max((moving, copy_name), (flops / peak, rate_name))


def _size(count: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:g} B"
