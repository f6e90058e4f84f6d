"""The vocabulary of rooftune: problem, operator, competitor, space, candidate, status, evidence.

Standard library only: everything here is imported by `bench.py --help` and by every worker.
"""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

Config = dict[str, Any]  # axis name -> value; JSON scalars only


class ExitCode(IntEnum):
    """What `bench.py` returns to the shell."""

    OK = 0
    REGRESSION = 1  # a confirmed regression, or a wrong result
    USAGE = 2  # bad arguments or bad data
    INCONCLUSIVE = 3  # the data cannot decide, or is not comparable
    NOTHING_RAN = 4  # no competitor could run here
    INTERRUPTED = 130  # Ctrl-C; the journal is kept


class RooftuneError(Exception):
    """An error the user can act on: its text is the one line that is printed."""


class UsageError(RooftuneError):
    """Bad argument or bad data: exit code 2."""


class Unavailable(RooftuneError):
    """Something is not on this machine: a device, a package, a sensor."""


class CompileError(RooftuneError):
    """A compiler refuses a competitor's source: a failure of the competitor, not a reason to leave it out."""


def unknown(what: str, name: str, known: Sequence[str], hint: str = "") -> UsageError:
    """The one-line error for a name that does not exist: what, the known values, the next command."""
    tail = f"; {hint}" if hint else ""
    return UsageError(f"unknown {what} '{name}'; known: {', '.join(sorted(known)) or 'none'}{tail}")


def cache_folder(kind: str) -> Path:
    """Where what can be made again lies: below $ROOFTUNE_CACHE_DIR, else below rooftune in the user's cache folder."""
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rooftune"
    return Path(os.environ.get("ROOFTUNE_CACHE_DIR") or users) / kind


class Status(StrEnum):
    """How a candidate ended. Only `OK` ever carries a time."""

    OK = "ok"
    WRONG = "wrong"
    FAILED_COMPILE = "failed(compile)"
    FAILED_LAUNCH = "failed(launch)"
    FAILED_CRASH = "failed(crash)"
    TIMEOUT = "timeout"
    SKIPPED = "skipped"


class Evidence(StrEnum):
    """Where a result comes from. A report never mixes them in one column."""

    MEASURED = "measured"  # ran natively on the named device
    EMULATED = "emulated"  # the same kernel on a CPU: right or wrong, never a time
    COMPILED = "compiled"  # machine code was made and read; nothing ran


@dataclass(frozen=True)
class Precision:
    """A number format for inputs and outputs. Names of dtypes are torch's.

    `u_out` is the unit roundoff of the output format, `u_in` that of any rounding of operands on the
    way in (tf32), `tiny` the largest absolute error that flushing subnormals may cause, `rel_fro`
    the relative Frobenius error a right kernel stays below (1.5 to 2 times that of rounding alone).
    """

    name: str
    storage: str
    out: str
    bytes_in: int
    bytes_out: int
    u_out: float
    u_in: float
    tiny: float
    rel_fro: float

    @property
    def exact(self) -> bool:
        """Integer results have no rounding: they must agree bit for bit."""
        return self.rel_fro == 0.0


PRECISIONS: dict[str, Precision] = {
    p.name: p
    for p in (
        Precision("fp32", "float32", "float32", 4, 4, 2**-24, 0.0, 2**-126, 2e-6),
        Precision("tf32", "float32", "float32", 4, 4, 2**-24, 2**-11, 2**-126, 6e-4),
        Precision("fp16", "float16", "float16", 2, 2, 2**-11, 0.0, 2**-24, 5e-4),
        Precision("bf16", "bfloat16", "bfloat16", 2, 2, 2**-8, 0.0, 2**-126, 2.5e-3),
        Precision("fp8", "float8_e4m3fn", "bfloat16", 1, 2, 2**-8, 0.0, 2**-126, 1e-2),
        Precision("int8", "int8", "int32", 1, 4, 0.0, 0.0, 0.0, 0.0),
    )
}


@dataclass(frozen=True)
class Tolerance:
    """Error model of one problem.

    A value passes if ``|out - ref| <= c * (u_out*|ref| + u_in*scale_in + u_acc*growth*scale_acc + tiny)``
    with the scales of the operator's `Reference`; on N(0,1) inputs the whole must also have a relative
    Frobenius error below `rel_fro`.
    """

    rel_fro: float
    u_out: float
    u_in: float
    u_acc: float
    growth: float
    tiny: float
    c: float = 4.0


_NAME = re.compile(r"[a-z][a-z0-9_]*")
_SUFFIX = {"k": 1000, "ki": 1024, "m": 1000**2, "mi": 1024**2, "g": 1000**3, "gi": 1024**3}


def parse_count(text: str, what: str) -> int:
    """A positive whole number; `4k` is 4000 and `4Ki` is 4096.

    Raises:
        UsageError: not a number, zero or negative.
    """
    match = re.fullmatch(r"\s*(-?\d+)([kKmMgG]i?)?\s*", text)
    if not match:
        raise UsageError(f"{what}: '{text}' is not a whole number; write for example 4096 or 4Ki")
    value = int(match[1]) * _SUFFIX.get((match[2] or "").lower(), 1)
    if value <= 0:
        raise UsageError(f"{what} must be positive, not {text.strip()}")
    return value


@dataclass(frozen=True)
class Problem:
    """What is to be computed: operator, sizes, flags, precision. Hashable, printable, parseable.

    >>> str(Problem.parse("gemm[m=64, n=32, k=16, bf16]"))
    'gemm[m=64,n=32,k=16,bf16]'
    """

    op: str
    dims: tuple[tuple[str, int], ...]
    precision: str
    flags: tuple[tuple[str, str], ...] = ()  # sorted; a bare flag such as `causal` has the value "1"

    @classmethod
    def make(cls, op: str, precision: str, flags: Mapping[str, str] | None = None, **dims: int) -> Problem:
        """Build from keywords, in the given order of dims."""
        return cls(op, tuple(dims.items()), precision, tuple(sorted((flags or {}).items())))

    @classmethod
    def parse(cls, text: str) -> Problem:
        """Read the printed form. Sizes and flags are checked by `Op.problem`, which knows the names.

        Raises:
            UsageError: the text has not the form ``op[dim=size,...,flag,precision]``.
        """
        match = re.fullmatch(r"\s*([a-z][a-z0-9_]*)\[([^\[\]]*)\]\s*", text)
        if not match:
            raise UsageError(f"'{text}' is not a problem; write for example gemm[m=4096,n=4096,k=4096,bf16]")
        dims: dict[str, int] = {}
        flags: dict[str, str] = {}
        precision = ""
        for part in filter(None, (p.strip() for p in match[2].split(","))):
            key, eq, value = (s.strip() for s in part.partition("="))
            if key in dims or key in flags or (precision and key in PRECISIONS):
                raise UsageError(f"'{part}' in '{text}': that was said before")
            if not eq and key in PRECISIONS:
                precision = key
            elif not _NAME.fullmatch(key):
                raise UsageError(f"'{part}' in '{text}' is neither a size, a flag nor a precision")
            elif not eq:
                flags[key] = "1"
            elif re.match(r"-?\d", value):
                dims[key] = parse_count(value, f"{key} in '{text}'")
            else:
                flags[key] = value
        return cls(match[1], tuple(dims.items()), precision or "fp32", tuple(sorted(flags.items())))

    def __str__(self) -> str:
        return f"{self.op}[{self.shape},{self.precision}]"

    @property
    def shape(self) -> str:
        """Sizes and flags without operator and precision: `m=64,n=64,k=64,transpose=nt`."""
        return ",".join([*(f"{k}={v}" for k, v in self.dims), *(k if v == "1" else f"{k}={v}" for k, v in self.flags)])

    def __getitem__(self, dim: str) -> int:
        for key, value in self.dims:
            if key == dim:
                return value
        raise KeyError(f"{self} has no size '{dim}'")

    def flag(self, name: str, default: str = "") -> str:
        """The value of a flag, or the default where it is not set."""
        return dict(self.flags).get(name, default)

    def replace(self, precision: str | None = None, **dims: int) -> Problem:
        """The same problem with other sizes or another precision."""
        new = tuple((k, dims.get(k, v)) for k, v in self.dims)
        return Problem(self.op, new, precision or self.precision, self.flags)


@dataclass(frozen=True)
class Reference:
    """The right answer for some rows of an output, in float64, with the scales of its error.

    All tensors are [rows, columns] or broadcast to it: the output flattened to two dimensions.
    """

    value: Any
    scale_in: Any  # what an error of one operand rounding is relative to
    scale_acc: Any  # what an error of the arithmetic inside is relative to


@dataclass(frozen=True)
class Op:
    """An operator: what is computed, how much work it is, and what counts as right.

    `dims` names the sizes in printing order; `defaults` gives sizes that may be left out, from those
    present; `flags` maps a flag to its legal values (the first is the default and is never printed).
    `inputs(problem, generator, device, kind)` -> tensors; kind is "normal" or one of `adversarial`
    (none at all: that kind has no agreed answer on this problem).
    `output(problem)` -> (shape, torch dtype name). `reference(problem, inputs, rows)` -> `Reference`,
    rows being a list of row numbers of the flattened output, or None for all.
    `flops`, `bytes`: the model work (each operand moved once); TFLOP/s, GB/s and the roof derive from it.
    `ragged(problem)`: small odd-sized relatives for the correctness check. `small(precision)`: sizes
    an emulator finishes in about a second.
    `parts(problem)`: an operator with several results (a backward pass) writes them into the one output,
    below one another as rows of its last dimension; name -> number of rows. They are sampled and judged
    one by one. So a kernel still gets one output, and guards, poison and timing stay as they are.
    `stored(problem)`: parts whose values have another format than the output, name -> torch dtype name. Their bits
    fill whole rows of it, and what is behind the last value is 0.
    """

    name: str
    summary: str
    dims: tuple[str, ...]
    precisions: tuple[str, ...]
    bound: str  # "compute" or "memory": which roof a large instance meets
    inputs: Callable[..., tuple[Any, ...]]
    output: Callable[[Problem], tuple[tuple[int, ...], str]]
    reference: Callable[..., Reference]
    flops: Callable[[Problem], float]
    bytes: Callable[[Problem], float]
    tolerance: Callable[[Problem], Tolerance]
    ragged: Callable[[Problem], Sequence[Problem]]
    small: Callable[[str], Sequence[Problem]]
    adversarial: tuple[str, ...] = ()
    defaults: Mapping[str, Callable[[Mapping[str, int]], int]] = field(default_factory=dict)
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Callable[[Problem], Mapping[str, int]] = lambda problem: {}
    stored: Callable[[Problem], Mapping[str, str]] = lambda problem: {}

    def problem(self, given: Problem) -> Problem:
        """Check names, fill defaults, and put sizes in order.

        Raises:
            UsageError: a size is missing or unknown, a flag or precision is not one of the operator's.
        """
        sizes = dict(given.dims)
        for dim, rule in self.defaults.items():
            sizes.setdefault(dim, rule(sizes)) if all(d in sizes for d in self.dims if d not in self.defaults) else None
        for dim in sizes:
            if dim not in self.dims:
                raise unknown(f"size of {self.name}", dim, self.dims)
            if sizes[dim] <= 0:
                raise UsageError(f"{dim} in '{given}' must be positive, not {sizes[dim]}")
        if missing := [d for d in self.dims if d not in sizes]:
            raise UsageError(f"{given.op}: size {', '.join(missing)} missing; it needs {', '.join(self.dims)}")
        for flag, value in given.flags:
            if flag not in self.flags:
                raise unknown(f"flag of {self.name}", flag, list(self.flags))
            if value not in self.flags[flag]:
                raise unknown(f"{flag} of {self.name}", value, self.flags[flag])
        if given.precision not in self.precisions:
            raise unknown(f"precision of {self.name}", given.precision, self.precisions)
        kept = tuple((k, v) for k, v in sorted(given.flags) if v != self.flags[k][0])
        return Problem(self.name, tuple((d, sizes[d]) for d in self.dims), given.precision, kept)

    def memory_bytes(self, problem: Problem) -> float:
        """What one call keeps in memory at least: every operand once."""
        return self.bytes(problem)


Rule = Callable[[Config, Problem], bool]


@dataclass(frozen=True)
class Space:
    """The configs of a competitor: axes with their values, rules that make a config valid.

    `default` is a config or a function of the problem. `entrants` names an axis each of whose values
    enters the race by itself (the torch baseline's `call`). Rules read (config, problem).
    """

    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    where: tuple[Rule, ...] = ()
    default: Config | Callable[[Problem], Config] = field(default_factory=dict)
    entrants: str | None = None

    def valid(self, config: Config, problem: Problem) -> bool:
        """True if the config has exactly our axes, legal values, and breaks no rule."""
        if set(config) != set(self.axes) or any(config[a] not in v for a, v in self.axes.items()):
            return False
        return all(rule(config, problem) for rule in self.where)

    def configs(self, problem: Problem) -> Iterator[Config]:
        """Every valid config, in the order of `itertools.product`."""
        from rooftune import listing  # needs numpy

        return listing.listed(self, problem)

    def default_for(self, problem: Problem, among: Iterable[Config] | None = None) -> Config:
        """The untuned config. If the declared default breaks a rule here, the config nearest to it: of all valid ones,
        or `among` some."""
        config = dict(self.default(problem) if callable(self.default) else self.default)
        if self.valid(config, problem):
            return config

        def distance(other: Config) -> int:
            return sum(abs(v.index(other[a]) - v.index(config[a])) for a, v in self.axes.items() if config.get(a) in v)

        best = min(self.configs(problem) if among is None else among, key=distance, default=None)
        if best is None:
            raise UsageError(f"no valid config for {problem}: every one breaks a rule of the space")
        return best

    def sample(self, problem: Problem, rng: random.Random, tries: int = 1000) -> Config | None:
        """A random valid config, or None if none was found."""
        for _ in range(tries):
            config = {axis: rng.choice(values) for axis, values in self.axes.items()}
            if all(rule(config, problem) for rule in self.where):
                return config
        return None

    @cached_property
    def size(self) -> int:
        """Number of configs before the rules."""
        return math.prod(len(values) for values in self.axes.values())


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes from a multiprocessor; from the machine code, nothing ran.

    `tensor_core` lists the matrix instructions found (HMMA, HGMMA, IMMA, mma.sync...), empty if none.
    `binary` stands for the machine code and its grid: two configs with the same one are the same kernel. Empty
    where the grid is not known to what compiles.
    """

    arch: str
    registers: int | None
    spill_bytes: int | None
    shared_bytes: int | None
    tensor_core: tuple[str, ...] = ()
    toolchain: str = ""
    threads: int | None = None
    binary: str = ""


@dataclass(frozen=True)
class Candidate:
    """A competitor with a config: one entrant of a race."""

    impl: str  # "gemm/numba"
    config: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, impl: str, config: Config) -> Candidate:
        """From a config dict."""
        return cls(impl, tuple(config.items()))

    def __str__(self) -> str:
        return self.impl + (f"({', '.join(f'{k}={v}' for k, v in self.config)})" if self.config else "")
