"""Every test writes its results and caches to a folder of its own; nothing touches the user's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rooftune import device
from rooftune.lab import Lab
from rooftune.results import store
from rooftune.results.record import SCHEMA


@pytest.fixture(scope="session")
def made_up_ceilings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored run of this CPU with ceilings that nobody measured: measuring takes each of a dozen runs 16 s."""
    log = store.Log(tmp_path_factory.mktemp("ceilings") / "made-up.jsonl")
    log.append({"kind": "session", "schema": SCHEMA, "device": device.find("cpu").fingerprint()})
    for threads in (1, 2):
        rate = {p: {"value": 0.1, "unit": "TFLOP/s", "how": "made up"} for p in ("fp32", "bf16", "fp16")}
        copy = [{"working_set_bytes": 2**20, "value": 20.0, "unit": "GB/s", "how": "made up"}]
        found = {"device": "cpu", "threads": threads, "copy": copy, "matrix": rate, "vector": {}, "datasheet": None}
        log.append({"kind": "ceilings", "schema": SCHEMA, "ceilings": found})
    return log.path


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up_ceilings: Path) -> None:
    monkeypatch.setenv("ROOFTUNE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("ROOFTUNE_CEILINGS", str(made_up_ceilings))


@pytest.fixture(autouse=True)
def _gradients_as_before() -> Iterator[None]:
    """A competitor that is built here and not in a worker turns torch's gradients off for the whole process."""
    yield
    if torch := sys.modules.get("torch"):
        torch.set_grad_enabled(True)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab("cpu", threads=1) as made:
        yield made


KERNEL = '''"""A user's kernel."""
import os, signal, sys, time
import torch
from rooftune.core import Space
OP = "softmax"
DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
SPACE = Space()
calls = 0
def build(problem, config):
    def run(out, x):
        global calls
        calls += 1
        {body}
    return run
'''
RIGHT = "torch.softmax(x, -1, out=out)"


@pytest.fixture
def kernel(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Write a user's softmax file whose run() has the given body; returns its path."""

    def write(body: str = RIGHT, name: str = "mine", text: str = KERNEL) -> Path:
        path = tmp_path / f"{name}.py"
        path.write_text(text.replace("{body}", body.replace("\n", "\n        ")))
        return path

    return write
