"""The Python face of the verbs: the same race, tuning and comparison as the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rooftune import race, registry
from rooftune.autotune import tuner
from rooftune.core import Problem, UsageError
from rooftune.results import store
from rooftune.results.compare import Cell
from rooftune.results.compare import compare as judge
from rooftune.results.record import Record
from rooftune.session import Session


def ops() -> tuple[str, ...]:
    """Names of the operators."""
    return registry.op_names()


def _impls(problem: Problem, only: str | Sequence[str]) -> list[registry.Impl]:
    """Competitors by name (`numba`) or file (`my_kernel.py`); all of the operator's if none is named."""
    only = [only] if isinstance(only, str) and only else only
    if not only:
        return list(registry.impls(problem.op))
    return [
        registry.user_impl(Path(name)) if name.endswith(".py") else registry.impl(f"{problem.op}/{name}")
        for name in only
    ]


def run(
    *problems: str | Problem,
    only: str | Sequence[str] = (),
    device: str = "cpu",
    threads: int | None = None,
    **options: Any,
) -> list[Record]:
    """Race competitors and return their records; they are stored as `bench.py run` stores them.

    Args:
        problems: such as `"softmax[m=4096,n=1024,bf16]"`.
        only: competitors by name, or paths of kernel files; all if empty.
        options: fields of `race.Options`, such as `rounds=20`.
    Raises:
        UsageError: a name that does not exist, or a problem too large for the device.
    """
    timing = race.Options(**options)
    asked = [registry.problem(p) for p in problems]
    found: list[Record] = []
    with Session("api", device, threads, quiet=True) as session:
        for problem in asked:
            session.check_memory(problem, registry.op(problem.op).memory_bytes(problem))
            records = race.race(session.lab, problem, _impls(problem, only), timing, session.ceilings)
            session.keep(records)
            found += records
    return found


def tune(
    competitor: str,
    problem: str | Problem,
    budget: str = "60s",
    device: str = "cpu",
    threads: int | None = None,
    **how: Any,
) -> tuner.TuneResult:
    """Tune a competitor (`"softmax/numba"`) on a problem; a winner enters the tuned table. See `tuner.tune`."""
    impl, asked = registry.impl(competitor), registry.problem(problem)
    if impl.op != asked.op:
        raise UsageError(f"{competitor} computes {impl.op}, and {asked} is another operator")
    with Session("api-tune", device, threads, quiet=True) as session:
        return tuner.tune(
            session.lab,
            impl,
            asked,
            budget,
            identity=session.about["identity"],
            **how,
        )


def compare(base: str | Path, candidate: str | Path, **limits: float) -> list[Cell]:
    """Verdicts on two stored runs: ids, files, or `latest~1` and `latest`. See `results.compare.compare`."""
    return judge(store.load_run(store.resolve(str(base))), store.load_run(store.resolve(str(candidate))), **limits)
