"""pytest: `kernel_benchmark` checks a competitor, times it as `run` does, and hands the rounds to pytest-benchmark.

    def test_softmax(kernel_benchmark):
        kernel_benchmark("softmax/numba", "softmax[m=1024,n=1024,fp32]")

A wrong result fails the test. The figures stand in pytest-benchmark's table, JSON and comparisons like any
other (one per round: its 25 % order statistic), with our record in `extra_info["rooftune"]`. With
--benchmark-disable, or without pytest-benchmark, the competitor is checked only. Options: --rooftune-device,
--rooftune-threads, or ROOFTUNE_DEVICE and ROOFTUNE_THREADS.

This module is imported by every pytest run on a machine where rooftune is installed: nothing but pytest here.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from rooftune.core import Config, Problem
    from rooftune.device import Device
    from rooftune.lab import Lab
    from rooftune.registry import Impl
    from rooftune.results.record import Record

ROUNDS = 10  # 6 are the least for a 95 % interval


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rooftune", "kernels checked and timed by rooftune")
    group.addoption("--rooftune-device", metavar="NAME", help="cpu, cuda, cuda:1... (default: where the kernel runs)")
    group.addoption("--rooftune-threads", metavar="N", type=int, help="CPU threads of a kernel (default: all cores)")


def pytest_configure(config: pytest.Config) -> None:
    """Offer the fixture in the form that fits: pytest-benchmark may be absent or switched off."""
    there = any(config.pluginmanager.hasplugin(name) for name in ("benchmark", "pytest_benchmark.plugin"))
    if not config.pluginmanager.hasplugin("rooftune-fixtures"):
        config.pluginmanager.register(_Timed() if there else _Checked(), "rooftune-fixtures")


class _Labs:
    """One Lab a device for the whole pytest session: worker processes are started once."""

    def __init__(self, config: pytest.Config) -> None:
        self.device = config.getoption("rooftune_device", None) or os.environ.get("ROOFTUNE_DEVICE", "auto")
        self.threads: int | None = config.getoption("rooftune_threads", None)
        self.open: dict[str, Lab] = {}

    def find(self, impl: Impl) -> tuple[Lab, Device]:
        """The Lab of the device asked for, else of the first device here that the competitor runs on.

        Raises:
            Unavailable: no such device is here.
            UsageError: not a number of threads that it has.
        """
        from rooftune import device
        from rooftune.core import Unavailable, UsageError
        from rooftune.lab import Lab
        from rooftune.session import threads_of

        if self.device != "auto":
            found = device.find(self.device)
        else:
            here = [d for d in device.devices() if d.kind in impl.devices]
            if not here:
                why = device.absent()
                raise Unavailable("; ".join(why.get(kind, f"no {kind} device") for kind in impl.devices))
            found = here[0]
        name = str(found)
        if name not in self.open:
            option, threads, given = "--rooftune-threads", self.threads, os.environ.get("ROOFTUNE_THREADS")
            if threads is None and given:
                option = "ROOFTUNE_THREADS"
                try:
                    threads = int(given)
                except ValueError as error:
                    raise UsageError(f"{option}={given}: not int; this process may use {found.cores} cores") from error
            self.open[name] = Lab(found.torch, threads_of(found, threads, option), found.kind)
        return self.open[name], found


class _Rounds:
    """Plays measured rounds to pytest-benchmark: a clock that stands still but for the round's time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.left: list[float] = []

    def timer(self) -> Callable[[], float]:
        def rooftune_rounds() -> float:
            return self.now

        return rooftune_rounds

    def reset(self) -> None:
        self.now = 0.0

    def play(self) -> None:
        self.now += self.left.pop(0) if self.left else 0.0


@pytest.fixture(scope="session")
def rooftune_labs(pytestconfig: pytest.Config) -> Iterator[_Labs]:
    """Labs by device; closed at the end of the session."""
    labs = _Labs(pytestconfig)
    yield labs
    for lab in labs.open.values():
        lab.close()


class _Checked:
    """Without pytest-benchmark: right or wrong."""

    @pytest.fixture
    def kernel_benchmark(self, rooftune_labs: _Labs) -> Callable[..., Record]:
        """`kernel_benchmark(impl, problem, config=None, rounds=10)` checks the competitor; returns its record."""

        def check(impl: str, problem: str | Problem, config: Config | None = None, rounds: int = ROUNDS) -> Record:
            return measure(rooftune_labs, impl, problem, config, 0, _end)

        return check


class _Timed:
    """With pytest-benchmark: right or wrong, and how fast."""

    @pytest.fixture
    def rooftune_rounds(self, request: pytest.FixtureRequest) -> _Rounds:
        """Sets the clock of the test's `benchmark` fixture, which is made after this one."""
        if "benchmark" in inspect.signature(request.function).parameters:
            pytest.fail("take kernel_benchmark without benchmark: it uses that itself", pytrace=False)
        rounds = _Rounds()
        marker = request.node.get_closest_marker("benchmark")
        settings = (dict(marker.kwargs) if marker else {}) | {"timer": rounds.timer()}
        request.node.add_marker(pytest.mark.benchmark(**settings), append=False)
        return rounds

    @pytest.fixture
    def kernel_benchmark(self, rooftune_labs: _Labs, rooftune_rounds: _Rounds, benchmark: Any) -> Callable[..., Record]:
        """`kernel_benchmark(impl, problem, config=None, rounds=10)` checks and times; returns its record."""

        def end(how: Callable[..., NoReturn], text: str) -> NoReturn:
            with contextlib.suppress(_NoTime):
                benchmark.pedantic(_no_time)
            _end(how, text)

        def run(impl: str, problem: str | Problem, config: Config | None = None, rounds: int = ROUNDS) -> Record:
            from rooftune.results import statistics

            if rounds < 1:
                end(pytest.fail, f"rounds must be positive, not {rounds}; --benchmark-disable checks only")
            record = measure(rooftune_labs, impl, problem, config, rounds if benchmark.enabled else 0, end)
            benchmark.group = benchmark.group or record.problem
            benchmark.extra_info["rooftune"] = record.to_json()
            rooftune_rounds.left = [float(s) for s in statistics.q25(record.rounds or ())]
            benchmark.pedantic(rooftune_rounds.play, setup=rooftune_rounds.reset, rounds=len(rooftune_rounds.left) or 1)
            return record

        return run


class _NoTime(Exception):
    """There is nothing to time: raised inside `benchmark`, it marks the test as one without figures."""


def _no_time() -> NoReturn:
    raise _NoTime


End = Callable[[Callable[..., NoReturn], str], NoReturn]


def _end(how: Callable[..., NoReturn], text: str) -> NoReturn:
    """Leave the test by `pytest.skip` or `pytest.fail`."""
    if how is pytest.fail:
        how(text, pytrace=False)
    how(text)


def measure(labs: _Labs, key: str, text: str | Problem, config: Config | None, rounds: int, end: End) -> Record:
    """Check a competitor and, if rounds are asked for, time it. Ends the test where there is nothing to return.

    Args:
        key: `softmax/numba`, or `file:/path/to/kernel.py`. config: None is the default.
        end: is called with `pytest.skip` if the competitor cannot run here, with `pytest.fail` if it is wrong,
            fails, or the request makes no sense; and the reason in one line.
    """
    from rooftune import race, registry
    from rooftune.core import Status, Unavailable, UsageError
    from rooftune.session import versions

    def ignore(kind: str, text: str) -> None:
        return None

    options = race.Options(rounds=max(rounds, 1), seed=0)  # the same inputs every time: a failure can be repeated
    try:
        impl, problem = registry.impl(key), registry.problem(text)
        if impl.op != problem.op:
            raise UsageError(f"{key} is a competitor of {impl.op}: it does not compute {problem}")
        if impl.missing:
            end(pytest.skip, f"{impl.key}: {impl.missing}")
        lab, device = labs.find(impl)
        field = race.entrants(lab, problem, [impl], ignore)
        entrant = next((e for e in field if e.default), field[0])
        if config is not None and entrant.status == Status.OK:
            entrant = race.Entrant(impl, config, config == entrant.config)
        if entrant.status == Status.OK:
            race.prepare(lab, problem, [entrant], options, set(), ignore)
        if entrant.status == Status.OK and rounds:
            race.time_rounds(lab, problem, [entrant], options, rounds, ignore)
    except UsageError as error:
        end(pytest.fail, str(error))
    except Unavailable as error:
        end(pytest.skip, f"{impl.key}: {error}")
    if entrant.status != Status.OK:
        how = pytest.skip if entrant.status == Status.SKIPPED else pytest.fail
        end(how, f"{entrant.label} on {problem}: {entrant.status}: {entrant.reason}")
    (record,) = race.judge(registry.op(problem.op), problem, [entrant], options, None, lab)
    if not rounds:
        record.reason = "checked, not timed"
    if entrant.handle is not None:
        lab.release(impl, entrant.handle)
    record.device = {"name": device.name, "kind": device.kind}
    record.versions = versions()
    return record
