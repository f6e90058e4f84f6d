"""A Lab without workers: configs have a known cost, some fail, and every measuring is counted."""

from __future__ import annotations

import contextlib
import importlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from rooftune import registry
from rooftune.autotune.table import Table
from rooftune.autotune.tuner import TuneResult, tune
from rooftune.core import Config, Problem, Status
from rooftune.lab import Lab, Reply
from rooftune.registry import Impl
from rooftune.results.store import Log

AXES: dict[str, tuple[Any, ...]] = {"block_m": (16, 32, 64, 128), "num_warps": (1, 2, 4, 8), "unroll": (1, 2, 4)}
DEFAULT: Config = {"block_m": 16, "num_warps": 1, "unroll": 1}
PROBLEM = registry.problem("softmax[m=64,n=512,fp32]")
IMPL = registry.impl("softmax/torch")


def cost(config: Config) -> float:
    """Seconds: best at block_m=64, num_warps=4, unroll=2 (half the default's)."""
    steps = sum(abs(AXES[a].index(config[a]) - AXES[a].index(v)) for a, v in BEST.items())
    return 1e-3 * (1 + steps / 5)


BEST: Config = {"block_m": 64, "num_warps": 4, "unroll": 2}


class FakeLab:
    """The part of `Lab` that tuning uses.

    Args:
        cost: config -> seconds per call.
        fate: config -> the reply to `prepare` or `time` that ends it, or None.
        noise: relative deviation of a sample; `sleep_s` is slept per prepared config.
    """

    device, kind, threads = "cpu", "cpu", 1

    def __init__(
        self,
        cost: Callable[[Config], float] = cost,
        fate: Callable[[str, Config], Reply | None] = lambda verb, config: None,
        noise: float = 0.01,
        sleep_s: float = 0.0,
        axes: dict[str, tuple[Any, ...]] = AXES,
    ) -> None:
        self.cost, self.fate, self.noise, self.sleep_s, self.axes = cost, fate, noise, sleep_s, axes
        self.rng = random.Random(7)
        self.live: dict[int, Config] = {}
        self.most_live = 0
        self.serial = 0
        self.prepared: list[Config] = []
        self.thorough: list[Config] = []
        self.retired = 0
        self.calls: list[int] = []
        self.timings: list[dict[str, Any]] = []  # how each call was to be timed
        self.drift = 1.0

    @property
    def lab(self) -> Lab:
        return cast(Lab, self)

    def space(self, impl: Impl, problem: Problem, mode: str = "native") -> dict[str, Any]:
        names = list(self.axes)
        configs: list[Config] = [{}]
        for name in names:
            configs = [{**c, name: v} for c in configs for v in self.axes[name]]
        return {"axes": {a: list(v) for a, v in self.axes.items()}, "configs": configs, "default": dict(DEFAULT)}

    def prepare(self, impl: Impl, problem: Problem, config: Config, seed: int, thorough: bool = True) -> Reply:
        time.sleep(self.sleep_s)
        self.prepared.append(config)
        if thorough:
            self.thorough.append(config)
        if ended := self.fate("thorough" if thorough else "prepare", config):
            if ended.status in (Status.FAILED_CRASH, Status.TIMEOUT):
                self.live.clear()
            return ended
        self.serial += 1
        self.live[self.serial] = config
        self.most_live = max(self.most_live, len(self.live))
        return Reply(Status.OK, "", {"handle": self.serial, "build_s": 0.0, "error": {"rel_fro": 1e-7}})

    def time(self, impl: Impl, handle: int, seed: int, deadline_s: float = 60.0, **options: Any) -> Reply:
        config = self.live.get(handle)
        if config is None:
            return Reply(Status.FAILED_CRASH, "its worker is gone")
        self.calls.append(handle)
        self.timings.append(options)
        if ended := self.fate("time", config):
            if ended.status != Status.WRONG:  # only a wrong output leaves the worker alive
                self.live.clear()
            return ended
        self.drift *= 1.002  # the machine gets slower all the time: only paired ratios stay right
        base = self.cost(config) * self.drift
        return Reply(Status.OK, "", {"samples_s": [base * self.rng.lognormvariate(0, self.noise) for _ in range(5)]})

    def call(self, function: str, **arguments: Any) -> Any:
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(**arguments)

    def release(self, impl: Impl, handle: int) -> None:
        self.live.pop(handle, None)

    def retire(self, impl: Impl | None, mode: str = "native") -> None:
        self.retired += 1
        self.live.clear()

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        yield


HERE = {"kind": "cpu", "name": "test"}


def run(fake: FakeLab, path: Path, budget: str = "20", **options: Any) -> TuneResult:
    """Tune with the table beside the journal."""
    options = {"identity": HERE, "table": Table(path.with_name("tuned.json")), **options}
    return tune(fake.lab, IMPL, PROBLEM, budget, journal_path=path, **options)


def config_lines(path: Path) -> list[dict[str, Any]]:
    """The outcomes in a journal."""
    return [line["trial"] for line in Log(path).read()[0] if line["event"] == "config"]
