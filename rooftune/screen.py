"""Which rows of a large output are judged: float64 has no time for all of them.

Some are the edges, some random, and some look most wrong, for a rough look has time for all. A product is multiplied by
a few random vectors, which costs a thousandth of it: a wrong number anywhere shows in its row, if it is wrong by more
than some four roundings times the root of the columns (integers: if it is wrong). Other operators are compared with
torch's own call in the problem's own precision. Nothing is decided here: the rows at the top are judged against float64
like the others, so that a rough look can neither pass nor fail anybody.

Source: Freivalds, "Probabilistic machines can use less running time", IFIP Congress 1977, of products.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem
from rooftune.formulas import FORMULAS

SAMPLED_ROWS = 48  # at least, and as many as make SAMPLED_VALUES
SAMPLED_VALUES = 2**17
SUSPECTS = 16  # rows: where a tile is wrong, several show
VECTORS = 4
CHUNK = 2**17  # numbers at a time, which stay in the caches: of 2^22 a look takes twice as long


def sample_rows(total: int, seed: int, count: int = SAMPLED_ROWS, parts: Mapping[str, int] | None = None) -> list[int]:
    """First, last and random rows of every part: tails are where kernels are wrong."""
    if total <= count:
        return list(range(total))
    edges, start = set[int](), 0
    for size in (parts or {"": total}).values():
        edges |= {start, start + size - 1}
        start += size
    picked = random.Random(seed).sample(range(total), max(2, count - len(edges)))
    return sorted(edges.union(picked))


def suspects(op: Op, problem: Problem, got: Any, tensors: Sequence[Any]) -> list[int]:
    """The SUSPECTS rows of an output [rows, columns] that differ most from what a rough look expects.

    None where there is no such look: an operator without a formula, an output in several parts, or no room for torch's
    call; `Verdict.rows` says how many rows were judged.

    Args:
        tensors: the inputs, N(0, 1), in any place; the look is taken there.
    """
    import torch

    if op.parts(problem):
        return []
    tensors = [t.bfloat16() if t.dtype == torch.float8_e4m3fn else t for t in tensors]  # exact; known to all calls
    with torch.no_grad():
        if op.name == "gemm" and problem.flag("epilogue", "none") in ("none", "bias", "residual"):
            away = _product(problem, got, tensors)
        elif op.name in FORMULAS and problem.precision in ("fp32", "tf32", "fp16", "bf16"):
            try:
                expected = FORMULAS[op.name](problem, tensors).reshape(got.shape)
            except RuntimeError:  # out of memory, or a call that torch lacks here: no fault of who is judged
                return []
            away = _differences(problem, got, expected)
        else:
            return []
    away = away.nan_to_num(float("inf"), float("inf"))
    return [int(row) for row in away.topk(min(SUSPECTS, len(away))).indices]


def _product(problem: Problem, got: Any, tensors: Sequence[Any]) -> Any:
    """[m], how far (a @ b) w + added w is from c w, at most, of VECTORS w: signs, for int8 whole numbers (so exact)."""
    import torch

    where = tensors[0].device
    rng = torch.Generator().manual_seed(len(got))
    w = 2.0 * torch.randint(0, 2, (problem["n"], VECTORS), generator=rng, dtype=torch.float64) - 1
    if PRECISIONS[problem.precision].exact:  # signs alone would cancel in two wrong numbers half of the time
        w *= torch.randint(1, 128, w.shape, generator=rng)
    w = w.to(where)
    ta, tb = tuple(problem.flag("transpose", "nn"))
    a = tensors[0] if ta == "n" else tensors[0].t()
    b = tensors[1] if tb == "n" else tensors[1].t()
    scale = float(tensors[2]) * float(tensors[3]) if problem.precision == "fp8" else 1.0
    bw = torch.cat([b[part].double() @ w for part in _parts(b)]) * scale
    epilogue = problem.flag("epilogue", "none")
    away = []
    for part in _parts(got):
        want = a[part].double() @ bw
        if epilogue != "none":
            want = want + (tensors[-1][part] if epilogue == "residual" else tensors[-1]).double() @ w
        away.append((got[part].to(where).double() @ w - want).abs().amax(1))
    return torch.cat(away)


def _differences(problem: Problem, got: Any, expected: Any) -> Any:
    """[rows], the largest difference from what torch's own call gave, in units of the row's largest number."""
    import torch

    away = []
    for part in _parts(got):
        want = expected[part].float()
        size = want.abs().amax(1).clamp_min(PRECISIONS[problem.precision].tiny)
        away.append((got[part].to(want.device).float() - want).abs().amax(1) / size)
    return torch.cat(away)


def _parts(x: Any) -> Iterator[slice]:
    rows = max(1, CHUNK // max(1, x.shape[1]))
    return (slice(start, start + rows) for start in range(0, len(x), rows))
