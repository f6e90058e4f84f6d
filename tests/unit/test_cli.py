"""The command line as a user meets it: exit codes, one-line errors, data on stdout."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rooftune import registry
from rooftune.core import ExitCode, UsageError
from rooftune.results import store

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "bench.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


BAD = {
    "unknown op": (["run", "gem"], "unknown op 'gem'; known: attention, "),
    "unknown competitor": (["run", "softmax", "--only", "trton"], "unknown competitor 'trton'; known: cupy"),
    "unknown precision": (["run", "softmax", "--precision", "fp12"], "unknown precision 'fp12'; known: bf16"),
    "precision the op lacks": (["run", "softmax[m=4,n=4,int8]"], "unknown precision of softmax 'int8'"),
    "unknown suite": (["run", "softmax", "--suite", "larg"], "unknown suite 'larg'; known: c"),
    "unknown device": (["run", "softmax", "--device", "tpu"], "tpu"),
    "absent device": (["run", "softmax", "--device", "rocm"], "no ROCm device"),
    "zero": (["run", "softmax[m=0,n=4]"], "m in 'softmax[m=0,n=4]' must be positive"),
    "negative": (["run", "gemm[m=4,n=-4,k=4]"], "must be positive"),
    "not a number": (["run", "softmax[m=x,n=4]"], "m"),
    "larger than memory": (["run", "softmax[m=4000000,n=400000]", "--dtype", "fp32"], "GiB for inputs, output"),
    "missing kernel file": (["run", "softmax", "--load", "nowhere.py"], "nowhere.py: no such file"),
    "negative error": (["tune", "gemm", "--max-error", "-1"], "--max-error must be positive"),
    "weight of nothing": (["tune", "softmax", "--weight", "softmax[m=64,n=512]=0"], "write PROBLEM=NUMBER above 0"),
    "shared precisions": (["tune", "gemm", "--share", "--max-error", "1e-2"], "--share and --max-error: a budget is"),
    "error without bound": (["tune", "gemm", "--max-error", "nan"], "--max-error must be positive"),
    "no rounds": (["run", "softmax", "--rounds", "0"], "--rounds must be positive"),
    "a check without rounds": (["check", "--baseline", "x", "--rounds", "0"], "--rounds must be positive, not 0"),
    "no such folder": (["run", "softmax", "--json", "/no/such/folder/x.jsonl"], "there is no folder /no/such/folder"),
    "a folder as a file": (["run", "softmax", "--csv", "/tmp"], "--csv /tmp: is a folder; give a file in it"),
    "no such run": (["compare", "nothing", "latest"], "nothing"),
    "one run alone": (["compare", "latest"], "two runs are needed, such as latest~1 latest; or --base REV"),
    "rounds of stored runs": (["compare", "a", "b", "--rounds", "9"], "--rounds is about racing"),
    "a candidate without a base": (["compare", "--cand", "HEAD"], "--cand needs --base"),
    "too few deciding rounds": (["selfcheck", "--confirm", "3"], "--confirm must be 6 or more, not 3"),
    "more launches than deciding rounds": (["selfcheck", "--launches", "9", "--confirm", "8"], "as many --confirm (8)"),
    "a margin that is none": (["compare", "--base", "HEAD", "--margin", "-1"], "--margin is in percent"),
    "no such model": (["block", "--model", "gpt5"], "gpt5"),
    "cpu clock of many threads": (["run", "softmax", "--clock", "cpu", "--threads", "2"], "--threads 1"),
    "no threads": (["run", "softmax", "--threads", "0"], "--threads must be positive, not 0"),
    "unknown option": (["tune", "softmax", "--csv", "x"], "unknown option '--csv'; known: --budget, "),
    "one word too many": (["compare", "a", "b", "c"], "'c': nothing is expected there; next: bench.py compare --help"),
    "no problem": (["best"], "required: PROBLEM; next: bench.py best --help"),
    "bad environment": (["run", "softmax"], "ROOFTUNE_CACHE=lukewarm"),
    "an operator as a problem": (["run", "--problem", "softmax"], "'softmax' is not a problem; write for example"),
    "a size twice": (["run", "softmax[m=4,n=4,m=8]"], "'m=8' in 'softmax[m=4,n=4,m=8]': that was said before"),
    "two precisions": (["run", "softmax[m=4,n=4,fp32,bf16]"], "'bf16' in 'softmax[m=4,n=4,fp32,bf16]': that was"),
    "one of torch's calls": (
        ["run", "softmax", "--only", "torch:softmax"],
        "calls of torch race together; write torch",
    ),
    "nobody's operator": (["run", "softmax", "--only", "numba_amx"], "no competitor of softmax; known: cupy, numba, "),
    "nobody's gate": (
        ["compare", "--base", "HEAD", "softmax", "--only", "numba_amx"],
        "leave no competitor of softmax",
    ),
    "no sample length": (["run", "softmax", "--min-sample-ms", "nan"], "--min-sample-ms must be positive, not nan"),
    "a suite that is not needed": (["tune", "softmax[m=4,n=4]", "--suite", "larg"], "unknown suite 'larg'; known: c"),
    "a precision not needed": (["run", "softmax[m=4,n=4,fp32]", "--precision", "fp12"], "unknown precision 'fp12'"),
    "a plan for no device": (["run", "softmax", "--device", "gpu", "--dry-run"], "unknown device 'gpu'; known: cpu"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_input_gets_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    arguments, words = BAD[name]
    env = {"ROOFTUNE_CACHE": "lukewarm"} if name == "bad environment" else {}
    done = bench(*arguments, **env)
    assert done.returncode == ExitCode.USAGE, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rooftune: ")]
    assert len(lines) == 1, done.stderr
    assert words in lines[0]
    assert "Traceback" not in done.stderr
    assert not done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"[]", ""),
        (b"null", ""),
        (b"\x00" * 4096, ""),
        (b"\xff\xfe\xfa", ""),
        (b'{"schema": 99, "kind": "result"}\n', "99"),
    ],
)
def test_a_results_file_that_is_none_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    for arguments in (["compare", str(path), str(path)], ["check", "--baseline", str(path)]):
        done = bench(*arguments)
        assert done.returncode == ExitCode.USAGE, done.stderr
        assert str(path.name) in done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_the_environment_is_that_of_the_verb_asked_for(tmp_path: Path) -> None:
    """One variable may be an option of several verbs, with other values: only the one that runs reads it."""
    assert bench("run", "softmax", "--dry-run", ROOFTUNE_FORMAT="github").returncode == ExitCode.OK
    done = bench("export", "--out", str(tmp_path), ROOFTUNE_FORMAT="github")
    assert (done.returncode, "ROOFTUNE_FORMAT=github: choose from package" in done.stderr) == (ExitCode.USAGE, True)
    done = bench("run", "softmax", ROOFTUNE_DRY_RUN="on", ROOFTUNE_THREADS="")  # empty is unset
    assert (done.returncode, "numba" in done.stdout) == (ExitCode.OK, True), done.stderr
    for name, value in (("DRY_RUN", "please"), ("THREADS", "two")):
        done = bench("run", "softmax", **{f"ROOFTUNE_{name}": value})
        assert (done.returncode, f"ROOFTUNE_{name}={value}: " in done.stderr) == (ExitCode.USAGE, True)


def test_an_option_that_must_be_given_may_come_from_the_environment() -> None:
    done = bench("check", ROOFTUNE_BASELINE="nowhere")
    assert done.returncode == ExitCode.USAGE
    assert "no run 'nowhere'" in done.stderr


def test_a_device_in_capitals_gets_the_problems_of_its_kind() -> None:
    plans = {bench("run", "softmax", "--dry-run", "--device", name).stdout for name in ("cpu", "CPU")}
    assert len(plans) == 1


@pytest.mark.parametrize("names", [("numba",), ("mine", "other/mine")])
def test_files_whose_records_could_not_be_told_apart_are_refused(kernel, names: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    paths = [kernel(name=names[0])]
    for name in names[1:]:
        paths.append(paths[0].parent / f"{name}.py")
        paths[-1].parent.mkdir()
        paths[-1].write_text(paths[0].read_text())
    loads = [word for path in paths for word in ("--load", str(path))]
    done = bench("run", "softmax", "--dry-run", *loads)
    assert (done.returncode, "rename" in done.stderr) == (ExitCode.USAGE, True), done.stderr
    assert bench("run", "softmax", "--dry-run", *["--load", str(kernel())] * 2).returncode == ExitCode.OK


@pytest.mark.parametrize("arguments", [("run", "--dry-run"), ("selfcheck",)])
def test_a_file_of_an_operator_that_is_not_raced_is_refused(kernel, arguments: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    done = bench(*arguments, "gemm[m=8,n=8,k=8,fp32]", "--load", str(kernel()))
    assert done.returncode == ExitCode.USAGE
    assert "mine.py computes softmax, and no problem of it is asked for" in done.stderr


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ('DEVICES = ("cpu",)', 'DEVICES = "cpu"', "DEVICES must be a tuple of names"),
        ('DEVICES = ("cpu",)', 'DEVICES = ("gpu",)', "unknown device of DEVICES 'gpu'; known: cpu, cuda, rocm"),
        ('PRECISIONS = ("fp32",)', 'PRECISIONS = ("fp33",)', "unknown precision of PRECISIONS 'fp33'; known: bf16"),
        ('PRECISIONS = ("fp32",)', "PRECISIONS = ()", "PRECISIONS must be a tuple of names"),
        ("SPACE = Space()", 'SPACE = Space()\nREQUIRES = "torch"', "REQUIRES must be a tuple of names"),
        ("SPACE = Space()", 'SPACE = Space()\nENV = {"OMP_NUM_THREADS": "1"}', "ENV must have the form"),
        ("SPACE = Space()", "", "has no SPACE"),
    ],
)
def test_a_file_that_declares_nonsense_is_refused(kernel, before: str, after: str, words: str) -> None:  # type: ignore[no-untyped-def]
    path = kernel()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(UsageError, match=re.escape(words)):
        registry.user_impl(path)


def test_a_file_that_raises_on_import_stops_before_anything_is_timed(kernel) -> None:  # type: ignore[no-untyped-def]
    path = kernel()
    path.write_text(path.read_text() + "\nraise OSError('libfoo.so not found')\n")
    done = bench("run", "softmax[m=8,n=64]", "--load", str(path))
    assert done.returncode == ExitCode.USAGE
    assert "mine.py raises on import: OSError: libfoo.so not found" in done.stderr


@pytest.mark.slow
def test_a_users_kernel_joins_the_race_and_json_has_its_keys(kernel) -> None:  # type: ignore[no-untyped-def]
    done = bench("run", "softmax[m=64,n=256,fp32]", "--only", "torch", "--load", str(kernel()), "--rounds", "6",
                 "--evidence", "none", "--json", ROOFTUNE_CEILINGS="")  # fmt: skip
    assert done.returncode == ExitCode.OK, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    promised = "problem op shape precision impl config default status reason evidence time_s time_ci_s ratio_to_torch"
    promised += " ratio_ci tflops gbps roof error energy device"
    for row in rows:
        assert set(promised.split()) <= set(row)
        assert row["energy"]["joules"] is None
        assert row["energy"]["reason"]
    mine = next(r for r in rows if r["impl"] == "softmax/mine")
    assert mine["status"] == "ok"
    assert mine["shape"] == "m=64,n=256"
    assert mine["roof"] > 0
    low, high = mine["ratio_ci"]
    assert low <= mine["ratio_to_torch"] <= high


def test_a_wrong_kernel_has_no_time_and_exit_code_1(kernel) -> None:  # type: ignore[no-untyped-def]
    done = bench("run", "softmax[m=64,n=8192,fp32]", "--only", "torch", "--load", str(kernel("out.zero_()")),
                 "--rounds", "6", "--evidence", "none", "--json")  # fmt: skip
    assert done.returncode == ExitCode.REGRESSION
    mine = next(r for r in map(json.loads, done.stdout.splitlines()) if r["impl"] == "softmax/mine")
    assert (mine["status"], mine["time_s"], mine["rounds"]) == ("wrong", None, None)
    assert "Frobenius" in mine["reason"]


def test_a_kernel_that_one_brings_and_that_fails_is_exit_code_1(kernel) -> None:  # type: ignore[no-untyped-def]
    done = bench("run", "softmax[m=64,n=256,fp32]", "--only", "torch", "--load", str(kernel("raise ValueError('no')")),
                 "--rounds", "6", "--evidence", "none", "--json")  # fmt: skip
    assert done.returncode == ExitCode.REGRESSION, done.stderr
    status = {r["impl"]: r["status"] for r in map(json.loads, done.stdout.splitlines())}
    assert status.pop("softmax/mine").startswith("failed")
    assert "ok" in status.values()


def test_ceilings_of_another_device_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    log = store.Log(path)
    log.append({"kind": "session", "schema": 1, "device": {"kind": "cpu", "name": "another CPU"}})
    log.append({"kind": "ceilings", "schema": 1, "ceilings": {"threads": 1}})
    done = bench("run", "softmax[m=8,n=64,fp32]", "--only", "torch", "--threads", "1", ROOFTUNE_CEILINGS=str(path))
    assert done.returncode == ExitCode.USAGE
    assert "other.jsonl: no ceilings of" in done.stderr


def test_nothing_that_can_run_is_exit_code_4() -> None:
    done = bench("run", "softmax[m=8,n=64,bf16]", "--only", "triton", "--evidence", "none")
    assert done.returncode == ExitCode.NOTHING_RAN, done.stderr


def test_evidence_of_nobody_is_exit_code_4() -> None:
    done = bench("run", "softmax[m=8,n=64,fp32]", "--only", "numba", "--evidence", "only")
    assert (done.returncode, "nothing to prove" in done.stdout) == (ExitCode.NOTHING_RAN, True), done.stderr


@pytest.mark.slow
def test_two_runs_compare_and_the_gate_answers(tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = bench("run", "softmax[m=64,n=256,fp32]", "--only", "torch", "--rounds", "6", "--evidence", "none",
                     "--json", str(tmp_path / name))  # fmt: skip
        assert done.returncode == ExitCode.OK, done.stderr
    done = bench("compare", str(tmp_path / "a"), str(tmp_path / "b"), COLUMNS="40")  # a log is not 40 columns wide
    # two stored sessions can be alike or suspect, but they never confirm a regression by themselves
    assert done.returncode in (ExitCode.OK, ExitCode.INCONCLUSIVE), done.stdout
    assert "softmax[m=64,n=256,fp32]" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("run", "softmax[m=4000000,n=400000,fp32]"), ("tune", "softmax[m=64,n=512,fp32]", "--only", "torch")],
)
def test_a_command_that_is_refused_leaves_the_file_of_earlier_results(tmp_path: Path, arguments: tuple[str]) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("earlier results\n")
    done = bench(*arguments, "--json", str(path))
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert path.read_text() == "earlier results\n"


def test_the_package_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rooftune", "best"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert done.stderr.endswith("required: PROBLEM; next: rooftune best --help\n")


def test_a_folder_of_runs_that_cannot_be_made_is_told_with_what_sets_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = bench("run", "softmax[m=64,n=512,fp32]", ROOFTUNE_RESULTS_DIR=str(tmp_path / "file" / "runs"))
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert done.stderr.endswith(".jsonl: Not a directory; next: set ROOFTUNE_RESULTS_DIR\n")


@pytest.mark.parametrize(("disposition", "expected"), [("SIG_DFL", ExitCode.INTERRUPTED), ("SIG_IGN", ExitCode.OK)])
def test_a_closed_terminal_interrupts_unless_nohup_said_that_it_shall_not(disposition: str, expected: int) -> None:
    code = f"import os, signal, sys, bench; signal.signal(signal.SIGHUP, signal.{disposition})\n"
    code += "from rooftune import commands\n"
    code += "commands.VERBS['list'] = lambda chosen: (os.kill(os.getpid(), signal.SIGHUP), 0)[1]\n"
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(bench.main(['list']))"], cwd=ROOT)
    assert done.returncode == expected


def test_help_takes_little_more_cpu_time_than_python_itself() -> None:
    """Twice as much, where nothing but the standard library is imported; with numpy it would be seven times."""
    ours = min(_cpu_s("bench.py", "--help") for _ in range(3))
    assert ours < 4 * min(_cpu_s("-c", "pass") for _ in range(3))


def _cpu_s(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def test_a_package_that_is_missing_is_one_line() -> None:
    code = "import sys; sys.modules['rich'] = None; import bench; sys.exit(bench.main(['list']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == ExitCode.NOTHING_RAN, done.stderr
    assert done.stderr == "rooftune: rich is not installed; next: pip install rich\n"


def test_the_overview_names_what_is_missing_and_what_to_do_next() -> None:
    done = bench()
    assert done.returncode == ExitCode.OK
    for words in ("softmax", "numba", "triton", "suites: c", "next: python bench.py run"):
        assert words in done.stdout


def test_a_variable_is_checked_by_the_verb_that_reads_it_and_stands_for_a_required_option() -> None:
    assert bench("list", ROOFTUNE_FORMAT="github").returncode == ExitCode.OK
    done = bench("export", "--out", "x", ROOFTUNE_FORMAT="github")  # `check` has it, `export` does not
    assert done.returncode == ExitCode.USAGE
    assert "ROOFTUNE_FORMAT=github: choose from package, " in done.stderr
    done = bench("check", ROOFTUNE_BASELINE="/no/such/run")
    assert done.returncode == ExitCode.USAGE
    assert "required" not in done.stderr
    assert "/no/such/run" in done.stderr


def test_the_table_of_environment_variables_is_made_from_the_options() -> None:
    done = bench("doctor", "--environment", ROOFTUNE_ROUNDS="12")
    assert done.returncode == ExitCode.OK, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("ROOFTUNE_ROUNDS "))
    assert "--rounds" in line
    assert line.rstrip().endswith("12")
    assert "ROOFTUNE_RESULTS_DIR" in done.stdout
