"""Right or wrong, and by how much.

A kernel runs into an output that is filled with a poison pattern and fenced by guard bands, on fresh
random inputs that are compared with a pristine copy afterwards; then the *contents* of the same buffers
change and it runs again. The answer is judged against float64 by the operator's error model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rooftune.core import PRECISIONS, Op, Problem, Reference, UsageError
from rooftune.fence import OTHER_POISON, Fenced, bits
from rooftune.screen import SAMPLED_ROWS, SAMPLED_VALUES, sample_rows, suspects

# run(out, *inputs) fills `out`. A call that can only allocate (most of torch's) returns its result instead, as
# its users get it: that is then what is checked, and no copy that they do not pay is in its time.
Run = Callable[..., Any]
# The float64 reference is of the whole output up to so many operations and values, else of sampled rows: a float64
# softmax of 8 M values and its error model take 5 s of a core.
WHOLE_FLOPS, WHOLE_VALUES = 3e8, 2**19
SUSPECT = "suspect"  # rows picked because they differ most: each value has its limit, together they are no sample
# Inputs of more values are compared on the GPU they are on: on the host 48 float64 rows of a product of 4096 take a
# core 0.2 s, and the copies. Meanwhile each needs DOUBLES bytes: its float64 and two results of that size.
DEVICE_VALUES, DOUBLES = 2**20, 24


@dataclass(frozen=True)
class Verdict:
    """What the check found. `max_error` is in units of the allowed error: 1 is the limit.

    `rel_fro` is the relative Frobenius error on N(0,1) inputs. `rows` is None if the whole output was
    compared, else how many rows were. `cases` names what was tried, in order.
    """

    ok: bool
    reason: str = ""
    rel_fro: float | None = None
    max_error: float | None = None
    max_abs: float | None = None
    rows: int | None = None
    deterministic: bool | None = None
    cases: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain data for a record."""
        return asdict(self)


def _first(wrong: Any, numbers: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where the first of these is: in the rows that are compared, and in the output."""
    here = tuple(int(i) for i in wrong.nonzero()[0])
    return here, here if numbers is None else (int(numbers[here[0]]), *here[1:])


def judge(
    op: Op, problem: Problem, out: Any, ref: Reference, kind: str = "normal", numbers: Any = None
) -> tuple[str, dict[str, float]]:
    """Compare rows of an output, if not all then of these numbers, with their reference.

    Returns (what is wrong or "", error figures)."""
    import torch

    tol = op.tolerance(problem)
    if PRECISIONS[problem.precision].exact:
        differ = out.double() != ref.value
        if not (wrong := int(differ.sum())):
            return "", {"rel_fro": 0.0, "max_error": 0.0, "max_abs": 0.0}
        here, there = _first(differ, numbers)
        text = f"{out[here].item()} instead of {ref.value[here].item():.0f} at {there}"
        figures = {"rel_fro": 1.0, "max_error": float(wrong), "max_abs": float(wrong)}
        return f"{wrong} of {out.numel()} integers differ ({text}, {kind} input)", figures
    got, want = out.double(), ref.value.clone()
    limit = float(torch.finfo(out.dtype).max)
    want[want.abs() > limit] = torch.sign(want[want.abs() > limit]) * math.inf  # beyond the format
    special = ~want.isfinite()
    same = (got.isnan() & want.isnan()) | (got == want)
    if bad := int((special & ~same).sum()):
        here, there = _first(special & ~same, numbers)
        text = f"{want[here].item()} but are e.g. {got[here].item()} at {there}"
        return f"{bad} values should be {text} ({kind} input)", {}
    if bad := int((~special & ~got.isfinite()).sum()):
        here, there = _first(~special & ~got.isfinite(), numbers)
        text = "never written or not finite" if bool(got[here].isnan()) else "infinite"
        return f"{bad} of {got.numel()} values {text}, first at {there} ({kind} input)", {}
    diff = torch.where(special, torch.zeros_like(got), (got - want).abs())
    magnitude = torch.where(special, torch.zeros_like(got), want.abs())
    scale_in = torch.where(special, torch.zeros_like(got), ref.scale_in + torch.zeros_like(got))
    scale_acc = torch.where(special, torch.zeros_like(got), ref.scale_acc + torch.zeros_like(got))
    growth = tol.u_acc * tol.growth
    bound = tol.c * (tol.u_out * magnitude + tol.u_in * scale_in + growth * scale_acc + tol.tiny)
    ratio = torch.where(diff == 0, torch.zeros_like(diff), diff / bound)
    norm = float(magnitude.norm())
    figures = {
        "rel_fro": float(diff.norm()) / norm if norm else float(diff.norm()),
        "max_error": float(ratio.max()) if ratio.numel() else 0.0,
        "max_abs": float(diff.max()) if diff.numel() else 0.0,
    }
    # On very few values one cancellation dominates the norm: there the element gate decides alone. Where few
    # values carry the norm (softmax), their roundings do not average out: correctly rounded bf16 rows of 200
    # exceeded the plain limit in 13 of 2,000 seeds, with the allowance for `carriers` in none of 3,000.
    fourth = float((magnitude**4).sum())
    carriers = norm**4 / fourth if fourth else 1.0
    # `rel_fro` is that of sums of up to 4096 terms; fp32's own of many more err more (torch 4.2e-6 at k = 100003).
    limit_fro = max(tol.rel_fro, tol.u_acc * tol.growth / 2) * (1 + 2 / math.sqrt(max(carriers, 1.0)))
    if norm:  # subnormals have an absolute spacing: half of it is in every value (fp16 softmax of 50,000 columns)
        limit_fro = math.hypot(limit_fro, tol.tiny / 2 * math.sqrt(got.numel()) / norm)
    if kind == "normal" and got.numel() >= 64 and not figures["rel_fro"] <= limit_fro:
        return f"relative Frobenius error {figures['rel_fro']:.2e} is above {limit_fro:.1e}", figures
    if not figures["max_error"] <= 1.0:
        here, there = _first(ratio == ratio.max(), numbers)
        text = f"{got[here].item():.6g} instead of {want[here].item():.6g} at {there}"
        return f"error {figures['max_error']:.3g}x the allowed ({text}, {kind} input)", figures
    return "", figures


def judge_parts(
    op: Op, problem: Problem, out: Any, ref: Reference, rows: Sequence[int] | None, kind: str = "normal"
) -> tuple[str, dict[str, float]]:
    """`judge` for each part of the output by itself: the norm of a large part must not hide a small one."""
    import torch

    parts = op.parts(problem)
    if not parts:
        return judge(op, problem, out, ref, kind, rows)
    at = torch.arange(len(out)) if rows is None else torch.as_tensor(list(rows))
    stored, worst, start = op.stored(problem), dict[str, float](), 0
    for name, size in parts.items():
        mine, numbers = (at >= start) & (at < start + size), at - start
        start += size
        if not bool(mine.any()):
            continue
        own, own_problem = out[mine], problem
        if name in stored and (dtype := getattr(torch, stored[name])) != own.dtype:  # wider: judged as fp32 is
            own, own_problem = own.view(dtype), problem.replace(precision="fp32")
        columns = own.shape[-1]
        scales = (s.expand_as(ref.value)[mine, :columns] for s in (ref.scale_in, ref.scale_acc))
        wrong, figures = judge(op, own_problem, own, Reference(ref.value[mine, :columns], *scales), kind, numbers[mine])
        worst |= {k: max(v, worst.get(k, 0.0)) for k, v in figures.items()}
        if wrong:
            return f"{name}: {wrong}", worst
    return "", worst


def place(tensors: Sequence[Any], device: str) -> str:
    """Where (torch's name) the float64 reference of these inputs is computed: on the host, or on the GPU itself where
    they are large and half of its free memory holds their float64. A thorough check also has small problems, whose
    reference is the host's: no kernel is judged by its own device alone."""
    import torch

    values = sum(t.numel() for t in tensors)
    if device == "cpu" or values <= DEVICE_VALUES:
        return "cpu"
    return device if DOUBLES * values <= torch.cuda.mem_get_info(device)[0] / 2 else "cpu"


def compare(
    op: Op, problem: Problem, out: Any, tensors: Sequence[Any], rows: Sequence[int] | None, kind: str, where: str
) -> tuple[str, dict[str, float]]:
    """`judge_parts` of an output [rows, columns], or of those rows of it, against float64 of the inputs.

    `where`: as `place` said; it is torch's default device meanwhile, on which a reference makes its tensors."""
    return compare_rows(op, problem, out if rows is None else out[rows], tensors, rows, kind, where)


def compare_rows(
    op: Op, problem: Problem, out: Any, tensors: Sequence[Any], rows: Sequence[int] | None, kind: str, where: str
) -> tuple[str, dict[str, float]]:
    """`compare`, where `out` has these rows only."""
    import torch

    inputs = [t.detach().to(where) for t in tensors]
    if where != "cpu":  # every e4m3 is a bf16, and not all of torch's GPU calls know the former
        inputs = [t.bfloat16() if t.dtype == torch.float8_e4m3fn else t for t in inputs]
    with torch.device(where):
        ref = op.reference(problem, inputs, rows)
        return judge_parts(op, problem, out.to(where), ref, rows, kind)


def settle(result: Any, out: Any) -> None:
    """Put what a competitor returned, if anything, where it was to be written; a tuple holds the parts.

    Raises:
        TypeError: it has another shape, format or device than the output.
    """
    if result is None:
        return
    result = joined(result, out)
    want, got = (tuple(out.shape), out.dtype, out.device), (tuple(result.shape), result.dtype, result.device)
    if want != got:
        raise TypeError(f"returned {got} instead of {want}")
    out.copy_(result)


def joined(result: Any, out: Any) -> Any:
    """What a call returned as one tensor: several results are rows of one output, one below the other; one of another
    format is its bits, filled up with zeros (see Op.stored)."""
    if not isinstance(result, tuple):
        return result
    import torch

    rows = []
    for part in result:
        flat = part.contiguous().view(-1)
        flat = flat if part.dtype == out.dtype else flat.view(out.dtype)
        rows.append(torch.nn.functional.pad(flat, (0, -flat.numel() % out.shape[-1])).view(-1, out.shape[-1]))
    return torch.cat(rows)


def _holes(op: Op, problem: Problem, out: Any) -> int:
    """Values that are not finite; of parts in another format (infinite may be right) those that are NaN."""
    import torch

    stored, start, holes = op.stored(problem), 0, 0
    for name, size in (op.parts(problem) or {"": len(out)}).items():
        own = out[start : start + size]
        start += size
        if name in stored:
            holes += int(own.view(getattr(torch, stored[name])).isnan().sum())
        elif not bool(torch.stack(own.aminmax()).isfinite().all()):  # a tenth of the time of asking each
            holes += int((~own.isfinite()).sum())
    return holes


def generator(device: str, seed: int) -> Any:
    """A torch generator on the device."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


def _verdict(ok: bool, reason: str, figures: dict[str, float], rows: list[int] | None) -> Verdict:
    seen = None if rows is None else len(rows)
    return Verdict(ok, reason, figures.get("rel_fro"), figures.get("max_error"), figures.get("max_abs"), seen)


def sync(device: str) -> None:
    """Wait for a GPU."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's own calls on so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_case(op: Op, problem: Problem, run: Run, seed: int, device: str = "cpu", kind: str = "normal") -> Verdict:
    """One problem, one kind of input, twice: same buffers, changed contents; then once more for repeatability.

    The run has all threads; inputs, reference and judgement, some hundred short calls, have one on a CPU. Where
    other competitors compile or check meanwhile, each of these calls would wait for a thread that has no core:
    0.4 s of checking took 9.7 s on two cores.
    """
    import torch

    threads = torch.get_num_threads()

    def all_threads(*tensors: Any) -> Any:
        with _threads(threads):
            return run(*tensors)

    with _threads(1 if device == "cpu" else threads):
        return _check_case(op, problem, all_threads, seed, device, kind)


def _check_case(op: Op, problem: Problem, run: Run, seed: int, device: str, kind: str) -> Verdict:
    import torch

    tensors = op.inputs(problem, generator(device, seed), device, kind)
    if not tensors:
        return Verdict(True)  # this kind of input has no agreed answer on this problem
    shape, dtype = op.output(problem)
    out = Fenced(shape, dtype, device)
    rows_total = math.prod(shape[:-1])
    whole = op.flops(problem) <= WHOLE_FLOPS and math.prod(shape) <= WHOLE_VALUES
    count = SAMPLED_ROWS if op.bound == "compute" else max(SAMPLED_ROWS, SAMPLED_VALUES // shape[-1])
    rows: list[int] | None = None
    where = place(tensors, device)
    figures: dict[str, float] = {}
    for turn in range(2):
        rows = None if whole else sample_rows(rows_total, seed + turn, count, op.parts(problem))
        if turn:  # same pointers, other contents: a result cached by address is stale now
            changed = op.inputs(problem, generator(device, seed + 1), device, kind)
            for t, fresh in zip(tensors, changed, strict=True):
                t.copy_(fresh)
        pristine = [t.detach().to(where, copy=True) for t in tensors]
        out.poison()
        settle(run(out.tensor, *tensors), out.tensor)
        sync(device)
        if damage := out.damage():
            return Verdict(False, f"{damage} ({kind} input)")
        for index, (t, p) in enumerate(zip(tensors, pristine, strict=True)):
            if not torch.equal(bits(t), bits(p.to(device))):
                return Verdict(False, f"changed its input {index} ({kind} input)")
        # What concerns every value is asked where the values are: of 270 MB a core would take two seconds each time.
        got = out.tensor.detach().reshape(rows_total, shape[-1])
        if got.numel() and kind == "normal" and bool(got[0, 0].isnan() and got.isnan().all()):
            return Verdict(False, f"output never written ({kind} input)")
        problem_found, found = compare(op, problem, got, pristine, rows, kind, where)
        if not problem_found and rows is not None and kind == "normal":
            extra = suspects(op, problem, got, pristine)
            problem_found, more = compare(op, problem, got, pristine, extra, SUSPECT, where) if extra else ("", {})
            found = {k: max(v, more.get(k, v) if k != "rel_fro" else v) for k, v in found.items()}
            rows = sorted({*rows, *extra})
        if not problem_found and rows is not None and kind == "normal" and dtype != "int32":
            holes = _holes(op, problem, got)  # rows that were not compared were at least written
            problem_found = f"{holes} of {got.numel()} values never written or not finite" if holes else ""
        figures = {k: max(v, figures.get(k, 0.0)) for k, v in found.items()} or figures
        if problem_found:
            suffix = "" if not turn else " (second call, same buffers with changed contents)"
            return _verdict(False, problem_found + suffix, figures, rows)
    # Once more on the very same contents: what is left as it was, for nothing seemed to have changed, holds another
    # poison now. Where the bits differ the answer is judged again; integers have no order of summation to differ by.
    first = out.tensor.clone()
    out.poison(OTHER_POISON)
    settle(run(out.tensor, *tensors), out.tensor)
    sync(device)
    repeat = torch.equal(bits(first), bits(out.tensor))
    again = out.damage()
    if not again and not repeat:
        got = out.tensor.detach().reshape(rows_total, shape[-1])
        again, _ = compare(op, problem, got, pristine, rows, kind, where)
        if not again and PRECISIONS[problem.precision].exact:
            again = "integers differ from those of the call before"
    if again:
        return _verdict(False, f"{again} (third call, nothing changed)", figures, rows)
    verdict = _verdict(True, "", figures, rows)
    return replace(verdict, deterministic=repeat, cases=[f"{problem.shape}:{kind}"])


Build = Callable[[Problem, dict[str, Any]], Run]


def check(
    op: Op,
    problem: Problem,
    config: dict[str, Any],
    build: Build,
    seed: int,
    device: str = "cpu",
    run: Run | None = None,
    valid: Callable[[dict[str, Any], Problem], bool] = lambda config, problem: True,
    thorough: bool = True,
    per_shape: bool = False,
) -> Verdict:
    """The whole gate: the problem itself, then ragged relatives and adversarial values on small ones.

    Args:
        run: what `build(problem, config)` returned, if it was built already.
        valid: whether the config may be used on a relative; one that may not be is left out.
        thorough: False checks the problem alone (its relatives passed before with this config).
        per_shape: the competitor is another kernel for every shape (torch.compile): the adversarial
            values go through the problem itself, and relatives, being other kernels, are left out.
    Returns:
        The first failure, or the figures of the problem itself with the list of cases that passed.
    """
    run = run or build(problem, config)
    own = check_case(op, problem, run, seed, device)
    if not own.ok or not thorough:
        return own
    cases = list(own.cases)
    relatives = [] if per_shape else [r for r in op.ragged(problem) if valid(config, r)]
    plan = [(r, "normal") for r in relatives]
    base = next((r for r in relatives if min(size for _, size in r.dims) > 1), None)
    if base is None and (per_shape or op.flops(problem) <= WHOLE_FLOPS):
        base = problem  # its rules leave no relative: the adversarial values go through the problem itself
    if base is not None:
        # e4m3 has no infinity and its NaN is no operand; integers have neither.
        kinds = [k for k in op.adversarial if problem.precision not in ("fp8", "int8") or k == "integers"]
        plan += [(base, kind) for kind in kinds]
    for relative, kind in plan:
        try:
            ran = run if relative == problem else build(relative, config)
        except UsageError:
            continue  # the competitor says that it does not do this size: not a claim, so not a fault
        verdict = check_case(op, relative, ran, seed + len(cases), device, kind)
        if not verdict.ok:
            return replace(own, ok=False, reason=f"{relative.shape}: {verdict.reason}", deterministic=None, cases=[])
        cases += verdict.cases
    return replace(own, cases=cases)
