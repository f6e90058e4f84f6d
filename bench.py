#!/usr/bin/env python3
"""The command line: one function per verb, each a few lines over the library.

`python bench.py` works from a bare checkout; installed, the same program is called `rooftune`.
Data go to stdout or a file, talk goes to stderr; exit codes are `rooftune.core.ExitCode`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

if not __package__:  # run as a file: the checkout is the import path, and `bench` is not our name
    sys.path[0] = str(Path(__file__).resolve().parent)

from rooftune import streams
from rooftune.core import ExitCode, RooftuneError, Unavailable, UsageError, unknown

EXAMPLES = """examples:
  python bench.py                                   what is here, what is missing, what to do next
  python bench.py run softmax layernorm             race two operators on the quick suite
  python bench.py run "gemm[m=1024,n=1024,k=1024,bf16]" --json out.jsonl
  python bench.py run softmax --load my_kernel.py   your kernel joins the race
  python bench.py tune softmax --budget 60s         find a better config, keep it only if it is better
  python bench.py block --model gpt2 --phase decode
  python bench.py compare --base origin/main        the CI gate: a commit's kernels against today's, in one session

Every option can be set by the environment: --rounds 20 is ROOFTUNE_ROUNDS=20 (doctor --environment lists all).
Exit codes: 0 ok, 1 regression or wrong result, 2 bad arguments or data, 3 inconclusive, 4 nothing ran here,
130 interrupted (what was measured is kept)."""

YES, NO = ("1", "yes", "true", "on"), ("0", "no", "false", "off")  # what a variable says to an option without a value


def _add_race_options(
    verb: argparse.ArgumentParser, metavar: str = "OP|PROBLEM", what: str = "operators (all), or softmax[m=64,n=512]"
) -> None:
    verb.add_argument("what", nargs="*", metavar=metavar, help=what)
    verb.add_argument("--problem", action="append", default=[], help="a problem; may be repeated")
    verb.add_argument("--suite", default="quick", help="which problems: quick, llm, square, ... (all: bench.py)")
    verb.add_argument("--precision", "--dtype", default="", help="fp32,bf16,... (default: fp32 and bf16)")
    verb.add_argument("--only", default="", help="competitors, by name: torch,numba")
    verb.add_argument("--skip", default="", help="competitors to leave out")
    verb.add_argument("--load", action="append", default=[], metavar="FILE", help="a kernel file of your own")
    verb.add_argument("--samples", type=int, default=5, help="samples a round")
    verb.add_argument("--cache", choices=("hot", "cold"), default="hot", help="state of the last-level cache")
    verb.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: process time, with --threads 1")
    verb.add_argument("--seed", type=int, default=None, help="of data and order (default: drawn, and recorded)")


def _add_device_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, rocm (default: the first GPU, else cpu)")
    verb.add_argument("--threads", type=int, default=None, help="of a competitor on the CPU (default: all cores)")


def _add_output_options(verb: argparse.ArgumentParser, forms: Sequence[str] = ("json", "csv", "md", "junit")) -> None:
    for form in forms:
        verb.add_argument(f"--{form}", nargs="?", const="-", metavar="FILE", help=f"{form} to FILE or stdout")
    verb.add_argument("-q", "--quiet", action="store_true", help="no progress")


def _add_gate_options(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--inconclusive", choices=("fail", "pass"), default="fail", help="pass: exit 0 instead of 3")
    verb.add_argument("--format", choices=("auto", "text", "github"), default="auto",
                      help="github: annotations and step summary (auto: where GITHUB_ACTIONS is set)")  # fmt: skip


def _add_revision_options(verb: argparse.ArgumentParser) -> None:
    verb.set_defaults(suite="ci")
    verb.add_argument("--rounds", type=int, default=8, help="of all cells, in which a sign of a change is looked for")
    verb.add_argument("--confirm", type=int, default=32, help="fresh rounds that decide where there is one")
    verb.add_argument("--launches", type=int, default=8, help="processes a side for these, which must agree: one may "
                      "be unlucky as a whole; more where many cells are decided (1: rounds alone decide)")  # fmt: skip
    verb.add_argument("--margin", type=float, default=0.5, help="percent that a change must exceed")
    verb.add_argument("--detect", type=float, default=10.0, help="percent: undecided where this would not show")
    verb.add_argument("--min-sample-ms", type=float, default=2.0, help="shortest sample, by repeating the call")
    _add_gate_options(verb)
    _add_device_options(verb)
    _add_output_options(verb, ("json", "junit"))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says a default that is a number or a word, where the text does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        value, text = action.default, action.help or ""
        plain = isinstance(value, int | float | str) and not isinstance(value, bool) and value not in ("", "auto")
        return super()._get_help_string(action) if plain and "default" not in text else text


class Parser(argparse.ArgumentParser):
    """Complains in one line, as the rest of the program does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; next: {self.prog} --help")

    def parse_known_args(  # type: ignore[override]  # of its two forms this is the one used
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Reads the environment of the verb that was asked for: what another's options mean does not concern it."""
        _environment_defaults(self)
        return super().parse_known_args(args, namespace)


def parser() -> Parser:
    """All verbs and options; imports nothing heavy."""
    top = Parser(
        prog="bench.py" if not __package__ else "rooftune",
        description="Race competing kernels, tune them to the hardware's roof, tell the truth about the result.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("-v", "--verbose", action="store_true", help="tracebacks")
    verbs = top.add_subparsers(dest="verb", metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, formatter_class=Help)

    verb("list", "operators, competitors, suites and devices: what is here, and why the rest is not")
    doctor = verb("doctor", "the device, the toolchain, the noise, and what to install next")
    doctor.add_argument("--environment", action="store_true", help="only the table of environment variables")
    _add_device_options(doctor)
    tour = verb("tour", "the whole story in minutes: race, tuned winner, transformer block, GPU evidence")
    _add_device_options(tour)
    run = verb("run", "race competitors; interleaved, checked, with intervals")
    _add_race_options(run)
    run.add_argument("--rounds", type=int, default=10, help="interleaved rounds (at least 6 for an interval)")
    run.add_argument("--launches", type=int, default=1, help="spread the rounds over this many fresh processes")
    run.add_argument("--min-sample-ms", type=float, default=2.0, help="shortest sample, by repeating the call")
    _add_device_options(run)
    _add_output_options(run)
    run.add_argument("--evidence", choices=("auto", "none", "only", "full"), default="auto",
                     help="emulate and compile the kernels of a GPU that is not here (full: every case)")  # fmt: skip
    run.add_argument("--energy", action="store_true", help="joules per call, where there is a sensor (a minute each)")
    run.add_argument("--dry-run", action="store_true", help="print the plan")
    tune = verb("tune", "search configs and precisions; keep a winner only if it beats the default")
    _add_race_options(tune)
    tune.set_defaults(launches=1)  # its final has fresh processes of its own
    tune.add_argument("--rounds", type=int, default=12, help="of each stage of the final (at least 10)")
    tune.add_argument("--min-sample-ms", type=float, default=1.0, help="shortest sample, by repeating the call")
    _add_device_options(tune)
    _add_output_options(tune, ("json",))
    tune.add_argument("--budget", default="", help="per problem and competitor: 60s (the default), 5m or 200 (configs)")
    tune.add_argument("--effort", choices=("", "quick", "full", "exhaustive"), default="",
                      help="instead of a budget: 30 s or 40 configs, 10 min or 400, every config")  # fmt: skip
    tune.add_argument("--share", action="store_true", help="one budget for all, spent where most is to be gained")
    tune.add_argument("--weight", action="append", default=[], metavar="PROBLEM=W",
                      help="share, and count this problem's gains W times")  # fmt: skip
    tune.add_argument("--objective", choices=("time", "energy", "edp"), default="time",
                      help="energy: joules per call; edp: joules times seconds (both need a sensor)")  # fmt: skip
    tune.add_argument("--search", default="surrogate", help="surrogate, random, local, exhaustive, tpe")
    tune.add_argument("--history", action="append", default=[], metavar="FILE",
                      help="start from recorded tunings of other devices or tools")  # fmt: skip
    tune.add_argument("--simulate", action="append", default=[], metavar="FILE",
                      help="replay the search on a recorded tuning (a journal, cache, T4); no device")  # fmt: skip
    tune.add_argument("--max-error", type=float, default=None, help="precisions compete below this error")
    best = verb("best", "what production should use for a problem, and why")
    best.add_argument("what", nargs="+", metavar="PROBLEM", help="such as softmax[m=64,n=512,bf16]")
    _add_device_options(best)
    _add_output_options(best, ("json",))
    export = verb("export", "the winners as a package without rooftune, or recorded tunings in another tool's format")
    export.add_argument("what", nargs="*", metavar="OP|PROBLEM|FILE", help="default: all measured on this device")
    export.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    export.add_argument("--name", default="tuned_kernels", help="of the package")
    export.add_argument("--format", choices=("package", "kernel-tuner", "t4", "vllm"), default="package",
                        help="others: of FILEs (journals, Kernel Tuner caches, T4, Triton .autotune.json)")  # fmt: skip
    _add_device_options(export)
    block = verb("block", "a transformer block from all-torch, one language, and the best mix")
    block.add_argument("--model", default="bert-base", help="transformer-base, bert-base, gpt2, llama3-8b")
    block.add_argument(
        "--phase", choices=("prefill", "decode"), default="prefill", help="all tokens, or one after many"
    )
    block.add_argument("--precision", "--dtype", default="fp32", help="of all tensors: fp32, tf32, fp16, bf16")
    block.add_argument("--batch", type=int, default=1, help="sequences")
    block.add_argument("--seq", type=int, default=None,
                       help="tokens (default: the model's, on a CPU 512 at most), or keys of the decode")  # fmt: skip
    block.add_argument("--layers-dim-scale", "--dim-scale", type=int, default=None, dest="dim_scale",
                       help="divide the model's widths by this (default: what runs in seconds here)")  # fmt: skip
    block.add_argument("--energy", action="store_true", help="three windows of 5 s each, where there is a sensor")
    block.add_argument("--rounds", type=int, default=10, help="interleaved rounds of whole layers")
    block.add_argument("--seed", type=int, default=None, help="of data and order (default: drawn, and recorded)")
    _add_device_options(block)
    _add_output_options(block, ("json",))
    report = verb("report", "stored runs again, as tables or for a program; --history: what may have changed")
    report.add_argument("what", nargs="*", metavar="RUN", help="ids, files, latest~1 (latest; --history: all stored)")
    report.add_argument("--history", action="store_true", help="exit 3: something may have become slower")
    _add_output_options(report)
    compare = verb("compare", "verdict per cell of two stored runs, or of two revisions raced in one session")
    _add_race_options(compare, "RUN|OP|PROBLEM", "two runs (ids, files, latest~1 latest); with --base what to race")
    _add_revision_options(compare)
    compare.add_argument("--base", metavar="REV", help="a commit: its kernels against today's")
    compare.add_argument("--cand", metavar="REV", help="another commit instead of the working tree")
    compare.add_argument("--every", action="store_true", help="also competitors whose source did not change")
    selfcheck = verb("selfcheck", "everything against itself: false alarms, and the smallest change found here")
    _add_race_options(selfcheck)
    _add_revision_options(selfcheck)
    check = verb("check", "measure a stored baseline's cells again: broken, or suspect at most")
    check.add_argument("--baseline", required=True, metavar="FILE", help="a stored run: id, file, latest~1")
    check.add_argument("--current", metavar="FILE", help="judge this stored run instead of measuring")
    check.add_argument("--rounds", type=int, default=10, help="interleaved rounds (at least 6 for an interval)")
    _add_gate_options(check)
    _add_device_options(check)
    _add_output_options(check, ("json", "junit"))
    static = verb("static", "registers, spills, occupancy and tensor-core instructions, no GPU needed; exit 1 if worse")
    static.add_argument("what", nargs="*", metavar="OP|IMPL|PROBLEM", help="gemm, gemm/triton, softmax[m=64,n=512]")
    static.add_argument("--arch", default="", help="sm_80,sm_90a,sm_100a,sm_120a (all of them)")
    static.add_argument("--precision", "--dtype", default="", help="fp32,bf16,... (default: all)")
    static.add_argument("--configs", default="default", help="default, all, or how many of each kernel")
    static.add_argument("--load", action="append", default=[], metavar="FILE", help="a kernel file of your own")
    static.add_argument("--save", metavar="FILE", help="write a baseline")
    static.add_argument("--baseline", metavar="FILE", help="exit 1: spills, less occupancy, tensor cores lost")
    _add_output_options(static, ("json", "csv", "md"))
    campaign = verb("campaign", "everything a fresh device can tell in a given time; resumes; fits in 16 MiB")
    campaign.add_argument("what", nargs="*", metavar="OP|PROBLEM", help="operators (all), or softmax[m=64,n=512]")
    campaign.add_argument("--budget", default="9m", help="of the whole: 9m, 300s")
    campaign.add_argument("--out", required=True, metavar="DIR", help="a folder; the same one goes on where it ended")
    campaign.add_argument(
        "--precision", "--dtype", default="", help="in order of value (a GPU: bf16,fp8,int8; else fp32)"
    )
    campaign.add_argument("--only", default="", help="competitors, by name: torch,triton")
    campaign.add_argument("--skip", default="", help="competitors to leave out")
    campaign.add_argument("--load", action="append", default=[], metavar="FILE", help="a kernel file of your own")
    campaign.add_argument("--seed", type=int, default=0, help="of data and order")
    _add_device_options(campaign)
    _add_output_options(campaign)
    doctor.set_defaults(variables=lambda: _variables(verbs.choices))
    compare.set_defaults(unchosen=lambda: top.parse_args(["compare"]))
    return top


def _variables(verbs: Mapping[str, argparse.ArgumentParser]) -> dict[str, tuple[str, str]]:
    """The one table of environment variables: name -> (what it sets, the verbs that read it)."""
    found = {
        "ROOFTUNE_RESULTS_DIR": ("where runs are stored (default: results/runs)", "all"),
        "ROOFTUNE_CEILINGS": (
            "a stored run of this device whose ceilings are used, not measured anew",
            "run, tune, block, check, tour, campaign",
        ),
        "ROOFTUNE_CACHE_DIR": ("where compiled kernels are kept (default: the user's cache folder)", "all"),
        "ROOFTUNE_TABLE": (
            "the file of tuned configs (default: in the folder of runs)",
            "run, tune, best, export, block, tour",
        ),
    }
    users: dict[str, list[str]] = {}
    for verb, each in verbs.items():
        for action in each._actions:
            if action.option_strings and action.dest != "help":
                text = f"{max(action.option_strings, key=len)}: {action.help or ''}".rstrip(": ")
                text += {list: f" (several: {os.pathsep} between)", bool: " (1: on)"}.get(type(action.default), "")
                name = f"ROOFTUNE_{action.dest.upper()}"
                found.setdefault(name, (text, ""))
                users.setdefault(name, []).append(verb)
    return {name: (text, ", ".join(users.get(name, ())) or verbs_) for name, (text, verbs_) in found.items()}


def _environment_defaults(verb: argparse.ArgumentParser) -> None:
    """`ROOFTUNE_<FLAG>` sets the default of `--flag`, and gives an option that must be given; empty is unset.

    Raises:
        UsageError: a value that the option would not take; the text names the variable.
    """
    for action in verb._actions:
        name = f"ROOFTUNE_{action.dest.upper()}"
        value = os.environ.get(name)
        if not value or not action.option_strings or action.dest == "help":
            continue
        switch = isinstance(action, argparse._StoreTrueAction)
        known = [*YES, *NO] if switch else action.choices
        if known is not None and (value.lower() if switch else value) not in known:
            raise UsageError(f"{name}={value}: choose from {', '.join(map(str, known))}")
        if switch:
            action.default = value.lower() in YES
        elif isinstance(action.default, list):
            action.default = value.split(os.pathsep)
        else:
            try:
                action.default = action.type(value) if callable(action.type) else value
            except ValueError as error:
                kind = getattr(action.type, "__name__", "value")
                raise UsageError(f"{name}={value}: not {kind}; next: {verb.prog} --help") from error
        action.required = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. A `RooftuneError` becomes one line on stderr."""
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # `nohup`: go on
        signal.signal(signal.SIGHUP, _terminate)
    with streams.guarded():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    verbose = False
    try:
        if sys.stdout is None:
            raise UsageError("standard output is closed; next: the same with >/dev/null")
        chosen = _parsed(arguments)
        verbose = chosen.verbose
        from rooftune import commands

        code = int(commands.VERBS[chosen.verb or "list"](chosen))
        sys.stdout.flush()  # a disk may be full at the last byte too
        return code
    except RooftuneError as error:
        if verbose:
            raise
        print(f"rooftune: {error}", file=sys.stderr)
        return ExitCode.NOTHING_RAN if isinstance(error, Unavailable) else ExitCode.USAGE
    except KeyboardInterrupt:
        print("rooftune: interrupted; what was measured is kept", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except ModuleNotFoundError as error:  # a checkout beside a torch of the user's own
        package = (error.name or "").partition(".")[0]
        if verbose or package not in ("numpy", "rich"):
            raise
        print(f"rooftune: {package} is not installed; next: pip install {package}", file=sys.stderr)
        return ExitCode.NOTHING_RAN


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the arguments say.

    Raises:
        UsageError: not understood.
    """
    top = parser()
    chosen, others = top.parse_known_args(arguments)
    verbs = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction)).choices
    verb = verbs.get(chosen.verb or "", top)
    if others:
        _refuse(verb, others[0].partition("=")[0])
    return chosen


def _refuse(verb: argparse.ArgumentParser, given: str) -> NoReturn:
    """Say what was not understood, and what would be."""
    if given.startswith("-"):
        known = [o for a in verb._actions for o in a.option_strings]
        raise unknown("option", given, known, f"next: {verb.prog} --help")
    raise UsageError(f"'{given}': nothing is expected there; next: {verb.prog} --help")


def _terminate(signum: int, _: object) -> None:
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    sys.exit(main())
