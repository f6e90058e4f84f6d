"""A space that is none is refused in one line; one without a config for a problem is skipped there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rooftune import race, registry, spaces
from rooftune.bench import main
from rooftune.core import ExitCode, Space, Status, UsageError
from rooftune.lab import Lab

RULE = "SPACE = Space(axes={'a': (1, 2)}, where=(lambda config, problem: problem['n'] % 128 == 0,))"


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({"a": (1, 2)}, "SPACE is a dict; write SPACE = Space(axes=...)"),
        (Space(axes=("a", "b")), "axes is a tuple; write"),  # type: ignore[arg-type]
        (Space(axes={"a": "xyz"}), "axis 'a' is 'xyz'; write a tuple"),  # type: ignore[dict-item]
        (Space(axes={"a": 5}), "axis 'a' is 5; write a tuple"),  # type: ignore[dict-item]
        (Space(axes={"a": ()}), "axis 'a' has no values"),
        (Space(axes={"a": ((1, 2), (3, 4))}), "axis 'a' has the value (1, 2) of type tuple"),
        (Space(axes={"a": (float("nan"),)}), "axis 'a' has the value nan of type float"),
        (Space(axes={"a": (1,)}, where=lambda c, p: True), "where is not a tuple of rules"),  # type: ignore[arg-type]
        (Space(axes={"a": (1,)}, entrants="b"), "entrants names 'b', which is no axis; known: a"),
        (Space(axes={"a": (1,)}, default={"b": 1}), "default names 'b', which is no axis; known: a"),
        (Space(axes={"a": (1, 2)}, default={"a": 3}), "default a=3 is none of (1, 2)"),
        (Space(axes={"a": (1,), "b": (1,)}, default={"a": 1}), "default has no value for b"),
        (Space(axes={"a": (1,)}, default=7), "default is neither"),  # type: ignore[arg-type]
    ],
)
def test_a_space_that_is_none_is_refused(space: Any, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        spaces.checked(space)
    assert words in str(refused.value)


def test_spaces_that_are_right_pass() -> None:
    values = (1, 2.5, "x", True, None)
    for space in (Space(), Space(axes={"a": values}, default={"a": None}), Space(axes={"a": range(1, 3)})):  # type: ignore[dict-item]
        assert spaces.checked(space) is space


def _with(path: Path, space: str) -> Path:
    path.write_text(path.read_text().replace("SPACE = Space()", space))
    return path


def test_a_users_bad_space_names_the_file_before_anything_is_timed(kernel, capsys) -> None:  # type: ignore[no-untyped-def]
    path = _with(kernel(), "SPACE = Space(axes={'tile': [(1, 2), (3, 4)]})")
    assert main(["run", "softmax[m=8,n=64,fp32]", "--load", str(path), "-q"]) == ExitCode.USAGE
    assert f"{path}: SPACE: axis 'tile' has the value (1, 2) of type tuple" in capsys.readouterr().err


def test_a_kernel_without_a_config_for_a_problem_is_skipped_there(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    impl = registry.user_impl(_with(kernel(), RULE))
    here, there = (registry.problem(f"softmax[m=8,n={n},fp32]") for n in (128, 200))
    for problem, status in ((here, Status.OK), (there, Status.SKIPPED)):
        (entrant,) = race.entrants(lab, problem, [impl], lambda kind, text: None)
        assert entrant.status == status
    assert "no valid config for softmax[m=8,n=200,fp32]" in entrant.reason


def test_tune_goes_on_where_one_problem_has_no_config(kernel, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    path, out = _with(kernel(), RULE), tmp_path / "out.jsonl"
    asked = ["softmax[m=8,n=200,fp32]", "softmax[m=8,n=128,fp32]"]
    asked += ["--only", "mine", "--load", str(path), "--budget", "2", "--rounds", "10", "--json", str(out), "-q"]
    assert main(["tune", *asked]) == ExitCode.OK
    assert [json.loads(line)["problem"] for line in out.read_text().splitlines()] == ["softmax[m=8,n=128,fp32]"]
    assert "no valid config for softmax[m=8,n=200,fp32]" in capsys.readouterr().out.replace("\n", " ")
