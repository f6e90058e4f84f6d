"""The verbs of the command line; each module is imported when its verb is used."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable

from rooftune.core import ExitCode


def _lazy(module: str, function: str) -> Callable[[argparse.Namespace], ExitCode]:
    def verb(chosen: argparse.Namespace) -> ExitCode:
        found: ExitCode = getattr(importlib.import_module(f"rooftune.commands.{module}"), function)(chosen)
        return found

    return verb


VERBS: dict[str, Callable[[argparse.Namespace], ExitCode]] = {
    "list": _lazy("info", "overview"),
    "doctor": _lazy("info", "doctor"),
    "tour": _lazy("tour", "tour"),
    "run": _lazy("run", "run"),
    "tune": _lazy("tune", "tune"),
    "best": _lazy("tune", "best"),
    "export": _lazy("export", "export"),
    "block": _lazy("block", "block"),
    "compare": _lazy("judge", "compare"),
    "check": _lazy("judge", "check"),
    "report": _lazy("report", "report"),
    "selfcheck": _lazy("revisions", "selfcheck"),
    "static": _lazy("static", "static_verb"),
    "campaign": _lazy("campaign", "campaign"),
}
