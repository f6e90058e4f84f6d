"""Every test writes its results and caches to a folder of its own; nothing touches the user's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rooftune.lab import Lab


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("ROOFTUNE_RESULTS_DIR", str(tmp_path / "results"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


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
