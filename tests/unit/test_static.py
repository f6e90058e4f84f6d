"""Compile-time resources: rows, the cache, the baseline and its verdicts; by a stand-in kernel and one real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rooftune import registry
from rooftune import static as compiling
from rooftune.bench import main
from rooftune.core import ExitCode, UsageError
from rooftune.evidence import ARCHITECTURES
from rooftune.results import static, store
from rooftune.results.static import Verdict

KEYS = {
    *("impl", "precision", "config", "default", "arch", "registers", "spill_bytes", "shared_bytes", "occupancy"),
    *("tensor_core_instructions", "toolchain", "status", "reason"),
}
# What a compiler would say stands in the file itself, so that a test changes it as an edit would.
KERNEL = '''"""A user's kernel with a compile_for."""
from pathlib import Path
from rooftune.core import Resources, Space, UsageError
OP = "softmax"
DEVICES = ("cuda",)
PRECISIONS = ("bf16",)
SPACE = Space(axes={"block_n": (64, 128, 256)}, default={"block_n": 128})
REGISTERS, SPILLS, SHARED, UNITS = 64, 0, 1024, ("HMMA.16816.F32.BF16",)
def build(problem, config):
    raise UsageError("no device in this test")
def compile_for(problem, config, arch):
    with Path(__file__).with_name("calls.log").open("a") as log:
        log.write(arch + "\\n")
    if arch == "sm_80":
        raise UsageError("needs sm_90 or newer")
    return Resources(arch, REGISTERS, SPILLS, SHARED * config["block_n"] // 128, UNITS, "acme 1.0", 256)
'''


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "mine.py"
    path.write_text(KERNEL)
    return path


def rows_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["static", *arguments, "--json"])
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def compiled(file: Path) -> int:
    """How often the kernel's compile_for was called so far."""
    log = file.with_name("calls.log")
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_row_per_kernel_config_and_architecture(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = rows_of(capsys, "--load", str(file), "--configs", "all", "--arch", "sm_80,sm_90a,sm_120a")
    assert code == ExitCode.OK
    assert len(rows) == 9
    for row in rows:
        assert set(row) >= KEYS
        assert row["evidence"] == "compiled"
    assert [r["config"]["block_n"] for r in rows if r["default"]] == [128] * 3
    first = rows[0]
    assert (first["arch"], first["status"], first["reason"]) == ("sm_80", "skipped", "needs sm_90 or newer")
    assert first["occupancy"] is None
    hopper = next(r for r in rows if r["arch"] == "sm_90a" and r["default"])
    assert (hopper["registers"], hopper["spill_bytes"], hopper["shared_bytes"]) == (64, 0, 1024)
    assert hopper["occupancy"] == 0.5  # 4 blocks of 8 warps by registers, of 64
    assert hopper["tensor_core_instructions"] == ["HMMA.16816.F32.BF16"]


def test_a_second_run_compiles_nothing_until_the_source_changes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = rows_of(capsys, "--load", str(file), "--arch", "sm_90a,sm_120a")
    assert compiled(file) == 2
    assert rows_of(capsys, "--load", str(file), "--arch", "sm_90a,sm_120a") == first
    assert compiled(file) == 2
    rows_of(capsys, "--load", str(file), "--arch", "sm_90a,sm_120a,sm_100a")
    assert compiled(file) == 3
    file.write_text(KERNEL.replace("= 64, 0", "= 80, 0"))
    _, rows = rows_of(capsys, "--load", str(file), "--arch", "sm_90a")
    assert (compiled(file), rows[0]["registers"]) == (4, 80)


def test_what_was_compiled_is_known_to_the_analytic_model(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    impl, problem = registry.user_impl(file), registry.problem("softmax[m=8192,n=4096,bf16]")
    configs = [{"block_n": 64}, {"block_n": 128}]
    assert compiling.known(impl, problem, configs, "sm_90a") == {}
    rows_of(capsys, "--load", str(file), "--arch", "sm_90a,sm_80")
    found = compiling.known(impl, problem, configs, "sm_90a")
    assert found.keys() == {1}
    assert (found[1].registers, found[1].threads, list(found[1].tensor_core)) == (64, 256, ["HMMA.16816.F32.BF16"])
    assert compiling.known(impl, problem, configs, "sm_80") == {}  # refused there: nothing to know


CHANGES = {
    "nothing": ("", "", ExitCode.OK, ""),
    "spills": ("= 64, 0", "= 64, 8", ExitCode.REGRESSION, "spills 0 -> 8 bytes"),
    "occupancy": ("= 64, 0", "= 96, 0", ExitCode.REGRESSION, "occupancy 50.0% -> 25.0% (registers 64 -> 96)"),
    "more registers, same occupancy": ("= 64, 0", "= 60, 0", ExitCode.OK, ""),
    "no tensor cores": ('("HMMA.16816.F32.BF16",)', "()", ExitCode.REGRESSION, "lost its tensor-core instructions"),
    "a better unit": ("HMMA.16816", "HGMMA.64x64x16", ExitCode.REGRESSION, "lost its tensor-core instructions: mma"),
    "does not compile": ("    if arch", "    raise ValueError('bad ptx')\n    if arch", ExitCode.REGRESSION, "bad ptx"),
    "faster": ("= 64, 0", "= 32, 0", ExitCode.OK, "occupancy 50.0% -> 100.0%"),
    "another compiler": ("acme 1.0", "acme 2.0", ExitCode.INCONCLUSIVE, "acme 1.0 -> acme 2.0"),
    "a config that is not valid any more": ("(64, 128, 256)", "(128, 256)", ExitCode.INCONCLUSIVE, "baseline only"),
}


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("baseline")
    file, saved = folder / "mine.py", folder / "base.jsonl"
    file.write_text(KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOFTUNE_CACHE_DIR", str(folder))
        asked = ["--load", str(file), "--arch", "sm_90a", "--configs", "3"]
        assert main(["static", *asked, "--save", str(saved)]) == ExitCode.OK
    return saved


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_the_gate(file: Path, baseline: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    old, new, code, words = CHANGES[name]
    file.write_text(KERNEL.replace(old, new, 1) if old else KERNEL)
    assert main(["static", "--load", str(file), "--arch", "sm_90a", "--baseline", str(baseline)]) == code
    shown = " ".join(capsys.readouterr().out.split())
    assert words in shown
    assert ("worse" in shown or "broken" in shown) == (code == ExitCode.REGRESSION)


def test_a_kernel_that_is_not_here_any_more_is_not_passed_over(
    file: Path, baseline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, gone = static.load(baseline), plain(impl="softmax/mine", problem="softmax[m=1,n=1,bf16]", precision="bf16")
    both = tmp_path / "both.jsonl"
    static.save(both, [*more, gone, plain(impl="gemm/other")])
    asked = ["static", "--load", str(file), "--arch", "sm_90a", "--baseline"]
    assert main([*asked, str(both)]) == ExitCode.INCONCLUSIVE  # its problem is not compiled any more
    assert "gone" in capsys.readouterr().out
    static.save(both, [plain(impl="gemm/other")])
    assert main([*asked, str(both)]) == ExitCode.USAGE  # nothing to compare is no success
    assert "no row about softmax/mine" in capsys.readouterr().err


def test_a_kernel_that_no_multiprocessor_holds_is_said_to_be_so(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(KERNEL.replace("= 64, 0, 1024", "= 64, 0, 131072"))
    code, rows = rows_of(capsys, "--load", str(file), "--arch", "sm_90a,sm_120a")
    assert code == ExitCode.OK
    assert [r["blocks_per_sm"] for r in rows] == [1, 0]
    assert "sm_120a cannot hold one block: shared memory (131072 bytes of 101376)" in rows[1]["reason"]


def test_forms_for_programs(file: Path, tmp_path: Path) -> None:
    csv, md = tmp_path / "s.csv", tmp_path / "s.md"
    assert main(["static", "--load", str(file), "--arch", "sm_90a", "--csv", str(csv), "--md", str(md), "-q"]) == 0
    header, line = csv.read_text().splitlines()
    assert header == ",".join(static.COLUMNS)
    assert "HMMA.16816.F32.BF16" in line
    assert "| softmax/mine | bf16 |" in md.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["softmax", "--arch", "sm_70"], "sm_70"),
        (["softmax", "--precision", "fp12"], "fp12"),
        (["softmx"], "softmx"),
        (["softmax/torch"], "compile_for"),
        (["softmax", "--baseline", "/nowhere/b.jsonl"], "/nowhere/b.jsonl"),
        (["softmax", "--save", "/nowhere/b.jsonl"], "no folder /nowhere"),
        (["softmax/cupy", "--configs", "0"], "--configs 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["static", *arguments]) == ExitCode.USAGE
    error = capsys.readouterr().err
    assert words in error
    assert error.count("rooftune: ") == 1


def plain(**changes: Any) -> dict[str, Any]:
    row = {
        "impl": "gemm/x",
        "problem": "gemm[m=1,n=1,k=1,bf16]",
        "precision": "bf16",
        "config": {},
        "default": True,
        "arch": "sm_90a",
        "status": "ok",
        "reason": "",
        "registers": 64,
        "spill_bytes": 0,
        "shared_bytes": 0,
        "threads": 128,
        "occupancy": 0.5,
        "blocks_per_sm": 8,
        "occupancy_limit": "registers",
        "tensor_core_instructions": [],
        "toolchain": "t 1",
        "packages": {"t": "1"},
        "source_hash": "0123456789abcdef",
    }
    return row | changes


def test_units_do_not_depend_on_whether_a_disassembler_was_there() -> None:
    machine, text = ["HGMMA.64x256x16.F32.BF16"], ["wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"]
    for old, new in ((machine, text), (text, machine)):
        found = static.compare(
            [plain(tensor_core_instructions=old)], [plain(tensor_core_instructions=new, source_hash="f" * 16)]
        )
        assert [c.verdict for c in found] == [Verdict.SAME]
    fallen = static.compare(
        [plain(tensor_core_instructions=machine)], [plain(tensor_core_instructions=["HMMA.16816.F32"])]
    )
    assert fallen[0].verdict == Verdict.WORSE


def test_a_baseline_of_an_older_source_is_said_to_be_so_and_still_judged(capsys: pytest.CaptureFixture[str]) -> None:
    old = [plain(), plain(arch="sm_80"), plain(impl="gemm/y")]
    new = [plain(source_hash="f" * 16), plain(arch="sm_80", source_hash="f" * 16), plain(impl="gemm/y"),
           plain(config={"tile": 2}, default=False)]  # fmt: skip
    found = static.compare(old, new)
    assert static.gate(found) == ExitCode.OK
    assert {c.older for c in found if c.row["impl"] == "gemm/x" and c.row["default"]} == {"0123456789abcdef"}
    static.change_table(found, Console(width=200))
    said = capsys.readouterr().out
    assert "the baseline is of an older source of: gemm/x (2)" in said
    worse = static.compare(old, [new[0] | {"spill_bytes": 8}, *new[1:]])
    assert static.gate(worse) == ExitCode.REGRESSION


def test_a_package_that_is_gone_is_not_a_regression() -> None:
    lost = plain(status="skipped", reason="t not installed", packages={})
    found = static.compare([plain()], [lost])
    assert found[0].verdict == Verdict.INCOMPARABLE
    assert "t 1 -> absent" in found[0].text
    assert static.gate(found) == ExitCode.INCONCLUSIVE


def test_a_damaged_baseline_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    static.save(path, [plain(), plain(arch="sm_80")])
    assert len(static.load(path)) == 2
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"registers":64', b'"registers":32', 1))
    with pytest.raises(UsageError, match="1 damaged"):
        static.load(path)
    path.write_bytes(data[: data.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(UsageError, match="1 of 2 rows"):
        static.load(path)
    store.atomic_write(path, store.seal({"kind": "result", "schema": 1}) + "\n")
    with pytest.raises(UsageError, match="not a static baseline"):
        static.load(path)


def test_the_committed_baseline_is_read_and_a_doctored_copy_of_it_fails(tmp_path: Path) -> None:
    committed = store.REFERENCE / "static" / "defaults.jsonl"
    assert committed not in store.list_runs(store.REFERENCE)  # it is no run, and no run's name is its
    rows = static.load(committed)
    assert {r["arch"] for r in rows} == set(ARCHITECTURES)
    assert {r["impl"].partition("/")[0] for r in rows} == set(registry.op_names())
    assert all(r["default"] for r in rows)
    assert committed.stat().st_size < 2**19
    assert static.gate(static.compare(rows, [*rows, plain(impl="gemm/added", default=False)])) == ExitCode.OK
    good = next(n for n, r in enumerate(rows) if r["tensor_core_instructions"])
    for change in ({"spill_bytes": -1}, {"occupancy": 2.0}, {"tensor_core_instructions": ["UTCHMMA"]}):
        copy = tmp_path / "doctored.jsonl"
        static.save(copy, [*rows[:good], rows[good] | change, *rows[good + 1 :]])
        found = static.compare(static.load(copy), rows)
        assert static.gate(found) == ExitCode.REGRESSION, change
        assert [c.row["impl"] for c in found if c.verdict == Verdict.WORSE] == [rows[good]["impl"]]


def test_what_cannot_be_kept_is_compiled_and_shown_all_the_same(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A read-only cache folder (here: one below a file, which root may not write either), and a user without a home."""
    (tmp_path / "no-folder").touch()
    for folder in (tmp_path / "no-folder", None):
        if folder is None:
            monkeypatch.delenv("ROOFTUNE_CACHE_DIR")
            monkeypatch.setattr("rooftune.static.cache_folder", no_home)
        else:
            monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(folder))
        before = compiled(file)
        code = main(["static", "--load", str(file), "--arch", "sm_90a,sm_100a", "--json"])
        said = capsys.readouterr()
        assert (code, compiled(file) - before) == (ExitCode.OK, 2)
        assert [json.loads(line)["status"] for line in said.out.splitlines()] == ["ok", "ok"]
        assert said.err.count("is not kept in") == 1
    assert main(["list"]) == ExitCode.OK


def no_home(kind: str) -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_real_kernel_against_its_own_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As CI does it: save, then judge; the numbers come from ptxas."""
    monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(tmp_path / "cache"))
    asked = ("softmax/cupy", "--precision", "bf16", "--arch", "sm_80,sm_90a")
    code, rows = rows_of(capsys, *asked, "--save", str(tmp_path / "b"))
    if all("not installed" in r["reason"] or "NVRTC is not usable" in r["reason"] for r in rows):
        pytest.skip(rows[0]["reason"])
    assert code == ExitCode.OK
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert 0 < row["occupancy"] <= 1
        assert row["spill_bytes"] == 0
    assert main(["static", *asked, "--baseline", str(tmp_path / "b")]) == ExitCode.OK
    assert "2 of 2 rows are as in the baseline" in capsys.readouterr().out
