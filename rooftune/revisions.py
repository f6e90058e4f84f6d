"""Kernels of another commit, measured by today's code.

What a commit's kernels are timed by must not differ from what today's are timed by, so a worker gets a copy of this
package whose `kernels` folder is the commit's. Everything lies in a temporary folder; the checkout is only read.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import rooftune
from rooftune import registry
from rooftune.core import UsageError
from rooftune.registry import Impl

LEFT_OUT = ("kernels", "__pycache__", "reference", "runs")  # of the copy: replaced, or not needed to measure


def commit(revision: str, beside: Path) -> str:
    """The short hash of a revision of the repository that a file or folder lies in.

    Raises:
        UsageError: no git, no repository, or no such revision.
    """
    known = _git(beside, "rev-parse", "--verify", "--quiet", "--short", f"{revision}^{{commit}}", check=False)
    if not known:
        recent = _git(beside, "for-each-ref", "--count=5", "--format=%(refname:short)", "refs/heads", "refs/tags")
        raise UsageError(
            f"unknown revision '{revision}' in {_top(beside)}; known: {', '.join(recent.decode().split())} and "
            "any commit; next: git log --oneline"
        )
    return known.decode().strip()


def head(beside: Path) -> str:
    """The short hash of what is checked out where a folder lies, with `-dirty` if something was edited since; empty
    where there is no git, no checkout, or another repository's (an installed package in somebody's working tree)."""
    try:
        if not _git(beside, "ls-files", ".", check=False):
            return ""
        told = _git(beside, "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*", check=False)
    except UsageError:
        return ""
    return told.decode().strip()


def home(revision: str, target: Path) -> Path:
    """A copy of this package with a revision's kernels, for `Impl.home`.

    Args:
        target: a folder that is made.
    Raises:
        UsageError: rooftune does not lie in a git checkout, or the revision has no kernels.
    """
    with _copying(target):
        _package(target)
        _extract(revision, registry.kernel_folder().resolve(), target / "rooftune" / "kernels")
    return target


def copy(target: Path) -> Path:
    """A copy of this package with the kernels as they lie here."""
    ignored = shutil.ignore_patterns("__pycache__")
    with _copying(target):
        _package(target)
        shutil.copytree(registry.kernel_folder(), target / "rooftune" / "kernels", ignore=ignored)
    return target


def copy_file(path: Path, target: Path) -> Path:
    """A copy of a user's kernel file, with the CUDA C++ of its name beside it."""
    with _copying(target):
        target.mkdir(parents=True)
        for each in path.parent.glob(f"{path.stem}.*"):
            shutil.copy(each, target)
    return target / path.name


@contextlib.contextmanager
def _copying(target: Path) -> Iterator[None]:
    """A full disk is no verdict about a revision, so it must not look like one (exit code 1)."""
    try:
        yield
    except OSError as error:
        why = str(error.args[0][-1][2]) if isinstance(error, shutil.Error) else error.strerror or str(error)
        why = why.partition(": ")[0]  # shutil's names both files
        raise UsageError(f"cannot copy kernels to {target}: {why}; next: set TMPDIR to a folder with room") from error


def _package(target: Path) -> None:
    shutil.copytree(Path(rooftune.__file__).parent, target / "rooftune", ignore=shutil.ignore_patterns(*LEFT_OUT))


def user_file(revision: str, path: Path, target: Path) -> Path:
    """A user's kernel file as it was in a revision of its own repository, with the folder that it lies in."""
    with _copying(target):
        _extract(revision, path.parent, target)
    if not (target / path.name).is_file():
        raise UsageError(f"{path.name} is not in revision {revision} of {_top(path)}")
    return target / path.name


def competitors(op: str, place: Path | None, files: list[Path]) -> list[Impl]:
    """The competitors of an operator: those of a `home` (today's: None), then users' files."""
    own = registry.impls(op) if place is None else registry.impls_at(op, place)
    return [*own, *(found for found in map(registry.user_impl, files) if found.op == op)]


def _top(beside: Path) -> Path:
    return Path(_git(beside, "rev-parse", "--show-toplevel").decode().strip())


def _extract(revision: str, folder: Path, target: Path) -> None:
    """A folder of the repository it lies in, as it was in a revision."""
    top = _top(folder)
    inside = folder.resolve().relative_to(top.resolve()).as_posix()
    data = _git(top, "archive", "--format=tar", f"{revision}:{'' if inside == '.' else inside}", check=False)
    if not data:
        raise UsageError(f"{inside} is not in revision {revision} of {top}")
    target.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        if hasattr(tarfile, "data_filter"):  # Python 3.11.4; git's own archives hold nothing that it refuses
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(target)


def _git(beside: Path, *arguments: str, check: bool = True) -> bytes:
    folder = beside if beside.is_dir() else beside.parent
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    except OSError as error:
        raise UsageError(f"git cannot be run, and revisions are taken from it: {error}") from error
    if done.returncode and check:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        raise UsageError(
            f"{folder}: {text[-1] if text else 'git ' + arguments[0] + ' failed'}; revisions need a checkout"
        )
    return b"" if done.returncode else done.stdout
