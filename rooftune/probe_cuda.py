"""GPU ceilings: copy by working set, torch's matrix product by precision; CUDA and ROCm."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rooftune import clock
from rooftune.datasheet import promised
from rooftune.probe import Entry, entry, missing

COPY_SETS = (2**22, 2**25, 2**28, 2**31, 2**33)  # two inside most L2s; the last takes 2 ms at 4.3 TB/s (H200)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
MATRIX_SIZES = (4096, 8192)


def _samples(call: Callable[[], Any], work: float, device: str, samples: int) -> list[float]:
    """Work a second, from events behind a blocker."""
    return [work / s for s in clock.time_calls(call, [()], device, samples=samples).samples_s]


def _copies(device: str, torch_device: str, samples: int) -> list[dict[str, Any]]:
    import torch

    found = []
    free = torch.cuda.mem_get_info(torch_device)[0]
    for size in (s for s in COPY_SETS if s <= free // 4):
        source = torch.randint(0, 255, (size // 2,), dtype=torch.uint8, device=torch_device)
        target = torch.empty_like(source)

        def copy(target: Any = target, source: Any = source) -> None:
            target.copy_(source)

        rates = _samples(copy, size / 1e9, device, samples)
        found.append({"working_set_bytes": size, **entry(rates, "GB/s", "torch copy_")})
    return found


@contextlib.contextmanager
def _tf32(on: bool) -> Iterator[None]:
    """Products of float32 in tf32 or in full, as it was before afterwards. torch 2.9 renamed the switch."""
    import torch

    matmul: Any = torch.backends.cuda.matmul
    named = hasattr(matmul, "fp32_precision")
    name = "fp32_precision" if named else "allow_tf32"
    value: Any = ("tf32" if on else "ieee") if named else on
    was = getattr(matmul, name)
    setattr(matmul, name, value)
    try:
        yield
    finally:
        setattr(matmul, name, was)


def _product(precision: str, size: int, device: str) -> Callable[[], Any]:
    """A square matrix product on random data (zeros run up to 15 % faster: less power, higher clocks)."""
    import torch

    if precision == "int8":
        a = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device)
        b = torch.randint(-127, 128, (size, size), dtype=torch.int8, device=device).t()
        return lambda: torch._int_mm(a, b)
    x, y = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    if precision == "fp8":
        a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = x.to(dtype), y.to(dtype)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _matrix(precision: str, device: str, torch_device: str, samples: int) -> Entry:
    unit = "TOP/s" if precision == "int8" else "TFLOP/s"
    best: Entry | None = None
    for size in MATRIX_SIZES:
        try:
            with _tf32(precision == "tf32"):
                call = _product(precision, size, torch_device)
                rates = _samples(call, 2 * size**3 / 1e12, device, samples)
        except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
            return missing(unit, f"torch refuses {precision} here: {str(error).splitlines()[0][:120]}")
        name = {"int8": "torch._int_mm", "fp8": "torch._scaled_mm"}.get(precision, "torch.mm")
        found = entry(rates, unit, f"{name} {size}x{size}x{size}")
        best = found if best is None or found["value"] > best["value"] else best
    assert best is not None
    return best


def ceilings(device: str, quick: bool = True) -> dict[str, Any]:
    """See `rooftune.probe.ceilings`."""
    import torch

    torch_device = device.replace("rocm", "cuda")
    samples = 10 if quick else 40
    matrix = {p: _matrix(p, device, torch_device, samples) for p in PRECISIONS if p != "tf32" or torch.version.cuda}
    name = torch.cuda.get_device_name(torch_device)
    return {"copy": _copies(device, torch_device, samples), "matrix": matrix, "datasheet": promised(name)}
