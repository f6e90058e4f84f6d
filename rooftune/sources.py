"""What a competitor is made of: its file, what that imports of a kernels folder or, outside of one, from beside it, and
what its CUDA C++ includes.

A result, a tuned entry or a proof holds for one state of these files. Shared files that a competitor does not use
may change without making its results old; so may what judges it: of its operator's `__init__.py` (inputs, reference,
limits) only the definitions that it imports are part of it.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

HEADERS = Path("common", "cuda")  # below a kernels folder: where an #include is looked for, after the file's own folder
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
CUDA = (".cu", ".cuh", ".hpp", ".h")


def digest(path: Path, roots: Mapping[str, Path]) -> str:
    """Hash of a competitor's sources: 16 hexadecimal digits.

    Args:
        path: its file.
        roots: name of a package of kernels -> its folder.
    """
    made = hashlib.sha256()
    for _, text in sorted(_sources(path, roots).items()):
        made.update(text)
    return made.hexdigest()[:16]


def files(path: Path, roots: Mapping[str, Path]) -> list[Path]:
    """The file and all that it needs, in the order of their paths."""
    return sorted(_sources(path, roots))


def _sources(path: Path, roots: Mapping[str, Path]) -> dict[Path, bytes]:
    """Every file that a competitor is made of, with what of it counts."""
    found: dict[Path, bytes] = {}
    wanted: dict[Path, set[str]] = {}  # names that are imported of an operator's __init__; "*": all of it
    left: list[tuple[Path, tuple[str, ...]]] = [(path, ("*",)), (path.parent / "__init__.py", ("",))]
    while left:
        file, names = left.pop()
        if not file.is_file() or wanted.get(file, set()) >= set(names):
            continue
        wanted.setdefault(file, set()).update(names)
        found[file] = text = file.read_bytes()
        if file.suffix == ".py":
            if file.name == "__init__.py" and "*" not in wanted[file]:
                found[file] = text = _part(text.decode("utf-8"), frozenset(wanted[file])).encode("utf-8")
            left += _modules(file, text.decode("utf-8"), roots)
            # `cupy.cu` beside `cupy.py`; the operator's __init__ has no such neighbours
            left += [(near, ("*",)) for near in file.parent.glob(f"{file.stem}.*") if near != file]
        elif file.suffix in CUDA:
            found |= {near: near.read_bytes() for near in included(file, [root / HEADERS for root in roots.values()])}
    return found


@cache
def _part(text: str, names: frozenset[str]) -> str:
    """Of an operator's module the top-level statements that define these names, and what they need; any other whole."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return text
    defines = [_defines(node) for node in tree.body]
    if not any("OP" in names for names in defines):
        return text
    needed, before = set(names), 0
    while len(needed) > before:
        before = len(needed)
        for node, own in zip(tree.body, defines, strict=True):
            if own & needed:
                needed |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    kept = [node for node, own in zip(tree.body, defines, strict=True) if own & needed]
    return "\n".join(ast.get_source_segment(text, node) or "" for node in kept)


def _defines(node: ast.stmt) -> set[str]:
    """The names that a top-level statement binds."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def included(file: Path, folders: Sequence[Path]) -> list[Path]:
    """The headers that a CUDA C++ file includes, and what these do, in the order of their paths.

    A name in quotes is looked for beside the file that includes it, then in the folders; one that is nowhere is the
    compiler's own.
    """
    found: set[Path] = set()
    left = [file]
    while left:
        here = left.pop()
        for name in INCLUDE.findall(here.read_text(encoding="utf-8")):
            places = (folder / name for folder in (here.parent, *folders))
            header = next((place for place in places if place.is_file()), None)
            if header is not None and header not in found:
                found.add(header)
                left.append(header)
    return sorted(found)


def _modules(file: Path, text: str, roots: Mapping[str, Path]) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Files of the modules that a Python file imports out of packages of kernels, and which names it takes of each."""
    for level, name, names in _imports(text):
        parts = name.split(".") if name else []
        if level:  # relative: one folder up for every dot after the first
            place = file.parents[level - 1]
        else:
            root = next((r for r in roots if name == r or name.startswith(f"{r}.")), None)
            if root is not None:
                place, parts = roots[root], parts[len(root.split(".")) :]
            elif any(file.is_relative_to(folder) for folder in roots.values()):
                continue  # `import numba` beside kernels/softmax/numba.py is the package
            else:
                place = file.parent  # a user's file (`--load`): what lies beside it is its own
        place = place.joinpath(*parts)
        yield (place.with_suffix(".py") if parts else place / "__init__.py"), names or ("*",)
        yield place / "__init__.py", names or ("*",)
        for one in names:  # `from package import module`
            yield place / f"{one}.py", ("*",)
            yield place / one / "__init__.py", ("*",)


@cache
def _imports(text: str) -> tuple[tuple[int, str, tuple[str, ...]], ...]:
    """Every import of a text: (leading dots, module, names taken from it). None of a text that is not Python."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # said where the file is imported
        return ()
    found: list[tuple[int, str, tuple[str, ...]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
        elif isinstance(node, ast.Import):
            found += [(0, alias.name, ()) for alias in node.names]
    return tuple(found)
