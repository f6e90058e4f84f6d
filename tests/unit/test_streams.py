"""Standard output and error that are a left pipe, a full disk, closed, non-blocking, or of another encoding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rooftune.core import ExitCode
from rooftune.results import store

ROOT = Path(__file__).resolve().parents[2]
RUN = "20261127-151355-run-192fdd"  # a committed record: 130 KiB as JSON, microseconds in its tables


def bench(*arguments: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", "-c", f'exec "$0" bench.py "$@" {redirect}', sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


def piped(*arguments: str, both: bool = False) -> tuple[int, str]:
    """Exit code and standard error of a verb whose reader has left before it began."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "bench.py", *arguments],
            cwd=ROOT,
            stdout=write,
            stderr=write if both else subprocess.PIPE,
            text=True,
            timeout=300,
        )
    finally:
        os.close(write)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("arguments", [("list",), ("report", RUN), ("report", RUN, "--json"), ("--help",)])
def test_a_reader_that_leaves_is_no_failure(arguments: tuple[str, ...]) -> None:
    code, talk = piped(*arguments)
    assert (code, "Traceback" in talk) == (ExitCode.OK, False), talk


@pytest.mark.parametrize("both", [False, True])
def test_a_verdict_outlives_its_reader(tmp_path: Path, both: bool) -> None:
    """`compare ... | head` under `set -o pipefail` is a gate as well: a broken kernel stays exit code 1."""
    path = tmp_path / "broken.jsonl"
    log = store.Log(path)
    for record in store.load_run(store.resolve(RUN)):
        record.status, record.reason, record.time_s = "failed(crash)", "for this test", None
        log.append({k: v for k, v in record.to_json().items() if k != "crc"})
    for form in ((), ("--json",)):
        assert piped("compare", RUN, str(path), *form, both=both)[0] == ExitCode.REGRESSION


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_data_that_cannot_be_written_are_one_line_and_exit_code_2() -> None:
    for arguments in (("list",), ("report", RUN, "--json", "-q")):
        done = bench(*arguments, redirect=">/dev/full")
        assert done.returncode == ExitCode.USAGE
        assert "rooftune: cannot write to standard output: No space left on device\n" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_closed_output_is_one_line_and_exit_code_2() -> None:
    done = bench("list", redirect=">&-")
    assert (done.returncode, done.stderr.count("\n")) == (ExitCode.USAGE, 1), done.stderr
    assert "standard output is closed" in done.stderr


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full"])
def test_talk_that_cannot_be_written_changes_no_exit_code_and_is_no_data(redirect: str) -> None:
    done = bench("run", "nothing", redirect=redirect)
    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    code = "from rooftune import session, streams; s = object.__new__(session.Session); s.quiet = False\n"
    code += "with streams.guarded(): s.say('talk'); s.clear()\n"
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, code], cwd=ROOT)
    assert done.returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_data_are_the_same_bytes_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    assert bench("report", RUN, "--md", str(tmp_path / "file")).returncode == ExitCode.OK
    command = [sys.executable, "bench.py", "report", RUN, "--md"]
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=env, timeout=300)
    assert (done.returncode, b"Traceback" in done.stderr) == (ExitCode.OK, False), done.stderr
    assert done.stdout == (tmp_path / "file").read_bytes()
    assert "µ".encode() in done.stdout


def test_a_pipe_that_another_made_non_blocking_gets_everything() -> None:
    """A CI runner's may be. What it holds (64 KiB) is less than these data."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    command = [sys.executable, "bench.py", "report", RUN, "--json"]
    with subprocess.Popen(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE) as process:
        os.close(write)
        time.sleep(2.0)  # it fills the pipe meanwhile
        with os.fdopen(read, "rb") as pipe:
            rows = [json.loads(line) for line in pipe]
        talk = process.stderr.read() if process.stderr else b""
    assert process.returncode == ExitCode.OK, talk.decode()
    assert len(rows) == len(store.load_run(store.resolve(RUN)))
