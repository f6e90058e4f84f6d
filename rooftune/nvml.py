"""The few NVML calls we need, through ctypes: no package to install, nothing loaded until used.

Entry points, structures and constants: NVIDIA's NVML API reference. NVML makes no CUDA context.
"""

from __future__ import annotations

import ctypes
import sys
from ctypes import byref, c_char_p, c_double, c_int, c_longlong, c_uint, c_ulonglong, c_void_p
from typing import Any

from rooftune.core import Unavailable

LIBRARY = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
ERRORS = {
    1: "not initialised",
    2: "invalid argument",
    3: "not supported by this board",
    4: "no permission",
    6: "not found",
    9: "driver not loaded",
    12: "library not found",
    13: "call not in this driver",
    15: "GPU is lost",
    16: "GPU needs a reset",
    18: "driver and library versions differ",
    999: "unknown error",
}
FUNCTION_NOT_FOUND = 13
POWER_INSTANT = 186  # NVML_FI_DEV_POWER_INSTANT, mW; nvmlDeviceGetPowerUsage is a 1 s average from Ampere on
EVENT_REASONS = {
    0x001: "idle",
    0x002: "application-clocks",
    0x004: "power-cap",
    0x008: "hw-slowdown",
    0x010: "sync-boost",
    0x020: "sw-thermal",
    0x040: "hw-thermal",
    0x080: "hw-power-brake",
    0x100: "display-clocks",
}


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Process(ctypes.Structure):
    _fields_ = [("pid", c_uint), ("memory", c_ulonglong), ("gpu_instance", c_uint), ("compute_instance", c_uint)]


class _Value(ctypes.Union):
    _fields_ = [("double", c_double), ("uint", c_uint), ("ulonglong", c_ulonglong), ("longlong", c_longlong)]


class _Field(ctypes.Structure):
    _fields_ = [
        ("field", c_uint),
        ("scope", c_uint),
        ("timestamp", c_longlong),
        ("latency", c_longlong),
        ("kind", c_uint),
        ("status", c_uint),
        ("value", _Value),
    ]


class NvmlError(Unavailable):
    """A call that NVML refused; `code` is its return value."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"NVML {call}: {ERRORS.get(code, f'error {code}')}")
        self.code = code


class Nvml:
    """The library, initialised.

    Raises:
        Unavailable: it cannot be loaded or does not start.
    """

    def __init__(self) -> None:
        try:
            self.lib: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise Unavailable(f"NVML not found ({LIBRARY})") from error
        self.call("Init_v2")

    def call(self, name: str, *args: Any) -> None:
        """Call `nvml<name>`; NvmlError if it does not succeed."""
        try:
            function = getattr(self.lib, f"nvml{name}")
        except AttributeError as error:
            raise NvmlError(name, FUNCTION_NOT_FOUND) from error
        if code := function(*args):
            raise NvmlError(name, code)

    def driver(self) -> str:
        """Driver version."""
        text = ctypes.create_string_buffer(96)
        self.call("SystemGetDriverVersion", text, c_uint(96))
        return text.value.decode()

    def count(self) -> int:
        """Boards in the machine, whatever CUDA_VISIBLE_DEVICES says."""
        number = c_uint()
        self.call("DeviceGetCount_v2", byref(number))
        return number.value

    def board(self, uuid: str) -> Board:
        """The board (or MIG slice) of that UUID: indices differ between NVML and CUDA, UUIDs do not."""
        handle = c_void_p()
        self.call("DeviceGetHandleByUUID", c_char_p(uuid.encode()), byref(handle))
        return Board(self, handle)


class Board:
    """One GPU. Every method raises NvmlError where the board does not tell."""

    def __init__(self, nvml: Nvml, handle: c_void_p) -> None:
        self.nvml, self.handle = nvml, handle

    def number(self, name: str, *args: Any) -> int:
        """A call `nvmlDevice<name>(device, args..., unsigned int *)`."""
        out = c_uint()
        self.nvml.call(f"Device{name}", self.handle, *args, byref(out))
        return out.value

    def pair(self, name: str) -> tuple[int, int]:
        """A call with two outputs: (current, pending)."""
        current, pending = c_uint(), c_uint()
        self.nvml.call(f"Device{name}", self.handle, byref(current), byref(pending))
        return current.value, pending.value

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes."""
        out = _Memory()
        self.nvml.call("DeviceGetMemoryInfo", self.handle, byref(out))
        return out.total, out.free

    def uncorrected_errors(self) -> int:
        """Uncorrected ECC errors since the driver was loaded."""
        out = c_ulonglong()
        self.nvml.call("DeviceGetTotalEccErrors", self.handle, c_int(1), c_int(0), byref(out))
        return out.value

    def energy_mj(self) -> int:
        """Millijoules since the driver was loaded (Volta and newer)."""
        out = c_ulonglong()
        self.nvml.call("DeviceGetTotalEnergyConsumption", self.handle, byref(out))
        return out.value

    def power_w(self) -> float:
        """Instant board power, watts: field 186, never the 1 s average.

        Raises:
            NvmlError: the board has no such field.
        """
        field = _Field(field=POWER_INSTANT)
        self.nvml.call("DeviceGetFieldValues", self.handle, c_int(1), byref(field))
        if field.status:
            raise NvmlError("field 186 (instant power)", field.status)
        return float(field.value.uint) / 1e3

    def event_reasons(self) -> list[str]:
        """Why the clocks are not higher, now."""
        out = c_ulonglong()
        try:
            self.nvml.call("DeviceGetCurrentClocksEventReasons", self.handle, byref(out))
        except NvmlError as error:
            if error.code != FUNCTION_NOT_FOUND:
                raise
            self.nvml.call("DeviceGetCurrentClocksThrottleReasons", self.handle, byref(out))  # before driver 535
        return [name for bit, name in EVENT_REASONS.items() if out.value & bit]

    def processes(self) -> list[int]:
        """Ids of the processes that compute on the board."""
        room = (_Process * 128)()
        count = c_uint(len(room))
        self.nvml.call("DeviceGetComputeRunningProcesses_v3", self.handle, byref(count), room)
        return [p.pid for p in room[: count.value]]

    def mig(self) -> bool:
        """Whether the board is cut into MIG slices. Boards that cannot be are not."""
        try:
            return bool(self.pair("GetMigMode")[0])
        except NvmlError as error:
            if error.code == 3:
                return False
            raise
