"""What can be proven about a kernel whose device is not here: it is emulated, and it is compiled.

Emulation runs the same kernel on a CPU (Triton's interpreter, Numba's simulator, CUDA C++ with a fiber
per thread) through the full correctness check. Compilation makes machine code for several architectures
and reads registers, spills, shared memory and tensor-core instructions from it. Neither gives a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rooftune import pools, registry
from rooftune.core import Config, Evidence, Problem, Status, UsageError
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl
from rooftune.results import store
from rooftune.results.record import Record
from rooftune.spaces import NoConfig

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a", "sm_120a")
COMPILE_S = 180.0
EMULATE_S = 600.0
READ_BYTES = 16 * 2**20  # of one's own stored runs that are looked at for the best evidence, the newest first
Event = Callable[[str, str], None]


@dataclass(frozen=True)
class Standing:
    """The best evidence on record for a competitor. `stale`: it is of another source than today's.

    `kinds` are all kinds there are for that source, the best first; empty if there is nothing. `ever`: some source
    of it, today's or an older one, was measured. `earlier`: they are of inputs, reference and limits that have changed
    since: times hold, but that it is right was asked by an earlier gate; `before`: where that one saw it measured.
    """

    kinds: tuple[Evidence, ...] = ()
    device: str = ""
    source_hash: str = ""
    stale: bool = False
    ever: bool = False
    earlier: bool = False
    before: str = ""

    @property
    def said(self) -> str:
        """In words, without the source."""
        if not self.kinds:
            return "nothing on record"
        stale, gate = "STALE: " if self.stale else "", ", by an earlier gate" if self.earlier else ""
        if self.kinds[0] == Evidence.MEASURED:
            return f"{stale}measured on {self.device or 'an unnamed device'}{gate}"
        if self.before:
            return f"{' and '.join(self.kinds)}; measured on {self.before}, by an earlier gate"
        never = "not run on hardware since it changed" if self.ever else "never run on hardware"
        return f"{stale}{' and '.join(self.kinds)}{gate}, {never}"

    def __str__(self) -> str:
        source = f" ({'older ' if self.stale else ''}source {self.source_hash[:8]})"
        return self.said + (source if self.kinds else "")


def on_record(impls: Iterable[Impl], runs: Sequence[Path] | None = None) -> dict[str, Standing]:
    """The standing of each competitor: from stored runs (newest first, then the committed ones), and from what
    `static` has compiled of today's source. Today's source always goes before an older one."""
    asked = list(impls)
    if not asked:
        return {}
    found: dict[str, dict[tuple[str, bool], dict[Evidence, str]]] = {}  # competitor -> source, gate of today -> kinds
    gates = {op: registry.judge_hash(op) for op in {impl.op for impl in asked}}
    judges = {impl.key: gates[impl.op] for impl in asked}
    paths = [*_newest(), *store.list_runs(store.REFERENCE)] if runs is None else list(runs)
    for path in paths:
        for line in store.Log(path).read()[0]:
            if line.get("kind") in ("result", "static") and line.get("status") == Status.OK and line.get("source_hash"):
                who, kind = str(line.get("impl")), Evidence(line["evidence"])
                same = kind == Evidence.COMPILED or line.get("judge_hash") == judges.get(
                    who
                )  # a compiler judges nothing
                kinds = found.setdefault(who, {}).setdefault((str(line["source_hash"]), same), {})
                kinds.setdefault(kind, str((line.get("device") or {}).get("name") or ""))
    return {impl.key: _standing(impl, found.get(impl.key, {})) for impl in asked}


def _newest() -> Iterator[Path]:
    """One's own stored runs, the newest first, as many as `READ_BYTES` allow."""
    left = READ_BYTES
    for path in store.list_runs():
        left -= path.stat().st_size
        if left < 0:
            return
        yield path


def _standing(impl: Impl, sources: dict[tuple[str, bool], dict[Evidence, str]]) -> Standing:
    from rooftune import static

    today, earlier = dict(sources.get((impl.source_hash, True), {})), sources.get((impl.source_hash, False), {})
    if impl.compiles and Evidence.COMPILED not in today and static.Cache(impl).compiled():
        today[Evidence.COMPILED] = ""
    order = list(Evidence)
    ever = any(Evidence.MEASURED in kinds for kinds in sources.values())
    if found := today or earlier:
        kinds, device = tuple(sorted(found, key=order.index)), found.get(Evidence.MEASURED, "")
        before = "" if device or Evidence.MEASURED not in earlier else earlier[Evidence.MEASURED] or "an unnamed device"
        return Standing(kinds, device, impl.source_hash, ever=ever, earlier=not today, before=before)
    best = min(sources.items(), key=lambda s: min(map(order.index, s[1])), default=None)
    if best is None:
        return Standing()
    kinds = tuple(sorted(best[1], key=order.index))
    return Standing(kinds, best[1].get(Evidence.MEASURED, ""), best[0][0], True, ever)


def stale(records: Iterable[Record]) -> dict[str, str]:
    """Competitor -> source hash, of records that are of another source than today's, or of a file that is gone."""
    found: dict[str, str] = {}
    for record in records:
        if record.source_hash and record.impl not in found:
            try:
                today = registry.impl(record.impl).source_hash
            except UsageError:
                today = ""
            if record.source_hash != today:
                found[record.impl] = record.source_hash
    return found


def record_of(impl: Impl, problem: Problem, config: Config, evidence: Evidence, reply: Reply) -> Record:
    """What became of the default config of a competitor, as a row without a time."""
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
        judge_hash=registry.judge_hash(problem.op),
    )


def emulate(lab: Lab, impl: Impl, problem: Problem, seed: int, thorough: bool = True) -> Record:
    """Check the kernel on a CPU; `thorough` adds ragged shapes and adversarial values."""
    if impl.missing:
        return record_of(impl, problem, {}, Evidence.EMULATED, Reply(Status.SKIPPED, impl.missing))
    if not impl.emulates:
        return record_of(impl, problem, {}, Evidence.EMULATED, Reply(Status.SKIPPED, "has no emulate()"))
    try:
        config = lab.space(impl, problem, "emulate")["default"]
    except NoConfig as error:
        return record_of(impl, problem, {}, Evidence.EMULATED, Reply(Status.SKIPPED, str(error)))
    except UsageError as error:
        return record_of(impl, problem, {}, Evidence.EMULATED, Reply(Status.FAILED_COMPILE, str(error)))
    reply = lab.ask(
        impl, "prepare", EMULATE_S, "emulate", problem=str(problem), config=config, seed=seed, thorough=thorough
    )
    return record_of(impl, problem, config, Evidence.EMULATED, reply)


def compile_all(lab: Lab, impl: Impl, problem: Problem, archs: Sequence[str] = ARCHITECTURES) -> Record:
    """Compile the default config for every architecture; `resources` holds a row each, or why there is none."""
    if impl.missing:
        return record_of(impl, problem, {}, Evidence.COMPILED, Reply(Status.SKIPPED, impl.missing))
    if not impl.compiles:
        return record_of(impl, problem, {}, Evidence.COMPILED, Reply(Status.SKIPPED, "has no compile_for()"))
    try:
        config = lab.space(impl, problem, "compile")["default"]
    except NoConfig as error:
        return record_of(impl, problem, {}, Evidence.COMPILED, Reply(Status.SKIPPED, str(error)))
    except UsageError as error:
        return record_of(impl, problem, {}, Evidence.COMPILED, Reply(Status.FAILED_COMPILE, str(error)))
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
    record = record_of(impl, problem, config, Evidence.COMPILED, status)
    record.resources = rows
    return record


# Sizes for which the default config is the one that large problems use, by the dimensions an operator has.
LARGE: tuple[dict[str, int], ...] = (
    {"b": 4, "h": 16, "sq": 4096, "d": 128},
    {"m": 4096, "n": 4096, "k": 4096},
    {"m": 8192, "n": 4096},
)


def compile_problem(op_name: str, precision: str) -> Problem:
    """A large problem of any operator; one whose dimensions we have no sizes for has its own small one."""
    op = registry.op(op_name)
    needed = set(op.dims) - set(op.defaults)
    sizes = next((s for s in LARGE if set(s) == needed), None)
    if sizes is None:
        return registry.problem(op.small(precision)[0])
    flags = {"causal": "1"} if "causal" in op.flags else {}
    if precision == "fp8" and "transpose" in op.flags:
        flags["transpose"] = "nt"
    return registry.problem(Problem.make(op_name, precision, flags, **sizes))


def gather(
    lab: Lab,
    impls: Sequence[Impl],
    precisions: Sequence[str],
    seed: int,
    archs: Sequence[str] = ARCHITECTURES,
    thorough: bool = True,
    event: Event = lambda kind, text: None,
    done: list[Record] | None = None,
) -> list[Record]:
    """Evidence for every competitor and precision, two at a time. Do not run it beside a timing.

    `done`: gets every record as it is made, for whoever is interrupted.
    """

    def one(job: tuple[Impl, str, str]) -> Record:
        impl, precision, what = job
        event(what, f"{impl.key} {precision}")
        if what == "emulate":
            small = registry.problem(registry.op(impl.op).small(precision)[0])
            record = emulate(lab, impl, small, seed, thorough)
        else:
            record = compile_all(lab, impl, compile_problem(impl.op, precision), archs)
        event("done", f"{what} {impl.key} {precision}: {record.status} {record.reason}")
        if done is not None:
            done.append(record)
        return record

    def work(jobs: list[tuple[Impl, str, str]]) -> list[Record]:
        return [one(job) for job in jobs]

    # One worker serves one language in one mode, so the jobs of such a pair stay in one thread.
    languages = dict.fromkeys(impl.language or impl.key for impl in impls)
    groups = [
        [(i, p, what) for i in impls if (i.language or i.key) == name for p in precisions if p in i.precisions]
        for what in ("compile", "emulate")  # compiling for all architectures takes longest, so it starts first
        for name in languages
    ]
    with pools.asking(lab, 2) as pool:
        records = [record for group in pool.map(work, groups) for record in group]
    for impl in impls:
        for mode in ("emulate", "compile"):
            lab.retire(impl, mode)
    return records
