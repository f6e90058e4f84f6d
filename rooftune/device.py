"""What is here: CPU, CUDA and ROCm devices, and the fingerprint that says whether two runs compare.

Standard library only, and no device is initialised in this process: it is imported by the parent.
A vendor is a module with the four names of `Vendor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from rooftune import device_cpu, device_cuda, device_rocm
from rooftune.core import UsageError, unknown

Scalar = str | int | float | bool | None


class Memory(NamedTuple):
    """Bytes of device memory; None where it cannot be read."""

    total: int | None
    free: int | None


class Vendor(Protocol):
    """What a device module offers. `IDENTITY` names the fingerprint fields that must agree to compare."""

    IDENTITY: tuple[str, ...]

    def present(self) -> tuple[list[str], str]:
        """Names of the usable devices in the framework's order, or none and why."""

    def fingerprint(self, index: int) -> dict[str, Scalar]:
        """Everything worth recording; None means it could not be read, `<field>_reason` says why."""

    def memory(self, index: int) -> tuple[int | None, int | None]:
        """Total and free bytes."""


VENDORS: dict[str, Vendor] = {"cpu": device_cpu, "cuda": device_cuda, "rocm": device_rocm}


@dataclass(frozen=True)
class Device:
    """One device: `kind` is cpu, cuda or rocm; `index` counts as the framework does; `name` is the product."""

    kind: str
    index: int
    name: str

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def torch(self) -> str:
        """The name torch has for it: ROCm devices are called cuda there."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @property
    def cores(self) -> int:
        """Host cores this process may use: its affinity, cut to the container's quota."""
        return device_cpu.cores()

    def fingerprint(self) -> dict[str, Scalar]:
        """State and make of the device and its host, as JSON scalars; takes some 50 ms (steal window).

        None is *not readable*; where the cause is known it stands in `<field>_reason`. A GPU's fields
        are joined by its host's, which begin with `host_`.
        """
        mine: dict[str, Scalar] = {"kind": self.kind, "index": self.index, "name": self.name}
        mine |= VENDORS[self.kind].fingerprint(self.index)
        if self.kind != "cpu":
            host = device_cpu.fingerprint(0)
            mine |= {f"host_{k}": host[k] for k in ("model", "cores", "kernel", "hypervisor", "load_1m", "steal")}
        return mine

    def identity(self) -> dict[str, Scalar]:
        """`identity` of this device now."""
        return identity(self.fingerprint())

    def memory_bytes(self) -> Memory:
        """Total and free memory of the device (a CPU: of the machine or container)."""
        return Memory(*VENDORS[self.kind].memory(self.index))


def identity(fingerprint: dict[str, Scalar]) -> dict[str, Scalar]:
    """The part of a fingerprint that must agree before absolute times of two runs are compared.

    A GPU is identified by its UUID too: two boards of one product differed by 30-50 % on the same
    kernel (power limit, cooling, bin). A CPU has no such number; `machine` in the fingerprint is a
    hash of the installation's id, where the system has one.
    """
    kind = str(fingerprint.get("kind"))
    if kind not in VENDORS:
        raise UsageError(f"fingerprint of an unknown kind of device: {kind}")
    return {k: fingerprint.get(k) for k in ("kind", "name", *VENDORS[kind].IDENTITY)}


def devices() -> list[Device]:
    """Every usable device: the CPU first, then CUDA and ROCm devices in the framework's order."""
    return [Device(kind, i, name) for kind, v in VENDORS.items() for i, name in enumerate(v.present()[0])]


def absent() -> dict[str, str]:
    """Kinds of which no device is here, and why: `{"cuda": "no CUDA device (libcuda not found)"}`."""
    return {kind: why for kind, (names, why) in ((k, v.present()) for k, v in VENDORS.items()) if not names}


def find(name: str) -> Device:
    """The device called `cpu`, `cuda`, `cuda:1`, `rocm`...; a kind alone is its first device.

    Raises:
        UsageError: there is none; the text lists the devices here and why the others are not.
    """
    kind, _, number = name.strip().lower().partition(":")
    here = devices()
    for found in here:
        if found.kind == kind and (number or "0") == str(found.index):
            return found
    gone = absent()
    if kind in gone:
        raise UsageError(f"{name}: {gone[kind]}; here: {', '.join(map(str, here))}")
    hint = "; ".join(f"{kind}: {why}" for kind, why in gone.items())
    raise unknown("device", name, [str(d) for d in here], hint)
