"""The CPU: make, caches, state. Read from /proc and /sys; elsewhere than on Linux most fields are None."""

from __future__ import annotations

import hashlib
import os
import platform
import time
from functools import cache
from pathlib import Path

Scalar = str | int | float | bool | None

IDENTITY: tuple[str, ...] = (
    *("model", "cpu_id", "cores", "cpu_quota", "smt", "l2_bytes", "l3_bytes", "flags", "governor", "hypervisor"),
)
# Instruction sets that decide which kernel runs or how fast: everything else in /proc/cpuinfo is noise.
FLAGS = (
    *(
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512vl",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
    ),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "sve", "sve2", "bf16", "i8mm", "sme"),
)
STEAL_WINDOW_S = 0.05  # five ticks of 10 ms: a hint; for a round's share read ticks() around it
ROOT = Path("/")  # tests point it to a recorded tree


def _text(path: str) -> str | None:
    """A file's stripped text, or None where it does not exist or may not be read."""
    try:
        return (ROOT / path).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def _number(path: str) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota() -> float | None:
    """Cores' worth of time the container may use (cgroup v2, then v1), or None where it is not limited."""
    both = (_text("sys/fs/cgroup/cpu.max") or "").split()
    if len(both) != 2:
        both = [_text(f"sys/fs/cgroup/cpu/cpu.cfs_{part}_us") or "" for part in ("quota", "period")]
    if all(part.isdigit() for part in both) and int(both[1]):
        return int(both[0]) / int(both[1])
    return None


def cores() -> int:
    """Cores this process may keep busy: affinity, cut to the container's quota, at least 1."""
    limit = quota()
    mine = len(_affinity())
    return mine if limit is None else max(1, min(mine, int(limit)))


def _bytes(text: str | None) -> int | None:
    """`2048K` as bytes."""
    if not text:
        return None
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)
    digits = text.rstrip("KMG")
    return int(digits) * unit if digits.isdigit() else None


def caches() -> dict[str, int | None]:
    """L1d and L2 of one core, L3 summed over the instances our cores reach; bytes, None if not told.

    A guest often sees the whole socket's L3 though it gets a part of it.
    """
    sizes: dict[str, int | None] = {"l1d_bytes": None, "l2_bytes": None, "l3_bytes": None}
    seen: set[tuple[str, str]] = set()
    for cpu in _affinity():
        for index in range(8):
            where = f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
            level, kind = _text(f"{where}/level"), _text(f"{where}/type")
            size = _bytes(_text(f"{where}/size"))
            if level is None or kind == "Instruction" or size is None:
                continue
            name = {"1": "l1d_bytes", "2": "l2_bytes", "3": "l3_bytes"}.get(level)
            shared = (level, _text(f"{where}/shared_cpu_list") or str(cpu))
            if name == "l3_bytes" and shared not in seen:
                sizes[name] = (sizes[name] or 0) + size
            elif name and sizes[name] is None:
                sizes[name] = size
            seen.add(shared)
    return sizes


def last_level_bytes() -> int:
    """The outermost cache; 32 MiB where the system does not tell."""
    sizes = caches()
    return sizes["l3_bytes"] or sizes["l2_bytes"] or 32 * 2**20


@cache
def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's lines of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in (_text("proc/cpuinfo") or "").split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _model() -> str:
    info = _cpuinfo(ROOT)
    arm = f"{info.get('CPU implementer', '')} {info.get('CPU part', '')}".strip()
    return info.get("model name") or (f"Arm {arm}" if arm else "") or platform.processor() or platform.machine()


def flags() -> set[str]:
    """Every feature flag of the processor, in Linux's names."""
    info = _cpuinfo(ROOT)
    return set((info.get("flags") or info.get("Features") or "").split())


def hypervisor() -> str | None:
    """Name of the hypervisor, `unnamed` if there is one that does not say, None on bare metal."""
    clocks = _text("sys/devices/system/clocksource/clocksource0/available_clocksource") or ""
    for word, name in (("kvm-clock", "KVM"), ("hyperv", "Hyper-V"), ("xen", "Xen")):
        if word in clocks:
            return name
    named = _text("sys/hypervisor/type")
    if named or "hypervisor" not in flags():
        return named
    return _text("sys/class/dmi/id/sys_vendor") or "unnamed"


def ticks() -> tuple[int, int] | None:
    """(steal, total) ticks of all cores since boot: read around a round, their ratio is the round's steal share.

    The guest columns are already inside user and nice, so they are left out.
    """
    line = (_text("proc/stat") or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    columns = [int(x) for x in line[1:9]]
    return columns[7], sum(columns)


def steal(window_s: float = STEAL_WINDOW_S) -> float | None:
    """Share of the machine's CPU time, 0..1, that the hypervisor gave to others during the window."""
    before = ticks()
    time.sleep(window_s)
    after = ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def memory(index: int = 0) -> tuple[int | None, int | None]:
    """Total and available bytes of the machine, cut to the container's limit (cgroup v2)."""
    lines = (line.split() for line in (_text("proc/meminfo") or "").splitlines())
    table = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1 and line[1].isdigit()}
    total, free = table.get("MemTotal"), table.get("MemAvailable")
    limit, used = _number("sys/fs/cgroup/memory.max"), _number("sys/fs/cgroup/memory.current")
    if limit is not None and total is not None:
        total = min(total, limit)
        if used is not None and free is not None:
            free = min(free, max(0, limit - used))
    return total, free


def present() -> tuple[list[str], str]:
    """The CPU is always there, and is one device."""
    return [_model()], ""


def fingerprint(index: int = 0) -> dict[str, Scalar]:
    """See `rooftune.device.Device.fingerprint`."""
    mine, info = _affinity(), _cpuinfo(ROOT)
    topology = {
        (_text(f"sys/devices/system/cpu/cpu{c}/topology/physical_package_id"), core)
        for c in mine
        if (core := _text(f"sys/devices/system/cpu/cpu{c}/topology/core_id")) is not None
    }
    siblings = _text(f"sys/devices/system/cpu/cpu{mine[0]}/topology/thread_siblings_list")
    governor = _text(f"sys/devices/system/cpu/cpu{mine[0]}/cpufreq/scaling_governor")
    no_turbo = _number("sys/devices/system/cpu/intel_pstate/no_turbo")
    virtual = hypervisor()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    total, free = memory()
    features = flags()
    machine = _text("etc/machine-id")
    found: dict[str, Scalar] = {
        "model": _model(),
        "cpu_id": "-".join(info.get(k, "?") for k in ("vendor_id", "cpu family", "model", "stepping")),
        "microcode": info.get("microcode"),
        "machine": hashlib.sha256(machine.encode()).hexdigest()[:12] if machine else None,
        "cores": cores(),
        "cpu_quota": quota(),
        "physical_cores": len(topology) or None,
        "smt": None if siblings is None else bool({",", "-"} & set(siblings)),
        **caches(),
        "flags": " ".join(f for f in FLAGS if f in features),
        "governor": governor,
        "turbo": None if no_turbo is None else no_turbo == 0,
        "load_1m": None if load is None else round(load, 2),
        "steal": steal(),
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "kernel": f"{platform.system()} {platform.release()}",
        "hypervisor": virtual,
    }
    if governor is None:
        found["governor_reason"] = "no cpufreq (VM)" if virtual else "no cpufreq"
    return found
