"""What a user grants a search: a budget, and constraints on configs."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from rooftune.autotune.journal import Journal
from rooftune.core import Config, UsageError, parse_count


@dataclass(frozen=True)
class Budget:
    """How long a search goes on: seconds of measuring, configs, or what ends first; what an earlier run spent counts.

    The final comparison comes on top. A time budget is looked at between two configs.
    """

    seconds: float | None = None
    configs: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read `60s`, `2m`, `1h`, `40` or `40 configs`.

        Raises:
            UsageError: anything else, zero, or negative.
        """
        form = text.strip().lower()
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)", form):
            unit = {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2][0]]
            if float(match[1]) > 0:
                return cls(seconds=float(match[1]) * unit)
        elif match := re.fullmatch(r"(\d+)\s*(?:configs?)?", form):
            return cls(configs=parse_count(match[1], "the budget"))
        raise UsageError(f"budget '{text}' is not understood; write 60s, 2m, 1h or 40 (configs)")

    def left(self, journal: Journal) -> bool:
        """True while there is something to spend."""
        if self.configs is not None and len(journal.trials) >= self.configs:
            return False
        return self.seconds is None or journal.spent_s < self.seconds

    def __str__(self) -> str:
        parts = [f"{self.configs} configs"] if self.configs is not None else []
        parts += [f"{self.seconds:g} s"] if self.seconds is not None else []
        return " or ".join(parts) or "all configs"


# How hard to look, for each problem and competitor: a first impression, what a table for production deserves, and
# every config there is.
EFFORTS = {"quick": Budget(30.0, 40), "full": Budget(600.0, 400), "exhaustive": Budget()}


def constraint(text: str) -> Callable[[Config], bool]:
    """A rule for configs from `block_m<=64`, `num_warps=4` or `call!=sdpa`; a config without that axis passes.

    Raises:
        UsageError: no comparison of an axis with a value.
    """
    match = re.fullmatch(r"\s*([a-z]\w*)\s*(<=|>=|==|!=|=|<|>)\s*(\S+)\s*", text)
    if not match:
        raise UsageError(f"constraint '{text}' is not understood; write for example block_m<=64")
    axis, sign, given = match[1], match[2], match[3]
    compare = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "!=": operator.ne}
    number = float(given) if re.fullmatch(r"-?\d+(\.\d+)?", given) else None
    exact = sign in ("=", "==", "!=")
    if number is None and not exact:
        raise UsageError(f"constraint '{text}': {given} is not a number, so {sign} means nothing")

    def rule(config: Config) -> bool:
        if axis not in config:
            return True
        value = config[axis]
        if number is not None and isinstance(value, int | float):
            return bool(compare.get(sign, operator.eq)(value, number))
        return exact and bool(compare.get(sign, operator.eq)(str(value).lower(), given.lower()))

    return rule
