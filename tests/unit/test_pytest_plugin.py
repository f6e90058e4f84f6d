"""The pytest plugin, as a user has it: in a pytest run of its own, with and without pytest-benchmark."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rooftune

HOME = Path(rooftune.__file__).resolve().parent.parent
BENCHMARK = importlib.util.find_spec("pytest_benchmark") is not None

TESTS = """
import pytest

@pytest.mark.benchmark(group="mine")
def test_right(kernel_benchmark):
    record = kernel_benchmark("softmax/torch", "softmax[m=4,n=300,bf16]", rounds=6)
    assert record.status == "ok"
    assert record.error["rel_fro"] < 2.5e-3

def test_wrong(kernel_benchmark):
    kernel_benchmark("file:{folder}/zeros.py", "softmax[m=4,n=300,fp32]")

def test_elsewhere(kernel_benchmark):
    kernel_benchmark("file:{folder}/elsewhere.py", "softmax[m=4,n=300,fp32]")

def test_unknown(kernel_benchmark):
    kernel_benchmark("softmax/tourch", "softmax[m=4,n=300,fp32]")

def test_other_operator(kernel_benchmark):
    kernel_benchmark("softmax/torch", "layernorm[m=4,n=300,fp32]")
"""
KERNEL = '''"""A kernel."""
from rooftune.core import Space
OP = "softmax"
DEVICES = ("{device}",)
PRECISIONS = ("fp32",)
SPACE = Space()
def build(problem, config):
    def run(out, x):
        out.zero_()
    return run
'''


def pytest_run(folder, *arguments, benchmark=True):
    """A pytest run on the files above; installed plugins stay out, so that these two decide."""
    (folder / "test_it.py").write_text(TESTS.replace("{folder}", str(folder)))
    (folder / "zeros.py").write_text(KERNEL.replace("{device}", "cpu"))
    (folder / "elsewhere.py").write_text(KERNEL.replace("{device}", "rocm"))
    plugins = ["-p", "rooftune.pytest_plugin"] + (["-p", "benchmark"] if benchmark else [])
    command = [sys.executable, "-m", "pytest", "-rfs", "-p", "no:cacheprovider", *plugins, *arguments, "test_it.py"]
    # pytest-benchmark measures nothing under xdist, and it would think itself there if we are
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env = outside | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(HOME), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout + done.stderr


@pytest.mark.skipif(not BENCHMARK, reason="pytest-benchmark not installed")
def test_rounds_reach_the_table_and_the_json(tmp_path):
    output = pytest_run(tmp_path, "--benchmark-json=out.json", "--rooftune-threads=1")
    assert "3 failed, 1 passed, 1 skipped" in output, output
    assert "FAILED test_it.py::test_wrong - Failed: softmax/zeros on softmax[m=4,n=300,fp32]: wrong: " in output
    assert "softmax/elsewhere: no ROCm device" in output
    assert "unknown competitor of softmax 'tourch'; known: " in output
    assert "softmax/torch is a competitor of softmax: it does not compute layernorm[" in output
    assert "was not used" not in output
    assert "benchmark 'mine'" in output
    (entry,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    record = entry["extra_info"]["rooftune"]
    assert entry["name"] == "test_right"
    assert entry["options"]["timer"] == "rooftune_rounds"
    # a round's figure is its 25 % order statistic: of five samples the second smallest
    assert entry["stats"]["data"] == [sorted(samples)[1] for samples in record["rounds"]]
    assert entry["stats"]["rounds"] == 6
    assert entry["stats"]["median"] == pytest.approx(record["time_s"])
    assert record["impl"] == "softmax/torch"
    assert record["regime"]["threads"] == 1
    assert record["time_ci_s"][0] <= record["time_s"] <= record["time_ci_s"][1]


@pytest.mark.skipif(not BENCHMARK, reason="pytest-benchmark not installed")
def test_disabled_it_only_checks(tmp_path):
    output = pytest_run(tmp_path, "--benchmark-disable", "-k", "right")
    assert "1 passed, 4 deselected" in output
    assert "benchmark 'mine'" not in output
    assert "was not used" not in output


@pytest.mark.parametrize(
    ("argument", "variable", "words"),
    [
        ("--rooftune-threads=0", "1", "Failed: --rooftune-threads must be positive, not 0"),
        ("--rooftune-threads=9999", "1", "Failed: --rooftune-threads 9999: this process may use "),
        ("-q", "two", "Failed: ROOFTUNE_THREADS=two: not int; this process may use "),
    ],
)
def test_threads_that_are_none_are_refused(tmp_path, monkeypatch, argument, variable, words):
    monkeypatch.setenv("ROOFTUNE_THREADS", variable)
    output = pytest_run(tmp_path, argument, "-k", "right", benchmark=False)
    assert f"FAILED test_it.py::test_right - {words}" in output
    assert "Traceback" not in output


@pytest.mark.skipif(not BENCHMARK, reason="pytest-benchmark not installed")
def test_no_rounds_are_no_time_of_zero(tmp_path):
    call = 'kernel_benchmark("softmax/torch", "softmax[m=4,n=300,fp32]", rounds=0)'
    (tmp_path / "test_none.py").write_text(f"def test_none(kernel_benchmark):\n    {call}\n")
    output = pytest_run(tmp_path, "test_none.py", "-k", "none")
    assert "Failed: rounds must be positive, not 0" in output
    assert "1 failed" in output


def test_without_pytest_benchmark_it_only_checks(tmp_path):
    output = pytest_run(tmp_path, "-k", "right or wrong", benchmark=False)
    assert "1 failed, 1 passed, 3 deselected" in output
    assert "softmax/zeros on softmax[m=4,n=300,fp32]: wrong: " in output


@pytest.mark.skipif(not BENCHMARK, reason="pytest-benchmark not installed")
def test_it_counts_as_a_benchmark(tmp_path):
    assert "5 skipped" in pytest_run(tmp_path, "--benchmark-skip")


@pytest.mark.skipif(not BENCHMARK, reason="pytest-benchmark not installed")
def test_the_fixture_of_pytest_benchmark_beside_ours_is_refused(tmp_path):
    (tmp_path / "test_both.py").write_text("def test_both(benchmark, kernel_benchmark):\n    pass\n")
    output = pytest_run(tmp_path, "test_both.py", "-k", "both")
    assert "take kernel_benchmark without benchmark" in output


def test_loading_it_imports_nothing_heavy():
    code = (
        "import sys, pytest; before = set(sys.modules); import rooftune.pytest_plugin;"
        "print(sorted({m.partition('.')[0] if not m.startswith('rooftune') else m for m in set(sys.modules) - before}))"
    )
    env = os.environ | {"PYTHONPATH": str(HOME)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "'rooftune', 'rooftune.pytest_plugin']" in done.stdout
    for heavy in ("torch", "numpy", "rich", "triton", "numba", "cupy", "pytest_benchmark"):
        assert f"'{heavy}'" not in done.stdout
