"""Inside a worker: builds one composition of a layer, checks it against float64, times it whole and by step.

The parent calls the functions at the end through the worker's verb `call`; a composition lives in
`_blocks` until the process ends. Everything is allocated before anything runs.
"""

from __future__ import annotations

import itertools
import os
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

from rooftune import check, registry, screen
from rooftune.core import RooftuneError, Status
from rooftune.fence import Fenced
from rooftune.suites.block_math import Glue, Tensors, dtype, reference, weights
from rooftune.suites.block_plan import ROW_FACTOR, Shape, Step, error_bound, plan

SAMPLED_ROWS = 16  # of each operator's result, judged by its own error model with those that look most wrong
HOLD_CYCLES = 4_000_000  # some 2 ms of a GPU: all launches of a pass are queued before its first event


class StepError(Exception):
    """A step cannot be built or run; `status` says how it ended."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def _failed(step: Step, choice: dict[str, Any], error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    place = f"{os.path.basename(where.filename)}:{where.lineno}"
    return f"step {step.name}: {choice['impl']}: {type(error).__name__}: {text} ({place})"


class Block:
    """One composition: tensors, and one call per step."""

    def __init__(self, shape: Shape, choices: dict[str, Any], seed: int, device: str) -> None:
        import torch

        torch.set_grad_enabled(False)
        self.shape, self.seed, self.device = shape, seed, device
        self.steps = plan(shape)
        self.fences: dict[str, Fenced] = {}
        self.tensors: Tensors = weights(shape, self.steps, seed, device)
        self.pool = torch.randn(
            2 * shape.tokens * shape.sizes.d, generator=check.generator(device, seed + 1), device=device
        ).to(dtype(shape))
        self.tensors["x"] = torch.empty(shape.tokens, shape.sizes.d, dtype=dtype(shape), device=device)
        glue = Glue(shape, device)
        self.calls: list[Callable[[], None]] = []
        for step in self.steps:
            self.calls.append(self._operator(step, choices[step.name]) if step.problem else self._glue(step, glue))

    def _operator(self, step: Step, choice: dict[str, Any]) -> Callable[[], None]:
        problem = registry.problem(step.problem)
        module = registry.impl(choice["impl"]).load()
        config = choice["config"] if choice["config"] is not None else module.SPACE.default_for(problem)
        choice["config"] = config
        try:
            run = module.build(problem, config)
        except RooftuneError as error:
            raise StepError(Status.SKIPPED, f"step {step.name}: {choice['impl']}: {error}") from error
        except Exception as error:
            raise StepError(Status.FAILED_COMPILE, _failed(step, choice, error)) from error
        fence = Fenced(*registry.op(problem.op).output(problem), self.device)
        self.fences[step.name] = fence
        self.tensors[step.name] = fence.tensor
        tensors, name, reads = self.tensors, step.name, step.reads

        def call() -> None:  # a call that can only allocate returns its result, and the next step reads that
            result = run(fence.tensor, *(tensors[source] for source in reads))
            tensors[name] = fence.tensor if result is None else result

        return call

    def _glue(self, step: Step, glue: Glue) -> Callable[[], None]:
        import torch

        for name, size in step.writes:
            self.tensors[name] = torch.empty(size, dtype=dtype(self.shape), device=self.device)
            if f"past_{name}" in self.tensors:
                self.tensors[name][:, :, : self.shape.seq].copy_(self.tensors[f"past_{name}"])
        function = getattr(glue, step.name)
        tensors, names = self.tensors, (*step.reads, *(name for name, _ in step.writes))
        return lambda: function(*(tensors[name] for name in names))

    @property
    def out(self) -> Any:
        """The layer's result, as the last pass left it."""
        return self.tensors[self.steps[-1].writes[0][0]]

    def run(self) -> None:
        """One pass."""
        for call in self.calls:
            call()

    def fill(self, seed: int) -> None:
        """Other contents of the input, at copy speed, and poisoned results."""
        x = self.tensors["x"]
        start = random.Random(seed).randrange(x.numel())
        x.view(-1).copy_(self.pool[start : start + x.numel()])
        for fence in self.fences.values():
            fence.poison()

    def sync(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def verify(self, seed: int, thorough: bool = True) -> tuple[str, dict[str, Any]]:
        """Judge the last pass. Returns what is wrong (or "") with the first step that is, and the figures.

        `thorough` judges every operator by itself too; without, only to name the one that spoilt the layer.
        """
        self.sync()
        bound, model = error_bound(self.shape, self.steps)
        for name, fence in self.fences.items():
            if damage := fence.damage():
                return f"step {name} {damage}", {"bound": bound, "model": model}
        pristine = weights(self.shape, self.steps, self.seed, self.device)
        want = reference(self.shape, pristine, self.tensors["x"])
        diff = self.out.double() - want
        figures: dict[str, Any] = {"bound": bound, "model": model, "row_bound": ROW_FACTOR * bound}
        holes = int((~diff.isfinite()).sum())
        if not holes:
            figures["rel_fro"] = float(diff.norm() / want.norm())
            figures["worst_row"] = float((diff.norm(dim=-1) / want.norm(dim=-1)).max())
        wrong = f"{holes} of {diff.numel()} values never written or not finite" if holes else ""
        for key, limit in (("rel_fro", bound), ("worst_row", ROW_FACTOR * bound)):
            if not wrong and not figures[key] <= limit:
                wrong = f"relative error {figures[key]:.2e} ({key}) is above {limit:.1e}"
        if not wrong and not thorough:
            return "", figures
        step, figures["worst_step"] = self.blame(seed)
        if wrong:
            return f"{wrong}; {step or 'every step is right on what it was given'}", figures
        return step, figures

    def blame(self, seed: int) -> tuple[str, float | None]:
        """The first operator whose result is wrong for the inputs it got, and the worst error found.

        The error is in units of what the operator's own model allows, on sampled rows.
        """
        worst = 0.0
        for step in self.steps:
            if not step.problem:
                continue
            problem = registry.problem(step.problem)
            got = self.tensors[step.name].detach()
            got = got.reshape(-1, got.shape[-1])
            op, inputs = registry.op(problem.op), [self.tensors[name].detach() for name in step.reads]
            rows = screen.sample_rows(got.shape[0], seed, SAMPLED_ROWS)
            rows = sorted({*rows, *screen.suspects(op, problem, got, inputs)})
            where = check.place(inputs, self.device)
            wrong, figures = check.compare(op, problem, got, inputs, rows, "block", where)
            if wrong:
                return f"step {step.name}: {wrong}", figures.get("max_error")
            worst = max(worst, figures["max_error"])
        return "", worst

    def marked(self, passes: int, clock: str) -> list[list[float]]:
        """Seconds of every step in passes of their own: [passes][steps], in the cache state of a real pass."""
        return [self._marked_gpu() if self.device != "cpu" else self._marked_cpu(clock) for _ in range(passes)]

    def _marked_cpu(self, clock: str) -> list[float]:
        from rooftune.clock import CLOCKS

        now = CLOCKS[clock]
        marks = [now()]
        for call in self.calls:
            call()
            marks.append(now())
        return [max(1, b - a) / 1e9 for a, b in itertools.pairwise(marks)]

    def _marked_gpu(self) -> list[float]:
        """Events between the steps, everything queued behind a kernel that holds the stream."""
        import torch

        cuda: Any = torch.cuda
        events = [cuda.Event(enable_timing=True) for _ in range(len(self.calls) + 1)]
        cuda.synchronize()
        cuda._sleep(HOLD_CYCLES)
        events[0].record()
        for call, event in zip(self.calls, events[1:], strict=True):
            call()
            event.record()
        cuda.synchronize()
        return [max(1e-9, a.elapsed_time(b) / 1e3) for a, b in itertools.pairwise(events)]


_blocks: dict[int, Block] = {}


def prepare(shape: dict[str, Any], choices: dict[str, Any], seed: int, device: str) -> dict[str, Any]:
    """Build a composition, run it once and check it.

    Args:
        shape: the fields of a `Shape`. choices: step name -> {"impl": key, "config": dict or None}.

    Returns:
        `status`, `reason`, `error` (figures of the check), `configs` (step name -> what was used),
        `build_s`, and `handle` if it is right.
    """
    import torch

    torch.set_num_threads(int(os.environ.get("ROOFTUNE_THREADS", "1")))
    if device != "cpu":
        torch.cuda.set_device(device)
    begin = time.perf_counter()
    try:
        block = Block(Shape(**shape), choices, seed, device)
        built_s = time.perf_counter() - begin
        block.fill(seed)
        _pass(block, choices)
    except StepError as error:
        return {"status": str(error.status), "reason": str(error)}
    wrong, figures = block.verify(seed)
    reply: dict[str, Any] = {"status": str(Status.WRONG if wrong else Status.OK), "reason": wrong, "error": figures}
    reply |= {"build_s": built_s, "configs": {name: choice["config"] for name, choice in choices.items()}}
    if not wrong:
        reply["handle"] = len(_blocks)
        _blocks[len(_blocks)] = block
    return reply


def _pass(block: Block, choices: dict[str, Any]) -> None:
    """The first pass, step by step, so that what fails has a name."""
    for step, call in zip(block.steps, block.calls, strict=True):
        try:
            call()
            block.sync()
        except Exception as error:
            choice = choices.get(step.name, {"impl": "glue"})
            raise StepError(Status.FAILED_LAUNCH, _failed(step, choice, error)) from error


def measure(
    handle: int, seed: int, samples: int, min_sample_s: float, cache: str, clock: str, verify: bool
) -> dict[str, Any]:
    """One round on other contents of the input: whole passes, then passes with a time between the steps.

    Returns:
        `status`, `reason`, `samples_s` (seconds a pass), `steps_s` [passes][steps], `wall_s`, `notes`.
    """
    from rooftune.clock import time_calls

    block = _blocks[handle]
    block.fill(seed)
    timing = time_calls(block.run, [()], block.device, samples, min_sample_s, cache, clock)
    steps_s = block.marked(samples, clock)
    if verify:
        wrong, _ = block.verify(seed, thorough=False)
        if wrong:
            return {"status": str(Status.WRONG), "reason": f"output of a timed pass: {wrong}"}
    reply = {"status": str(Status.OK), "reason": "", "samples_s": timing.samples_s, "steps_s": steps_s}
    return reply | {"wall_s": timing.wall_s, "notes": timing.notes}


def energy(handle: int, device_name: str, windows: int) -> dict[str, Any]:
    """Joules per pass over so many windows of 5 s (0: only says whether there is a meter), as `Energy` prints itself.

    Args:
        device_name: ours (`cpu`, `cuda:0`, `rocm:1`), by which the meter is found.
    """
    from rooftune import device, metering, sensors
    from rooftune.energy import Energy

    block = _blocks[handle]
    sensor = sensors.find_sensor(device.find(device_name))
    if isinstance(sensor, Energy):
        return sensor.as_json()
    if not windows:
        return Energy.unavailable("not asked for; add --energy", "off").as_json()
    return metering.measure(sensor, metering.load(block.run, [()], block.device), windows=windows).as_json()
