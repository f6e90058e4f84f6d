"""Two hundred random shapes for every Numba CPU competitor: odd, prime and tiny sizes, addresses of every alignment.

Sizes are run-time arguments of these kernels, so one compilation serves all of them.
"""

# ruff: noqa: E402  # nothing below can be imported where numba or torch is missing
from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest

MISSING = [name for name in ("torch", "numba") if importlib.util.find_spec(name) is None]
if MISSING:
    pytest.skip(f"{', '.join(MISSING)} not installed", allow_module_level=True)

import torch

from rooftune import check, registry
from rooftune.core import Config, Problem
from rooftune.kernels.common import numba_few
from rooftune.kernels.common.numba_cpu import dot_formats

SHAPES = 200
SIZES = (1, 2, 3, 5, 7, 8, 13, 16, 17, 23, 24, 31, 32, 33, 47, 64, 67, 97, 101)


def misaligned(run: check.Run, by: int) -> check.Run:
    """The same call on tensors that begin `by` elements after an aligned address."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        space = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)[by:].view(tensor.shape)
        return space.copy_(tensor)

    def call(out: Any, *tensors: Any) -> None:
        place = moved(out)
        run(place, *(moved(t) for t in tensors))
        out.copy_(place)

    return call


class Scratch:
    """Stands for torch while a kernel is built: what it asks for as scratch memory lies between guard bands."""

    BAND, FILL = 16 << 10, -7

    def __init__(self) -> None:
        self.bands: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, size: int, dtype: Any) -> torch.Tensor:
        space = torch.full((size + 2 * self.BAND,), self.FILL, dtype=dtype)
        self.bands += [space[: self.BAND], space[-self.BAND :]]
        return space[self.BAND : -self.BAND]

    def kept(self) -> bool:
        return all(bool((band == self.FILL).all()) for band in self.bands)


def fenced(build: check.Build, problem: Problem, config: Config) -> tuple[check.Run, Scratch]:
    """What is built, in scratch memory between guard bands."""
    scratch = Scratch()
    with pytest.MonkeyPatch.context() as patch:
        for module in (sys.modules[build.__module__], numba_few):
            if hasattr(module, "torch"):
                patch.setattr(module, "torch", scratch)
        return build(problem, config), scratch


def race_shapes(
    problems: list[Problem], change: Callable[[Problem], Config] = lambda problem: {}, name: str = "numba"
) -> None:
    """Check each problem under the default config with changes: value, bounds, inputs kept, same bits again."""
    module = registry.impl(f"{problems[0].op}/{name}").load()
    for number, problem in enumerate(problems):
        op, config = registry.op(problem.op), {**module.SPACE.default_for(problem), **change(problem)}
        assert module.SPACE.valid(config, problem), f"{problem}: {config}"
        built, scratch = fenced(module.build, problem, config)
        run = misaligned(built, number % 4)
        kind = ("normal", *op.adversarial)[number % (1 + len(op.adversarial))] if number % 3 == 0 else "normal"
        if kind != "integers" and problem.precision == "int8":
            kind = "normal"
        verdict = check.check_case(op, problem, run, seed=number, kind=kind)
        assert verdict.ok, f"{problem}, {kind}, {number % 4} elements off: {verdict.reason}"
        assert verdict.deterministic is not False, f"{problem}: other bits the second time"
        assert scratch.kept(), f"{problem}: wrote beyond its scratch memory"


def drawn(count: int, make: Callable[[Callable[..., int]], Problem]) -> list[Problem]:
    rng = random.Random(7)
    return [registry.problem(make(lambda *sizes: rng.choice(sizes or SIZES))) for _ in range(count)]


def decoded(problem: Problem) -> Config:
    """Of every code path: queries one by one and two by two, keys of one part and of several, pairs where they may."""
    most = 4 if problem["sk"] >= 4 * 32 else 2 if problem["sk"] >= 2 * 32 else 1
    rows, splits = 1 + problem["sq"] % 2, most if problem["sk"] % 2 else 1
    config: Config = {"block_k": 32, "rows": rows, "num_splits": splits, "multiply": "dot"}
    valid = registry.impl("attention/numba_decode").load().SPACE.valid(config, problem)
    return config if valid else {**config, "multiply": "widen"}


def test_decode() -> None:
    problems = drawn(SHAPES, attention_shapes("bf16", (1, 3, 8, 20, 32, 33, 34, 64, 80, 126)))
    kinds = ["widen", "dot"] if "bf16" in dot_formats() else ["widen"]
    assert {(c["rows"], c["num_splits"] > 1, c["multiply"]) for c in map(decoded, problems)} == {
        *((rows, split, kind) for rows in (1, 2) for split in (False, True) for kind in kinds)
    }
    race_shapes(problems, decoded, "numba_decode")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_softmax(precision: str) -> None:
    problems = drawn(SHAPES, lambda size: Problem.make("softmax", precision, m=size(), n=size()))
    race_shapes(problems, lambda problem: {"rows": 4, "unroll": 2, "store": "stream"})  # and one by one: m % 4


def test_layer_norm() -> None:
    problems = drawn(SHAPES, lambda size: Problem.make("layernorm", "bf16", m=size(), n=size()))
    race_shapes(problems)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("flags", [{}, {"rms": "1"}], ids=["layer norm", "rms norm"])
def test_rows_written_abreast(precision: str, flags: dict[str, str]) -> None:
    rows = drawn(
        SHAPES // 8, lambda size: Problem.make("layernorm", precision, flags, m=size(), n=size(32, 64, 96, 544))
    )
    race_shapes(rows, lambda problem: {"rows": 4, "unroll": 2, "store": "abreast"})


PATHS = [
    ("fp32", "nt", {"read_b": "packed", "tile": 0, "block_k": 64, "prefetch": "next"}),
    ("int8", "tt", {"read_b": "packed", "tile": 1, "block_k": 64, "prefetch": "none", "multiply": "widen"}),
    ("bf16", "nn", {"read_b": "direct", "tile": 1, "block_k": 8}),
    ("fp32", "nt", {"read_b": "direct", "tile": 1, "block_k": 8}),
    ("int8", "tt", {"read_b": "direct", "tile": 2, "block_k": 8}),
    # two blocks of rows of a, and often fewer panels of b than threads
    ("fp32", "tn", {"read_b": "late", "tile": 0, "block_m": 56, "block_k": 256, "prefetch": "next"}),
    ("bf16", "nt", {"read_b": "late", "tile": 1, "block_m": 56, "block_k": 256, "prefetch": "none"}),
]
if "int8" in dot_formats():
    PATHS.append(("int8", "nn", {"read_b": "direct", "tile": 1, "block_k": 16, "multiply": "dot"}))
PATH_NAMES = ["packed", "int8", "direct", "dots", "words", "late", "late along k", "lines"][: len(PATHS)]


@pytest.mark.parametrize(("precision", "transpose", "config"), PATHS, ids=PATH_NAMES)
def test_gemm(precision: str, transpose: str, config: Config) -> None:
    tiles = registry.impl("gemm/numba").load().SPACE.axes["tile"]
    flags = {"transpose": transpose}
    words = precision == "int8" and config["read_b"] == "direct"  # k fills a vector, or n the widest tile
    n, k = (128 * words, 0) if transpose[1] == "n" else (0, 64 * words)
    problems = drawn(
        SHAPES // 4, lambda size: Problem.make("gemm", precision, flags, m=size(), n=n + size(), k=k + size())
    )
    fixed = {"block_m": 168, "unroll": 1, "prefetch": "next", "multiply": "widen"}
    race_shapes(problems, lambda problem: {**fixed, **config, "tile": tiles[config["tile"]]})


def attention_shapes(
    precision: str, heads: Sequence[int] = (1, 3, 4, 8, 12, 20, 33, 64, 80)
) -> Callable[[Callable[..., int]], Problem]:
    """Causal or not, grouped heads, heads smaller than a vector, and rows that may see no key (sq > sk)."""

    def make(size: Callable[..., int]) -> Problem:
        group, hkv, d = size(1, 2, 3), size(1, 2), size(*heads)
        flags = {"causal": "1"} if size(0, 1) else {}
        sizes = {"b": size(1, 2), "h": hkv * group, "hkv": hkv, "sq": size(), "sk": size(), "d": d}
        return Problem.make("attention", precision, flags, **sizes)

    return make


def test_attention() -> None:
    problems = drawn(SHAPES, attention_shapes("fp32"))
    assert any(p.flag("causal") and p["sq"] > p["sk"] for p in problems)
    tile = registry.impl("attention/numba").load().SPACE.axes["tile"][0]
    race_shapes(
        problems,
        lambda problem: {"tile": tile, "block_k": 32, "query_tiles": 1 + problem["sq"] % 2, "multiply": "widen"},
    )
