"""Compile-time resources of GPU kernels, as rows: registers, spills, shared memory, occupancy, matrix instructions.

Nothing runs, so this works where there is no GPU. A kernel is compiled once for a source hash, toolchain, problem,
config and architecture: the outcome is kept in the cache folder, and a second look at it costs a file read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from rooftune import pools, registry
from rooftune.core import Config, Evidence, Problem, Resources, Status, UsageError, cache_folder
from rooftune.evidence import COMPILE_S
from rooftune.lab import Lab
from rooftune.occupancy import multiprocessor, occupancy
from rooftune.registry import Impl
from rooftune.results.store import Log

Row = dict[str, Any]
Event = Callable[[str, str], None]
SETTLED = (Status.OK, Status.SKIPPED, Status.FAILED_COMPILE)  # outcomes that would be the same again
KEPT_FILES = 4  # cache files of a competitor: the newest few sources and toolchains
# What turns a language into machine code; a competitor's rows compare only where these agree.
COMPILERS = {
    "triton": ("triton",),
    "cupy": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
    "numba_cuda": ("numba-cuda", "numba", "llvmlite", "cuda-core", "nvidia-nvvm", "nvidia-nvjitlink"),
}


@dataclass(frozen=True)
class Job:
    """One compilation: a config of a competitor on a problem, for an architecture."""

    impl: Impl
    problem: Problem
    config: Config
    default: bool
    arch: str


@cache
def _versions(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for name in names:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def packages(impl: Impl) -> dict[str, str]:
    """Versions of the compiler packages of its language; of every language for a file that names none."""
    mine = [name for language in impl.requires for name in COMPILERS.get(language, ())]
    every = [name for names in COMPILERS.values() for name in names]
    return dict(_versions(tuple(mine or every)))


def configs(lab: Lab, impl: Impl, problem: Problem, wanted: str) -> list[Config]:
    """The default config first, then as many others as wanted: `default`, `all`, or a number in all.

    A number takes the default and a seeded sample, so that the same command always names the same configs.

    Raises:
        UsageError: the file does not load, no config is valid, or `wanted` is none of the three.
    """
    if wanted not in ("default", "all") and not (wanted.isdigit() and int(wanted)):
        raise UsageError(f"--configs {wanted}: choose default, all, or a number such as 16")
    kept = Cache(impl)
    key = _digest("space", str(problem), wanted)
    if (known := kept.get(key)) is not None:
        found: list[Config] = known["configs"]
        return found
    space = lab.space(impl, problem, "compile")
    default: Config = space["default"]
    others = [c for c in space["configs"] if c != default]
    if wanted != "all":
        count = 0 if wanted == "default" else min(int(wanted) - 1, len(others))
        others = random.Random(0).sample(others, count)
    kept.put(key, {"configs": [default, *others]})
    return [default, *others]


def compile_rows(lab: Lab, jobs: Sequence[Job], event: Event = lambda kind, text: None) -> list[Row]:
    """A row for each job, in order. Two languages are compiled at a time; not to be run beside a timing."""
    done: dict[int, Row] = {}

    def work(numbers: list[int]) -> None:
        kept: dict[str, Cache] = {}
        for number in numbers:
            job = jobs[number]
            mine = kept.setdefault(job.impl.module, Cache(job.impl))
            done[number] = _row(lab, job, mine)
            event("compile", f"{len(done)}/{len(jobs)} {job.impl.key} {job.problem.precision} {job.arch}")

    groups: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(job.impl.language or job.impl.module, []).append(number)
    with pools.asking(lab, 2) as pool:
        list(pool.map(work, groups.values()))
    for impl in {job.impl.module: job.impl for job in jobs}.values():
        lab.retire(impl, "compile")
    return [done[number] for number in range(len(jobs))]


def known(impl: Impl, problem: Problem, configs: Sequence[Config], arch: str) -> dict[int, Resources]:
    """What was compiled of these configs already, by their number; compiles nothing."""
    kept, names = Cache(impl), {f.name for f in fields(Resources)}
    found: dict[int, Resources] = {}
    for number, config in enumerate(configs):
        seen = kept.get(_key(problem, config, arch))
        if seen is not None and seen["status"] == Status.OK:
            found[number] = Resources(**{n: v for n, v in seen.items() if n in names})
    return found


def _key(problem: Problem, config: Config, arch: str) -> str:
    return _digest(str(problem), json.dumps(config, sort_keys=True), arch)


def _row(lab: Lab, job: Job, kept: Cache) -> Row:
    key = _key(job.problem, job.config, job.arch)
    found = kept.get(key)
    if found is None:
        if job.impl.missing:
            return row(job, {"status": str(Status.SKIPPED), "reason": job.impl.missing})
        reply = lab.ask(
            job.impl, "compile", COMPILE_S, "compile", problem=str(job.problem), config=job.config, arch=job.arch
        )
        found = {**reply.data, "status": str(reply.status), "reason": reply.reason}
        if reply.status in SETTLED:
            kept.put(key, found)
    return row(job, found)


def row(job: Job, found: Row) -> Row:
    """What is printed and stored: the job, what its machine code takes, and what follows from that."""
    ok = found["status"] == Status.OK
    kit = packages(job.impl)
    made: Row = {
        "impl": job.impl.key,
        "problem": str(job.problem),
        "precision": job.problem.precision,
        "config": job.config,
        "default": job.default,
        "arch": job.arch,
        **{name: found.get(name) for name in ("registers", "spill_bytes", "shared_bytes", "threads")},
        **dict.fromkeys(("occupancy", "blocks_per_sm", "occupancy_limit")),
        "tensor_core_instructions": list(found.get("tensor_core") or ()) if ok else None,
        "toolchain": found.get("toolchain") or ", ".join(f"{k} {v}" for k, v in kit.items()),
        "packages": kit,
        "source_hash": job.impl.source_hash,
        "evidence": str(Evidence.COMPILED),
        "status": found["status"],
        "reason": found.get("reason") or "",
    }
    figures = [made[name] for name in ("threads", "registers", "shared_bytes")]
    if ok and None not in figures:
        held = occupancy(job.arch, *figures)
        made |= {"occupancy": held.share, "blocks_per_sm": held.blocks, "occupancy_limit": held.limit}
        if not held.blocks:
            most = multiprocessor(job.arch).shared_per_block
            why = f"{figures[2]} bytes of {most}" if held.limit == "shared memory" else f"{figures[1]} x {figures[0]}"
            made["reason"] = f"compiles, but {job.arch} cannot hold one block: {held.limit} ({why})"
    return made


# --- the cache ------------------------------------------------------------------------------------------------------


class Cache:
    """What is known of one competitor under its present source and toolchain. Several processes may add to it.

    Where nothing can be kept (a read-only or full disk, no home) all is compiled again the next time, and that is said:
    minutes of a compiler are not lost for it.
    """

    def __init__(self, impl: Impl) -> None:
        # A user's file may build on our common blocks, which its own hash does not cover.
        ours = next((i.source_hash for i in registry.impls(impl.op)), "")
        digest = _digest(impl.module, impl.source_hash, ours, json.dumps(packages(impl)))
        self._prefix = f"{impl.op}-{impl.name}-"
        self._known: dict[str, Row] = {}
        self._log: Log | None = None
        try:
            self._log = Log(cache_folder("static") / f"{self._prefix}{digest}.jsonl", sync_s=60.0)
        except RuntimeError:  # a user without a home folder, as in a container with --user
            return
        if os.path.exists(self._log.path):  # Path.exists raises where a folder may not be entered
            self._known = {line["key"]: line["found"] for line in self._log.read()[0] if "key" in line}

    def get(self, key: str) -> Row | None:
        """The outcome under a key, if there is one."""
        return self._known.get(key)

    def compiled(self) -> bool:
        """Whether anything of today's source and toolchain is known to compile."""
        return any(found.get("status") == Status.OK for found in self._known.values())

    def put(self, key: str, found: Row) -> None:
        """Keep an outcome; the first of a new source pushes out files of old ones."""
        self._known[key] = found
        if self._log is None:
            _not_kept("the user's cache folder", "no home directory")
            return
        fresh = not os.path.exists(self._log.path)
        try:
            self._log.append({"key": key, "found": found})
        except UsageError as error:
            _not_kept(str(self._log.path.parent), str(error).rpartition(": ")[2])
            return
        if fresh:
            for old in _newest_first(self._log.path.parent.glob(f"{self._prefix}*.jsonl"))[KEPT_FILES:]:
                old.unlink(missing_ok=True)


@cache
def _not_kept(folder: str, why: str) -> None:
    print(f"rooftune: what is compiled is not kept in {folder}: {why}; next: set ROOFTUNE_CACHE_DIR", file=sys.stderr)


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda p: p.stat().st_mtime_ns, reverse=True)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
