"""A competitor that crashes, hangs, lies or cannot be loaded becomes a reply; the others go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rooftune import lab as lab_module
from rooftune import pools, race, registry
from rooftune.core import ExitCode, Status, Unavailable
from rooftune.lab import Lab, OutOfTime, Reply, WorkerDied

ROOT = Path(__file__).resolve().parents[2]
PROBLEM = registry.problem("softmax[m=16,n=64]")


def _prepare(lab: Lab, path: Path):  # type: ignore[no-untyped-def]
    return lab.prepare(registry.user_impl(path), PROBLEM, {}, seed=1, thorough=False)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", Status.FAILED_CRASH, "SIGSEGV"),
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", Status.FAILED_CRASH, "SIGKILL", marks=pytest.mark.slow),
        pytest.param("os.abort()", Status.FAILED_CRASH, "SIGABRT", marks=pytest.mark.slow),
        (
            r"os.write(2, b'rooftune emulation: deadlock in block 3\n'); os.abort()",
            Status.FAILED_CRASH,
            "crashed: SIGABRT; rooftune emulation: deadlock in block 3",
        ),
        pytest.param("os._exit(3)", Status.FAILED_CRASH, "exit code 3", marks=pytest.mark.slow),
        ("raise RuntimeError('no such kernel image')", Status.FAILED_LAUNCH, "no such kernel image (mine.py:"),
        ("out.zero_()", Status.WRONG, "relative Frobenius error 1.00e+00"),
    ],
)
def test_a_failing_kernel_becomes_a_status_and_a_reason(
    lab: Lab, kernel, body: str, status: Status, words: str
) -> None:  # type: ignore[no-untyped-def]
    reply = _prepare(lab, kernel(body))
    assert reply.status == status
    assert words in reply.reason
    assert "handle" not in reply.data
    assert _prepare(lab, kernel(name="right")).ok  # the lab lives


def test_a_candidate_is_built_once_as_long_as_its_worker_lives(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    path = kernel("raise RuntimeError(f'build {len(built)}')")
    head = "def build(problem, config):"
    path.write_text(path.read_text().replace(head, f"built = []\n{head}\n    built.append(1)"))
    for _ in range(2):
        assert "build 1" in _prepare(lab, path).reason
    other = registry.problem("softmax[m=32,n=64]")
    assert "build 2" in lab.prepare(registry.user_impl(path), other, {}, seed=1, thorough=False).reason


def test_a_kernel_that_never_ends_is_killed_at_its_deadline(lab: Lab, kernel, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    path = kernel("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1)")
    impl = registry.user_impl(path)
    lab.worker(impl)
    monkeypatch.setattr(lab_module, "PREPARE_S", 6.0)
    monkeypatch.setattr(lab_module, "TERM_S", 0.3)
    pid = lab.worker(impl).process.pid
    reply = _prepare(lab, path)
    assert reply.status == Status.TIMEOUT
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_file_that_raises_on_import_says_where(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    path = kernel()
    path.write_text(path.read_text() + "\nraise ValueError('half written')\n")
    reply = _prepare(lab, path)
    assert reply.status == Status.FAILED_COMPILE
    assert "mine.py raises on import: ValueError: half written" in reply.reason


def test_an_answer_that_is_none_is_a_protocol_error(lab: Lab) -> None:
    worker = lab.worker(None)
    os.write(worker._request, b'{"nonce": "forged", "verb": "hello", "args": {}}\n')
    with pytest.raises(WorkerDied, match="protocol"):
        worker.request("hello", 30.0)


def test_workers_that_never_start_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Lab() as broken, pytest.raises(Unavailable, match="worker processes do not start"):
        broken.worker(None)


def test_no_process_is_left_behind(kernel) -> None:  # type: ignore[no-untyped-def]
    with Lab() as made:
        _prepare(made, kernel("time.sleep(0)\n" + "torch.softmax(x, -1, out=out)"))
        pids = [w.process.pid for w in made._workers.values()]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_crash_in_the_middle_of_a_race_costs_only_the_crasher(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    crasher = registry.user_impl(
        kernel("if calls > 60: os.kill(os.getpid(), signal.SIGSEGV)\n" + "torch.softmax(x, -1, out=out)", "crasher")
    )
    right = registry.user_impl(kernel(name="right"))
    torch = registry.impl("softmax/torch")
    records = race.race(lab, PROBLEM, [torch, crasher, right], race.Options(rounds=6, min_sample_s=1e-4, seed=3))
    by_name = {r.impl: r for r in records}
    assert by_name["softmax/crasher"].status == Status.FAILED_CRASH
    assert "SIGSEGV" in by_name["softmax/crasher"].reason
    assert by_name["softmax/crasher"].time_s is None
    assert by_name["softmax/crasher"].rounds is None
    for name in ("softmax/right", "softmax/torch"):
        assert by_name[name].status == Status.OK
        assert len(by_name[name].rounds or ()) == 6
        assert by_name[name].ratio_to_torch is not None


def test_a_kernel_that_turns_wrong_while_it_is_timed_loses_its_time(lab: Lab, kernel) -> None:  # type: ignore[no-untyped-def]
    sly = registry.user_impl(kernel("if calls < 60: torch.softmax(x, -1, out=out)\nelse: out.fill_(0.01)", "sly"))
    records = race.race(lab, PROBLEM, [sly], race.Options(rounds=6, min_sample_s=1e-4, seed=3))
    assert records[0].status == Status.WRONG
    assert "timed call" in records[0].reason
    assert records[0].time_s is None


def test_killing_the_parent_takes_the_workers_along(tmp_path: Path, kernel) -> None:  # type: ignore[no-untyped-def]
    path = kernel("time.sleep(0.05)\n" + "torch.softmax(x, -1, out=out)")
    command = [
        sys.executable,
        "bench.py",
        "run",
        "softmax[m=16,n=64]",
        "--only",
        "mine",
        "--load",
        str(path),
        "--rounds",
        "500",
    ]
    env = {**os.environ, "ROOFTUNE_RESULTS_DIR": str(tmp_path / "runs")}
    parent = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    workers = _wait_for(lambda: _children(parent.pid))
    assert workers
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert _wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 5.0)


def test_workers_start_where_we_are_process_1_as_in_a_container() -> None:
    alone = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable]
    try:
        subprocess.run([*alone, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no process namespace of our own can be made: {error}")
    script = "import os; from rooftune.lab import Lab\nwith Lab() as lab: print(os.getpid(), lab.worker(None).alive)"
    said = subprocess.run([*alone, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert said.stdout == "1 True\n", said.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_its_file(tmp_path: Path, kernel, signum: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    path = kernel("time.sleep(0.02)\n" + "torch.softmax(x, -1, out=out)")
    out = tmp_path / "out.jsonl"
    problems = [f"softmax[m=16,n={64 + i}]" for i in range(12)]
    command = [
        sys.executable,
        "bench.py",
        "run",
        *problems,
        "--precision",
        "fp32",
        "--only",
        "mine",
        "--load",
        str(path),
    ]
    command += ["--rounds", "20", "--evidence", "none", "--json", str(out)]
    env = {**os.environ, "ROOFTUNE_RESULTS_DIR": str(tmp_path / "runs")}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )
    log = lambda: next(iter((tmp_path / "runs").rglob("*.jsonl")), None)  # noqa: E731
    assert _wait_for(
        lambda: log() is not None and '"impl": "softmax/mine"' in log().read_text().replace('":"', '": "'), 240.0
    )
    process.send_signal(signum)
    _, talk = process.communicate(timeout=20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "interrupted" in talk
    assert "softmax/mine" in out.read_text()


def test_ctrl_c_does_not_wait_for_what_workers_are_at(tmp_path: Path, kernel) -> None:  # type: ignore[no-untyped-def]
    """A build may take minutes, and there may be more of them in line. The 90 s are the worker's limit without that."""
    body = f"open({str(tmp_path)!r} + '/' + __name__, 'w').close()\ntime.sleep(600)"
    first, second, unborn = (kernel(body, name=name) for name in ("first", "second", "unborn"))
    before = set(tmp_path.iterdir())
    with Lab() as lab:
        lab.patience_s = 90.0

        def work() -> list[Reply]:
            return [_prepare(lab, path) for path in (first, second)]

        with pytest.raises(KeyboardInterrupt), pools.asking(lab, 1) as threads:  # noqa: PT012 - as a verb does it
            found, waiting = threads.submit(work), threads.submit(_prepare, lab, unborn)
            assert _wait_for(lambda: set(tmp_path.iterdir()) - before, 80.0)
            raise KeyboardInterrupt
        with pytest.raises(OutOfTime):  # of the second, which was never begun
            found.result(timeout=0)
        assert waiting.cancelled()
        assert len(set(tmp_path.iterdir()) - before) == 1


def _children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def _wait_for(ready, limit_s: float = 60.0):  # type: ignore[no-untyped-def]
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if found := ready():
            return found
        time.sleep(0.05)
    return ready()


def test_tritons_cache_follows_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own default is in the home folder, which may be read-only where ROOFTUNE_CACHE_DIR is set."""
    seen: list[dict[str, str]] = []

    def start(key: object, env: dict[str, str], *rest: object) -> None:
        seen.append(env)
        raise Unavailable("not today")

    monkeypatch.setattr(lab_module.nursery, "start", start)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    for folder, theirs in ((tmp_path, None), (tmp_path, "/theirs"), (None, None)):
        for name, value in (("ROOFTUNE_CACHE_DIR", folder), ("TRITON_CACHE_DIR", theirs)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))
        with pytest.raises(Unavailable, match="not today"):
            lab_module.Worker(None, "compile", "cpu", 1)
    assert [env.get("TRITON_CACHE_DIR") for env in seen] == [str(tmp_path / "triton"), "/theirs", None]
