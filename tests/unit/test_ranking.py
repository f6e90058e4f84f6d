"""The analytic ranking: facts that any good model of a GPU orders rightly, and a measured space where there is one."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rooftune import registry
from rooftune.autotune.ranking import Gpu, prior, ranker
from rooftune.core import Resources, UsageError

H200, A100 = Gpu.named("NVIDIA H200"), Gpu.named("NVIDIA A100-SXM4-80GB")
TILE = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 4, "group_m": 8}
ROWS = {"threads_per_row": 128, "num_threads": 128, "vec": 8}
FLASH = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2}


def seconds(key: str, problem: str, *changes: dict[str, Any], gpu: Gpu = H200, **more: Any) -> list[float]:
    base = {"gemm": TILE, "attention": FLASH}.get(key.partition("/")[0], ROWS)
    found = prior(registry.impl(key), registry.problem(problem), [base | c for c in changes], gpu, **more)
    assert found is not None
    return found


def test_a_tile_more_than_a_whole_wave_costs_a_second_wave() -> None:
    """12 x 11 tiles of 128 x 128 keep every multiprocessor of an H200 busy once; one more row starts another round."""
    one, two, late = (
        seconds("gemm/triton", f"gemm[m={128 * tiles},n={128 * 11},k=8192,bf16]", {})[0] for tiles in (12, 13, 24)
    )
    assert two > 1.5 * one
    assert late < 1.15 * two


def test_large_tiles_win_large_products_and_lose_small_ones() -> None:
    tiles = [{"block_m": m, "block_n": n} for m, n in ((128, 256), (128, 128), (64, 64), (32, 32))]
    for key in ("gemm/triton", "gemm/cupy", "gemm/numba_cuda"):
        found = seconds(key, "gemm[m=8192,n=8192,k=8192,bf16]", *[t | {"num_stages": 3} for t in tiles])
        assert found == sorted(found)
    small = seconds("gemm/triton", "gemm[m=512,n=512,k=512,bf16]", *[t | {"num_stages": 3} for t in tiles])
    assert small.index(min(small)) in (1, 2)  # 8 tiles of 128 x 256 leave 124 multiprocessors without work


def test_what_cannot_be_launched_is_infinite() -> None:
    most = seconds("gemm/triton", "gemm[m=4096,n=4096,k=4096,bf16]", {}, {"block_k": 256, "num_stages": 5})
    assert math.isfinite(most[0])
    assert most[1] == math.inf  # 5 stages of 128 KiB
    flash = seconds("attention/cupy", "attention[b=1,h=8,sq=1024,d=256,bf16]", {"block_m": 256, "block_n": 128})
    assert flash == [math.inf]


def test_split_k_pays_only_where_tiles_are_few() -> None:
    few = seconds("gemm/triton", "gemm[m=64,n=512,k=16384,bf16]", *({"block_m": 64, "split_k": s} for s in (1, 4, 8)))
    assert few == sorted(few, reverse=True)
    many = seconds("gemm/triton", "gemm[m=8192,n=8192,k=1024,bf16]", {"split_k": 1}, {"split_k": 8})
    assert many[0] < many[1]


def test_stream_k_pays_where_the_last_round_is_nearly_empty_or_tiles_are_few() -> None:
    """On 132 multiprocessors: 143 tiles are a round and a bit, 132 are one, 8 leave most of them without work."""
    problems = ("m=1664,n=1408,k=8192", "m=1536,n=1408,k=8192", "m=128,n=1024,k=8192")
    ragged, whole, few = (
        seconds("gemm/cupy_wgmma", f"gemm[{sizes},bf16]", {"split_k": 1}, {"split_k": 1, "stream_k": 1})
        for sizes in problems
    )
    assert ragged[1] < 0.8 * ragged[0]
    assert whole[1] == whole[0]
    assert few[1] < few[0] / 4


def test_warpgroup_instructions_matter_where_there_are_such() -> None:
    problem = "gemm[m=8192,n=8192,k=8192,bf16]"
    wide, narrow = (seconds(key, problem, {})[0] for key in ("gemm/triton", "gemm/cupy"))
    assert narrow > 1.3 * wide
    same = [seconds(key, problem, {"num_stages": 3}, gpu=A100)[0] for key in ("gemm/triton", "gemm/cupy")]
    assert same[0] == pytest.approx(same[1], rel=0.1)


def test_warpgroup_specialised_kernels_move_their_registers_to_those_who_compute() -> None:
    """384 threads have 168 registers each at the launch, and 128 x 256 sums fit all the same."""
    special = replace(registry.impl("gemm/cupy"), name="cupy_wgmma")
    problem = registry.problem("gemm[m=8192,n=8192,k=8192,bf16]")
    tiles = [
        {"block_m": m, "block_n": n, "block_k": 64, "num_stages": 4} for m, n in ((128, 256), (128, 128), (64, 64))
    ]
    found = prior(special, problem, tiles, H200)
    assert found is not None
    assert found == sorted(found)
    assert found[0] < 1.6 * 2 * 8192**3 / H200.matrix_rate["bf16"]
    flash = replace(registry.impl("attention/cupy"), name="cupy_wgmma")
    wide = [{"block_m": m, "block_n": 128, "num_stages": 2, "pingpong": 1} for m in (128, 64)]
    told = prior(flash, registry.problem("attention[b=4,h=16,sq=4096,d=128,bf16]"), wide, H200)
    assert told is not None
    assert told == sorted(told)


def test_compiled_facts_replace_estimates() -> None:
    problem, plain = "gemm[m=4096,n=4096,k=4096,bf16]", {"arch": "sm_90a", "shared_bytes": 65536, "threads": 256}
    units = ("HGMMA.64x128x16.F32.BF16",)
    good = Resources(registers=128, spill_bytes=0, tensor_core=units, **plain)  # type: ignore[arg-type]
    spills = Resources(registers=128, spill_bytes=512, tensor_core=units, **plain)  # type: ignore[arg-type]
    falls = Resources(registers=128, spill_bytes=0, tensor_core=("HMMA.16816.F32.BF16",), **plain)  # type: ignore[arg-type]
    best, second, third = (
        seconds("gemm/triton", problem, {}, resources={0: found})[0] for found in (good, spills, falls)
    )
    assert best < second
    assert best < third


def test_packed_heads_help_where_queries_do_not_fill_a_tile() -> None:
    for queries, faster in ((16, 1.5), (4096, 0.98)):
        problem = f"attention[b=8,h=32,hkv=8,sq={queries},sk=4096,d=128,bf16]"
        apart, together = seconds("attention/cupy_wgmma", problem, *({"block_m": 128, "pack_gqa": p} for p in (0, 1)))
        assert apart / together > faster
        assert queries == 16 or apart / together < 1.02


def test_packed_tiles_hold_whole_heads() -> None:
    space = registry.impl("attention/cupy_wgmma").load().SPACE
    few, many = (registry.problem(f"attention[b=1,h=32,hkv=8,sq={n},sk=4096,d=128,bf16]") for n in (17, 4096))
    assert (space.default_for(few)["pack_gqa"], space.default_for(many)["pack_gqa"]) == (1, 0)
    packed = {**space.default_for(few), "block_m": 128, "pack_gqa": 1}
    for h, hkv, valid in ((32, 8, True), (8, 8, False), (24, 8, False), (256, 8, False), (128, 8, True)):
        problem = registry.problem(f"attention[b=1,h={h},hkv={hkv},sq=17,sk=4096,d=128,bf16]")
        assert space.valid(packed, problem) == valid


def test_attention_is_ordered_by_work_and_by_key_traffic() -> None:
    full, causal = (
        seconds("attention/triton", f"attention[b=4,h=16,sq=4096,d=128{flag},bf16]", {})[0] for flag in ("", ",causal")
    )
    assert 1.6 < full / causal < 2.1
    tall = seconds(
        "attention/cupy",
        "attention[b=4,h=16,sq=4096,d=128,bf16]",
        *({"block_m": m, "num_warps": m // 16} for m in (32, 128)),
    )
    assert tall[1] < tall[0]
    decode = "attention[b=1,h=8,sq=1,sk=65536,d=128,bf16]"
    split = seconds("attention/cupy", decode, *({"block_m": 16, "num_warps": 1, "num_splits": s} for s in (1, 16)))
    assert split[1] < split[0] / 4  # 8 of 132 multiprocessors read the keys, or nearly all of them


def test_the_backward_pass_of_attention_is_ordered_by_its_two_launches() -> None:
    shape, base = "b=4,h=16,sq=4096,d=128", {"block_m1": 32, "block_n2": 32, "num_warps": 8, "num_stages": 2}

    def times(key: str, text: str, *changes: dict[str, Any]) -> list[float]:
        found = prior(registry.impl(key), registry.problem(text), [base | c for c in changes], H200)
        assert found is not None
        return found

    ours = "attention_bwd/cupy"
    full, causal = (times(ours, f"attention_bwd[{shape}{flag},bf16]", {})[0] for flag in ("", ",causal"))
    assert 1.6 < full / causal < 2.1
    forward = seconds("attention/cupy", f"attention[{shape},bf16]", {})[0]
    assert 2.5 < full / forward < 5.0  # seven products for two
    few, many = times(ours, f"attention_bwd[{shape},bf16]", {"num_warps": 2}, {})
    assert many < few  # 32 rows read what passes as often as 128 do
    big, small = times("attention_bwd/triton", f"attention_bwd[{shape},bf16]",
                       {"block_n1": 128, "block_m2": 128}, {"block_n1": 32, "block_m2": 32})  # fmt: skip
    assert big < small
    over = times(ours, f"attention_bwd[{shape},bf16]", {"num_stages": 8, "block_m1": 64})
    assert over == [math.inf]


def test_rows_are_ordered_by_bytes_vector_width_and_waste() -> None:
    problem = "softmax[m=32768,n=4096,bf16]"
    vectors = seconds("softmax/cupy", problem, *({"vec": v} for v in (8, 4, 2, 1)))
    assert vectors == sorted(vectors)
    assert vectors[0] < vectors[-1]
    half, whole = (seconds("softmax/cupy", f"softmax[m=32768,n=4096,{p}]", {"vec": 4})[0] for p in ("bf16", "fp32"))
    assert whole == pytest.approx(2 * half, rel=0.1)
    kept, again = seconds("softmax/cupy", problem, {}, {"threads_per_row": 32})  # 128 values a thread: read twice
    assert kept < again
    long = seconds("softmax/cupy", "softmax[m=2048,n=262144,bf16]", *({"threads_per_row": t, "num_threads": max(t, 128)}
                   for t in (1024, 256, 8)))  # fmt: skip
    assert long == sorted(long)  # eight threads walk a row of 262,144 in 4,096 steps
    idle = seconds("softmax/cupy", "softmax[m=32768,n=256,bf16]", {"threads_per_row": 32}, {"num_threads": 1024})
    assert idle[0] < idle[1]
    floor = registry.op("softmax").bytes(registry.problem(problem)) / H200.copy_rate
    assert floor < vectors[0] < 1.2 * floor


def test_clusters_pay_where_they_keep_a_row_and_cost_where_a_block_does() -> None:
    block = {"threads_per_row": 1024, "num_threads": 1024}
    one, eight = seconds("softmax/cupy", "softmax[m=2048,n=262144,bf16]", *(block | {"cluster": c} for c in (1, 8)))
    assert eight < one  # 32 values a thread instead of 256, which are read twice
    one, eight = seconds("softmax/cupy", "softmax[m=8192,n=16384,bf16]", *(block | {"cluster": c} for c in (1, 8)))
    assert one < eight
    wide = "softmax_bwd[m=2048,n=65536,bf16]"
    kept, again = seconds("softmax_bwd/cupy", wide, *(block | {"cluster": c} for c in (4, 2)))
    assert kept < again  # 16 and 32 places of two values each, of which 32 fit


def test_no_model_means_no_ranking() -> None:
    torch, problem = registry.impl("gemm/torch"), registry.problem("gemm[m=64,n=64,k=64,bf16]")
    assert prior(torch, problem, [{"call": "matmul"}], H200) is None
    assert prior(registry.impl("gemm/triton"), problem, [], H200) is None


def test_a_device_is_described_by_its_datasheet_and_better_by_its_ceilings() -> None:
    sheet = {"kind": "cuda", "name": "NVIDIA H200", "compute_capability": "9.0", "multiprocessors": 132}
    known = Gpu.of(sheet)
    assert known is not None
    assert (known.arch, known.multiprocessors, known.matrix_rate["bf16"]) == ("sm_90a", 132, 989e12)
    ceilings = {
        "matrix": {"bf16": {"value": 780.0}, "fp8": {"value": None, "reason": "refused"}},
        "copy": [{"working_set_bytes": 2**22, "value": 9000.0}, {"working_set_bytes": 2**33, "value": 4300.0}],
    }
    measured = Gpu.of(sheet | {"name": "NVIDIA Unknown", "max_sm_clock_mhz": 1980, "l2_bytes": 6e7}, ceilings)
    assert measured is not None
    assert dict(measured.matrix_rate) == {"bf16": 780e12}  # what is neither promised nor measured is not guessed
    assert (measured.copy_rate, measured.clock_hz) == (4300e9, 1980e6)
    assert Gpu.of({"kind": "cpu", "name": "x"}) is None
    assert Gpu.of(sheet | {"name": "NVIDIA Unknown"}) is None
    assert Gpu.of(sheet | {"compute_capability": "7.5"}) is None
    assert Gpu.of(sheet | {"compute_capability": "19.0"}) is None
    assert Gpu.of(sheet | {"compute_capability": None}) is None
    with pytest.raises(UsageError, match="no datasheet"):
        Gpu.named("Voodoo 2")


DATA = Path(__file__).resolve().parents[3] / "shared" / "tuning" / "spaces.py"


@pytest.mark.skipif(not DATA.exists(), reason="no recorded tuning spaces beside the checkout")
def test_a_measured_space_is_ordered_better_than_by_chance() -> None:
    """An fp32 product measured on an RTX 2080 Ti, by the tile and thread axes that the model knows: the best time
    over the others of each. (The rank correlation was 0.74 when this was written.)"""
    spec = importlib.util.spec_from_file_location("recorded_spaces", DATA)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    space = module.load("gemm-RTX_2080_Ti")
    best: dict[tuple[int, ...], float] = {}
    for number, time_ms in enumerate(space.time_ms.tolist()):
        c = space.config(number)
        tile = c["MWG"], c["NWG"], c["MDIMC"], c["NDIMC"]
        if math.isfinite(time_ms):
            best[tile] = min(best.get(tile, math.inf), time_ms)
    configs = [
        {"block_m": m, "block_n": n, "block_k": 32, "warps_m": max(1, x // 8), "warps_n": max(1, y // 4)}
        | {"stages": 1}
        for m, n, x, y in best
    ]
    turing = Gpu("RTX 2080 Ti", "sm_86", 68, 1.6e9, 5.5e6, 560e9, {"fp32": 13.4e12})  # no row for sm_75: the nearest
    found = prior(registry.impl("gemm/cupy"), registry.problem("gemm[m=4096,n=4096,k=4096,fp32]"), configs, turing)
    assert found is not None

    def ranks(values: list[float]) -> Any:
        order = np.empty(len(values))
        order[np.argsort(values, kind="stable")] = np.arange(len(values))
        return order

    assert np.corrcoef(ranks(found), ranks(list(best.values())))[0, 1] > 0.6


def test_a_search_gets_the_ranking_only_with_a_device_that_the_model_knows() -> None:
    impl, problem = registry.impl("gemm/triton"), registry.problem("gemm[m=4096,n=4096,k=4096,bf16]")
    assert ranker(impl, problem, None) is None
    rank = ranker(impl, problem, H200)
    assert rank is not None
    assert rank([TILE]) == prior(impl, problem, [TILE], H200)
