"""Listing a space by asking rules about arrays gives what asking them about one config after another gives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest

from rooftune import listing, registry, spaces
from rooftune.core import Config, Problem, Rule, Space

PROBLEM = registry.problem("softmax[m=64,n=4096,fp32]")
AXES: dict[str, tuple[Any, ...]] = {
    "block": (16, 32, 64, 96, 128, 256),
    "warps": (1, 2, 4, 8),
    "unroll": (0, 1, 2, 3),
    "share": (0.25, 0.5, 1.0),
    "pad": (False, True),
    "layout": ("row", "column", None),
    "one": (7,),
}


def one_by_one(space: Space, problem: Problem) -> Iterator[Config]:
    """What a valid config is."""
    for values in itertools.product(*space.axes.values()):
        config = dict(zip(space.axes, values, strict=True))
        if all(rule(config, problem) for rule in space.where):
            yield config


def same(space: Space, problem: Problem) -> bool:
    return list(map(repr, space.configs(problem))) == list(map(repr, one_by_one(space, problem)))


def _halves(config: Config, problem: Problem) -> bool:
    """A loop, and a change in place: of a number, not of the config's."""
    n = config["block"]
    while n % 2 == 0:
        n //= 2
    n += config["unroll"]
    return bool(n <= 3)


RULES: dict[str, Rule] = {
    "a loop": _halves,
    "arithmetic": lambda c, p: c["block"] * c["warps"] <= 512,
    "between": lambda c, p: 32 <= c["block"] * c["warps"] <= 512,
    "and": lambda c, p: c["block"] > 16 and c["warps"] > 1 and c["unroll"] > 0,
    "or, not": lambda c, p: not c["pad"] or c["block"] >= 64,
    "if": lambda c, p: c["warps"] <= 4 if c["block"] < 64 else c["unroll"] > 0,
    "smaller of": lambda c, p: min(c["block"], 32 * c["warps"]) % 64 == 0,
    "in": lambda c, p: c["layout"] in ("row", None),
    "is": lambda c, p: c["layout"] is None,
    "is, among others": lambda c, p: (c["layout"] is None) | (c["block"] > 64),
    "a word's length": lambda c, p: c["layout"] is not None and len(c["layout"]) == 3,
    "a first letter": lambda c, p: c["layout"] is None or c["layout"][0] == "r",
    "two flags": lambda c, p: c["pad"] + (c["unroll"] > 1) == 2,
    "a flag": lambda c, p: c["pad"],
    "a number": lambda c, p: c["unroll"],
    "a function of one": lambda c, p: math.log2(c["block"]) == int(math.log2(c["block"])),
    "of the problem": lambda c, p: p["n"] % c["block"] == 0,
    "of the problem alone": lambda c, p: p["n"] > 10,
    "never": lambda c, p: False,
    "a fraction": lambda c, p: c["block"] * c["share"] >= 48.0,
    "bits": lambda c, p: c["block"] & (c["block"] - 1) == 0,
    "a table": lambda c, p: {16: 1, 32: 2}.get(c["block"], 4) >= c["warps"],
    "all of": lambda c, p: all(c[axis] for axis in ("block", "unroll")),
    "a value given once": lambda c, p: c["one"] == 7 and int(c["one"]) > 6,
    "guarded": lambda c, p: c["unroll"] > 0 and 6 % c["unroll"] == 0,
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("chunk", [1 << 20, 40, 1])
def test_a_rule_means_the_same(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "CHUNK", chunk)
    axes = {axis: AXES[axis] for axis in ("block", "warps", "unroll", "layout", "pad", "share", "one")}
    if name != "a fraction":
        axes.pop("share")
    if chunk == 1:  # every config alone: a few will do
        axes |= {"warps": (1, 4), "block": (16, 96, 256)}
    assert same(Space(axes, (RULES[name],)), PROBLEM)


ARRAYS = ("a loop", "arithmetic", "between", "and", "or, not", "if", "smaller of", "in", "two flags", "bits", "all of")
ALONE = ("is", "is, among others", "a word's length", "a first letter", "a function of one", "a table")


def test_which_rules_take_arrays() -> None:
    taken = {name: listing.candidates(Space(AXES, (RULES[name],)), PROBLEM)[1] for name in (*ARRAYS, *ALONE)}
    assert taken == dict.fromkeys(ARRAYS, True) | dict.fromkeys(ALONE, False)


def test_rules_together_and_a_division_that_an_earlier_one_guards() -> None:
    guarded: tuple[Rule, ...] = (lambda c, p: c["unroll"] > 0, lambda c, p: 6 % c["unroll"] == 0, RULES["between"])
    assert same(Space(AXES, guarded), PROBLEM)
    with pytest.raises(ZeroDivisionError):  # without a guard it is the author's error, and is not hidden
        list(Space(AXES, guarded[1:]).configs(PROBLEM))


def test_spaces_without_rules_or_axes() -> None:
    for space in (Space(), Space(AXES), Space({"a": (1, 2)}, (lambda c, p: c["a"] > 5,))):
        assert same(space, PROBLEM)


def _small(key: str) -> Problem:
    op = registry.op(key.split("/")[0])
    return registry.problem(str(op.small(op.precisions[0])[0]))


KEYS = [impl.key for name in registry.op_names() for impl in registry.impls(name)]


@pytest.mark.parametrize("key", KEYS)
def test_our_kernels_have_the_configs_that_their_rules_say(key: str) -> None:
    impl = registry.impl(key)
    if impl.missing:
        pytest.skip(impl.missing)
    assert same(impl.load().SPACE, _small(key))


def test_few_questions_list_a_large_space() -> None:
    asked = 0

    def counted(config: Config, problem: Problem) -> bool:
        nonlocal asked
        asked += 1
        return bool(config["a"] * config["b"] <= 8 and config["c"] % (config["d"] + 1) == 0)

    axes = {name: tuple(range(1, 41)) for name in "abcd"}
    places, exact = listing.candidates(Space(axes, (counted,)), PROBLEM)
    assert exact
    expected = sum(1 for a in axes["a"] for b in axes["b"] if a * b <= 8)
    assert len(places) == expected * sum(1 for c in axes["c"] for d in axes["d"] if c % (d + 1) == 0)
    assert asked < 20_000  # of 2,560,000 configs


def test_more_configs_than_are_sent_are_drawn_and_that_is_said() -> None:
    space = Space({"a": tuple(range(100)), "b": tuple(range(100))}, (lambda c, p: c["a"] > c["b"],), {"a": 1, "b": 0})
    found = spaces.described(space, PROBLEM, 200, 0)
    assert found["drawn"] == "drawn from 4,950"
    assert len(found["configs"]) == 200
    assert all(c["a"] > c["b"] for c in found["configs"])
    assert found == spaces.described(space, PROBLEM, 200, 0)
    assert found["configs"] != spaces.described(space, PROBLEM, 200, 1)["configs"]
    whole = spaces.described(space, PROBLEM, 4_950, 0)
    assert (whole["drawn"], len(whole["configs"])) == ("", 4_950)


def test_a_rule_that_takes_no_arrays_is_counted_too() -> None:
    rule: Rule = lambda c, p: str(c["a"])[-1] == "3"  # noqa: E731
    space = Space({"a": tuple(range(100)), "b": tuple(range(100))}, (rule,), {"a": 3, "b": 0})
    found = spaces.described(space, PROBLEM, 50, 0)
    assert (found["drawn"], len(found["configs"])) == ("drawn from 1,000", 50)


def test_too_many_to_ask_one_by_one_are_drawn_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "COUNTED", 400)
    rule: Rule = lambda c, p: str(c["a"])[-1] in "357"  # noqa: E731
    space = Space(
        {"a": tuple(range(100)), "b": tuple(range(100))}, (rule, lambda c, p: c["a"] > c["b"]), {"a": 3, "b": 0}
    )
    found = spaces.described(space, PROBLEM, 50, 0)
    assert found["drawn"] == "drawn from 4,950 that some of the rules allow"
    assert len(found["configs"]) == 50
    assert all(c["a"] > c["b"] and c["a"] % 10 in (3, 5, 7) for c in found["configs"])


def test_a_space_too_large_to_list_is_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "LISTED", 1_000)
    space = Space({"a": tuple(range(100)), "b": tuple(range(100))}, (lambda c, p: c["a"] > c["b"],), {"a": 1, "b": 0})
    found = spaces.described(space, PROBLEM, 50, 0)
    assert found["drawn"] == "drawn from 1e+04 before the rules"
    assert 30 < len(found["configs"]) <= 50
    assert found["default"] == {"a": 1, "b": 0}
    odd = Space(space.axes, space.where, {"a": 0, "b": 50})
    found = spaces.described(odd, PROBLEM, 50, 0)
    assert found["default"] in found["configs"]  # the nearest of those drawn: nobody lists the others


def test_the_valid_config_nearest_to_a_default_that_breaks_a_rule() -> None:
    space = Space(
        {"a": tuple(range(200)), "b": tuple(range(200))}, (lambda c, p: c["a"] + c["b"] == 9,), {"a": 4, "b": 4}
    )
    assert space.default_for(PROBLEM) == {"a": 4, "b": 5}
