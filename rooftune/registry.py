"""What is here: the folders are the registry.

`kernels/<op>/__init__.py` declares the operator, `kernels/<op>/<backend>[_variant].py` is a competitor.
Nothing is imported to list them: a competitor's declarations (`DEVICES`, `PRECISIONS`, ...) are literals
and are read from its syntax tree, so `list` works where triton or cupy is not installed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from rooftune import sources
from rooftune.core import PRECISIONS, Op, Problem, RooftuneError, UsageError, unknown
from rooftune.device import VENDORS

KERNELS = "rooftune.kernels"
ENTRY_POINTS = "rooftune.kernels"  # group: a package with the same folder layout
MODES = ("native", "emulate", "compile")  # of a worker
LITERALS = ("DEVICES", "PRECISIONS", "REQUIRES", "ENV", "OP", "BASELINE", "PER_SHAPE")


@dataclass(frozen=True)
class Impl:
    """One competitor: a file. `name` is `numba`, `key` is `gemm/numba`.

    `emulates` and `compiles` say whether the file can prove itself without its device. `per_shape`
    marks a compiler that makes another kernel for every shape: it is checked on the problem's own.
    `language` is the `common/<language>.py` that it builds on, if there is one. `home` is the folder of the copy of
    this package that a worker runs it from, if that is not this one (`revisions`).
    """

    op: str
    name: str
    path: Path
    module: str
    summary: str
    devices: tuple[str, ...]
    precisions: tuple[str, ...]
    requires: tuple[str, ...]
    language: str = ""
    env: dict[str, dict[str, str]] = field(hash=False, compare=False, default_factory=dict)
    emulates: bool = False
    compiles: bool = False
    baseline: bool = False
    per_shape: bool = False
    home: Path | None = None

    @property
    def key(self) -> str:
        return f"{self.op}/{self.name}"

    @property
    def missing(self) -> str | None:
        """Why this cannot be imported here, or None. Found without importing the backend."""
        for package in self.requires:
            try:
                found = importlib.util.find_spec(package)
            except (ImportError, ValueError):
                found = None
            if found is None:
                return f"{package} not installed"
        return None

    def load(self) -> ModuleType:
        """Import the competitor. Only a worker does this: it may crash or hang."""
        if self.module.startswith("file:"):
            return load_file(self.path)
        return importlib.import_module(self.module)

    @property
    def source_hash(self) -> str:
        """Hash of the files it is made of, see `sources`."""
        roots = dict(_roots())
        if self.home is not None:
            roots[KERNELS] = _kernels_at(self.home)
        return sources.digest(self.path, roots)


def load_file(path: Path) -> ModuleType:
    """Import one file that is not part of a package, under a name of its own."""
    name = f"rooftune_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be loaded as Python; --load takes one .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def kernel_folder() -> Path:
    """Our own kernels."""
    return Path(next(iter(importlib.import_module(KERNELS).__path__)))


def _kernels_at(home: Path) -> Path:
    return home / "rooftune" / "kernels"


def _roots() -> Iterator[tuple[str, Path]]:
    """Our kernels folder, then those of packages that announce one."""
    yield KERNELS, kernel_folder()
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINTS):
        spec = importlib.util.find_spec(point.value)
        for place in (spec.submodule_search_locations or ()) if spec else ():
            yield point.value, Path(place)


@cache
def op_names() -> tuple[str, ...]:
    """Operators, in alphabetical order."""
    found = set()
    for _, root in _roots():
        for init in root.glob("*/__init__.py"):
            if re.search(r"^OP\b", init.read_text(), re.MULTILINE):
                found.add(init.parent.name)
    return tuple(sorted(found))


@cache
def op(name: str) -> Op:
    """The operator of that name.

    Raises:
        UsageError: there is none; the text lists those there are.
    """
    if name in op_names():
        for package, root in _roots():
            if (root / name / "__init__.py").exists():
                return _declared(f"{package}.{name}", root / name / "__init__.py")
    raise unknown("op", name, op_names())


def judge_hash(name: str) -> str:
    """Hash of what judges an operator's competitors: its inputs, reference and limits, and what these import."""
    roots = dict(_roots())
    return next((sources.digest(r / name / "__init__.py", roots) for r in roots.values() if (r / name).is_dir()), "")


def _declared(module: str, path: Path) -> Op:
    """The `OP` of an operator's file. Every verb reads all of them, so a broken one must say which it is."""
    try:
        found = importlib.import_module(module).OP
    except RooftuneError as error:
        raise UsageError(f"{path}: {error}") from error
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        at = f" ({Path(where.filename).name}:{where.lineno})" if not isinstance(error, SyntaxError) else ""
        raise UsageError(f"{path} raises on import: {type(error).__name__}: {error}{at}") from error
    if not isinstance(found, Op):
        raise UsageError(f"{path}: OP is a {type(found).__name__}; write OP = Op(name=...), from rooftune.core")
    if found.name != path.parent.name:
        raise UsageError(f"{path}: the operator is called '{found.name}', its folder '{path.parent.name}'; rename one")
    return found


def baseline(op_name: str) -> Impl:
    """What an operator's competitors are compared with, and what production falls back on: torch's own call.

    Raises:
        UsageError: it has none.
    """
    for found in impls(op_name):
        if found.baseline:
            return found
    raise UsageError(
        f"{op_name} has no competitor with BASELINE = True: nothing to compare with or to fall back on; "
        f"add torch's own calls as kernels/{op_name}/torch.py"
    )


def _read(path: Path) -> tuple[dict[str, Any], str, set[str]]:
    """Literals, first docstring line and function names of a file, without running it."""
    try:
        return _read_once(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise UsageError(f"{path} cannot be read as Python: {error}") from error


@cache
def _read_once(path: Path, _: int) -> tuple[dict[str, Any], str, set[str]]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as Python: {error}") from error
    values: dict[str, Any] = {}
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(a.asname or a.name for a in node.names)
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        for target in targets:
            if isinstance(target, ast.Name):
                names.add(target.id)
                if target.id in LITERALS and value is not None:
                    try:
                        values[target.id] = ast.literal_eval(value)
                    except ValueError as error:
                        raise UsageError(f"{path}: {target.id} must be a literal: listing imports nothing") from error
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return values, summary, names


def _language(root: Path, name: str) -> tuple[str, dict[str, Any]]:
    """The longest-named language that begins the competitor's name, and its literals: a `common/<language>.py` that
    declares what it requires (others are building blocks)."""
    parts = name.split("_")
    for length in range(len(parts), 0, -1):
        path = root / "common" / ("_".join(parts[:length]) + ".py")
        if path.exists() and "REQUIRES" in (literals := _read(path)[0]):
            return path.stem, literals
    return "", {}


def environment(mode: str) -> dict[str, str]:
    """The variables of all our languages for a mode: with them any competitor's process can begin alike."""
    found = _environment(mode)
    if (kept := os.environ.get("ROOFTUNE_CACHE_DIR")) and "TRITON_CACHE_DIR" not in os.environ:
        # Triton's own default is in the home folder, which may be read-only.
        found = {**found, "TRITON_CACHE_DIR": str(Path(kept).expanduser().absolute() / "triton")}
    return found


@cache
def _environment(mode: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted((kernel_folder() / "common").glob("*.py")):
        for name, value in _read(path)[0].get("ENV", {}).get(mode, {}).items():
            found.setdefault(name, value)
    return found


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(name, str) for name in value)


def _is_environment(value: Any) -> bool:
    """A mode of a worker -> variables."""
    return isinstance(value, dict) and all(
        mode in MODES and isinstance(some, dict) and _are_names([*some, *some.values()]) for mode, some in value.items()
    )


def _impl(op_name: str, path: Path, module: str, root: Path | None) -> Impl:
    values, summary, names = _read(path)
    for needed in ("DEVICES", "PRECISIONS"):
        if needed not in values:
            raise UsageError(f"{path} has no {needed}; a kernel file declares DEVICES, PRECISIONS, SPACE and build()")
    for needed, what, known in (("DEVICES", "device", tuple(VENDORS)), ("PRECISIONS", "precision", tuple(PRECISIONS))):
        if not isinstance(values[needed], tuple | list) or not values[needed]:
            raise UsageError(f'{path}: {needed} must be a tuple of names, such as ("{known[0]}",)')
        for name in values[needed]:
            if name not in known:
                raise unknown(f"{what} of {needed}", str(name), known, str(path))
    if not _are_names(values.get("REQUIRES", ())):  # a word would be taken for packages of a letter each
        raise UsageError(f'{path}: REQUIRES must be a tuple of names, such as ("torch",)')
    if not _is_environment(values.get("ENV", {})):  # what has another form would be set nowhere
        raise UsageError(f'{path}: ENV must have the form {{"native": {{"NAME": "value"}}}}; known: {", ".join(MODES)}')
    spoken, language = _language(root, path.stem) if root else ("", {})
    default = () if root is None else (path.stem.split("_")[0],)
    return Impl(
        op=op_name,
        name=path.stem,
        path=path,
        module=module,
        summary=summary,
        devices=tuple(values["DEVICES"]),
        precisions=tuple(values["PRECISIONS"]),
        requires=tuple(values.get("REQUIRES", language.get("REQUIRES", default))),
        language=spoken,
        env={**language.get("ENV", {}), **values.get("ENV", {})},
        emulates="emulate" in names,
        compiles="compile_for" in names,
        baseline=bool(values.get("BASELINE", False)),
        per_shape=bool(values.get("PER_SHAPE", False)),
    )


@cache
def impls(op_name: str) -> tuple[Impl, ...]:
    """The competitors of an operator: baselines first, then by name."""
    op(op_name)
    return _listed(op_name, _roots())


def impls_at(op_name: str, home: Path) -> tuple[Impl, ...]:
    """The same, of a copy of this package (`revisions`)."""
    return tuple(replace(found, home=home) for found in _listed(op_name, [(KERNELS, _kernels_at(home))]))


def _listed(op_name: str, roots: Iterable[tuple[str, Path]]) -> tuple[Impl, ...]:
    found = [
        _impl(op_name, path, f"{package}.{op_name}.{path.stem}", root)
        for package, root in roots
        for path in sorted((root / op_name).glob("*.py"))
        if path.stem != "__init__"
    ]
    return tuple(sorted(found, key=lambda i: (not i.baseline, i.name)))


def impl(key: str) -> Impl:
    """The competitor with a key such as `gemm/numba`, or `file:/path/to/kernel.py`.

    Raises:
        UsageError: unknown operator or competitor.
    """
    if key.startswith("file:"):
        return user_impl(Path(key[5:]))
    op_name, _, name = key.partition("/")
    for found in impls(op_name):
        if found.name == name:
            return found
    raise unknown(f"competitor of {op_name}", name, [i.name for i in impls(op_name)])


def user_impl(path: Path) -> Impl:
    """A user's own kernel file (`--load`): the same form, plus `OP = "softmax"`.

    Raises:
        UsageError: not there, not Python, or a declaration is missing.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --load takes a kernel file")
    values, _, names = _read(path)
    if "OP" not in values:
        raise UsageError(f'{path} names no operator; add OP = "softmax" (known: {", ".join(op_names())})')
    if "build" not in names:
        raise UsageError(f"{path} has no build(problem, config); it returns run(out, *inputs)")
    if "SPACE" not in names:
        raise UsageError(f"{path} has no SPACE; without options to tune it is SPACE = Space(), from rooftune.core")
    op(values["OP"])
    return _impl(values["OP"], path.resolve(), f"file:{path.resolve()}", None)


def problem(text: str | Problem) -> Problem:
    """Parse and complete a problem: `gemm[m=64,n=64,k=64,bf16]`.

    Raises:
        UsageError: bad form, unknown operator, size, flag or precision.
    """
    given = Problem.parse(text) if isinstance(text, str) else text
    return op(given.op).problem(given)
