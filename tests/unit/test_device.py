"""Devices and fingerprints, on recorded trees and a driver library made for the test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rooftune import device, device_cpu, device_cuda, device_rocm, sensors
from rooftune.core import Unavailable, UsageError
from rooftune.energy import Energy

DATA = Path(__file__).parent / "data"
CPUS = {"cpu_vm": 2, "cpu_metal": 4}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded machine, as what device_cpu sees."""
    files = json.loads((DATA / f"{request.param}.json").read_text())
    del files["_about"]
    monkeypatch.setattr(device_cpu, "ROOT", plant(tmp_path, files))
    monkeypatch.setattr(device_cpu, "_affinity", lambda: list(range(CPUS[request.param])))
    monkeypatch.setattr(device_cpu, "STEAL_WINDOW_S", 0.0)
    return tmp_path


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the made-up driver library."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to build the made-up driver")
    out = tmp_path_factory.mktemp("driver") / "fake_driver.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(out), str(DATA / "fake_driver.c")], check=True)
    return str(out)


@pytest.fixture
def fake(driver: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The made-up driver in place of libcuda and NVML, in this process."""
    monkeypatch.setattr(device_cuda, "LIBCUDA", driver)
    monkeypatch.setattr("rooftune.nvml.LIBRARY", driver)
    return driver


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cuda, "ask", device_cuda.report)
    device_cuda._listed.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Any:
    device_cuda._listed.cache_clear()
    yield
    device_cuda._listed.cache_clear()


@pytest.mark.parametrize("tree", ["cpu_vm"], indirect=True)
def test_recorded_guest(tree: Path) -> None:
    found = device.find("cpu").fingerprint()
    want = {
        "model": "Intel(R) Xeon(R) Processor",
        "cpu_id": "GenuineIntel-6-207-2",
        "cores": 2,
        "physical_cores": 2,
        "smt": False,
        "l1d_bytes": 48 * 2**10,
        "l2_bytes": 2 * 2**20,
        "l3_bytes": 300 * 2**20,  # one instance, seen by both cores: counted once
        "hypervisor": "KVM",
        "governor": None,
        "governor_reason": "no cpufreq (VM)",
        "cpu_quota": None,
    }
    assert {k: found[k] for k in want} == want
    assert {"avx512f", "amx_bf16"} <= set(str(found["flags"]).split())
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("tree", ["cpu_metal"], indirect=True)
def test_bare_metal_in_a_container(tree: Path) -> None:
    here = device.find("cpu")
    found = here.fingerprint()
    want = {
        "cores": 2,  # four allowed, 2.5 cores' worth of time
        "cpu_quota": 2.5,
        "physical_cores": 2,
        "smt": True,
        "l3_bytes": 64 * 2**20,
        "hypervisor": None,
        "governor": "powersave",
        "memory_total_bytes": 8 * 2**30,
        "memory_free_bytes": 7 * 2**30,
    }
    assert {k: found[k] for k in want} == want
    assert "governor_reason" not in found
    assert here.memory_bytes() == (8 * 2**30, 7 * 2**30)
    assert "0123" not in str(found["machine"])  # a hash, not the installation's id


@pytest.mark.parametrize("tree", ["cpu_metal"], indirect=True)
def test_identity_ignores_state_and_notices_the_governor(tree: Path) -> None:
    before = device.find("cpu").identity()
    plant(tree, {"proc/stat": "cpu  900 0 90 5000 5 0 1 70 0 0\n", "proc/meminfo": "MemTotal: 65000000 kB\n"})
    assert device.find("cpu").identity() == before
    plant(tree, {"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n"})
    after = device.find("cpu").identity()
    assert {k for k in after if after[k] != before[k]} == {"governor"}


def test_identity_of_a_stored_fingerprint() -> None:
    stored = device.find("cpu").fingerprint()
    assert device.identity({**stored, "load_1m": 99.0}) == device.identity(stored)
    with pytest.raises(UsageError, match="unknown kind"):
        device.identity({"kind": "abacus"})


@pytest.mark.parametrize("tree", ["cpu_metal"], indirect=True)
def test_steal_is_the_windows_share(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "rooftune.device_cpu.time.sleep", lambda s: plant(tree, {"proc/stat": "cpu  130 0 50 1050 5 0 1 20 30 0\n"})
    )
    assert device_cpu.steal() == pytest.approx(20 / 100)  # 30 user, 50 idle, 20 stolen; guest time is inside user


def test_a_machine_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cpu, "ROOT", tmp_path)
    found = device_cpu.fingerprint()
    for key in ("smt", "l3_bytes", "governor", "steal", "memory_total_bytes", "machine", "physical_cores"):
        assert found[key] is None, key
    assert found["model"]
    assert device_cpu.last_level_bytes() == 32 * 2**20
    assert device_cpu.cores() >= 1


def test_find_names_what_is_here_and_why_others_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_cuda, "LIBCUDA", "libcuda-that-is-not-here.so.1")
    monkeypatch.setattr(device_rocm, "NODES", tmp_path / "none")
    assert [str(d) for d in device.devices()] == ["cpu"]
    with pytest.raises(UsageError, match=r"cuda: no CUDA device \(libcuda not found\); here: cpu"):
        device.find("cuda")
    with pytest.raises(UsageError, match=r"unknown device 'tpu'; known: cpu; cuda: no CUDA device.*; rocm: no ROCm"):
        device.find("tpu")
    with pytest.raises(UsageError, match="unknown device 'cpu:3'"):
        device.find("cpu:3")


def test_cuda_devices_and_state(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    assert [(str(d), d.name) for d in device.devices()][1:3] == [("cuda:0", "Fake A"), ("cuda:1", "Fake B")]
    found = device.find("cuda").fingerprint()
    want = {
        "uuid": "GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
        "compute_capability": "9.0",
        "cuda": "13.1",
        "driver": "580.1",
        "l2_bytes": 62914560,
        "sm_clock_mhz": 1755,
        "max_sm_clock_mhz": 1980,
        "power_limit_w": 700.0,
        "power_w": 350.5,
        "ecc": True,
        "ecc_uncorrected": 0,
        "mig": False,
        "pcie": "5x16",
        "memory_free_bytes": 900,
        "clock_limits": "idle power-cap",
        "process_ids": "17 4242",
        "compute_mode": None,
        "compute_mode_reason": "NVML DeviceGetComputeMode: not supported by this board",
    }
    assert {k: found[k] for k in want} == want
    assert found["host_cores"]
    assert json.loads(json.dumps(found)) == found
    assert device.find("cuda").memory_bytes() == (1000, 900)
    assert device.find("cuda").torch == "cuda:0"


def test_mig_slice_and_missing_nvml(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    found = device.find("cuda:1").fingerprint()
    assert (found["mig"], found["uuid"]) == (True, "MIG-bbbbbbbb-bbbb-bbbb-bbbb-bbbbbbbbbbbb")
    monkeypatch.setenv("FAKE_NVML", "18")
    found = device.find("cuda:0").fingerprint()
    assert found["nvml_reason"] == "NVML Init_v2: driver and library versions differ"
    assert found["compute_capability"] == "9.0"


def test_no_device_says_what_the_driver_said(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    monkeypatch.setenv("FAKE_INIT", "100")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.absent()["cuda"] == "no CUDA device (the driver sees no device; CUDA_VISIBLE_DEVICES='')"


def test_device_that_vanished(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    second = device.find("cuda:1")
    monkeypatch.setenv("FAKE_VISIBLE", "1")
    with pytest.raises(Unavailable, match="cuda:1 is gone"):
        second.fingerprint()


CHILD = "#!/bin/sh\n{}\n"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("sleep 30", "did not answer within 0.5 s"),
        ("echo last words >&2; exit 3", "status 3: last words"),
        ("kill -SEGV $$", "status -11"),
        ("echo '[1, 2'", "cannot be read"),
        ("echo '{\"devices\": 7}'", "cannot be read"),
    ],
)
def test_a_sick_driver_is_a_reason(script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python"
    path.write_text(CHILD.format(f"exec {script}" if script.startswith("sleep") else script))
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    start = time.monotonic()
    answer = device_cuda.ask(0.5 if "within" in reason else 10.0)
    assert answer["devices"] == []
    assert reason in answer["reason"]
    assert time.monotonic() - start < 10


def test_the_child_asks_the_library(driver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real child process, with the made-up library where the loader looks for libcuda."""
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        shutil.copy(driver, tmp_path / name)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    answer = device_cuda.ask()
    assert [d["name"] for d in answer["devices"]] == ["Fake A", "Fake B"]
    monkeypatch.setenv("FAKE_HANG", "1")
    assert "did not answer" in device_cuda.ask(1.0)["reason"]


def test_rocm_from_the_kernels_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = "simd_count 1216\nsimd_per_cu 4\ngfx_target_version 90402\ndrm_render_minor 129\nunique_id 255\n"
    nodes = plant(
        tmp_path / "nodes",
        {"0/properties": "cpu_cores_count 96\nsimd_count 0\n", "1/properties": gpu, "10/properties": gpu},
    )
    cards = plant(
        tmp_path / "drm",
        {
            "renderD129/device/product_name": "AMD Instinct MI300X\n",
            "renderD129/device/mem_info_vram_total": "1000\n",
            "renderD129/device/mem_info_vram_used": "300\n",
            "renderD129/device/hwmon/hwmon4/power1_cap": "750000000\n",
            "renderD129/device/hwmon/hwmon4/temp1_input": "45000\n",
        },
    )
    monkeypatch.setattr(device_rocm, "NODES", nodes)
    monkeypatch.setattr(device_rocm, "CARDS", cards)
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    assert device_rocm.present()[0] == ["AMD Instinct MI300X"] * 2
    found = device.find("rocm:1").fingerprint()
    want = {"gfx": "gfx942", "compute_units": 304, "power_limit_w": 750.0, "temperature_c": 45.0, "uuid": f"{255:016x}"}
    assert {k: found[k] for k in want} == want
    assert device.find("rocm").memory_bytes() == (1000, 700)
    assert device.find("rocm").torch == "cuda:0"
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "1")
    assert len(device_rocm.present()[0]) == 1


def test_the_parent_loads_no_gpu_library() -> None:
    code = "import sys, rooftune.device; bad = {'torch', 'numpy', 'pynvml'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_nvml_energy_through_the_library(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    sensor = sensors.find_sensor(device.find("cuda:0"))
    assert isinstance(sensor, sensors.NvmlSensor)
    assert (sensor.method, sensor.joules(), sensor.watts()) == ("counter", 5.0, 350.5)
    monkeypatch.setenv("FAKE_MJ", "-1")
    sensor = sensors.find_sensor(device.find("cuda:0"))
    assert isinstance(sensor, sensors.NvmlSensor)
    assert sensor.method == "instant-integral"
    refused = sensors.find_sensor(device.find("cuda:1"))
    assert isinstance(refused, Energy)
    assert refused.code == "mig"
