"""`tour`: what `make bench` shows. A race, a tuned winner, a transformer block, and the GPU kernels' evidence."""

from __future__ import annotations

import argparse
import secrets
import time
from typing import Any

from rooftune import race, registry
from rooftune.autotune import dispatch, tuner
from rooftune.commands import common
from rooftune.commands.block import compose_and_time
from rooftune.commands.run import measure, prove, verdict
from rooftune.commands.tune import show
from rooftune.core import ExitCode, RooftuneError
from rooftune.results import report
from rooftune.results.record import Record
from rooftune.session import Session
from rooftune.suites import block_plan, catalogue

TUNED = {"cpu": ("gemm/numba", "gemm[m=512,n=512,k=512]"), "cuda": ("gemm/triton", "gemm[m=4096,n=4096,k=4096,bf16]")}
MODEL = "transformer-base"
PRECISIONS = {"cpu": common.DEFAULT_PRECISIONS}  # a GPU's: bf16 alone, as its fp32 kernels take 20 times as long
TUNE_S = 15.0  # of search; the paired final comes on top
PROVEN = ("sm_90a",)  # of the architectures that `run` compiles for: each takes 10 to 20 s of our six minutes


def tour(chosen: argparse.Namespace) -> ExitCode:
    """One session through everything; each part says what it took and which command shows more."""
    name = common.device_name(chosen)
    console = common.console(chosen)
    seed = secrets.randbits(31)
    started = time.monotonic()

    def headline(text: str, command: str) -> None:
        session.clear()
        console.print(f"\n[bold]{text}[/bold]  [dim]{time.monotonic() - started:.0f} s[/dim]")
        console.print(f"more: {command}", style="dim", markup=False)

    with Session("tour", name, chosen.threads) as session:
        kind = session.device.kind
        console.print(f"[bold]{session.device}[/bold] {session.device.name}, {session.threads} threads")
        _ceilings(session, console)
        headline("1  The race", "python bench.py run --suite quick --rounds 20")
        precisions = PRECISIONS.get(kind, ("bf16",))
        problems = catalogue.problems("tour", registry.op_names(), precisions, kind)
        field = {op: list(registry.impls(op)) for op in dict.fromkeys(p.op for p in problems)}
        if kind == "cpu":  # 8 to 20 s of a C++ compiler a problem, a minute of the six we have
            field = {op: [i for i in impls if not i.per_shape] for op, impls in field.items()}
            console.print("left out here, as it compiles for each problem: torch_compile; `run` races it", style="dim")
        extra = common.tuned_entrants(session, problems)
        records = measure(session, problems, field, race.Options(rounds=8, seed=seed), console, extra)

        headline("2  A tuned winner", "python bench.py tune gemm --budget 200")
        tuned_line = _tune(session, kind, TUNE_S, console)

        headline("3  A transformer block", f"python bench.py block --model {MODEL} --phase decode")
        shape = block_plan.shape(MODEL, "prefill", precisions[0], kind)
        result = compose_and_time(session, shape, 8, seed, console)

        proofs: list[Record] = []
        headline("4  Competitors whose device is not here", "python bench.py run --evidence full")
        absent = {op: [i for i in impls if kind not in i.devices] for op, impls in field.items()}
        if any(absent.values()):
            console.print(f"bf16, for {PROVEN[0]} alone; `run` compiles for more", style="dim", markup=False)
            proofs = prove(session, absent, ("bf16",), seed, thorough=False, archs=PROVEN)
            session.clear()
            report.evidence_table(proofs, console)
        else:
            console.print("every competitor ran natively")

        headline("In one screen", "python bench.py best PROBLEM")
        _winners(records, console)
        console.print(tuned_line, markup=False)
        for composition in result.compositions:
            if composition.ratio_to_torch is not None and composition.name != "torch":
                low, high = composition.ratio_ci or (float("nan"), float("nan"))
                ratio = f"{composition.ratio_to_torch:.2f}x all-torch [{low:.2f}, {high:.2f}]"
                console.print(f"block, {composition.name}: {ratio}", markup=False)
        console.print("block: use {} ({})".format(*result.use), markup=False)
        energy = session.no_energy()
        console.print(f"energy: {energy['method']} ({energy['reason']})", markup=False)
        console.print(f"records: {session.path}", style="dim", markup=False)
    return verdict([*records, *proofs])


def _ceilings(session: Session, console: Any) -> None:
    """The measured roof: rates of torch's products, and on a CPU what its registers allow."""
    labels = ("measured matrix rates", "from vector registers", "from tile registers (AMX)")
    for kind, label in zip(("matrix", "vector", "tiles"), labels, strict=True):
        entries = sorted(session.ceilings.get(kind, {}).items())
        parts = [
            f"{name} {e['value']:.3g} {e['unit']}" for name, e in entries if isinstance(e, dict) and e.get("value")
        ]
        if parts or kind == "matrix":
            console.print(f"{label}: " + (", ".join(parts) or "none"), markup=False)


def _tune(session: Session, kind: str, budget_s: float, console: Any) -> str:
    key, text = TUNED.get(kind, TUNED["cuda"])
    impl, problem = registry.impl(key), registry.problem(text)
    try:
        result = tuner.tune(
            session.lab,
            impl,
            problem,
            f"{budget_s:.0f}s",
            seed=0,
            identity=session.about["identity"],
            event=lambda kind, text: session.say(f"tune {text}"),
        )
    except RooftuneError as error:
        return f"tuning: {error}"
    session.clear()
    show(result, console)
    if not result.better:
        return f"tuning: nothing beat the default of {key} with confidence, so the default stays"
    return f"tuning: {key} on {problem} is {result.speedup:.2f}x its default"


def _winners(records: list[Record], console: Any) -> None:
    """Per problem what production should use."""
    for problem, record in dispatch.winners(records).items():
        call = record.config.get("call")
        ratio = f"{record.ratio_to_torch:.2f}x the best torch call" if record.ratio_to_torch else ""
        what = f"torch's {call}" if call else f"{record.impl.partition('/')[2]}, {ratio}"
        console.print(f"{problem}: {what}", markup=False)
