"""Energy meters: NVIDIA boards (NVML), CPUs (RAPL), AMD boards (amdsmi, else the kernel's power reading).

A meter that is missing, forbidden or known to lie is an `Energy.unavailable` with the reason, never 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rooftune import device_cpu, device_rocm
from rooftune.core import Unavailable
from rooftune.device import Device
from rooftune.energy import Energy, refused
from rooftune.metering import Sensor
from rooftune.nvml import Board, Nvml, NvmlError

POWERCAP = Path("/sys/class/powercap")


class NvmlSensor:
    """A whole NVIDIA board: the counter of millijoules (Volta and newer), or instant power without one.

    The gain error is 5 % over 70 boards of 12 generations (Yang, Adamek, Armour, SC24), who also found
    that A100 and H100 sample a quarter of the run time only: hence many windows and the cross-check.
    """

    systematic = 0.05
    scope = "board"

    def __init__(self, board: Board) -> None:
        self.board = board
        self.method = "counter"
        if board.mig():
            raise Unavailable("mig: the board's counter is not per MIG slice")
        self._has_power = self._answers(board.power_w)
        if not self._answers(board.energy_mj):
            if not self._has_power:
                raise Unavailable("no-sensor: the board has neither an energy counter nor instant power")
            self.method = "instant-integral"

    @staticmethod
    def _answers(read: Any) -> bool:
        try:
            read()
        except NvmlError:
            return False
        return True

    def joules(self) -> float | None:
        return None if self.method == "instant-integral" else self.board.energy_mj() / 1e3

    def watts(self) -> float | None:
        return self.board.power_w() if self._has_power else None


class RaplSensor:
    """Intel or AMD CPU packages, with their memory where it is metered, through Linux powercap.

    The counters are those of whole packages: every process on them is in the figure. They wrap at
    `max_energy_range_uj`, which takes a minute or more at full power; a reading in every window is enough.
    """

    method = "rapl"
    systematic = 0.05

    def __init__(self, root: Path = POWERCAP) -> None:
        self.domains: list[tuple[Path, int]] = []
        names = set()
        for folder in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
            name = _text(folder / "name") or ""
            kind = name.partition("-")[0]
            if kind in ("package", "dram"):  # core and uncore lie inside package; psys would count it twice
                self.domains.append((folder, int(_text(folder / "max_energy_range_uj") or 0)))
                names.add(kind)
        if not self.domains:
            if device_cpu.hypervisor():
                raise Unavailable("vm-guest: no RAPL (VM)")
            raise Unavailable("no-sensor: no RAPL (no package domain in powercap)")
        self.scope = "+".join(n for n in ("package", "dram") if n in names)
        self.last = [self._read(folder) for folder, _ in self.domains]
        self.total_uj = 0

    @staticmethod
    def _read(folder: Path) -> int:
        try:
            return int((folder / "energy_uj").read_text())
        except PermissionError as error:
            text = "no-permission: RAPL counters may be read by root only (since 2020); allow reading energy_uj"
            raise Unavailable(text) from error
        except (OSError, ValueError) as error:
            raise Unavailable(f"counter-frozen: RAPL counter cannot be read: {error}") from error

    def joules(self) -> float | None:
        for index, (folder, span) in enumerate(self.domains):
            now = self._read(folder)
            step = now - self.last[index]
            if step < 0:
                if not span:
                    raise Unavailable("counter-frozen: RAPL counter ran backwards and tells no range")
                step += span + 1
            self.total_uj += step
            self.last[index] = now
        return self.total_uj / 1e6

    def watts(self) -> float | None:
        return None


class AmdSensor:
    """An AMD board through amdsmi's energy accumulator (steps of 15.3 uJ)."""

    method = "amd-counter"
    scope = "board"  # an MI2xx reports both dies at the first
    systematic = 0.05

    def __init__(self, index: int, smi: Any) -> None:
        self.smi = smi
        try:
            smi.amdsmi_init()
            self.handle = smi.amdsmi_get_processor_handles()[index]
        except (smi.AmdSmiException, IndexError) as error:
            raise Unavailable(f"no-sensor: amdsmi does not know the board: {error}") from error
        self.joules()

    def joules(self) -> float | None:
        try:
            count = self.smi.amdsmi_get_energy_count(self.handle)
        except self.smi.AmdSmiException as error:
            raise Unavailable(f"no-sensor: amdsmi gives no energy: {error}") from error
        steps = count.get("energy_accumulator", count.get("power"))  # the field's name before ROCm 6.1
        return float(steps) * float(count["counter_resolution"]) / 1e6

    def watts(self) -> float | None:
        return None


class HwmonSensor:
    """An AMD board's instant power in the kernel's hwmon files, microwatts. `power1_average` is not instant."""

    method = "instant-integral"
    scope = "board"
    systematic = 0.05

    def __init__(self, folder: Path | None) -> None:
        found = sorted((folder / "hwmon").glob("hwmon*/power1_input")) if folder else []
        if not found:
            raise Unavailable("no-sensor: neither amdsmi nor instant power in hwmon")
        self.path = found[0]

    def joules(self) -> float | None:
        return None

    def watts(self) -> float | None:
        text = _text(self.path)
        if text is None or not text.isdigit():
            raise Unavailable("counter-frozen: hwmon power cannot be read")
        return int(text) / 1e6


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _amd(index: int) -> Sensor:
    try:
        import amdsmi
    except (ImportError, KeyError, OSError):  # KeyError: the package without its library
        return HwmonSensor(device_rocm.card(device_rocm.nodes()[index][1]))
    return AmdSensor(index, amdsmi)


def find_sensor(device: Device) -> Sensor | Energy:
    """The best meter of a device, or why there is none. For a worker: it loads the vendor's library."""
    try:
        if device.kind == "cpu":
            return RaplSensor()
        if device.kind == "cuda":
            return NvmlSensor(Nvml().board(str(device.fingerprint()["uuid"])))
        return _amd(device.index)
    except Unavailable as error:
        return refused(error)
