"""AMD devices through the kernel's own files (amdkfd and amdgpu in /sys): thin, needs no library.

Field meanings: the kernel's documentation of amdgpu's sysfs files and of the KFD topology.
"""

from __future__ import annotations

import os
from pathlib import Path

Scalar = str | int | float | bool | None

IDENTITY: tuple[str, ...] = ("uuid", "driver", "gfx", "memory_total_bytes", "power_limit_w", "compute_units")
NODES = Path("/sys/class/kfd/kfd/topology/nodes")
CARDS = Path("/sys/class/drm")
DRIVER = Path("/sys/module/amdgpu/version")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and text.isdigit() else None


def _properties(node: Path) -> dict[str, int]:
    pairs = (line.split() for line in (_text(node / "properties") or "").splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}


def nodes() -> list[tuple[Path, dict[str, int]]]:
    """GPU nodes in the runtime's order, cut to ROCR_ or HIP_VISIBLE_DEVICES (positions only)."""
    every = sorted(NODES.glob("[0-9]*"), key=lambda p: int(p.name)) if NODES.is_dir() else []
    found = [(n, p) for n in every if (p := _properties(n)).get("simd_count")]
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        wanted = os.environ.get(variable)
        if wanted is not None:
            places = [int(w) for w in wanted.split(",") if w.strip().isdigit()]
            found = [found[i] for i in places if i < len(found)]
    return found


def _gfx(properties: dict[str, int]) -> str:
    """90402 is gfx942: major, then minor and step in hexadecimal."""
    version = properties.get("gfx_target_version", 0)
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def card(properties: dict[str, int]) -> Path | None:
    """The amdgpu folder of a node, through its render minor."""
    path = CARDS / f"renderD{properties.get('drm_render_minor', -1)}" / "device"
    return path if path.is_dir() else None


def _name(properties: dict[str, int]) -> str:
    folder = card(properties)
    return (folder and _text(folder / "product_name")) or f"AMD {_gfx(properties)}"


def present() -> tuple[list[str], str]:
    """Names, or why there is none."""
    if not NODES.is_dir():
        return [], "no ROCm device (no amdkfd in this kernel)"
    found = [_name(p) for _, p in nodes()]
    return found, "" if found else "no ROCm device (amdkfd lists no GPU, or none is visible)"


def memory(index: int) -> tuple[int | None, int | None]:
    """Total and free bytes of the card's memory."""
    folder = card(nodes()[index][1])
    if folder is None:
        return None, None
    total, used = _number(folder / "mem_info_vram_total"), _number(folder / "mem_info_vram_used")
    return total, None if total is None or used is None else total - used


def fingerprint(index: int) -> dict[str, Scalar]:
    """See `rooftune.device.Device.fingerprint`."""
    _, properties = nodes()[index]
    folder = card(properties)
    sensors = next(iter(sorted((folder / "hwmon").glob("hwmon*"))), None) if folder else None
    cap = _number(sensors / "power1_cap") if sensors else None
    heat = _number(sensors / "temp1_input") if sensors else None
    clock = _number(sensors / "freq1_input") if sensors else None
    total, free = memory(index)
    unique = properties.get("unique_id")
    found: dict[str, Scalar] = {
        "uuid": f"{unique:016x}" if unique else None,
        "driver": _text(DRIVER),
        "gfx": _gfx(properties),
        "compute_units": properties["simd_count"] // max(1, properties.get("simd_per_cu", 1)),
        "memory_total_bytes": total,
        "memory_free_bytes": free,
        "power_limit_w": None if cap is None else cap / 1e6,
        "temperature_c": None if heat is None else heat / 1e3,
        "sm_clock_mhz": None if clock is None else clock / 1e6,
    }
    if folder is None:
        found["memory_total_bytes_reason"] = "the node names no render device"
    return found
