"""What a competitor is made of: its file, what that imports of a kernels folder or, outside of one, from beside it, and
what its CUDA C++ includes.

A result, a tuned entry or a proof holds for one state of these files. Shared files that a competitor does not use
may change without making its results old.
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
    for file in files(path, roots):
        made.update(file.read_bytes())
    return made.hexdigest()[:16]


def files(path: Path, roots: Mapping[str, Path]) -> list[Path]:
    """The file, its operator's `__init__.py`, and all that they need, in the order of their paths."""
    found: set[Path] = set()
    left = [path, path.parent / "__init__.py"]
    while left:
        file = left.pop()
        if file in found or not file.is_file():
            continue
        found.add(file)
        if file.suffix == ".py":
            left += _modules(file, roots)
            # `cupy.cu` beside `cupy.py`; the operator's __init__ has no such neighbours
            left += file.parent.glob(f"{file.stem}.*")
        elif file.suffix in CUDA:
            found.update(included(file, [root / HEADERS for root in roots.values()]))
    return sorted(found)


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


def _modules(file: Path, roots: Mapping[str, Path]) -> Iterator[Path]:
    """Files of the modules that a Python file imports out of packages of kernels."""
    for level, name, names in _imports(file.read_text(encoding="utf-8")):
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
        yield place.with_suffix(".py") if parts else place / "__init__.py"
        yield place / "__init__.py"
        yield from (place / f"{one}.py" for one in names)  # `from package import module`
        yield from (place / one / "__init__.py" for one in names)


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
