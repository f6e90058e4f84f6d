"""A competitor's declared space: is it one, and which configs does it have for a problem.

Configs travel as JSON between processes and into records, so a value that does not survive that (a tuple comes back
as a list, and then equals none of its axis) is refused where it is declared, not met later as another error.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rooftune import listing
from rooftune.core import Problem, Space, UsageError

LISTED = 20_000_000  # a space of more configs before its rules is drawn from: their places take 160 MB
COUNTED = 1_000_000  # most that are asked one by one, 4 us each, before a sample is drawn


class NoConfig(UsageError):
    """The rules leave a competitor no config for a problem: it is skipped there, as where its `build` refuses."""


def checked(space: Any) -> Space:
    """The space, if it is one.

    Raises:
        UsageError: what is wrong with it, and what would be right.
    """
    if not isinstance(space, Space):
        raise UsageError(f"SPACE is a {type(space).__name__}; write SPACE = Space(axes=...), from rooftune.core")
    axes: Any = space.axes  # whatever its author wrote
    where: Any = space.where
    if not isinstance(axes, Mapping):
        raise UsageError(f'SPACE: axes is a {type(axes).__name__}; write {{"block": (64, 128)}}')
    for axis, values in axes.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UsageError(f"SPACE: axis '{axis}' is {_short(values)}; write a tuple of its values")
        if not values:
            raise UsageError(f"SPACE: axis '{axis}' has no values")
        for value in values:
            if not _scalar(value):
                raise UsageError(
                    f"SPACE: axis '{axis}' has the value {_short(value)} of type {type(value).__name__}; values are "
                    "whole or finite numbers, words, True, False and None"
                )
    if isinstance(where, str) or not isinstance(where, Sequence) or not all(map(callable, where)):
        raise UsageError("SPACE: where is not a tuple of rules; write (lambda config, problem: ...,) with its comma")
    if space.entrants is not None and space.entrants not in space.axes:
        raise UsageError(f"SPACE: entrants names '{space.entrants}', which is no axis; known: {_names(space)}")
    if isinstance(space.default, Mapping):
        _check_default(space, space.default)
    elif not callable(space.default):
        raise UsageError("SPACE: default is neither a config nor a function of the problem")
    return space


def _check_default(space: Space, default: Mapping[str, Any]) -> None:
    """A default that is written out has a value of every axis: a slip in a name would else race another config. None at
    all stands for the first; rules are another matter, they may exclude it on one problem and not on the next."""
    for axis, value in default.items():
        if axis not in space.axes:
            raise UsageError(f"SPACE: default names '{axis}', which is no axis; known: {_names(space)}")
        if value not in space.axes[axis]:
            raise UsageError(f"SPACE: default {axis}={_short(value)} is none of {_short(tuple(space.axes[axis]))}")
    if default and (missing := [axis for axis in space.axes if axis not in default]):
        raise UsageError(f"SPACE: default has no value for {', '.join(missing)}")


def _scalar(value: Any) -> bool:
    return value is None or isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value))


def _short(value: Any) -> str:
    return f"{value!r:.60}"


def _names(space: Space) -> str:
    return ", ".join(map(str, space.axes)) or "none"


def described(space: Space, problem: Problem, limit: int, seed: int) -> dict[str, Any]:
    """The valid configs for a problem (a seeded sample of them above `limit`), and the default.

    `drawn` says of what the configs are a sample, and is empty where they are all there are.

    Raises:
        UsageError: no config is valid.
    """
    rng, drawn = random.Random(seed), ""
    if space.size > LISTED:
        samples = (space.sample(problem, rng) for _ in range(limit))
        configs = list({json.dumps(c): c for c in samples if c is not None}.values())
        drawn = f"drawn from {space.size:.3g} before the rules"
    else:
        places, exact = listing.candidates(space, problem)
        if not exact and limit < len(places) <= COUNTED:  # what its other rules forbid goes before it is counted
            places = np.array(list(listing.kept(space, problem, places)), dtype=np.int64)
            exact = True
        if len(places) > limit:
            drawn = f"drawn from {len(places):,}" + ("" if exact else " that some of the rules allow")
            places = places[sorted(rng.sample(range(len(places)), limit if exact else COUNTED))]
        configs = list(listing.spelled(space, problem, places))
        if len(configs) > limit:
            configs = rng.sample(configs, limit)
    return {
        "axes": {a: list(v) for a, v in space.axes.items()},
        "configs": configs,
        "default": space.default_for(problem, configs if drawn else None),
        "entrants": space.entrants,
        "drawn": drawn,
    }
