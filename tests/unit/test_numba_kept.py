"""What is compiled in one process serves another, if it is the same in all that machine code depends on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from numba.core.ccallback import CFunc
from numba.core.types import int32

from rooftune import registry
from rooftune.kernels.common import numba_kept
from rooftune.kernels.common.numba_parallel import arguments_of, job
from rooftune.kernels.softmax import numba as softmax

ROOT = Path(__file__).resolve().parents[2]
CPU = [i for op in registry.op_names() for i in registry.impls(op) if i.language == "numba"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """As in a worker, with a cache of its own; the names of what was compiled."""
    monkeypatch.setenv("ROOFTUNE_WORKER", "1")
    monkeypatch.setenv("ROOFTUNE_CACHE_DIR", str(tmp_path / "cache"))
    done: list[str] = []
    before = CFunc._compile_uncached

    def counting(self: Any) -> Any:
        done.append(self.__qualname__)
        return before(self)

    monkeypatch.setattr(CFunc, "_compile_uncached", counting)
    return done


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "numba").glob("*.job"))


def result(**config: Any) -> torch.Tensor:
    """Of a softmax that is built as in a new process."""
    softmax.compiled.cache_clear()
    problem = registry.problem("softmax[m=3,n=37]")
    out, x = torch.empty(3, 37), torch.arange(111.0).view(3, 37).sin()
    softmax.build(problem, {**softmax.SPACE.default_for(problem), **config})(out, x)
    assert torch.allclose(out, torch.softmax(x, -1), atol=1e-6)
    return out


def test_a_second_process_compiles_nothing_and_computes_the_same(compiled: list[str], tmp_path: Path) -> None:
    first = result()
    assert len(compiled) == len(files(tmp_path)) == 1
    assert torch.equal(result(), first)
    assert len(compiled) == 1


def test_in_a_test_only_workers_keep(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROOFTUNE_WORKER")
    result()
    result()
    assert len(compiled) == 2
    assert not files(tmp_path)


def _sources(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numba_kept, "_sources", lambda: "of tomorrow")


def _features(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(numba_kept, "features", lambda: frozenset({"sse2"}))


def _variable(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("NUMBA_OPT", "2")


@pytest.mark.parametrize("change", [_sources, _features, _variable])
def test_another_source_cpu_or_setting_is_another_job(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    result()
    change(monkeypatch)
    result()
    assert len(compiled) == len(files(tmp_path)) == 2


def test_the_number_of_threads_is_not_compiled_in(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    result()
    monkeypatch.setenv("NUMBA_NUM_THREADS", "7")
    result()
    assert len(compiled) == 1


def test_another_config_is_another_job(compiled: list[str], tmp_path: Path) -> None:
    axis, values = next((name, v) for name, v in softmax.SPACE.axes.items() if name == "unroll")
    for value in values:
        result(**{axis: value})
    assert len(files(tmp_path)) == len(compiled) == len(values)
    result(**{axis: values[0]})
    assert len(compiled) == len(values)


def test_a_damaged_file_is_compiled_again(compiled: list[str], tmp_path: Path) -> None:
    first = result()
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    for number, data in enumerate((b"", whole[:20], whole[:-1], whole[:100] + b"x" + whole[101:], whole + b"x")):
        path.write_bytes(data)
        assert torch.equal(result(), first)
        assert len(compiled) == 2 + number
    result()
    assert len(compiled) == 6


def _made(*values: Any) -> Callable[..., None]:
    """A function with these values in its closure, as if it stood in a file of ours."""

    def function(given: Any, task: Any, slot: Any) -> Any:
        return values

    code = function.__code__.replace(co_filename=str(numba_kept.KERNELS / "made_up.py"))
    return FunctionType(code, {}, "function", None, function.__closure__)


@pytest.mark.parametrize("value", [1 << 40, object(), lambda: 0, [1 << 33], torch.zeros(1)])
def test_what_is_not_described_completely_is_not_kept(value: Any) -> None:
    with pytest.raises(numba_kept._Unknown):
        numba_kept.told(_made(value))


def test_the_values_of_a_closure_tell_functions_apart() -> None:
    plain = (1, True, "1", 1.0, None, (1,), {1: 2}, {2: 1}, frozenset({1, 2}), int32, _made(1), _made(2))
    assert len({numba_kept.told(_made(value)) for value in plain}) == len(plain)
    assert numba_kept.told(_made(1, "a")) == numba_kept.told(_made(1, "a"))


def test_functions_of_other_folders_are_not_kept(compiled: list[str], tmp_path: Path) -> None:
    arguments = arguments_of("int64")

    @job
    def mine(given, task, slot):  # type: ignore[no-untyped-def]
        arguments(given)

    assert len(compiled) == 1
    assert not files(tmp_path)


def test_room_is_made_from_the_oldest(compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "cache" / "numba"
    place.mkdir(parents=True)
    for age in range(4):
        old = place / f"{age}.job"
        old.write_bytes(bytes(1000))
        os.utime(old, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(numba_kept, "LIMIT", 3500)
    numba_kept._make_room(place)
    assert [path.name for path in files(tmp_path)] == ["0.job"]
    result()  # larger than all that may be kept
    assert len(compiled) == 1


def test_without_a_home_folder_nothing_is_kept(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(_: str) -> Path:
        raise RuntimeError("Could not determine home directory.")

    numba_kept._sources()  # which asks where that function is written
    monkeypatch.setattr(numba_kept, "cache_folder", nowhere)
    result()
    assert len(compiled) == 1


def test_a_folder_that_cannot_be_written_to_costs_nothing_else(
    compiled: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    result()
    assert len(compiled) == 1


PROCESS = """
import sys, torch
from rooftune import registry
from rooftune.kernels.gemm import numba as gemm
from rooftune.kernels.common.numba_cpu import vector_width
from numba.core.ccallback import CFunc
before, compiled = CFunc._compile_uncached, []
CFunc._compile_uncached = lambda self: compiled.append(1) or before(self)
problem = registry.problem("gemm[m=70,n=65,k=33,fp32]")
a, b, out = torch.randn(70, 33), torch.randn(33, 65), torch.empty(70, 65)
runs = []
for number in sys.argv[1:]:
    config = {**gemm.SPACE.default_for(problem), "read_b": "packed", "tile": gemm.TILES[vector_width()][int(number)]}
    runs.append(gemm.build(problem, config))
for run in runs:
    run(out, a, b)
    assert torch.allclose(out, a @ b, atol=1e-4), run
print(len(compiled))
"""


@pytest.mark.slow
def test_what_others_made_is_not_taken_for_what_was_made_here(tmp_path: Path) -> None:
    """Numba numbers the functions of every process alike: one that was loaded ran as another of the same number."""
    env = {**os.environ, "ROOFTUNE_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_CURRENT_TEST")  # as in production
    said = [
        subprocess.run([sys.executable, "-c", PROCESS, *tiles], env=env, capture_output=True, text=True, check=False)
        for tiles in (("0",), ("1", "0"))
    ]
    assert [each.stdout.strip() for each in said] == ["2", "2"], said[1].stderr  # packing, and the product


@pytest.mark.parametrize("impl", CPU, ids=lambda impl: impl.key)
def test_jobs_of_our_competitors_are_kept(impl: registry.Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but `gemm/numba_split`'s choice between two: it is small, and has their addresses."""
    asked: dict[str, bool] = {}
    before = numba_kept.of

    def noting(function: Any) -> Any:
        asked[function.__qualname__] = before(function) is not None

    def no_code(self: Any) -> None:
        self._wrapper_address = 1 << 40

    monkeypatch.setenv("ROOFTUNE_WORKER", "1")
    monkeypatch.setattr(numba_kept, "of", noting)
    monkeypatch.setattr(CFunc, "compile", no_code)
    module = impl.load()
    sizes = {"gemm": "m=70,n=70,k=70", "attention": "b=1,h=4,hkv=2,sq={sq},sk=200,d=128,causal"}
    for precision in impl.precisions:
        text = sizes.get(impl.op, "m=9,n=50").format(sq=1 if "decode" in impl.name else 128)
        problem = registry.problem(f"{impl.op}[{text},{precision}]")
        for cached in vars(module).values():
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
        try:
            module.build(problem, module.SPACE.default_for(problem))
        except registry.UsageError as error:
            print(f"{problem}: {error}")  # this CPU lacks what it needs
        for cached in vars(module).values():  # no code was made
            if hasattr(cached, "cache_clear"):
                cached.cache_clear()
    assert {name for name, kept in asked.items() if not kept} <= {"either.<locals>.chosen"}
    assert asked or "amx" in impl.name or "split" in impl.name
