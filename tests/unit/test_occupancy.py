"""The occupancy calculator: values known from NVIDIA's documents, and its agreement with NVIDIA's own header."""

from __future__ import annotations

import importlib.util
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from rooftune.core import UsageError
from rooftune.occupancy import MULTIPROCESSORS, multiprocessor, occupancy

KNOWN = [  # arch, threads, registers, shared bytes -> blocks, share, limit
    ("sm_80", 256, 32, 0, 8, 1.0, "threads"),
    ("sm_80", 256, 64, 0, 4, 0.5, "registers"),
    ("sm_80", 1024, 64, 0, 1, 0.5, "registers"),
    ("sm_80", 128, 255, 0, 2, 0.125, "registers"),
    ("sm_90a", 384, 168, 212992, 1, 12 / 64, "registers"),  # one producer and two consumer warpgroups
    ("sm_90a", 32, 8, 12 * 1024, 17, 17 / 64, "shared memory"),  # 12 KiB and the reserved one: 17 fit in 228 KiB
    ("sm_90", 32, 16, 0, 32, 0.5, "blocks"),
    ("sm_89", 64, 168, 16888, 5, 10 / 48, "shared memory"),
    ("sm_89", 64, 200, 0, 4, 8 / 48, "registers"),  # two warps a sub-partition, not 5 blocks as 65536/12800 says
    ("sm_120a", 1024, 32, 0, 1, 32 / 48, "threads"),
    ("sm_90a", 128, 32, 232449, 0, 0.0, "shared memory"),  # one byte above 227 KiB
    ("sm_80", 1024, 65, 0, 0, 0.0, "registers"),  # rounded to 72 a thread: 73,728 registers
]


@pytest.mark.parametrize(("arch", "threads", "registers", "shared", "blocks", "share", "limit"), KNOWN)
def test_known_values(
    arch: str, threads: int, registers: int, shared: int, blocks: int, share: float, limit: str
) -> None:
    found = occupancy(arch, threads, registers, shared)
    assert (found.blocks, found.limit) == (blocks, limit)
    assert found.share == pytest.approx(share)


def test_unknown_architectures_are_named() -> None:
    for arch in ("sm_70", "sm_999", "gfx942", ""):
        with pytest.raises(UsageError, match="no occupancy limits"):
            multiprocessor(arch)


DRIVER = r"""
#include "cuda_occupancy.h"
#include <cstdio>
int main() {
    int major, minor, threads, registers, warps, shared_sm, shared_block;
    long shared;
    while (scanf("%d %d %d %d %ld %d %d %d", &major, &minor, &threads, &registers, &shared, &warps, &shared_sm,
                 &shared_block) == 8) {
        cudaOccDeviceProp p;
        p.computeMajor = major; p.computeMinor = minor; p.maxThreadsPerBlock = 1024;
        p.maxThreadsPerMultiprocessor = warps * 32; p.regsPerBlock = 65536; p.regsPerMultiprocessor = 65536;
        p.warpSize = 32; p.sharedMemPerBlock = 49152; p.sharedMemPerMultiprocessor = shared_sm; p.numSms = 100;
        p.sharedMemPerBlockOptin = shared_block; p.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes a;
        a.maxThreadsPerBlock = 1024; a.numRegs = registers; a.sharedSizeBytes = 0;
        a.partitionedGCConfig = PARTITIONED_GC_OFF; a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        a.maxDynamicSharedSizeBytes = shared_block; a.numBlockBarriers = 1;
        cudaOccDeviceState s;
        cudaOccResult r;
        int code = cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
        printf("%d\n", code ? -code : r.activeBlocksPerMultiprocessor);
    }
}
"""


def _header() -> Path | None:
    places = [Path("/usr/local/cuda/include")]
    if (spec := importlib.util.find_spec("triton")) and spec.submodule_search_locations:
        places.append(Path(spec.submodule_search_locations[0]) / "backends" / "nvidia" / "include")
    return next((p for p in places if (p / "cuda_occupancy.h").exists()), None)


def test_it_agrees_with_the_toolkits_own_header(tmp_path: Path) -> None:
    include, compiler = _header(), shutil.which("g++")
    if include is None or compiler is None:
        pytest.skip("no cuda_occupancy.h (CUDA toolkit or triton) or no g++ here")
    source, program = tmp_path / "driver.cpp", tmp_path / "driver"
    source.write_text(DRIVER)
    subprocess.run([compiler, f"-I{include}", str(source), "-o", str(program)], check=True, capture_output=True)
    rng = random.Random(5)
    cases = []
    for capability, sm in MULTIPROCESSORS.items():
        for _ in range(400):
            threads, registers = rng.choice((rng.randint(1, 1024), 32 * rng.randint(1, 32))), rng.randint(1, 255)
            shared = rng.choice((0, rng.randint(0, 20_000), rng.randint(0, sm.shared_per_block)))
            cases.append((capability, threads, registers, shared))
    lines = []
    for capability, threads, registers, shared in cases:
        sm = MULTIPROCESSORS[capability]
        lines.append(
            f"{capability // 10} {capability % 10} {threads} {registers} {shared} {sm.warps} {sm.shared_bytes} "
            f"{sm.shared_per_block}"
        )
    done = subprocess.run([str(program)], input="\n".join(lines), text=True, capture_output=True, check=True)
    theirs = [int(x) for x in done.stdout.split()]
    assert len(theirs) == len(cases)
    unlike = [
        (case, mine, answer)
        for case, answer in zip(cases, theirs, strict=True)
        if (mine := occupancy(f"sm_{case[0]}", *case[1:]).blocks) != answer
    ]
    assert not unlike, unlike[:5]
