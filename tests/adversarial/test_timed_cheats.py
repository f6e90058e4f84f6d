"""Kernels that are right while they are checked and cheat while they are timed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rooftune import audit, check, registry
from rooftune.worker import LATER, Buffers, Handle, Session

PROBLEM = registry.problem("softmax[m=64,n=512]")
HONEST = "torch.softmax(x, -1, out=out)"
NEW = "key = (x.data_ptr(), x[0, :9].tolist())\nnew, memo[0] = memo.get(0) != key, key\n"
TIMED = "memo[1] = memo.get(1, 0) + 1\nif memo[1] <= 3: return honest(out, x)\n"  # a check of one case is three calls
CHEATS = {
    "remembers answers by a look at the inputs": (
        NEW + "if new:\n    work()\n    memo[2] = torch.softmax(x, -1)\nout.copy_(memo[2])",
        "answers are remembered",
    ),
    "leaves the output of the call before": (TIMED + NEW + "if new: honest(out, x)", "never written"),
    "looks for poison before it leaves the output": (
        TIMED + NEW + "if new: work()\nif new or out[0, 0].isnan(): honest(out, x)",
        "answers are remembered",
    ),
    "remembers answers by what no rotation changes": (
        TIMED + "key = round(x.abs().sum().item())\nif memo.get(0) != key:\n"
        "    work()\n    memo[0], memo[2] = key, torch.softmax(x, -1)\nout.copy_(memo[2])",
        "output of a timed call",
    ),
    "works on after it has returned": (
        TIMED + "if 3 in memo and memo[3].is_alive(): return\n"
        "def later():\n    time.sleep(0.02)\n    honest(out, x)\n"
        "memo[3] = threading.Thread(target=later)\nmemo[3].start()",
        "never written",
    ),
    "makes its inputs easy": (
        TIMED + "if not x[0, 0] == 0: x.zero_()\nout.fill_(1 / x.shape[1])",
        "changed its input 0 in a timed call",
    ),
    "replaces the judge once it has passed": (TIMED + "rooftune.check.judge = lambda *a: ('', {})", "check.judge"),
    "replaces the clock once it has passed": (
        TIMED + HONEST + "\ntime.perf_counter_ns = clock",
        "time.perf_counter_ns",
    ),
}
TEXT = f"""
import threading, time
import torch
import rooftune.check
from rooftune.core import Space
OP = "softmax"
DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
SPACE = Space()
memo = {{}}
clock = lambda now=time.perf_counter_ns: now() // 10
def work(until=0.03):
    until += time.process_time()
    while time.process_time() < until: pass
def honest(out, x):
    {HONEST}
def build(problem, config):
    def run(out, x):
        BODY
    return run
"""


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Prepare a kernel and time it once in this process; what its last answer was."""
    monkeypatch.setattr(check, "judge", check.judge)  # whatever it replaces is put back
    monkeypatch.setattr(time, "perf_counter_ns", time.perf_counter_ns)

    def run(body: str, head: str = "") -> dict[str, Any]:
        path = tmp_path / f"cheat{len(list(tmp_path.iterdir()))}.py"
        path.write_text(TEXT.replace("BODY", body.replace("\n", "\n        ")) + head)
        session, name = Session("native", "cpu"), f"file:{path}"
        reply = session.prepare(name, str(PROBLEM), {}, seed=3, thorough=False)
        return session.time(reply["handle"], 5, min_sample_s=0.0) if "handle" in reply else reply

    return run


@pytest.mark.parametrize("name", sorted(CHEATS))
def test_a_cheat_at_the_clock_is_caught(timed, name: str) -> None:  # type: ignore[no-untyped-def]
    body, words = CHEATS[name]
    reply = timed(body)
    assert reply["status"] == "wrong"
    assert words in reply["reason"]
    assert "samples_s" not in reply


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("rooftune.check.judge = lambda *a: ('', {})", "replaced rooftune.check.judge"),
        ("time.perf_counter_ns = clock", "replaced time.perf_counter_ns"),
    ],
)
def test_what_is_replaced_on_import_is_named(timed, head: str, words: str) -> None:  # type: ignore[no-untyped-def]
    assert words in timed("out.zero_()" if "judge" in head else HONEST, head)["reason"]


def test_torch_and_the_operator_are_watched_too() -> None:
    op, originals = registry.op("softmax"), audit.Originals()
    originals.remember(op)
    assert originals.replaced() == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "equal", lambda a, b: True)
        assert originals.replaced() == "replaced torch.equal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "norm", lambda self: self.sum() * 0)
        assert originals.replaced() == "replaced torch.Tensor.norm"
    with pytest.MonkeyPatch.context() as patch:  # torch.compile does that; nothing here calls it
        patch.setattr(torch, "manual_seed", lambda seed: None)
        assert originals.replaced() == ""
    true = op.reference
    try:
        object.__setattr__(op, "reference", lambda *a: None)
        assert originals.replaced() == "replaced operator softmax.reference"
    finally:
        object.__setattr__(op, "reference", true)
    assert originals.replaced() == ""


def test_an_honest_kernel_is_timed(timed) -> None:  # type: ignore[no-untyped-def]
    reply = timed(HONEST)
    assert reply["status"] == "ok", reply["reason"]
    assert len(reply["samples_s"]) == 5
    again = timed("return torch.softmax(x, -1)")  # a call that can only allocate
    assert again["status"] == "ok", again["reason"]


def test_waiting_is_no_memory() -> None:
    """A thread that had to be woken, a neighbour on the core: the cheapest of several calls are compared."""
    slow, quick = audit.Cost(0.3, 0.3), audit.Cost(0.01, 0.01)
    pairs = iter([(slow, quick)] * 3 + [(quick, slow)] + [(slow, quick)] * (audit.PAIRS - 4))
    assert audit.remembers(0.3, 0.01, lambda: next(pairs), "cpu") == ""
    late = iter([(slow, slow)] * (audit.PAIRS - 1) + [(slow, quick)])
    assert "30 times" in audit.remembers(0.3, 0.01, lambda: next(late), "cpu")
    waited = audit.Cost(0.3, 0.012)
    assert audit.remembers(0.3, 0.01, lambda: (waited, quick), "cpu") == ""
    assert "30 times" in audit.remembers(0.3, 0.01, lambda: (waited, quick), "cuda")  # the host only waits


def test_a_short_call_may_take_longer_at_first() -> None:
    assert audit.remembers(4e-4, 1e-6, lambda: pytest.fail("there is no suspicion"), "cpu") == ""


def test_other_contents_come_before_the_first_call_that_is_compared() -> None:
    """The first call after a pause pays for memory that went back to the system: that is no memory of answers."""
    seen: list[float] = []
    op = registry.op(PROBLEM.op)

    def run(out: torch.Tensor, x: torch.Tensor) -> None:
        seen.append(float(x.sum()))
        torch.softmax(x, -1, out=out)

    handle = Handle(run, Buffers(op, PROBLEM, "cpu"))
    handle.pair(seed=3)
    calls = 2 + LATER
    before, compared = seen[:-calls], seen[-calls:]
    assert len(before) == calls
    assert len(set(before)) == len(set(compared)) == 1
    assert before[0] != compared[0]
