"""Workers come from a process that has their imports; each is a process of its own all the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rooftune import nursery, registry
from rooftune.core import Status
from rooftune.lab import Lab

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker is executed")
PROBLEM = registry.problem("softmax[m=16,n=64]")


class Talk:
    """A worker at the other end of two pipes, without a lab."""

    def __init__(self, imports: tuple[str, ...] | None, **env: str) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        requests, self.ask_fd = os.pipe()
        self.reply_fd, replies = os.pipe()
        full = {**os.environ, "PYTHONPATH": str(Path(nursery.__file__).parents[1]), **env}
        self.process = nursery.start(("native", "cpu"), full, (requests, replies), self.log.fileno(), imports)
        os.close(requests)
        os.close(replies)

    def hello(self) -> int:
        """The pid that answers."""
        os.write(self.ask_fd, json.dumps({"nonce": "n", "verb": "hello", "args": {}}).encode() + b"\n")
        return int(json.loads(os.read(self.reply_fd, 1 << 12))["value"]["pid"])

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read().decode()

    def end(self) -> None:
        self.process.signal_group(signal.SIGKILL)
        self.process.wait(30.0)
        self.process.close()
        for fd in (self.ask_fd, self.reply_fd):
            os.close(fd)
        self.log.close()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nurseries of this test's own."""
    monkeypatch.setattr(nursery, "_nurseries", type(nursery._nurseries)())
    yield
    for each in nursery._nurseries.values():
        each.close()
        each.process.wait(30.0)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def imported_by(pid: int) -> str:
    """Files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def test_workers_share_what_is_imported_and_nothing_else(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    crasher, right = (registry.user_impl(kernel(*made)) for made in (("os.abort()", "crasher"), ()))
    pids = [lab.worker(impl).process.pid for impl in (crasher, right)]
    home = {parent_of(pid) for pid in pids}
    assert len(home) == 1
    assert home != {os.getpid()}
    assert "libtorch" in imported_by(pids[1])  # before anything was asked
    reply = lab.prepare(crasher, PROBLEM, {}, seed=1, thorough=False)
    assert reply.status == Status.FAILED_CRASH
    assert "SIGABRT" in reply.reason
    assert lab.prepare(right, PROBLEM, {}, seed=1, thorough=False).ok
    assert lab.worker(right).process.pid == pids[1]


def test_after_one_was_retired_the_next_is_executed(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    impl = registry.user_impl(kernel())
    assert parent_of(lab.worker(impl).process.pid) != os.getpid()
    lab.retire(impl)
    assert parent_of(lab.worker(impl).process.pid) == os.getpid()


def test_a_worker_has_the_environment_of_now(lab: Lab, kernel, monkeypatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    body = "import tempfile; raise RuntimeError(os.environ['ROOFTUNE_X'], tempfile.gettempdir(), os.getcwd())"
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setenv("ROOFTUNE_X", f"x-{name}")
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.chdir(folder)
        reason = lab.prepare(registry.user_impl(kernel(body, name)), PROBLEM, {}, 1, thorough=False).reason
        assert f"'x-{name}', '{folder}', '{folder}'" in reason
    assert len({parent_of(worker.process.pid) for worker in lab._workers.values()}) == 1


@pytest.mark.usefixtures("fresh")
def test_another_environment_is_another_nursery() -> None:
    talks = [Talk(("json",), NUMBA_NUM_THREADS=count) for count in ("1", "2")]
    assert len({parent_of(talk.hello()) for talk in talks}) == 2
    for talk in talks:
        talk.end()


@pytest.mark.usefixtures("fresh")
def test_what_cannot_be_imported_is_left_to_a_worker_that_begins_with_nothing() -> None:
    talk = Talk(("json", "no_such_module"))
    assert talk.hello() == talk.process.pid
    command = Path(f"/proc/{talk.process.pid}/cmdline").read_bytes().split(b"\0")
    assert b"rooftune.worker" in command
    assert "No module named 'no_such_module'" in talk.said()
    talk.end()


@pytest.mark.usefixtures("fresh")
def test_a_nursery_that_is_killed_takes_its_children_along_and_is_replaced() -> None:
    first = Talk(("json",))
    home = parent_of(first.hello())
    os.kill(home, signal.SIGKILL)
    assert first.process.wait(30.0) == -signal.SIGKILL
    first.end()
    next(iter(nursery._nurseries.values())).process.wait(30.0)
    second = Talk(("json",))
    assert parent_of(second.hello()) != home
    second.end()


@pytest.mark.usefixtures("fresh")
def test_who_is_not_wanted_any_more_is_not_born(tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(2)\n")
    path = os.pathsep.join((str(Path(nursery.__file__).parents[1]), str(tmp_path)))
    first, second = (Talk(("slow_to_import",), PYTHONPATH=path) for _ in range(2))
    second.process.signal_group(signal.SIGTERM)  # while the first one's import goes on
    assert second.process.poll() == -signal.SIGTERM
    assert os.read(second.reply_fd, 1) == b""  # nobody holds the other end
    home = parent_of(first.hello())
    assert Path(f"/proc/{home}/task/{home}/children").read_text().split() == [str(first.process.pid)]
    first.end()


@pytest.mark.usefixtures("fresh")
def test_how_a_child_ended_is_known_and_no_zombie_stays() -> None:
    talk = Talk(("json",))
    pid = talk.hello()
    with pytest.raises(subprocess.TimeoutExpired):
        talk.process.wait(0.05)
    os.close(talk.ask_fd)  # an idle worker ends
    assert talk.process.wait(30.0) == 0
    assert Path(f"/proc/{pid}").exists()  # so its pid cannot be another's yet
    talk.process.close()
    assert not Path(f"/proc/{pid}").exists()
    talk.process.signal_group(signal.SIGKILL)  # to nobody


@pytest.mark.usefixtures("fresh")
def test_a_nursery_that_is_not_kept_ends_with_its_last_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "NURSERIES", 1)
    old = Talk(("json",), NUMBA_NUM_THREADS="1")
    pid = old.hello()
    home = parent_of(pid)
    new = Talk(("json",), NUMBA_NUM_THREADS="2")
    new.hello()
    assert next(iter(nursery._nurseries.values())).process.pid == parent_of(new.process.pid)
    assert old.hello() == pid  # it lives on
    old.end()
    until = time.monotonic() + 30.0
    while Path(f"/proc/{home}/cmdline").exists() and Path(f"/proc/{home}/cmdline").read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)
    new.end()
