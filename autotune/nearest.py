"""Configs for shapes that were not tuned: a rule, and what it costs on shapes that it was not fitted on.

The rule: take what the nearest tuned shape decided for, if it is not farther than a radius; else the default.
Shapes are points of log2 sizes, one unit of distance is a factor of two in one size. The radius is fitted so
that no tuned shape would be slower than its default by its neighbours' configs; that claim is then tested on
each shape with a rule fitted on the others alone, and the rule is used only if it held everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rooftune.autotune.journal import Trial, canonical
from rooftune.core import Config, Problem
from rooftune.results import store

LEAST = 4  # shapes: one is held out, and a radius fitted on fewer than three others says nothing
SLOWER = 1.02  # a search's three rounds do not tell smaller losses from noise


@dataclass(frozen=True)
class Shape:
    """A tuned shape.

    Attributes:
        config: what its tuning decided for; the default if nothing was better.
        ratios: config -> time over the default's there, of every config measured there that ran.
        failed: configs that were tried there and have no time.
    """

    problem: Problem
    default: Config
    config: Config
    ratios: Mapping[str, float]
    failed: frozenset[str] = frozenset()

    @property
    def best(self) -> float:
        """The smallest ratio seen; the default's own is 1."""
        return min((1.0, *self.ratios.values()))

    @property
    def stays(self) -> bool:
        """The default was not beaten here."""
        return canonical(self.config) == canonical(self.default)

    def ratio(self, config: Config) -> float | None:
        """Time over the default's; a config that fails is replaced by the default. None: not measured."""
        key = canonical(config)
        return 1.0 if key in self.failed or key == canonical(self.default) else self.ratios.get(key)


def shape_of(problem: Problem, default: Config, config: Config, trials: Mapping[str, Trial]) -> Shape:
    """From what tuning left behind."""
    ratios = {key: t.ratio for key, t in trials.items() if t.ratio is not None}
    failed = frozenset(key for key, t in trials.items() if t.value is None)
    return Shape(problem, default, config, ratios, failed)


def distance(a: Problem, b: Problem) -> float:
    """Between two problems of one operator, in factors of two; infinite if flags or precision differ."""
    if (a.op, a.precision, a.flags) != (b.op, b.precision, b.flags):
        return math.inf
    return math.sqrt(sum(math.log2(a[dim] / size) ** 2 for dim, size in b.dims))


@dataclass(frozen=True)
class Rule:
    """A radius, the shapes it chooses from, and how it did on held-out shapes.

    Attributes:
        points: (problem, config); None: its default stays.
        regret: mean over held-out shapes of (time of the rule's choice over the best time seen there) - 1;
            `worst` is the largest.
        fallback: share of held-out shapes on which the rule falls back to the default.
        slower: share on which its choice was slower than the default.
        gain: smallest speed-up over the default on the held-out shapes where it chose; 1 if it never did.
    """

    impl: str
    radius: float
    points: tuple[tuple[str, Config | None], ...]
    regret: float
    worst: float
    fallback: float
    slower: float
    gain: float

    @property
    def sound(self) -> bool:
        """Never slower where it was tested."""
        return self.slower == 0.0

    def choose(self, problem: Problem) -> tuple[Config | None, str]:
        """(config, why) for a shape that was not tuned; None: the default."""
        near = min(self.points, key=lambda p: distance(problem, Problem.parse(p[0])), default=None)
        gap = math.inf if near is None else distance(problem, Problem.parse(near[0]))
        if near is None or gap > self.radius:
            return None, f"no tuned shape is within a factor of {2**self.radius:.2g}"
        if near[1] is None:
            return None, f"the default is not beaten at the nearest tuned shape, {near[0]}"
        return near[1], f"tuned at {near[0]}; on held-out shapes this rule gained at least {self.gain:.2f}x"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _pick(shape: Shape, others: Sequence[Shape], radius: float) -> Config:
    near = min(others, key=lambda o: distance(shape.problem, o.problem))
    if distance(shape.problem, near.problem) > radius or near.stays:
        return shape.default
    return near.config


def _left_out(shapes: Sequence[Shape], radius: float) -> list[float | None]:
    """Per shape the ratio of what the others would choose for it."""
    return [s.ratio(_pick(s, [o for o in shapes if o is not s], radius)) for s in shapes]


def _radius(shapes: Sequence[Shape]) -> float:
    """The radius with the least mean loss among those with which no shape gets slower; 0: always the default.

    A choice whose outcome is not on record counts as slower: nothing is claimed about it.
    """
    gaps = sorted({distance(a.problem, b.problem) for a in shapes for b in shapes if a is not b})
    best, least = 0.0, 0.0
    for radius in (gap for gap in gaps if math.isfinite(gap)):
        ratios = _left_out(shapes, radius)
        if any(r is None or r > SLOWER for r in ratios):
            continue
        loss = sum(math.log(r) for r in ratios if r)
        if loss < least:
            best, least = radius, loss
    return best


def fit(impl: str, shapes: Sequence[Shape]) -> Rule | None:
    """A rule fitted on all shapes, and its figures from rules fitted without the shape they are judged on.

    None with fewer than `LEAST` shapes.
    """
    if len(shapes) < LEAST:
        return None
    regrets: list[float] = []
    gains: list[float] = []
    fell = slower = 0
    for held in shapes:
        others = [o for o in shapes if o is not held]
        choice = _pick(held, others, _radius(others))
        ratio = held.ratio(choice)
        regrets.append((ratio if ratio is not None else SLOWER) / held.best - 1)
        slower += ratio is None or ratio > SLOWER
        if canonical(choice) == canonical(held.default):
            fell += 1
        elif ratio is not None:
            gains.append(1 / ratio)
    points = tuple((str(s.problem), None if s.stays else s.config) for s in shapes)
    count = len(shapes)
    return Rule(
        impl,
        _radius(shapes),
        points,
        sum(regrets) / count,
        max(regrets),
        fell / count,
        slower / count,
        min(gains, default=1.0),
    )


def told(rule: Rule) -> str:
    """What `tune` prints."""
    used = "used for shapes in between" if rule.sound and rule.radius else "not used"
    if not rule.radius:
        used += ": at no radius would neighbours' configs gain anything and make no tuned shape slower"
    elif not rule.sound:
        used += f": slower than the default on {rule.slower:.0%} of the held-out shapes"
    return (
        f"nearest shape, judged on {len(rule.points)} held-out shapes: expected regret {rule.regret:.1%} "
        f"(worst {rule.worst:.1%}), falls back to the default on {rule.fallback:.0%}; {used}"
    )


# --- on disk --------------------------------------------------------------------------------------------------------


class Rules:
    """The rules beside the tuned table, one log line each; the newest for a key counts.

    A rule's key is what a table entry's is: kernel source, toolchain, device, threads.
    """

    def __init__(self, path: Path) -> None:
        self.log = store.Log(path)

    def put(self, rule: Rule, key: Mapping[str, Any]) -> None:
        """Keep a rule, sound or not: one that is not takes an older one's place."""
        self.log.append({"kind": "rule", "schema": 1, "key": dict(key), "rule": rule.as_json()})

    def find(self, impl: str, problem: Problem, key: Mapping[str, Any]) -> Rule | None:
        """The rule for shapes like this one, here and now."""
        if not self.log.path.exists():
            return None
        for line in reversed(self.log.read()[0]):
            if line.get("kind") != "rule" or line.get("key") != dict(key) or line["rule"]["impl"] != impl:
                continue
            points = tuple((text, config) for text, config in line["rule"]["points"])
            if points and math.isfinite(distance(problem, Problem.parse(points[0][0]))):
                return Rule(**{**line["rule"], "points": points})
        return None
