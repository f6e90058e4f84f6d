"""Our sources as a package of their own: what a few functions need, and nothing of rooftune around it.

Modules are read, not imported. Of each, the top-level statements that the wanted names reach are kept, with
their comments and in their order; imports among ours become relative ones.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from rooftune.core import UsageError

OURS = "rooftune"
# What looks for files or starts processes is no part of a kernel; a source that needs it cannot leave us.
BOUND = ("rooftune.registry", "rooftune.lab", "rooftune.session", "rooftune.worker", "rooftune.race")
ALL = "*"


@dataclass(eq=False)
class Statement:
    """A top-level statement: its lines (with the comments above), the names it binds and those it reads.

    Attributes:
        bare: names read other than as `name.attribute`; `dotted` the attributes read of the others.
        imports: imports from our modules anywhere inside.
    """

    node: ast.stmt
    first: int
    binds: set[str]
    bare: set[str] = field(default_factory=set)
    dotted: dict[str, set[str]] = field(default_factory=dict)
    imports: list[ast.ImportFrom] = field(default_factory=list)

    @property
    def always(self) -> bool:
        """Whether it acts when the module is imported, beyond binding plain names."""
        node = self.node
        if isinstance(node, ast.Expr):
            return not isinstance(node.value, ast.Constant)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return False
        if isinstance(node, ast.Assign):
            return not all(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
        kinds = ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.AnnAssign
        return not isinstance(node, kinds) or ast.unparse(node).startswith("from __future__")


class Source:
    """One of our modules, read as text."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        tree = ast.parse(text)
        self.doc = ast.get_docstring(tree, clean=False)
        self.statements = [self._statement(node) for node in tree.body]

    def _statement(self, node: ast.stmt) -> Statement:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        made = Statement(node, first, set(_binds(node)))
        inner: set[int] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                made.dotted.setdefault(part.value.id, set()).add(part.attr)
                inner.add(id(part.value))
            elif isinstance(part, ast.Name) and id(part) not in inner:
                made.bare.add(part.id)
            elif isinstance(part, ast.ImportFrom) and part.module and part.module.split(".")[0] == OURS:
                made.imports.append(part)
            elif isinstance(part, ast.Import) and any(a.name.split(".")[0] == OURS for a in part.names):
                raise UsageError(
                    f"{self.path}:{part.lineno}: write `from {OURS}... import ...`; only that can be exported"
                )
        return made

    def binders(self, name: str) -> list[Statement]:
        return [s for s in self.statements if name in s.binds]


def _binds(node: ast.AST) -> Iterator[str]:
    """Names that a statement binds at module level."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from (a.asname or a.name.partition(".")[0] for a in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
        for part in ast.iter_child_nodes(node):
            yield from _binds(part)


@cache
def source(name: str) -> Source | None:
    """The module of that name, or None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        return None
    return Source(name, Path(spec.origin)) if spec and spec.origin and spec.origin.endswith(".py") else None


class Package:
    """A package that holds what was asked for. `places` gives modules another name in it."""

    def __init__(self, places: Mapping[str, str] | None = None) -> None:
        self.places = dict(places or {})
        self.kept: dict[str, set[Statement]] = {}
        self.names: dict[tuple[str, Statement], set[str]] = {}  # of imports: which of their names

    def add(self, module: str, name: str) -> None:
        """Keep a name (`*`: all of them) of a module, and all that it reaches.

        Raises:
            UsageError: it reaches something that cannot leave rooftune.
        """
        if module.startswith(BOUND):
            raise UsageError(f"needs {module}, which is rooftune itself")
        found = source(module)
        if found is None:
            raise UsageError(f"{module} has no source to export")
        if module not in self.kept:
            self.kept[module] = set()
            for statement in found.statements:
                if statement.always:
                    self._keep(found, statement)
        if name == ALL:
            for statement in found.statements:
                for bound in statement.binds - {"__all__"}:
                    self._keep(found, statement, bound)
        elif binders := found.binders(name):
            for statement in binders:
                self._keep(found, statement, name)
        elif source(f"{module}.{name}") is not None:
            self.add(f"{module}.{name}", ALL)
        else:
            raise UsageError(f"{module} has no '{name}'")

    def _keep(self, found: Source, statement: Statement, name: str = "") -> None:
        if isinstance(statement.node, ast.Import | ast.ImportFrom):
            if name in self.names.setdefault((found.name, statement), set()):
                return
            self.names[found.name, statement].add(name)
            self.kept[found.name].add(statement)
            for node in statement.imports:
                self._follow(node, {name})
            return
        if statement in self.kept[found.name]:
            return
        self.kept[found.name].add(statement)
        for node in statement.imports:  # inside a function, or under a condition
            self._follow(node, None, statement)
        for used in statement.bare | set(statement.dotted):
            for binder in found.binders(used):
                self._keep(found, binder, used)
                if isinstance(binder.node, ast.ImportFrom):
                    self._members(binder.node, used, statement)

    def _follow(self, node: ast.ImportFrom, only: set[str] | None, user: Statement | None = None) -> None:
        """Names imported from our modules; a module among them is followed where it is used."""
        module = node.module or ""
        for alias in node.names:
            bound = alias.asname or alias.name
            if only is not None and bound not in only:
                continue
            target = source(module)
            if target is not None and target.binders(alias.name):
                self.add(module, alias.name)
            elif user is not None:
                self._members(node, bound, user)

    def _members(self, node: ast.ImportFrom, bound: str, user: Statement) -> None:
        """Where an imported name is a module of ours, keep the attributes of it that are used."""
        name = next((a.name for a in node.names if (a.asname or a.name) == bound), "")
        target = source(node.module or "") if (node.module or "").split(".")[0] == OURS else None
        if target is None or target.binders(name):
            return
        for attribute in {ALL} if bound in user.bare else user.dotted.get(bound, set()):
            self.add(f"{node.module}.{name}", attribute)

    # --- writing ---

    def place(self, module: str) -> list[str]:
        """Where a module is in the package: its dotted name there, in parts."""
        return self.places.get(module, module.removeprefix(OURS).lstrip(".")).split(".")

    def files(self) -> dict[str, str]:
        """Path in the package -> text, folders' `__init__.py` included; the package's own is the caller's."""
        out: dict[str, str] = {}
        for module in sorted(self.kept):
            found = source(module)
            assert found is not None
            parts = self.place(module)
            for depth in range(1, len(parts)):
                out.setdefault("/".join([*parts[:depth], "__init__.py"]), "")
            here = parts if found.package == found.name else parts[:-1]
            path = "/".join([*here, "__init__.py" if found.package == found.name else parts[-1] + ".py"])
            out[path] = self._text(found, here)
        return out

    def _text(self, found: Source, here: list[str]) -> str:
        kept = [s for s in found.statements if s in self.kept[found.name]]
        head = f'"""{found.doc}"""\n\n' if found.doc else ""
        chunks: list[str] = []
        gap = 0
        for statement in found.statements:  # between two statements stay as many blank lines as stood there
            before = found.lines[: statement.first - 1]
            gap = max(gap, len(before) - len("\n".join(before).rstrip().splitlines()))
            if statement in kept:
                chunks.append("\n" * (gap if chunks else 0) + "\n".join(self._imports(found, statement, here)) + "\n")
                gap = 0
        return head + "".join(chunks)

    def _imports(self, found: Source, statement: Statement, here: list[str]) -> list[str]:
        """The lines of a statement, its imports from our modules made relative."""
        node, names = statement.node, self.names.get((found.name, statement))
        if isinstance(node, ast.Import | ast.ImportFrom) and names is not None:
            used = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in names or "" in names]
            what = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in used)
            if isinstance(node, ast.Import):
                return [f"import {what}"]
            line = f"from {self._relative(node.module or '', here)} import {what}"
            return (
                [line]
                if len(line) <= 120
                else [line.replace(" import ", " import (\n    ").replace(", ", ",\n    ") + ",\n)"]
            )
        lines = found.lines[statement.first - 1 : node.end_lineno]
        for inner in statement.imports:
            at = inner.lineno - statement.first
            lines[at] = re.sub(r"from \S+ import", f"from {self._relative(inner.module or '', here)} import", lines[at])
        return lines

    def _relative(self, module: str, here: list[str]) -> str:
        if module.split(".")[0] != OURS:
            return module
        there = [] if module == OURS else self.place(module)
        same = 0
        while same < min(len(here), len(there)) and here[same] == there[same]:
            same += 1
        return "." * (len(here) - same + 1) + ".".join(there[same:])
