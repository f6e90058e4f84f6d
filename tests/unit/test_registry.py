"""An operator of one's own that is broken or incomplete says so in one line, not in the traceback of every verb."""

from __future__ import annotations

from pathlib import Path

import pytest

from rooftune import device, registry
from rooftune.autotune import dispatch, export
from rooftune.core import UsageError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("OP = Op(", "raises on import: SyntaxError"),
        ("OP = 1 / 0", "raises on import: ZeroDivisionError: division by zero (__init__.py:1)"),
        ("OP = 5", "OP is a int; write OP = Op(name=...)"),
        ("from rooftune.kernels.softmax import OP", "the operator is called 'softmax', its folder"),
    ],
)
def test_a_broken_operator_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    name = f"broken{abs(hash(text))}"  # a name of its own: Python keeps what it imported
    file = tmp_path / name / "__init__.py"
    file.parent.mkdir()
    file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError) as refused:
        registry._declared(name, file)
    assert str(file) in str(refused.value)
    assert words in str(refused.value)


def test_without_torchs_own_call_there_is_nothing_to_choose_and_other_operators_are_exported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = registry.impls
    alone = tuple(i for i in every("softmax") if not i.baseline)
    monkeypatch.setattr(registry, "impls", lambda op: alone if op == "softmax" else every(op))
    problem = registry.problem("softmax[m=7,n=9,fp32]")
    with pytest.raises(UsageError, match=r"softmax has no competitor with BASELINE = True.*add torch's own calls"):
        dispatch.choose(problem)
    chosen, left = export.winners([problem, registry.problem("layernorm[m=7,n=9,fp32]")], device.find("cpu"))
    assert not chosen
    assert "BASELINE" in left[str(problem)]
    assert "nothing was measured" in left["layernorm[m=7,n=9,fp32]"]
