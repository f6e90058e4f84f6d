"""`block`: a transformer layer from all-torch, from one language, and from the measured best of each step."""

from __future__ import annotations

import argparse
import json
import secrets
from typing import Any

from rooftune import race, registry, streams
from rooftune.autotune import dispatch
from rooftune.commands import common
from rooftune.commands.run import measure
from rooftune.core import ExitCode, Status, UsageError
from rooftune.results import store
from rooftune.session import Session
from rooftune.suites import block as blocks
from rooftune.suites import block_plan

# Of the race between a step's competitors; the layer itself is timed with --rounds. Of 6 rounds the interval is their
# whole range: one disturbed round is enough to leave a step to torch.
STEP_ROUNDS = 10


def block(chosen: argparse.Namespace) -> ExitCode:
    """Race the layer's operators, compose the layer, check it against float64, time it."""
    common.check_targets(chosen)
    for name in ("rounds", "batch", "seq", "dim_scale"):
        value = getattr(chosen, name)
        if value is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} must be positive, not {value}")
    name = common.device_name(chosen)
    seed = secrets.randbits(31) if chosen.seed is None else chosen.seed
    with Session("block", name, chosen.threads, chosen.quiet) as session:
        shape = block_plan.shape(
            chosen.model,
            chosen.phase,
            chosen.precision,
            session.device.kind,
            chosen.batch,
            chosen.seq,
            chosen.dim_scale,
        )
        windows = 3 if chosen.energy else 0
        result = compose_and_time(session, shape, chosen.rounds, seed, common.console(chosen), energy_windows=windows)
        if chosen.json == "-":
            streams.put(json.dumps(result.to_json()) + "\n")
        elif chosen.json:
            store.atomic_write(chosen.json, json.dumps(result.to_json()) + "\n")
    statuses = {c.status for c in result.compositions}
    if str(Status.WRONG) in statuses:
        return ExitCode.REGRESSION
    return ExitCode.OK if str(Status.OK) in statuses else ExitCode.NOTHING_RAN


def compose_and_time(
    session: Session,
    shape: block_plan.Shape,
    rounds: int,
    seed: int,
    console: Any,
    energy_windows: int = 0,
) -> blocks.BlockResult:
    """The whole of `block` for one shape: race its steps, compose the layer, check and time it, print the tables."""
    from rich.console import Console

    steps = block_plan.plan(shape)
    problems = [registry.problem(p) for p in block_plan.problems(steps)]
    for problem in problems:
        session.check_memory(problem, registry.op(problem.op).memory_bytes(problem))
    kind = session.device.kind
    field = {
        op: [i for i in registry.impls(op) if kind in i.devices and not i.per_shape] for op in {p.op for p in problems}
    }
    timing = race.Options(rounds=STEP_ROUNDS, seed=seed)
    session.say(f"racing the competitors of {len(problems)} steps")
    ceilings = session.ceilings
    quiet = Console(quiet=True)  # the block's own table says what was chosen in the step races
    records = measure(session, problems, field, timing, quiet, common.tuned_entrants(session, problems))
    # Never slower: a step leaves torch only for what beat the best torch call with confidence.
    measured = {text: (record.impl, record.config) for text, record in dispatch.winners(records).items()}
    baselines = blocks.fastest_torch(records)
    compositions = [
        blocks.compose("torch", steps, kind, baselines),
        *(blocks.compose(language, steps, kind) for language in blocks.languages(steps, kind)),
        blocks.compose("best", steps, kind, measured),
    ]
    result = blocks.run(
        session.lab,
        shape,
        compositions,
        race.Options(rounds=rounds, seed=seed),
        ceilings,
        energy_windows,
        event=lambda kind, text: session.say(f"block {kind} {text}"),
    )
    session.log.append(result.to_json() | {"run": session.run})
    session.clear()
    from rooftune.suites import block_report

    block_report.tables(result, console)
    return result
