"""What vendors promise: shown beside measured ceilings, never used as one.

Dense rates without sparsity, at boost clock. Sources: NVIDIA's product datasheets and architecture papers
(A100 2020, Ada 2022, H100 2023, L40S 2023, H200 2024, Blackwell 2024). fp16 and bf16 with fp32 accumulation;
where a datasheet prints the 2:4 sparse figure, half of it stands here.
"""

from __future__ import annotations

from typing import Any

# Part of the product's name -> TFLOP/s (int8: TOP/s) by precision, and memory GB/s. First match wins.
GPUS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250, "fp8": 4500, "int8": 4500, "tf32": 1125, "fp32": 75, "copy": 8000},
    "H200 NVL": {"bf16": 835, "fp16": 835, "fp8": 1670, "int8": 1670, "tf32": 417, "fp32": 60, "copy": 4800},
    "H200": {"bf16": 989, "fp16": 989, "fp8": 1979, "int8": 1979, "tf32": 494, "fp32": 67, "copy": 4800},
    "H100 NVL": {"bf16": 835, "fp16": 835, "fp8": 1670, "int8": 1670, "tf32": 417, "fp32": 60, "copy": 3900},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "fp8": 1513, "int8": 1513, "tf32": 378, "fp32": 51, "copy": 2000},
    "H100": {"bf16": 989, "fp16": 989, "fp8": 1979, "int8": 1979, "tf32": 494, "fp32": 67, "copy": 3350},
    "A100-SXM4-80GB": {"bf16": 312, "fp16": 312, "int8": 624, "tf32": 156, "fp32": 19.5, "copy": 2039},
    "A100 80GB PCIe": {"bf16": 312, "fp16": 312, "int8": 624, "tf32": 156, "fp32": 19.5, "copy": 1935},
    "A100": {"bf16": 312, "fp16": 312, "int8": 624, "tf32": 156, "fp32": 19.5, "copy": 1555},
    "L40S": {"bf16": 362, "fp16": 362, "fp8": 733, "int8": 733, "tf32": 183, "fp32": 91.6, "copy": 864},
    "RTX 4090": {"bf16": 165, "fp16": 165, "fp8": 330, "int8": 661, "tf32": 83, "fp32": 82.6, "copy": 1008},
}


def promised(name: str) -> dict[str, Any] | None:
    """The vendor's figures for a product, or None if it is not in the table."""
    if "Laptop" in name:  # another chip under the same number
        return None
    for part, figures in GPUS.items():
        if all(word in name.replace("-", " ").split() for word in part.replace("-", " ").split()):
            return {"product": part, "unit": "TFLOP/s, copy GB/s", **figures}
    return None
