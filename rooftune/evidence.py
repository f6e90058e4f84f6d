"""What can be proven about a kernel whose device is not here: it is emulated, and it is compiled.

Emulation runs the same kernel on a CPU (Triton's interpreter, Numba's simulator, CUDA C++ with a fiber
per thread) through the full correctness check. Compilation makes machine code for several architectures
and reads registers, spills, shared memory and tensor-core instructions from it. Neither gives a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from rooftune import registry
from rooftune.core import Config, Evidence, Problem, Status, UsageError
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl
from rooftune.results.record import Record

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
COMPILE_S = 180.0
EMULATE_S = 600.0
Event = Callable[[str, str], None]


def _record(impl: Impl, problem: Problem, config: Config, evidence: Evidence, reply: Reply) -> Record:
    return Record(
        problem=str(problem),
        op=problem.op,
        shape=problem.shape,
        precision=problem.precision,
        impl=impl.key,
        config=config,
        default=True,
        status=reply.status,
        reason=reply.reason,
        evidence=evidence,
        error=reply.data.get("error"),
        source_hash=impl.source_hash,
    )


def emulate(lab: Lab, impl: Impl, problem: Problem, seed: int, thorough: bool = True) -> Record:
    """Check the kernel on a CPU; `thorough` adds ragged shapes and adversarial values."""
    if impl.missing:
        return _record(impl, problem, {}, Evidence.EMULATED, Reply(Status.SKIPPED, impl.missing))
    if not impl.emulates:
        return _record(impl, problem, {}, Evidence.EMULATED, Reply(Status.SKIPPED, "has no emulate()"))
    try:
        config = lab.space(impl, problem, "emulate")["default"]
    except UsageError as error:
        return _record(impl, problem, {}, Evidence.EMULATED, Reply(Status.FAILED_COMPILE, str(error)))
    reply = lab.ask(
        impl, "prepare", EMULATE_S, "emulate", problem=str(problem), config=config, seed=seed, thorough=thorough
    )
    return _record(impl, problem, config, Evidence.EMULATED, reply)


def compile_all(lab: Lab, impl: Impl, problem: Problem, archs: Sequence[str] = ARCHITECTURES) -> Record:
    """Compile the default config for every architecture; `resources` holds a row each, or why there is none."""
    if impl.missing:
        return _record(impl, problem, {}, Evidence.COMPILED, Reply(Status.SKIPPED, impl.missing))
    if not impl.compiles:
        return _record(impl, problem, {}, Evidence.COMPILED, Reply(Status.SKIPPED, "has no compile_for()"))
    try:
        config = lab.space(impl, problem, "compile")["default"]
    except UsageError as error:
        return _record(impl, problem, {}, Evidence.COMPILED, Reply(Status.FAILED_COMPILE, str(error)))
    rows = []
    for arch in archs:
        reply = lab.ask(impl, "compile", COMPILE_S, "compile", problem=str(problem), config=config, arch=arch)
        rows.append({"arch": arch, **reply.data, "status": str(reply.status), "reason": reply.reason})
    # An architecture that lacks the instructions is left out; a failure on any one is a failure.
    failed = [r for r in rows if r["status"] not in (Status.OK, Status.SKIPPED)]
    skipped = [r for r in rows if r["status"] == Status.SKIPPED]
    telling = failed or (skipped if len(skipped) == len(rows) else [])
    reason = "; ".join(f"{r['arch']}: {r['reason']}" for r in (failed or skipped))
    status = Reply(Status(telling[0]["status"]) if telling else Status.OK, reason)
    record = _record(impl, problem, config, Evidence.COMPILED, status)
    record.resources = rows
    return record


def compile_problem(op_name: str, precision: str) -> Problem:
    """A size for which the default config is the one that large problems use."""
    sizes = {
        "gemm": f"gemm[m=4096,n=4096,k=4096{',transpose=nt' if precision == 'fp8' else ''},{precision}]",
        "attention": f"attention[b=4,h=16,sq=4096,d=128,causal,{precision}]",
        "attention_bwd": f"attention_bwd[b=4,h=16,sq=4096,d=128,causal,{precision}]",
    }
    return registry.problem(sizes.get(op_name, f"{op_name}[m=8192,n=4096,{precision}]"))


def gather(
    lab: Lab,
    impls: Sequence[Impl],
    precisions: Sequence[str],
    seed: int,
    archs: Sequence[str] = ARCHITECTURES,
    thorough: bool = True,
    event: Event = lambda kind, text: None,
) -> list[Record]:
    """Evidence for every competitor and precision, two at a time. Do not run it beside a timing."""

    def one(job: tuple[Impl, str, str]) -> Record:
        impl, precision, what = job
        event(what, f"{impl.key} {precision}")
        if what == "emulate":
            small = registry.problem(registry.op(impl.op).small(precision)[0])
            record = emulate(lab, impl, small, seed, thorough)
        else:
            record = compile_all(lab, impl, compile_problem(impl.op, precision), archs)
        event("done", f"{what} {impl.key} {precision}: {record.status} {record.reason}")
        return record

    def work(jobs: list[tuple[Impl, str, str]]) -> list[Record]:
        return [one(job) for job in jobs]

    # One worker serves one language in one mode, so the jobs of such a pair stay in one thread.
    languages = dict.fromkeys(impl.language or impl.key for impl in impls)
    groups = [
        [(i, p, what) for i in impls if (i.language or i.key) == name for p in precisions if p in i.precisions]
        for what in ("emulate", "compile")
        for name in languages
    ]
    with ThreadPoolExecutor(2) as pool:
        records = [record for group in pool.map(work, groups) for record in group]
    for impl in impls:
        for mode in ("emulate", "compile"):
            lab.retire(impl, mode)
    return records
