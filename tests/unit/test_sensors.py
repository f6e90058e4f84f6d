"""Meters read from recorded and made-up trees and boards: RAPL, NVML, AMD."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rooftune import device, sensors
from rooftune.core import Unavailable
from rooftune.energy import Energy, refused
from rooftune.nvml import NvmlError


def rapl_tree(root: Path) -> Path:
    domains = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "psys"}
    for folder, name in domains.items():
        (root / folder).mkdir(parents=True)
        (root / folder / "name").write_text(name + "\n")
        (root / folder / "max_energy_range_uj").write_text("999\n")
        (root / folder / "energy_uj").write_text("900\n")
    return root


def test_rapl_adds_package_and_memory_and_survives_the_wrap(tmp_path: Path) -> None:
    sensor = sensors.RaplSensor(rapl_tree(tmp_path))
    assert (sensor.scope, sensor.joules(), sensor.watts()) == ("package+dram", 0.0, None)
    (tmp_path / "intel-rapl:0/energy_uj").write_text("50\n")  # 900 -> 999 -> 0 -> 50: 150 steps
    (tmp_path / "intel-rapl:0:1/energy_uj").write_text("910\n")
    (tmp_path / "intel-rapl:0:0/energy_uj").write_text("990\n")  # inside the package: not counted twice
    (tmp_path / "intel-rapl:1/energy_uj").write_text("990\n")
    assert sensor.joules() == pytest.approx(160e-6)
    assert sensor.joules() == pytest.approx(160e-6)


def test_rapl_that_is_forbidden_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = rapl_tree(tmp_path)
    monkeypatch.setattr(sensors, "POWERCAP", root)
    read = Path.read_text

    def guarded(path: Path, *args: Any, **options: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **options)

    monkeypatch.setattr(Path, "read_text", guarded)
    with pytest.raises(Unavailable, match="no-permission"):
        sensors.RaplSensor(root)
    for virtual, code, reason in (("KVM", "vm-guest", "no RAPL (VM)"), (None, "no-sensor", "no RAPL (no package")):
        monkeypatch.setattr("rooftune.device_cpu.hypervisor", lambda name=virtual: name)
        with pytest.raises(Unavailable) as caught:
            sensors.RaplSensor(tmp_path / "none")
        assert refused(caught.value).code == code
        assert refused(caught.value).reason.startswith(reason)


def test_this_machines_cpu_has_joules_or_a_reason() -> None:
    found = sensors.find_sensor(device.find("cpu"))
    if isinstance(found, Energy):
        assert found.value is None
        assert found.reason
    else:
        assert (found.joules() or 0.0) >= 0


class FakeBoard:
    def __init__(self, mig: bool = False, counter: bool = True, power: bool = True) -> None:
        self._mig, self.counter, self.power = mig, counter, power

    def mig(self) -> bool:
        return self._mig

    def energy_mj(self) -> int:
        if not self.counter:
            raise NvmlError("DeviceGetTotalEnergyConsumption", 3)
        return 12_500

    def power_w(self) -> float:
        if not self.power:
            raise NvmlError("field 186 (instant power)", 3)
        return 350.0


def test_nvml_boards() -> None:
    def read(**options: bool) -> tuple[str, float | None, float | None]:
        sensor = sensors.NvmlSensor(FakeBoard(**options))  # type: ignore[arg-type]
        return sensor.method, sensor.joules(), sensor.watts()

    assert read() == ("counter", 12.5, 350.0)
    assert read(power=False) == ("counter", 12.5, None)
    assert read(counter=False) == ("instant-integral", None, 350.0)
    with pytest.raises(Unavailable, match="mig: "):
        read(mig=True)
    with pytest.raises(Unavailable, match="no-sensor: "):
        read(counter=False, power=False)


class SmiError(Exception):
    pass


def test_amd_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def guest(handle: object) -> dict[str, float]:
        raise SmiError("not supported in a guest")

    smi = SimpleNamespace(
        AmdSmiException=SmiError, amdsmi_init=lambda: None, amdsmi_get_processor_handles=lambda: ["a"]
    )
    for field in ("energy_accumulator", "power"):
        smi.amdsmi_get_energy_count = lambda handle, field=field: {field: 2_000_000, "counter_resolution": 15.3}
        assert sensors.AmdSensor(0, smi).joules() == pytest.approx(30.6)
    with pytest.raises(Unavailable, match="does not know the board"):
        sensors.AmdSensor(1, smi)
    smi.amdsmi_get_energy_count = guest
    with pytest.raises(Unavailable, match="not supported in a guest"):
        sensors.AmdSensor(0, smi)
    with pytest.raises(Unavailable, match="no-sensor"):
        sensors.HwmonSensor(tmp_path)
    (tmp_path / "hwmon/hwmon3").mkdir(parents=True)
    (tmp_path / "hwmon/hwmon3/power1_input").write_text("305000000\n")
    assert sensors.HwmonSensor(tmp_path).watts() == 305.0
