"""Kernels of another commit: taken from git, run by today's measuring code, judged against today's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rooftune import registry, revisions
from rooftune.bench import parser
from rooftune.commands import common
from rooftune.core import ExitCode, Status, UsageError
from rooftune.lab import Lab
from rooftune.results import store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git not installed")
NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch not installed")
KERNEL = '''"""Softmax by torch, {times} time(s)."""

from rooftune.core import Space

OP = "softmax"
DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
REQUIRES = ("torch",)
SPACE = Space(axes={{"unroll": (1,)}}, default={{"unroll": 1}})


def build(problem, config):
    import torch

    def run(out, x):
        for _ in range({times}):
            torch.softmax(x, -1, out=out)
        {more}

    return run
'''


def git(folder: Path, *arguments: str) -> None:
    me = ("-c", "user.name=me", "-c", "user.email=me@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *me, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with a kernel file, of which the working tree has another version."""
    folder = tmp_path / "repo" / "kernels" / "softmax"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("OP = None\n")
    (folder / "mine.py").write_text(KERNEL.format(times=1, more="pass"))
    (folder.parent / "common").mkdir()
    (folder.parent / "common" / "shared.py").write_text("ONE = 1\n")
    git(tmp_path / "repo", "init", "-q")
    git(tmp_path / "repo", "add", "-A")
    git(tmp_path / "repo", "commit", "-qm", "one")
    (folder / "mine.py").write_text(KERNEL.format(times=4, more="pass"))
    return tmp_path / "repo"


def test_what_is_checked_out_has_a_name(repository: Path, tmp_path: Path) -> None:
    folder = repository / "kernels"
    assert revisions.head(folder) == f"{revisions.commit('HEAD', folder)}-dirty"
    git(repository, "stash", "-q")
    assert revisions.head(folder) == revisions.commit("HEAD", folder)
    assert revisions.head(tmp_path) == ""
    installed = repository / "site-packages" / "kernels"
    installed.mkdir(parents=True)
    (installed / "mine.py").write_text("")
    assert revisions.head(installed) == ""


def bench(repository: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = str(repository / "kernels" / "softmax" / "mine.py")
    command = [sys.executable, "bench.py", verb, *arguments, "--load", path, "softmax[m=256,n=256,fp32]", "-q"]
    command += ["--rounds", "8", "--confirm", "12", "--threads", "1", "--launches", "1"]
    env = {**os.environ, "ROOFTUNE_RESULTS_DIR": str(repository.parent / "runs")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)


def test_a_file_as_it_was(repository: Path, tmp_path: Path) -> None:
    path = repository / "kernels" / "softmax" / "mine.py"
    old = revisions.user_file("HEAD", path, tmp_path / "old")
    assert old.read_text() == KERNEL.format(times=1, more="pass")
    assert registry.user_impl(old).key == registry.user_impl(path).key == "softmax/mine"
    (path.parent / "new.py").write_text("")
    with pytest.raises(UsageError, match=r"new\.py is not in revision HEAD"):
        revisions.user_file("HEAD", path.parent / "new.py", tmp_path / "none")


def test_a_revision_that_is_not_there_and_a_folder_without_git(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown revision 'nope' in .*repo; known: "):
        revisions.commit("nope", repository)
    assert len(revisions.commit("HEAD", repository / "kernels" / "softmax" / "mine.py")) >= 4
    outside = tmp_path / "outside"
    outside.mkdir()
    with pytest.raises(UsageError, match="revisions need a checkout"):
        revisions.commit("HEAD", outside)


def test_a_home_holds_the_kernels_of_its_revision(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = repository / "kernels"
    monkeypatch.setattr(registry, "kernel_folder", lambda: kernels)
    (kernels / "common" / "shared.py").write_text("ONE = 2\n")
    home = revisions.home("HEAD", tmp_path / "base")
    assert (home / "rooftune" / "lab.py").read_bytes() == (ROOT / "rooftune" / "lab.py").read_bytes()
    assert (home / "rooftune" / "kernels" / "common" / "shared.py").read_text() == "ONE = 1\n"
    (old,) = registry.impls_at("softmax", home)
    assert (old.key, old.home) == ("softmax/mine", home)
    assert (
        old.source_hash != registry._impl("softmax", kernels / "softmax" / "mine.py", old.module, kernels).source_hash
    )


@NEEDS_TORCH
def test_a_worker_runs_the_kernels_of_its_home(tmp_path: Path) -> None:
    """What is a wrong result there is a right one here, in one Lab."""
    home = revisions.copy(tmp_path / "base")
    path = home / "rooftune" / "kernels" / "softmax" / "torch.py"
    path.write_text(path.read_text() + "\n\ndef build(problem, config):\n    return lambda out, x: out.zero_()\n")
    old = next(i for i in registry.impls_at("softmax", home) if i.name == "torch")
    problem = registry.problem("softmax[m=4,n=64,fp32]")
    with Lab("cpu") as lab:
        found = [
            lab.prepare(impl, problem, lab.space(impl, problem)["default"], 1, thorough=False).status
            for impl in (old, registry.impl("softmax/torch"))
        ]
    assert found == [Status.WRONG, Status.OK]


def test_launches_share_the_deciding_rounds_not_those_of_the_screen() -> None:
    chosen = parser().parse_args(["compare", "--base", "HEAD", "--rounds", "8", "--launches", "16"])
    assert common.options(chosen).launches == 16


@NEEDS_TORCH
def test_a_slower_kernel_is_found_and_an_unchanged_one_is_not_raced(repository: Path) -> None:
    done = bench(repository, "compare", "--base", "HEAD")
    assert done.returncode == ExitCode.REGRESSION, done.stdout + done.stderr
    assert "slower" in done.stdout
    assert store.list_runs(repository.parent / "runs") == []  # an old kernel's times are nobody's latest run
    (path,) = (repository.parent / "runs" / "revisions").iterdir()
    kept = [line for line in store.Log(path).read()[0] if line["kind"] == "revision"]
    assert [len(line["rounds"]) for line in kept] == [8, 8, 12, 12]
    assert [line["side"].partition(" ")[0] for line in kept] == ["HEAD", "the"] * 2
    git(repository, "checkout", "-q", "--", ".")
    done = bench(repository, "compare", "--base", "HEAD")
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    assert "no competitor that both have changed" in done.stdout


@NEEDS_TORCH
def test_a_wrong_kernel_is_broken(repository: Path) -> None:
    (repository / "kernels" / "softmax" / "mine.py").write_text(KERNEL.format(times=1, more="out[0, 0] += 0.5"))
    done = bench(repository, "compare", "--base", "HEAD", "--json")
    assert done.returncode == ExitCode.REGRESSION, done.stdout + done.stderr
    assert '"verdict": "broken"' in done.stdout


@NEEDS_TORCH
def test_a_kernel_against_itself_in_processes_of_their_own(repository: Path) -> None:
    done = bench(repository, "selfcheck", "--only", "torch", "--inconclusive", "pass")
    assert "false alarms: " in done.stdout, done.stdout + done.stderr
    assert done.returncode == (ExitCode.OK if "false alarms: 0 in 1 cells" in done.stdout else ExitCode.INCONCLUSIVE)
    assert "the working tree" in next((repository.parent / "runs" / "revisions").iterdir()).read_text()


def test_a_disk_without_room_for_copies_is_one_line_and_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for make in (revisions.copy, lambda target: revisions.copy_file(Path(__file__), target)):
        with pytest.raises(UsageError, match=r"cannot copy kernels to .*: Not a directory; next: set TMPDIR"):
            make(tmp_path / "file" / "below")

    def full(source: Path, target: str) -> None:
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(shutil.copytree, "__defaults__", (False, None, full, False, False))
    with pytest.raises(UsageError, match=r"cannot copy kernels to [^:]*: \[Errno 28\] No space left on device; next"):
        revisions.copy(tmp_path / "copy")


def test_nowhere_for_temporary_files_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a read-only file system."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UsageError, match=r"No usable temporary directory found in .*/nowhere.*; next: set TMPDIR"):
        Lab()
