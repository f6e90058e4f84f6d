"""Joules with their provenance: a figure is measured, with method, window, ticks and uncertainty, or `None`
with a reason. Zero joules does not exist: a counter that did not move is frozen or was watched too briefly.
`rooftune.metering` is the protocol that earns the figure, `rooftune.sensors` reads the meters.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from rooftune.core import Unavailable, UsageError

# Best first. `model` is an estimate and never stands in the field `joules`.
METHODS = (
    *("counter-aligned", "counter", "instant-integral", "rapl", "amd-counter", "external", "model", "unavailable"),
)
CODES = ("no-sensor", "vm-guest", "no-permission", "mig", "counter-frozen", "window-too-short", "off")


@dataclass(frozen=True)
class Energy:
    """Energy of one unit of work.

    Attributes:
        value: joules per `unit`, idle power included; None if not measured.
        unit: `J/call` or `J/token`.
        method: one of `METHODS`. `scope`: what was metered (`board`, `package+dram`).
        window_s: length of one window; `ticks`: counter ticks in the shortest window.
        u95_rel: half width of the 95 % interval over `value`: spread between windows, tick jitter.
        label: `measured`, `flagged` (the cross-check failed), `est.` (model) or `n/a`.
        reason, code: why there is no value, in words and as one of `CODES`.
        net: value without the idle power, or None with `net_reason`. `watts`: mean power under load.
        u_systematic: the sensor's own gain error; common to a board, so it cancels in ratios on it.
        cross_rel: counter over integrated instant power, minus 1; None if there is no second reading.
        windows: joules per unit of every window: raw data for ratios.
    """

    value: float | None
    unit: str = "J/call"
    method: str = "unavailable"
    scope: str = ""
    window_s: float | None = None
    ticks: int | None = None
    u95_rel: float | None = None
    label: str = "n/a"
    reason: str = ""
    code: str = ""
    net: float | None = None
    net_reason: str = ""
    watts: float | None = None
    idle_w: float | None = None
    u_systematic: float | None = None
    cross_rel: float | None = None
    windows: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if wrong := self._wrong():
            raise UsageError(f"energy: {wrong}")

    def _wrong(self) -> str:
        if self.method not in METHODS:
            return f"unknown method '{self.method}'; known: {', '.join(METHODS)}"
        if (self.value is None) != (self.method == "unavailable"):
            return f"value {self.value} with method '{self.method}'"
        if self.value is None:
            if not self.reason:
                return "no value and no reason"
            return "" if self.code in CODES else f"unknown reason code '{self.code}'; known: {', '.join(CODES)}"
        numbers = (self.value, self.net, self.u95_rel, self.window_s, self.watts, *self.windows)
        if not all(x is None or math.isfinite(x) for x in numbers):
            return "a figure is not finite"
        if self.value <= 0:
            return f"{self.value} J is not a measurement: the counter did not move"
        if (self.method == "model") != (self.label == "est."):
            return f"method '{self.method}' with label '{self.label}': estimates, and only they, are labelled est."
        return ""

    @classmethod
    def unavailable(cls, reason: str, code: str = "no-sensor", unit: str = "J/call") -> Energy:
        """Not measured, and why."""
        return cls(None, unit=unit, reason=reason, code=code)

    @property
    def joules(self) -> float | None:
        """The value if it was measured: never an estimate."""
        return None if self.method == "model" else self.value

    def as_json(self) -> dict[str, Any]:
        """Plain data. `joules` holds measurements alone, estimates stand in `joules_model`."""
        data = asdict(self)
        value = data.pop("value")
        data["windows"] = list(self.windows)
        return {"joules": self.joules, "joules_model": value if self.method == "model" else None, **data}

    @classmethod
    def from_json(cls, data: Any) -> Energy:
        """Read what `as_json` wrote; keys of newer versions are dropped.

        Raises:
            UsageError: not such an object, or one that claims what it cannot have measured.
        """
        if not isinstance(data, dict) or "method" not in data or "joules" not in data:
            raise UsageError("energy: needs the fields joules and method")
        if data["joules"] is not None and data["method"] == "model":
            raise UsageError("energy: an estimate in the field joules")
        known = {f.name for f in fields(cls)}
        kept = {k: v for k, v in data.items() if k in known}
        value = data["joules"] if data["method"] != "model" else data.get("joules_model")
        numbers = ("window_s", "ticks", "u95_rel", "net", "watts", "idle_w", "u_systematic", "cross_rel")
        for key, number in (("joules", value), *((k, kept.get(k)) for k in numbers)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int | float)):
                raise UsageError(f"energy: field '{key}' is {number!r}, expected a number or null")
        try:
            kept["windows"] = tuple(float(x) for x in data.get("windows") or ())
        except (TypeError, ValueError) as error:
            raise UsageError("energy: field 'windows' is not a list of numbers") from error
        return cls(value=None if value is None else float(value), **{k: v for k, v in kept.items() if k != "value"})

    def per_token(self, tokens: int) -> Energy:
        """The same, for one of the tokens that a call handles."""
        if self.value is None:
            return Energy.unavailable(self.reason, self.code, "J/token")
        mine = {f.name: getattr(self, f.name) for f in fields(self)} | {"unit": "J/token"}
        mine["value"] = self.value / tokens
        mine["net"] = None if self.net is None else self.net / tokens
        mine["windows"] = tuple(w / tokens for w in self.windows)
        return Energy(**mine)


def refused(error: Unavailable) -> Energy:
    """The energy that an error of the protocol stands for: its text is `code: reason`."""
    code, _, reason = str(error).partition(": ")
    return Energy.unavailable(reason, code) if code in CODES else Energy.unavailable(str(error))
