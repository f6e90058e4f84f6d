"""Which problems: a suite is a file in this folder with a literal `PROBLEMS`, and nothing else lists it.

A suite may have `GOALS = {op or template: {precision: ratio to torch}}`; a template goes before its operator.

`PROBLEMS = {"cpu": {op: (template, ...)}, "cuda": {...}}`; a template is a problem without its precision,
such as `gemm[m=512,n=512,k=512]`. The CPU has lists of its own: a call should take milliseconds there too.
ROCm devices use the list of `cuda`.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rooftune import registry
from rooftune.core import PRECISIONS, Problem, UsageError, unknown

HERE = Path(__file__).parent
Lists = dict[str, dict[str, tuple[str, ...]]]  # device kind -> operator -> templates
Goals = dict[str, dict[str, float]]  # operator or template -> precision -> ratio to torch


@cache
def _read(path: Path) -> tuple[Lists, str, Goals]:
    """`PROBLEMS`, the first docstring line and `GOALS` of a file, without running it; no suite: ({}, "", {})."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as Python: {error}") from error
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    found: dict[str, Any] = {}
    for node in tree.body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
        if isinstance(node, ast.Assign) and name in ("PROBLEMS", "GOALS"):
            try:
                found[name] = ast.literal_eval(node.value)
            except ValueError as error:
                raise UsageError(f"{path}: {name} must be a literal: listing imports nothing") from error
    return (found["PROBLEMS"], summary, found.get("GOALS", {})) if "PROBLEMS" in found else ({}, "", {})


def names() -> tuple[str, ...]:
    """The suites, in alphabetical order; `cpu_goals.py` is called `cpu-goals`."""
    return tuple(sorted(path.stem.replace("_", "-") for path in HERE.glob("*.py") if _read(path)[0]))


def summary(suite: str) -> str:
    """One line about a suite.

    Raises:
        UsageError: there is no such suite.
    """
    return _read(_path(suite))[1]


def operators(suite: str, device_kind: str) -> list[str]:
    """The operators that a suite has problems of, in its order.

    Raises:
        UsageError: there is no such suite.
    """
    return list(_listed(suite, device_kind))


def _listed(suite: str, device_kind: str) -> dict[str, tuple[str, ...]]:
    lists = _read(_path(suite))[0]
    return lists.get(device_kind, lists.get("cuda" if device_kind != "cpu" else "cpu", {}))


def _path(suite: str) -> Path:
    if suite not in names():
        raise unknown("suite", suite, names(), f"a suite is a file in {HERE.name}/")
    return HERE / f"{suite.replace('-', '_')}.py"


def problems(suite: str, ops: Sequence[str], precisions: Sequence[str], device_kind: str) -> list[Problem]:
    """The problems of a suite: by operator in the order given, then as listed, each in every precision.

    A precision that an operator does not have (tf32 softmax) is left out there.

    Raises:
        UsageError: unknown suite, operator or precision, or nothing is left.
    """
    for name in precisions:
        if name not in PRECISIONS:
            raise unknown("precision", name, list(PRECISIONS))
    listed = _listed(suite, device_kind)
    found: dict[Problem, None] = {}
    for name in ops:
        op = registry.op(name)
        for template in listed.get(name, ()):
            for precision in precisions:
                if precision in op.precisions:
                    found[_instance(template, precision)] = None
    if not found:
        asked = f"{', '.join(ops) or 'no operator'} in {', '.join(precisions) or 'no precision'} on {device_kind}"
        held = f"suite {suite} has no problem for {asked}; it holds {', '.join(listed) or 'nothing'}"
        without = next((name for name in ops if name not in listed), None)
        fits = [p for p in precisions if without and p in registry.op(without).precisions]
        raise UsageError(held + (f"; or write one out: '{registry.op(without).small(fits[0])[0]}'" if fits else ""))
    return list(found)


def goals(suite: str, asked: Sequence[Problem], device_kind: str) -> dict[Problem, float]:
    """The ratio to torch that a suite asks of a competitor, for those of its problems that have a goal.

    Raises:
        UsageError: there is no such suite.
    """
    listed, wanted = _listed(suite, device_kind), _read(_path(suite))[2]
    found: dict[Problem, float] = {}
    for problem in asked:
        templates = [t for t in listed.get(problem.op, ()) if _instance(t, problem.precision) == problem]
        for key in (*templates, problem.op) if templates else ():
            if problem.precision in wanted.get(key, {}):
                found.setdefault(problem, wanted[key][problem.precision])
    return found


def _instance(template: str, precision: str) -> Problem:
    return registry.problem(_fitted(Problem.parse(template).replace(precision=precision)))


def _fitted(problem: Problem) -> Problem:
    """A product in the form its precision has: fp8 exists as `transpose=nt` only, int8 without epilogue."""
    flags = dict(problem.flags)
    if problem.op == "gemm" and problem.precision == "fp8":
        flags["transpose"] = "nt"
    elif problem.op == "gemm" and problem.precision == "int8":
        flags.pop("epilogue", None)
    return Problem(problem.op, problem.dims, problem.precision, tuple(sorted(flags.items())))
