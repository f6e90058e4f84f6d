"""A transformer layer: its float64 reference, the gate, compositions in processes, the report."""

import dataclasses
import io
import json

import pytest

from rooftune import registry
from rooftune.lab import Lab
from rooftune.race import Options
from rooftune.results.record import Record
from rooftune.suites import block

torch = pytest.importorskip("torch", reason="the layer runs on torch tensors")
CASES = [(m, "prefill") for m in block.MODELS] + [(m.name, "decode") for m in block.MODELS.values() if m.decodes]


def tiny(model="gpt2", phase="prefill", precision="fp32", seq=19, batch=2):
    return block.shape(model, phase, precision, "cpu", batch, seq, 64 if model == "llama3-8b" else 12)


def chosen(shape, **others):
    plan = [s for s in block.plan(shape) if s.problem]
    return {s.name: {"impl": others.get(s.name, f"{s.problem.partition('[')[0]}/torch"), "config": None} for s in plan}


def prepare(shape, **others):
    from rooftune.suites import block_worker

    return block_worker.prepare(dataclasses.asdict(shape), chosen(shape, **others), 7, "cpu")


def kernel(folder, op, body, name="bad"):
    path = folder / f"{name}.py"
    path.write_text(
        f'"""Test kernel."""\nimport os\nimport torch\nfrom rooftune import registry\nfrom rooftune.core import Space\n'
        f'OP = "{op}"\nDEVICES = ("cpu",)\nPRECISIONS = ("fp32", "bf16")\nSPACE = Space()\n'
        f"def build(problem, config):\n"
        f"    import importlib\n"
        f"    module = importlib.import_module('rooftune.kernels.{op}.torch')\n"
        f"    right = module.build(problem, module.SPACE.default_for(problem))\n"
        f"    def run(out, *inputs):\n        {body}\n    return run\n"
    )
    return f"file:{path}"


# --- the arithmetic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "activation"), [("transformer-base", "relu"), ("bert-base", "gelu")])
def test_the_reference_agrees_with_torchs_own_encoder_layer(model, activation):
    from rooftune.suites import block_math

    shape = tiny(model)
    m = shape.sizes
    w = block_math.weights(shape, block.plan(shape), 3, "cpu")
    layer = torch.nn.TransformerEncoderLayer(m.d, m.h, m.dff, 0.0, activation, 1e-5, batch_first=True).double().eval()
    names = {
        "self_attn.in_proj_weight": "w_qkv", "self_attn.in_proj_bias": "b_qkv",
        "self_attn.out_proj.weight": "w_o", "self_attn.out_proj.bias": "b_o",
        "linear1.weight": "w_up", "linear1.bias": "b_up", "linear2.weight": "w_down", "linear2.bias": "b_down",
        "norm1.weight": "w_norm1", "norm1.bias": "b_norm1", "norm2.weight": "w_norm2", "norm2.bias": "b_norm2",
    }  # fmt: skip
    layer.load_state_dict({theirs: w[ours].double() for theirs, ours in names.items()})
    x = torch.randn(shape.tokens, m.d, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x.view(shape.batch, shape.new, m.d)).view(shape.tokens, m.d)
    torch.testing.assert_close(block_math.reference(shape, w, x), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model", ["gpt2", "llama3-8b"])
def test_decoding_the_last_token_is_the_last_row_of_a_prefill(model):
    """Positions, mask and cache: keys and values of a prefill, put into the cache, must give the same token."""
    from rooftune.suites import block_math

    whole, last = tiny(model, seq=9, batch=1), tiny(model, "decode", seq=8, batch=1)
    w = block_math.weights(whole, block.plan(whole), 3, "cpu")
    x = torch.randn(9, whole.sizes.d)
    steps = block.plan(whole)
    tensors = dict(w) | {"x": x}
    glue = block_math.Glue(whole, "cpu")
    for step in steps[:3]:  # norm, product, split (and rotation): what fills the cache
        if step.problem:
            problem = registry.problem(step.problem)
            inputs = [tensors[name] for name in step.reads]
            tensors[step.name] = registry.op(problem.op).reference(problem, inputs).value.float()
        else:
            made = {name: torch.empty(size) for name, size in step.writes}
            getattr(glue, step.name)(tensors[step.reads[0]], *made.values())
            tensors |= made
    w["past_k"], w["past_v"] = tensors["k"][:, :, :8], tensors["v"][:, :, :8]
    torch.testing.assert_close(
        block_math.reference(last, w, x[8:]), block_math.reference(whole, w, x)[8:], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("model", "phase"), CASES)
def test_torchs_layer_is_right_with_room_to_spare(model, phase, precision):
    reply = prepare(tiny(model, phase, precision))
    assert reply["status"] == "ok", reply["reason"]
    error = reply["error"]
    assert 0 < error["rel_fro"] < 0.7 * error["bound"]
    assert error["worst_row"] < 0.7 * error["row_bound"]
    assert error["worst_step"] < 0.7


# --- the gate -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "op", "body", "text"),
    [
        ("qkv", "gemm", "out.zero_()", "step qkv: error"),
        ("attention", "attention", "out.zero_()", "step attention: error"),
        ("norm2", "layernorm", "pass", "never written or not finite; step norm2"),
        ("up", "gemm", "right(out, inputs[0], inputs[1], 0 * inputs[2])", "step up: error"),
        ("down", "gemm", "right(out, inputs[0][:, :-2], inputs[1][:, :-2], inputs[2])", "step down: error"),
        ("o", "gemm", "right(out, *inputs); out[-1, -1] += 3", "step o: error"),
        ("norm1", "layernorm", "torch.as_strided(out, (out.numel() + 8,), (1,)).fill_(1.0)", "wrote after"),
        ("qkv", "gemm", "raise RuntimeError('no kernel image')", "no kernel image (bad.py"),
    ],
)
def test_one_broken_step_spoils_the_layer_and_is_named(tmp_path, step, op, body, text):
    reply = prepare(tiny(), **{step: kernel(tmp_path, op, body)})
    assert reply["status"] == ("failed(launch)" if "raise" in body else "wrong")
    assert text in reply["reason"]
    assert f"step {step}" in reply["reason"]
    assert "handle" not in reply


def test_a_wrong_composition_of_right_steps_is_caught(monkeypatch):
    from rooftune.suites import block_math

    monkeypatch.setattr(block_math.Glue, "add1", lambda self, x, y, out: out.copy_(y))
    reply = prepare(tiny())
    assert reply["status"] == "wrong"
    assert "every step is right on what it was given" in reply["reason"]
    assert reply["error"]["rel_fro"] > 100 * reply["error"]["bound"]


def test_a_result_kept_from_the_first_call_is_caught_in_a_timed_pass(tmp_path):
    from rooftune.suites import block_worker

    body = "right(run.kept, *inputs) if getattr(run, 'kept', None) is None else None"
    body = (
        "(right(out, *inputs), setattr(run, 'kept', out.clone())) if not hasattr(run, 'kept') else out.copy_(run.kept)"
    )
    reply = prepare(tiny(), up=kernel(tmp_path, "gemm", body))
    assert reply["status"] == "ok"
    timed = block_worker.measure(reply["handle"], 5, 1, 0.0, "hot", "wall", verify=True)
    assert timed["status"] == "wrong"
    assert "timed pass" in timed["reason"]
    assert "step up" in timed["reason"]


# --- compositions ---------------------------------------------------------------------------------------------


def record(problem, impl, time_s, status="ok", config=None):
    op, shape = problem.partition("[")[0], problem.partition("[")[2]
    return Record(problem, op, shape, "fp32", impl, config or {}, True, status, time_s=time_s)


def test_the_mix_takes_what_won_and_says_where_nothing_did_and_torch_its_fastest_call():
    steps = block.plan(tiny())
    qkv = next(s.problem for s in steps if s.name == "qkv")
    records = [
        record(qkv, "gemm/torch", 3e-6, config={"call": "addmm"}),
        record(qkv, "gemm/torch", 2e-6, config={"call": "onednn_linear"}),
        record(qkv, "gemm/numba", 1e-6, config={"block_m": 8}),
        record(qkv, "gemm/triton", None, "wrong"),
    ]
    best = block.compose("best", steps, "cpu", {qkv: ("gemm/numba", {"block_m": 8})})
    assert best.choices["qkv"] == block.Choice("gemm/numba", {"block_m": 8})
    assert best.choices["up"].impl == "gemm/torch"
    assert "no right and timed competitor" in best.choices["up"].note
    torch_only = block.compose("torch", steps, "cpu", block.fastest_torch(records))
    assert torch_only.choices["qkv"] == block.Choice("gemm/torch", {"call": "onednn_linear"})
    assert torch_only.choices["up"] == block.Choice("gemm/torch")


def test_a_language_does_all_operators_or_none():
    steps = block.plan(tiny())
    none = block.compose("cobol", steps, "cpu")
    assert not none.choices
    assert none.reason == "step norm1: no competitor of layernorm is written in cobol"
    assert "not on cpu" in block.compose("triton", steps, "cpu").reason
    for name in block.languages(steps, "cpu"):
        assert len(block.compose(name, steps, "cpu").choices) == 7


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Four compositions of a tiny layer through real worker processes."""
    folder = tmp_path_factory.mktemp("kernels")
    shape = tiny("llama3-8b", "decode", "bf16", 12)
    steps = block.plan(shape)
    torch_ = block.compose("torch", steps, "cpu")

    def with_(name, op, body):
        bad = block.Choice(kernel(folder, op, body, name))
        return block.Composition(name, {**torch_.choices, "norm1": bad})

    compositions = [
        torch_,
        with_("zeros", "layernorm", "out.zero_()"),
        with_("abort", "layernorm", "os.abort()"),
        block.compose("cobol", steps, "cpu"),
    ]
    entry = {"value": 10.0, "unit": "GB/s", "how": "", "spread": 0.0, "working_set_bytes": 2**20}
    ceilings = {"copy": [entry], "matrix": {"bf16": {"value": 0.1}}}
    with Lab("cpu", 1) as lab:
        return block.run(lab, shape, compositions, Options(rounds=6, samples=2, min_sample_s=1e-4, seed=1), ceilings)


def test_only_what_is_right_gets_a_time(measured):
    status = {c.name: c.status for c in measured.compositions}
    assert status == {"torch": "ok", "zeros": "wrong", "abort": "failed(crash)", "cobol": "skipped"}
    for c in measured.compositions:
        assert (c.time_s is None) == (c.status != "ok")
        assert bool(c.reason) == (c.status != "ok")
        assert bool(c.rounds) == (c.status == "ok")


def test_the_time_is_attributed_to_steps_glue_and_gap(measured):
    best = measured.compositions[0]
    assert sum(s.time_s for s in best.steps) + best.gap_s == pytest.approx(best.time_s)
    assert best.tokens_per_s == pytest.approx(2 / best.time_s)
    assert len(best.rounds) == 6
    assert best.ratio_to_torch == 1.0
    assert best.tie
    floors = [s.floor_s for s in best.steps if s.problem]
    assert best.roof == pytest.approx(sum(floors) / best.time_s)
    assert measured.floor_s == pytest.approx(sum(floors))
    assert all(s.floor_s is None and s.impl == "glue" for s in best.steps if not s.problem)
    assert best.steps[0].config == {"call": "rms_norm"}
    assert best.energy["joules"] is None or best.energy["unit"] == "J/token"
    assert best.energy["joules"] is not None or best.energy["reason"]


def test_the_report_shows_every_composition_and_every_reason(measured):
    from rich.console import Console

    out = io.StringIO()
    block.tables(measured, Console(file=out, width=120))
    text = out.getvalue()
    for word in ("llama3-8b / 64 decode bf16", "torch *", "zeros: wrong:", "abort: failed(crash):", "cobol: skipped:"):
        assert word in text
    for word in (
        "tokens/s",
        "TFLOP/s",
        "split_rope (glue)",
        "swiglu (glue)",
        "all glue",
        "gap (whole - steps)",
        "no J/token",
    ):
        assert word in text
    data = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert data["shape"]["model"] == "llama3-8b"
    assert data["compositions"][1]["status"] == "wrong"
    assert "use: torch (no other composition is faster" in text


@pytest.mark.parametrize(
    ("interval", "use"),
    [([1.01, 1.2], "best"), ([0.99, 1.2], "torch"), ([0.7, 0.9], "torch"), (None, "torch")],
)
def test_a_mix_is_used_only_if_it_is_faster_as_a_whole(measured, interval, use):
    mix = dataclasses.replace(measured.compositions[0], name="best", ratio_to_torch=1.1, ratio_ci=interval)
    assert dataclasses.replace(measured, compositions=[measured.compositions[0], mix]).use[0] == use
