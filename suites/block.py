"""A transformer layer from all-torch, from one language, and from the best mix: checked, timed, attributed.

Each composition lives in a worker process of its own, with all its competitors together; the parent asks
them in interleaved rounds, as `race` does. The layer's own time is that of whole passes; the times of its
steps come from passes of their own, so that what they leave unexplained (the gap) is shown, not hidden.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rooftune import probe, registry
from rooftune.core import Status, UsageError
from rooftune.energy import Energy
from rooftune.lab import Lab, Worker, WorkerDied
from rooftune.race import SLOW_S, VERIFY_SHARE, Event, Options
from rooftune.registry import Impl
from rooftune.results import statistics
from rooftune.suites.block_compose import Choice, Composition, compose, fastest_torch, languages
from rooftune.suites.block_plan import MODELS, Shape, Step, flops, plan, problems, shape, traffic
from rooftune.suites.block_report import BlockResult, CompositionResult, StepResult, tables

WORKER = "rooftune.suites.block_worker"
__all__ = [
    "MODELS", "BlockResult", "Choice", "Composition", "CompositionResult", "Shape", "StepResult",
    "compose", "fastest_torch", "languages", "plan", "problems", "run", "shape", "tables",
]  # fmt: skip
PREPARE_S = 900.0  # six builds (inductor, LLVM: tens of seconds each) and a float64 layer on two cores
ENERGY_S = 60.0  # one window with its waits; idle and warm-up are two more


@dataclass
class _Runner:
    """A composition while it is measured: its process, its handle there, its result."""

    composition: Composition
    result: CompositionResult
    worker: Worker | None = None
    handle: int | None = None
    step_rounds: list[list[list[float]]] = field(default_factory=list)  # [rounds][passes][steps]
    walls: list[float] = field(default_factory=list)

    def ask(self, function: str, deadline_s: float, **arguments: Any) -> Any:
        """Call a function of the block's worker; a dead worker takes the composition out, and None returns."""
        assert self.worker is not None
        try:
            return self.worker.request("call", deadline_s, function=f"{WORKER}:{function}", **arguments)
        except WorkerDied as death:
            self.fail(str(death.status), str(death))
            return None

    def fail(self, status: str, reason: str) -> None:
        """Out: no time stays beside a failure."""
        self.result.status, self.result.reason, self.handle = status, reason, None
        self.result.rounds.clear()


def _host(composition: Composition) -> Impl:
    """What a composition's process needs: the environment of every language in it.

    Raises:
        UsageError: two languages want different values of a variable.
    """
    impls = [registry.impl(c.impl) for c in composition.choices.values()]
    env: dict[str, str] = {}
    for impl in impls:
        for name, value in impl.env.get("native", {}).items():
            if env.setdefault(name, value) != value:
                raise UsageError(f"{impl.key} needs {name}={value}, another step needs {env[name]}")
    return replace(impls[0], op="block", name=composition.name, env={"native": env})


def run(
    lab: Lab,
    shape: Shape,
    compositions: Sequence[Composition],
    options: Options,
    ceilings: dict[str, Any] | None = None,
    energy_windows: int = 0,
    event: Event = lambda kind, text: None,
) -> BlockResult:
    """Check and time compositions of a layer.

    Args:
        lab: gives device, threads and the device's lock.
        ceilings: from `probe.ceilings`; None: no floors, and the result says so.
        energy_windows: windows of 5 s a composition; 0: energy is not measured.
    """
    steps = plan(shape)
    runners = [_Runner(c, CompositionResult(c.name, reason=c.reason)) for c in compositions]
    with ExitStack() as processes:
        for runner in runners:
            _start(runner, lab, processes)  # in this thread: a worker dies with the thread that started it
        with ThreadPoolExecutor(2) as pool:
            jobs = [pool.submit(_prepare, r, shape, options.seed, lab.device, event) for r in runners if r.worker]
        for job in jobs:
            job.result()
        _rounds([r for r in runners if r.handle is not None], lab, options, event)
        for runner in runners:
            if runner.handle is not None:
                event("energy", runner.composition.name)
                _energy(runner, lab, shape, energy_windows)
    floors, total, why = _floors(steps, ceilings)
    torch = next((r for r in runners if r.composition.name == "torch" and r.handle is not None), None)
    for runner in runners:
        _summarise(runner, steps, shape, floors, total, torch)
    done = {r.result.name: r.result.rounds for r in runners if r.handle is not None}
    leader, tied = statistics.tie_set(done) if done else ("", set())
    for runner in runners:
        runner.result.tie = runner.result.name in {leader, *tied} and runner.handle is not None
    results = [r.result for r in runners]
    return BlockResult(
        shape, str(shape), shape.sizes.layers, shape.tokens, flops(steps), traffic(steps), total, why,
        _device(lab), lab.threads, options.seed, results,
    )  # fmt: skip


def _start(runner: _Runner, lab: Lab, processes: ExitStack) -> None:
    if not runner.composition.choices:
        runner.fail(str(Status.SKIPPED), runner.composition.reason)
        return
    try:
        runner.worker = Worker(_host(runner.composition), "native", lab.device, lab.threads)
    except UsageError as error:
        runner.fail(str(Status.SKIPPED), str(error))
        return
    processes.callback(runner.worker.close)


def _prepare(runner: _Runner, shape: Shape, seed: int, device: str, event: Event) -> None:
    """Build and check."""
    event("prepare", runner.composition.name)
    choices = {name: {"impl": c.impl, "config": c.config} for name, c in runner.composition.choices.items()}
    try:
        reply = runner.ask("prepare", PREPARE_S, shape=asdict(shape), choices=choices, seed=seed, device=device)
    except UsageError as error:
        runner.fail(str(Status.SKIPPED), str(error))
        return
    if reply is None:
        return
    runner.result.error = reply.get("error")
    configs = reply.get("configs", {})
    for step in plan(shape):
        choice = runner.composition.choices.get(step.name, Choice("glue"))
        config = configs.get(step.name, choice.config)
        runner.result.steps.append(StepResult(step.name, step.problem, choice.impl, config, choice.note))
    if reply["status"] == Status.OK:
        runner.handle = reply["handle"]
    else:
        runner.fail(reply["status"], reply["reason"])


def _rounds(runners: list[_Runner], lab: Lab, options: Options, event: Event) -> None:
    """Interleaved rounds; who fails in one is out, so that rounds stay paired by their number."""
    rng = random.Random(f"{options.seed}:block")
    for number in range(options.rounds):
        order = [r for r in runners if r.handle is not None]
        rng.shuffle(order)
        last = number == options.rounds - 1
        with lab.exclusive():
            for runner in order:
                estimate = min(runner.result.rounds[0]) if runner.result.rounds else 0.0
                reply = runner.ask(
                    "measure",
                    max(120.0, 200 * estimate),
                    handle=runner.handle,
                    seed=rng.getrandbits(31),
                    samples=min(3, options.samples) if estimate > SLOW_S else options.samples,
                    min_sample_s=options.min_sample_s,
                    cache=options.cache,
                    clock=options.clock,
                    verify=last or rng.random() < VERIFY_SHARE,
                )
                if reply is None:
                    continue
                if reply["status"] != Status.OK:
                    runner.fail(reply["status"], reply["reason"])
                    continue
                runner.result.rounds.append(reply["samples_s"])
                runner.step_rounds.append(reply["steps_s"])
                runner.walls += [] if reply["wall_s"] is None else [reply["wall_s"]]
                runner.result.notes += [n for n in reply["notes"] if n not in runner.result.notes]
        event("time", f"round {number + 1}/{options.rounds}")


def _device(lab: Lab) -> str:
    """Our name of the lab's device."""
    return "cpu" if lab.kind == "cpu" else f"{lab.kind}:{lab.device.partition(':')[2] or 0}"


def _energy(runner: _Runner, lab: Lab, shape: Shape, windows: int) -> None:
    deadline_s, asked = ENERGY_S * (windows + 2), {"device_name": _device(lab), "windows": windows}
    with lab.exclusive():
        found = runner.ask("energy", deadline_s, handle=runner.handle, **asked)
    if found is not None:
        runner.result.energy = Energy.from_json(found).per_token(shape.tokens).as_json()


def _floors(
    steps: Sequence[Step], ceilings: dict[str, Any] | None
) -> tuple[dict[str, tuple[float | None, str]], float | None, str]:
    """Per operator step (seconds, which ceiling); their sum; why there is no sum."""
    if ceilings is None:
        return {}, None, "no ceilings were measured"
    floors: dict[str, tuple[float | None, str]] = {}
    for step in steps:
        if step.problem:
            problem = registry.problem(step.problem)
            op = registry.op(problem.op)
            work = op.flops(problem), op.bytes(problem)
            floors[step.name] = probe.roof(ceilings, op.bound, *work, problem.precision)
    known = [seconds for seconds, _ in floors.values() if seconds is not None]
    missing = next((f"step {name}: {why}" for name, (seconds, why) in floors.items() if seconds is None), "")
    return floors, None if missing else sum(known), missing


def _pair(lo: float | None, hi: float | None) -> list[float] | None:
    return None if lo is None or hi is None else [lo, hi]


def _typical(passes: list[list[float]]) -> list[float]:
    """The steps of the pass whose total is the round's 25 % order statistic: they add up to what a pass takes."""
    return sorted(passes, key=sum)[math.ceil(len(passes) / 4) - 1]


def _summarise(
    runner: _Runner,
    steps: Sequence[Step],
    shape: Shape,
    floors: Mapping[str, tuple[float | None, str]],
    total: float | None,
    torch: _Runner | None,
) -> None:
    """Times, shares and rates from the rounds."""
    result = runner.result
    if runner.handle is None:
        return
    result.time_s, lo, hi = statistics.summary(result.rounds)
    result.time_ci_s = _pair(lo, hi)
    result.wall_s = sorted(runner.walls)[len(runner.walls) // 2] if runner.walls else None
    result.tokens_per_s = shape.tokens / result.time_s
    result.tflops = flops(list(steps)) / result.time_s / 1e12
    result.roof = None if total is None else total / result.time_s
    explained = 0.0
    for index, step in enumerate(result.steps):
        step.time_s, lo, hi = statistics.summary([[_typical(passes)[index]] for passes in runner.step_rounds])
        step.time_ci_s, step.share = _pair(lo, hi), step.time_s / result.time_s
        step.floor_s, step.floor_why = floors.get(step.name, (None, ""))
        explained += step.time_s
    result.gap_s = result.time_s - explained
    if torch is not None:
        result.ratio_to_torch, lo, hi = statistics.ratio(torch.result.rounds, result.rounds)
        result.ratio_ci = _pair(lo, hi)
