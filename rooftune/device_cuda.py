"""CUDA devices: the driver library names them, NVML tells their state.

Both are asked in a short-lived child with a deadline: `cuInit` and NVML can hang on a sick board, and
the parent must stay free of a driver. CUDA_VISIBLE_DEVICES and the driver's own order hold by
construction, since libcuda does the counting.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from ctypes import byref, c_int, c_size_t, c_uint
from functools import cache
from pathlib import Path
from typing import Any

from rooftune.core import Unavailable
from rooftune.nvml import Board, Nvml, NvmlError

Scalar = str | int | float | bool | None

LIBCUDA = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
DEADLINE_S = 30.0  # eight boards without persistence mode take some 15 s to wake
IDENTITY: tuple[str, ...] = (
    "uuid",
    "driver",
    "compute_capability",
    "memory_total_bytes",
    "power_limit_w",
    "max_sm_clock_mhz",
    "max_memory_clock_mhz",
    "ecc",
    "mig",
)
_ATTRIBUTES = {  # CUdevice_attribute
    "multiprocessors": 16,
    "l2_bytes": 38,
    "persisting_l2_bytes": 108,
    "shared_bytes_per_block": 97,
    "registers_per_multiprocessor": 82,
}
_ERRORS = {
    3: "driver not initialised",
    34: "libcuda is a stub without a driver",
    100: "the driver sees no device",
    101: "invalid device",
    803: "driver and libcuda versions differ",
    804: "forward compatibility is not supported on this board",
    999: "unknown driver error",
}


def _cu(lib: Any, name: str, *args: Any) -> None:
    if code := getattr(lib, name)(*args):
        raise Unavailable(_ERRORS.get(code, f"{name} returned {code}"))


def _uuid(lib: Any, device: c_int) -> str:
    raw = (ctypes.c_ubyte * 16)()
    name = "cuDeviceGetUuid_v2" if hasattr(lib, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    _cu(lib, name, raw, device)
    text = bytes(raw).hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _make(lib: Any, ordinal: int) -> dict[str, Scalar]:
    """What the driver library says about one device; makes no context."""
    device, total, name = c_int(), c_size_t(), ctypes.create_string_buffer(256)
    _cu(lib, "cuDeviceGet", byref(device), c_int(ordinal))
    _cu(lib, "cuDeviceGetName", name, c_int(256), device)
    _cu(lib, "cuDeviceTotalMem_v2", byref(total), device)

    def attribute(number: int) -> int:
        out = c_int()
        _cu(lib, "cuDeviceGetAttribute", byref(out), c_int(number), device)
        return out.value

    return {
        "name": name.value.decode(),
        "uuid": _uuid(lib, device),
        "compute_capability": f"{attribute(75)}.{attribute(76)}",
        "memory_total_bytes": total.value,
        **{key: attribute(number) for key, number in _ATTRIBUTES.items()},
    }


def _board(nvml: Nvml, uuid: str) -> tuple[Board, bool]:
    """The NVML board of a CUDA device, and whether the device is a MIG slice."""
    try:
        return nvml.board(f"GPU-{uuid}"), False
    except NvmlError:
        return nvml.board(f"MIG-{uuid}"), True


def _state(nvml: Nvml, uuid: str) -> dict[str, Scalar]:
    """Clocks, power, errors... What a board does not tell is None, with `<field>_reason`."""
    board, sliced = _board(nvml, uuid)
    found: dict[str, Scalar] = {"driver": nvml.driver(), "uuid": f"{'MIG' if sliced else 'GPU'}-{uuid}"}
    readers: dict[str, Callable[[], Scalar]] = {
        "sm_clock_mhz": lambda: board.number("GetClockInfo", c_int(1)),
        "memory_clock_mhz": lambda: board.number("GetClockInfo", c_int(2)),
        "max_sm_clock_mhz": lambda: board.number("GetMaxClockInfo", c_int(1)),
        "max_memory_clock_mhz": lambda: board.number("GetMaxClockInfo", c_int(2)),
        "power_limit_w": lambda: board.number("GetEnforcedPowerLimit") / 1e3,
        "power_w": board.power_w,
        "temperature_c": lambda: board.number("GetTemperature", c_int(0)),
        "clock_limits": lambda: " ".join(board.event_reasons()),
        "ecc": lambda: bool(board.pair("GetEccMode")[0]),
        "ecc_uncorrected": board.uncorrected_errors,
        "mig": lambda: sliced or board.mig(),
        "persistence": lambda: bool(board.number("GetPersistenceMode")),
        "compute_mode": lambda: board.number("GetComputeMode"),
        "pcie": lambda: f"{board.number('GetCurrPcieLinkGeneration')}x{board.number('GetCurrPcieLinkWidth')}",
        "memory_free_bytes": lambda: board.memory()[1],
        "process_ids": lambda: " ".join(map(str, sorted(board.processes()))),
    }
    for key, read in readers.items():
        try:
            found[key] = read()
        except NvmlError as error:
            found[key], found[f"{key}_reason"] = None, str(error)
    return found


def report() -> dict[str, Any]:
    """`{"reason": why there is none, "devices": [fields of each]}`. Runs in the child: may hang."""
    try:
        lib = ctypes.CDLL(LIBCUDA)
        _cu(lib, "cuInit", c_uint(0))
        count, version = c_int(), c_int()
        _cu(lib, "cuDeviceGetCount", byref(count))
        _cu(lib, "cuDriverGetVersion", byref(version))
        found = [_make(lib, i) for i in range(count.value)]
    except OSError:
        return {"reason": "libcuda not found", "devices": []}
    except (Unavailable, AttributeError) as error:  # AttributeError: a libcuda without this entry point
        return {"reason": str(error), "devices": []}
    for device in found:
        device["cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
        try:
            device |= _state(Nvml(), str(device["uuid"]))
        except Unavailable as error:
            device["nvml_reason"] = str(error)
            device["uuid"] = f"GPU-{device['uuid']}"
    return {"reason": "" if found else "the driver sees no device", "devices": found}


def ask(deadline_s: float = DEADLINE_S) -> dict[str, Any]:
    """`report()` from a child process, or a reason if that takes longer than the deadline."""
    root = str(Path(__file__).resolve().parent.parent)
    code = f"import sys; sys.path.insert(0, {root!r}); from rooftune import device_cuda as d; d.main()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        out, err = child.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired:
        child.kill()  # not waited for: a process stuck inside the driver does not die before the driver answers
        return {"reason": f"the driver did not answer within {deadline_s:g} s", "devices": []}
    if child.returncode:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        return {"reason": f"asking the driver failed with status {child.returncode}: {last}"[:200], "devices": []}
    with contextlib.suppress(json.JSONDecodeError):
        answer = json.loads(out.decode(errors="replace").rpartition("\n")[2])
        if isinstance(answer, dict) and isinstance(answer.get("devices"), list):
            return answer
    return {"reason": "the driver's answer cannot be read", "devices": []}


def main() -> None:
    """The child: print the report as one line of JSON."""
    sys.stdout.write("\n" + json.dumps(report()))


@cache
def _listed(visible: str | None) -> dict[str, Any]:
    try:
        ctypes.CDLL(LIBCUDA)  # touches no device; spares machines without a driver the child
    except OSError:
        return {"reason": "libcuda not found", "devices": []}
    answer = ask()
    if not answer["devices"] and visible is not None:
        answer["reason"] += f"; CUDA_VISIBLE_DEVICES={visible!r}"
    return answer


def present() -> tuple[list[str], str]:
    """Names in CUDA's order, or why there is none. The answer is kept while CUDA_VISIBLE_DEVICES stays."""
    answer = _listed(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [d["name"] for d in answer["devices"]], "" if answer["devices"] else f"no CUDA device ({answer['reason']})"


def fingerprint(index: int) -> dict[str, Scalar]:
    """See `rooftune.device.Device.fingerprint`. Asks anew: clocks and processes change.

    Raises:
        Unavailable: the device is gone.
    """
    answer = ask()
    if index >= len(answer["devices"]):
        raise Unavailable(f"cuda:{index} is gone ({answer['reason'] or 'fewer devices than before'})")
    fields: dict[str, Scalar] = answer["devices"][index]
    return fields


def memory(index: int) -> tuple[int | None, int | None]:
    """Total and free bytes."""
    fields = fingerprint(index)
    total, free = fields.get("memory_total_bytes"), fields.get("memory_free_bytes")
    return (total if isinstance(total, int) else None), (free if isinstance(free, int) else None)
