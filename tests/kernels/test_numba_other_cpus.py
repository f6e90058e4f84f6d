"""The Numba CPU competitors as they are written for other CPUs, run on this one: 16 lanes and dot products, 8, and 4.

LLVM splits vectors that are too wide and `numba_dot` spells out instructions that are not here, so what the AVX-512
path computes (tiles, tails, packing, masks) is judged on a CPU without AVX-512; its speed is not. The space of a
kernel follows the CPU, so each runs in a process of its own: this file with the CPU's name.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rooftune.core import Config

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CPUS: dict[str, tuple[int, tuple[str, ...]]] = {  # lanes, features
    "avx512": (16, ("avx512f", "avx512bw", "avx512vnni", "avx512bf16", "avx2", "fma")),
    "amx": (16, ("avx512f", "avx512bw", "avx2", "fma", "amx-tile", "amx-bf16", "amx-int8")),
    "avx2": (8, ("avx2", "fma")),
    "generic": (4, ()),
}
SHAPES = 12
PACKED = {"block_m": 168, "block_k": 64, "unroll": 1, "prefetch": "next", "read_b": "packed"}
DIRECT = {"block_m": 168, "block_k": 8, "unroll": 1, "prefetch": "next", "read_b": "direct", "multiply": "widen"}
GEMMS = (  # CPUs, precision, transpose, epilogue, tile, config; a tile takes longer to compile the more vectors it has
    ("avx512 avx2 generic", "fp32", "nt", "bias_gelu", 0, {**PACKED, "multiply": "widen"}),
    ("avx512", "bf16", "nn", "none", 5, {**PACKED, "multiply": "dot"}),
    ("avx512", "int8", "tn", "none", 5, {**PACKED, "multiply": "dot"}),
    ("avx2 generic", "int8", "nn", "none", 1, {**PACKED, "multiply": "widen"}),  # pmaddwd, or a word a number
    ("avx512", "bf16", "nn", "none", 1, DIRECT),
    ("avx512 generic", "fp32", "nt", "none", 1, DIRECT),
    ("avx512", "int8", "nt", "none", 5, {**DIRECT, "multiply": "dot"}),
    ("avx512", "bf16", "tt", "bias_relu", 5, {**DIRECT, "multiply": "dot"}),
    ("avx512", "int8", "nn", "none", 5, {**DIRECT, "multiply": "dot"}),
    ("avx512", "bf16", "tn", "bias_relu", 1, {**DIRECT, "multiply": "dot", "block_k": 16}),
    ("avx2 generic", "int8", "nt", "none", 2, DIRECT),
    ("avx512", "int8", "nn", "none", 5, {**PACKED, "multiply": "dot", "read_b": "late", "block_k": 256}),
    ("avx512", "bf16", "nt", "residual", 3, {**PACKED, "multiply": "dot", "read_b": "late", "block_k": 256}),
)


TILES = (  # of products by AMX: precision, transpose, epilogue, config
    ("bf16", "nn", "bias_gelu", {"tile": "32x32", "block_m": 64, "block_n": 64, "block_k": 256}),
    ("bf16", "tt", "none", {"tile": "16x64", "block_m": 64, "block_n": 64, "block_k": 256}),
    ("int8", "nt", "none", {"tile": "16x32", "block_m": 64, "block_n": 64, "block_k": 256}),
    ("int8", "tn", "none", {"tile": "32x32", "block_m": 64, "block_n": 64, "block_k": 256}),
)


BLOCKS = {"block_m": 128, "block_n": 128, "block_k": 128, "pack_b": "block"}
WHOLE = {"block_m": 128, "block_n": 4096, "block_k": 256, "pack_b": "whole"}
SPLIT = (  # of fp32 by AMX: transpose, epilogue, config
    ("nn", "none", {"parts": "bf16", "tile": "16x32", **WHOLE}),
    ("tt", "bias_gelu", {"parts": "bf16", "tile": "32x16", **BLOCKS}),
    ("nt", "residual", {"parts": "bf16", "tile": "16x32", **WHOLE}),
    ("tn", "bias_relu", {"parts": "bf16", "tile": "16x32", **BLOCKS}),
    ("nn", "residual", {"parts": "int8", "tile": "16x16", **BLOCKS, "block_k": 1024}),
    ("tt", "none", {"parts": "int8", "tile": "16x16", **WHOLE}),
    ("nt", "bias_relu", {"parts": "int8", "tile": "16x16", **BLOCKS}),
    ("tn", "bias_gelu", {"parts": "int8", "tile": "16x16", **WHOLE, "block_k": 1024}),
)


def run_range(config: Config) -> None:
    """Numbers that are no sum of three bf16 that AMX knows: as small as 2^-125, or larger than the largest bf16."""
    import torch

    from rooftune import check, registry

    problem = registry.problem("gemm[m=33,n=70,k=290,fp32]")
    op, module = registry.op("gemm"), registry.impl("gemm/numba_split").load()
    a, b = op.inputs(problem, check.generator("cpu", 5))
    a[2] *= 2.0**-120
    a[20, 7], b[7] = 3.4e38, b[7] * 2.0**-20
    b[:, 40] *= 2.0**-112
    out = torch.full((33, 70), 9.0)
    module.build(problem, config)(out, a, b)
    scale, error = a.double().abs() @ b.double().abs(), (out.double() - a.double() @ b.double()).abs()
    assert bool((out[2, :40] != 0).all())
    assert bool((error <= 1e-6 * scale + 290 * 2.0**-149).all()), (error / scale).max()  # sums may be subnormal


def run_uneven(config: Config) -> None:
    """Numbers whose products have other sizes than the largest of their rows say, in some rows and in all."""
    import torch

    from rooftune import check, registry

    problem = registry.problem("gemm[m=67,n=70,k=515,fp32]")
    op, module = registry.op("gemm"), registry.impl("gemm/numba_split").load()
    generator = check.generator("cpu", 5)
    powers = 2.0 ** torch.randint(-12, 13, (515,), generator=generator)
    for rows in (slice(1, 2), slice(3, 67, 2), slice(0, 67)):
        a, b = op.inputs(problem, generator)
        a[rows] *= powers
        b /= powers[:, None]
        out = torch.full((67, 70), 9.0)
        module.build(problem, config)(out, a, b)
        wrong, _ = check.judge(op, problem, out, op.reference(problem, [a, b]), "uneven")
        assert not wrong, f"{rows}: {wrong}"


def run_small_heads(config: Config) -> None:
    """The same in attention: one head's values are too small for AMX, and one of another's keys."""
    import test_numba_special as special
    import torch

    from rooftune import check, registry

    problem = registry.problem(f"{special.HEADS},fp32]")
    op, module = registry.op("attention"), registry.impl("attention/numba").load()
    q, k, v = op.inputs(problem, check.generator("cpu", 5))
    v[0, 0] *= 2.0**-118
    k[0, 1, 3, 2] = 2.0**-120
    out = torch.full(q.shape, 9.0)
    module.build(problem, config)(out, q, k, v)
    keys, values = (x.double().repeat_interleave(2, dim=1) for x in (k, v))  # two heads share them
    weights = torch.softmax(q.double() @ keys.mT / problem["d"] ** 0.5, dim=-1)
    error, scale = (out.double() - weights @ values).abs(), weights @ values.abs()
    assert bool((error <= 3e-6 * scale).all()), (error / scale).max()


def run_uneven_keys(config: Config, text: str) -> None:
    """Numbers of a head that are large in keys and small in queries: in fixed point, scores would be wrong."""
    from rooftune import check, registry

    problem = registry.problem(text)
    op, module = registry.op("attention"), registry.impl("attention/numba").load()
    q, k, v = op.inputs(problem, check.generator("cpu", 5))
    for number, power in ((3, 12), (7, 7)):
        k[..., number] *= 2.0**power
        q[..., number] *= 2.0**-power
    q[..., 9] *= 2.0**9
    k[..., 9] *= 2.0**-9
    out = q.new_full(q.shape, 9.0)
    module.build(problem, config)(out, q, k, v)
    flat = out.reshape(-1, out.shape[-1])
    wrong, _ = check.judge(op, problem, flat, op.reference(problem, [q, k, v]), "uneven")
    assert not wrong, wrong


def run_tiles() -> None:
    """What AMX is used for, on ragged shapes of more than one block of k, and special values."""
    import test_numba_shapes as shapes
    import test_numba_special as special

    from rooftune.core import Problem

    for precision, transpose, epilogue, config in TILES:
        flags = {"transpose": transpose, "epilogue": epilogue}
        problems = shapes.drawn(
            shapes.SHAPES // len(TILES),
            lambda size, p=precision, f=flags: Problem.make("gemm", p, f, m=size(), n=size(), k=size(320, 23, 513, 1)),
        )
        shapes.race_shapes(problems, lambda problem, config=config: config, "numba_amx")
        if precision == "bf16" and epilogue == "none":
            for value in special.VALUES:
                text = f"gemm[m=33,n=70,k=290,transpose={transpose},bf16]"
                special.agree(text, config, special._product, value, "numba_amx")
    for transpose, epilogue, config in SPLIT:
        flags = {"transpose": transpose, "epilogue": epilogue}
        problems = shapes.drawn(
            shapes.SHAPES // len(SPLIT),
            lambda size, f=flags: Problem.make("gemm", "fp32", f, m=size(), n=size(), k=size(320, 23, 513, 1)),
        )
        shapes.race_shapes(problems, lambda problem, config=config: config, "numba_split")
        for value in special.VALUES if epilogue == "none" else ():
            text = f"gemm[m=33,n=70,k=290,transpose={transpose},fp32]"
            special.agree(text, config, special._product, value, "numba_split")
        run_range(config)
        run_uneven(config)
    for precision, tiles in (("bf16", ("32x16", "16x32")), ("fp32", ("32x16", "16x32", "16x16"))):
        for tile in tiles:
            heads: Config = {"tile": tile, "block_k": 64, "query_tiles": 2, "multiply": "amx"}
            problems = shapes.drawn(2 * SHAPES, shapes.attention_shapes(precision))
            shapes.race_shapes(problems, lambda problem, heads=heads: heads)
        for value in special.VALUES:
            for change in (special._queries, special._keys, special._values):
                special.agree(f"{special.HEADS},{precision}]", heads, change, value)
    run_small_heads(heads)
    for tile in ("16x32", "16x16"):
        heads = {"tile": tile, "block_k": 64, "query_tiles": 2, "multiply": "fixed"}
        problems = shapes.drawn(SHAPES, shapes.attention_shapes("fp32", (65, 80, 128, 130, 256)))
        shapes.race_shapes(problems, lambda problem, heads=heads: heads)
    large = special.HEADS.replace("d=20", "d=80")
    for value in special.VALUES:
        for change in (special._queries, special._keys, special._values):
            special.agree(f"{large},fp32]", heads, change, value)
    run_uneven_keys(heads, f"{large},fp32]")


def run_vectors(name: str) -> None:
    """Every kernel family on ragged shapes, and special values, as that CPU has them."""
    import test_numba_shapes as shapes
    import test_numba_special as special

    from rooftune import registry
    from rooftune.core import Problem

    for cpus, precision, transpose, epilogue, tile, config in GEMMS:
        if name in cpus.split():
            flags = {"transpose": transpose, "epilogue": epilogue}
            tiles = registry.impl("gemm/numba").load().SPACE.axes["tile"]
            words = config["read_b"] == "direct" and precision != "fp32"  # k fills a vector, or n the widest tile
            n, k = (128 * words, 0) if transpose[1] == "n" else (0, 64 * words)
            problems = shapes.drawn(
                SHAPES,
                lambda size, p=precision, f=flags, n=n, k=k: Problem.make(
                    "gemm", p, f, m=size(), n=n + size(), k=k + size()
                ),
            )
            changed: Config = {**config, "tile": tiles[tile]}
            shapes.race_shapes(problems, lambda problem, changed=changed: changed)
    wide = name == "avx512"
    for precision, multiply in (("fp32", "widen"), *([("bf16", "dot")] if wide else [])):
        tile = registry.impl("attention/numba").load().SPACE.axes["tile"][-1 if multiply == "dot" else 2]
        heads: Config = {"tile": tile, "block_k": 32, "query_tiles": 2, "multiply": multiply}
        problems = shapes.drawn(2 * SHAPES, shapes.attention_shapes(precision))
        shapes.race_shapes(problems, lambda problem, heads=heads: heads)
    shapes.race_shapes(shapes.drawn(2 * SHAPES, shapes.attention_shapes("bf16")), shapes.decoded, "numba_decode")
    rows = {"rows": 2, "unroll": 2, "store": "stream"}
    for op, precision, flags in (("softmax", "bf16", {}), ("layernorm", "fp32", {"rms": "1"} if wide else {})):
        problems = shapes.drawn(
            2 * SHAPES, lambda size, o=op, p=precision, f=flags: Problem.make(o, p, f, m=5, n=size())
        )
        shapes.race_shapes(problems, lambda problem: rows)
        if op == "layernorm":
            problems = shapes.drawn(
                SHAPES, lambda size, f=flags: Problem.make("layernorm", "fp32", f, m=5, n=size(16, 80))
            )
            shapes.race_shapes(problems, lambda problem: {**rows, "store": "abreast"})
    if wide:
        for value in special.VALUES:
            product = "gemm[m=33,n=70,k=90,bf16]"
            special.agree(product, {**PACKED, "tile": "4x64", "multiply": "dot"}, special._product, value)
            product = "gemm[m=5,n=70,k=90,transpose=nt,bf16]"  # a row's last vector has seen 6 of its 32 numbers
            special.agree(product, {**DIRECT, "tile": "4x64", "multiply": "dot"}, special._product, value)
            for change in (special._queries, special._keys, special._values):
                special.agree(f"{special.HEADS},bf16]", heads, change, value)


@pytest.mark.parametrize("name", CPUS)
def test_what_another_cpu_computes_is_right_here(name: str) -> None:
    from rooftune.kernels.common import numba_cpu

    if CPUS[name][0] == numba_cpu.vector_width() < 16:
        pytest.skip("this CPU's own path: test_numba_shapes.py runs it")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if not CPUS[name][1]:
        env["NUMBA_CPU_NAME"] = "generic"  # its machine code too
    done = subprocess.run([sys.executable, __file__, name], env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == f"{name}: right"


def test_the_lanes_cannot_change_under_a_kernel_that_is_there() -> None:
    from rooftune import registry
    from rooftune.kernels.common import numba_cpu

    registry.impl("softmax/numba").load()
    with pytest.raises(RuntimeError, match=r"too late.*softmax\.numba"):
        numba_cpu.pretend(("avx512f",))
    assert numba_cpu.features() == numba_cpu.native()


def run_as(name: str) -> None:
    from rooftune.kernels.common import numba_cpu

    numba_cpu.pretend(CPUS[name][1])
    assert numba_cpu.vector_width() == CPUS[name][0]
    if name == "amx":
        run_tiles()
    else:
        run_vectors(name)


if __name__ == "__main__":
    run_as(sys.argv[1])
    print(f"{sys.argv[1]}: right")
