"""The record: what is written comes back, and what is not a record is named."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from rooftune.core import Status, UsageError
from rooftune.results.record import SCHEMA, Record, from_json

MUST_HAVE = {
    *("problem", "op", "shape", "precision", "impl", "config", "default", "status", "reason", "evidence"),
    *("time_s", "time_ci_s", "ratio_to_torch", "ratio_ci", "tflops", "gbps", "roof", "error", "energy", "device"),
}


def record(**changes: Any) -> Record:
    plain: dict[str, Any] = {
        "problem": "softmax[m=8,n=500,fp32]",
        "op": "softmax",
        "shape": "m=8,n=500",
        "precision": "fp32",
        "impl": "softmax/numba",
        "config": {"block_n": 128},
        "default": True,
        "status": Status.OK,
        "time_s": 1.5e-5,
        "time_ci_s": [1.4e-5, 1.6e-5],
        "rounds": [[1.5e-5, 1.6e-5], []],
    }
    return Record(**(plain | changes))


def test_round_trip() -> None:
    one = record(error={"rel_fro": 1e-7}, resources=[{"arch": "sm_90a"}])
    assert from_json(json.loads(json.dumps(one.to_json()))) == one


def test_published_keys() -> None:
    assert set(record().to_json()) >= MUST_HAVE


def test_unknown_keys_of_our_schema_are_dropped_and_absent_ones_get_their_default() -> None:
    data = record().to_json() | {"from_a_newer_minor_version": 1}
    del data["energy"], data["tie"], data["rounds"]
    assert from_json(data).rounds is None


def test_cell_keeps_the_call() -> None:
    assert record(config={"call": "softmax"}).cell == ("softmax[m=8,n=500,fp32]", "softmax/numba:softmax")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"schema": SCHEMA + 1}, "newer than ours"),
        ({"schema": "1"}, "'schema'"),
        ({"schema": True}, "'schema'"),
        ({"schema": 0}, "'schema'"),
        ({"problem": 3}, "'problem' is 3, expected text"),
        ({"shape": None}, "'shape'"),
        ({"config": []}, "'config'"),
        ({"default": 1}, "'default'"),
        ({"status": "great"}, "unknown status 'great'"),
        ({"evidence": "guessed"}, "unknown evidence"),
        ({"time_s": math.nan}, "'time_s'"),
        ({"time_s": -1.0}, "'time_s'"),
        ({"time_s": True}, "'time_s'"),
        ({"time_s": "1"}, "'time_s'"),
        ({"gbps": 0}, "'gbps'"),
        ({"time_ci_s": [1.0]}, "'time_ci_s'"),
        ({"ratio_ci": [1.0, math.inf]}, "'ratio_ci'"),
        ({"rounds": [[1.0, -1.0]]}, "'rounds'"),
        ({"rounds": [1.0]}, "'rounds'"),
        ({"device": None}, "'device'"),
        ({"energy": 3.0}, "'energy'"),
        ({"resources": {}}, "'resources'"),
        ({"unix_time": "now"}, "'unix_time'"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        from_json(record().to_json() | changes, "file: line 7")
    assert text in str(caught.value)
    assert str(caught.value).startswith("file: line 7: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["problem", "shape", "config", "default", "status"])
def test_a_missing_field_is_named(key: str) -> None:
    data = record().to_json()
    del data[key]
    with pytest.raises(UsageError, match=f"'{key}' is missing"):
        from_json(data)


@pytest.mark.parametrize("data", [None, [], 3, "text", {}, {"time_s": 1.0}])
def test_other_json_is_not_ours(data: Any) -> None:
    with pytest.raises(UsageError, match="not a rooftune record"):
        from_json(data)
