"""The machine code of the register tiles for CPUs that need not be here: instructions in the inner loop, no spills.

LLVM compiles the same vector code for a named CPU; nothing runs. A tile whose sums left the registers would be
right and several times slower, which no test of values sees.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba not installed", allow_module_level=True)

import llvmlite.binding as llvm
from llvmlite import ir

from rooftune.kernels.common import numba as vectors
from rooftune.kernels.common import numba_tile as tiles
from rooftune.kernels.common import numba_tmul as tmul
from rooftune.kernels.common.numba_tile import Format

INSTRUCTIONS = {  # of those that are spelled out where a CPU has none
    "x86-64": {"sse2"},
    "znver3": {"sse2", "avx2"},
    "skylake-avx512": {"sse2", "avx2", "avx512bw"},
    "sapphirerapids": {"sse2", "avx2", "avx512bw", "avx512vnni", "avx512bf16", "amx-tile", "amx-bf16", "amx-int8"},
    "znver5": {"sse2", "avx2", "avx512f", "avx512dq", "avx512bw", "avx512vnni", "avx512bf16"},
}


def assembly(function: Any, arguments: int, width: int, cpu: str) -> str:
    """What LLVM makes of an intrinsic of whole numbers, at a vector width, for a CPU of x86-64."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module("code")
    module.triple = "x86_64-unknown-linux-gnu"
    kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments)
    made = ir.Function(module, kind, "kernel")
    builder = ir.IRBuilder(made.append_basic_block())
    function.emit(vectors.Emit(builder, width, INSTRUCTIONS[cpu]), *made.args)
    builder.ret_void()
    parsed = llvm.parse_assembly(str(module))
    machine = llvm.Target.from_triple(module.triple).create_target_machine(cpu=cpu, opt=3)
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


def inner_loop(code: str, instruction: str) -> str:
    """The one block that ends with a jump to its own beginning and holds the instruction."""
    blocks = re.split(r"\n(?=\.LBB)", code)
    own = [b for b in blocks if re.search(r"\bj\w+\s+" + re.escape(b.split(":")[0]) + r"\b", b) and instruction in b]
    assert len(own) == 1, [b.split(":")[0] for b in own]
    return own[0]


CASES = [  # CPU, lanes, format, rows, columns, instruction, register
    ("znver3", 8, Format("fp32", 1), 6, 16, "vfmadd", "ymm"),
    ("znver3", 8, Format("fp32", 1), 4, 24, "vfmadd", "ymm"),
    ("znver3", 8, Format("int8", 2, "int32"), 6, 16, "vpmaddwd", "ymm"),
    ("znver5", 16, Format("fp32", 1), 28, 16, "vfmadd", "zmm"),
    ("znver5", 16, Format("fp32", 1), 14, 32, "vfmadd", "zmm"),
    ("znver5", 16, Format("fp32", 1), 8, 48, "vfmadd", "zmm"),
    ("znver5", 16, Format("bf16", 2), 14, 32, "vdpbf16ps", "zmm"),
    ("znver5", 16, Format("bf16", 2), 8, 48, "vdpbf16ps", "zmm"),  # both products of attention
    ("sapphirerapids", 16, Format("bf16", 2), 8, 48, "vdpbf16ps", "zmm"),
    ("znver5", 16, Format("int8", 4, "int32", True), 14, 32, "vpdpbusd", "zmm"),
    ("sapphirerapids", 16, Format("fp32", 1), 14, 32, "vfmadd", "zmm"),
    ("skylake-avx512", 16, Format("int8", 2, "int32"), 8, 48, "vpmaddwd", "zmm"),
    ("x86-64", 4, Format("int8", 2, "int32"), 4, 8, "pmaddwd", "xmm"),
    ("sapphirerapids", 16, Format("int8", 4, "int32", True), 8, 48, "vpdpbusd", "zmm"),
]


@pytest.mark.parametrize(("cpu", "width", "form", "rows", "columns", "instruction", "register"), CASES)
def test_a_tile_keeps_its_sums_in_registers(
    cpu: str, width: int, form: Format, rows: int, columns: int, instruction: str, register: str
) -> None:
    loop = inner_loop(assembly(tiles.tile(form, rows, columns), 5, width, cpu), instruction)
    assert len(re.findall(rf"{instruction}\w*\s.*%{register}", loop)) == rows * columns // width, loop
    assert "(%rsp" not in loop, "sums leave the registers"
    assert not re.search(r"vfmadd\w*\s.*%xmm", loop)


@pytest.mark.parametrize(("dtype", "instruction"), [("bf16", "tdpbf16ps"), ("int8", "tdpbssd")])
def test_a_product_of_amx_is_four_tiles_a_step(dtype: str, instruction: str) -> None:
    code = assembly(tmul.tile(tmul.FORMATS[dtype], 32, 32, stream="b"), 7, 16, "sapphirerapids")
    loop = inner_loop(code, instruction)
    assert len(re.findall(rf"\b{instruction}\b", loop)) == 4
    assert len(re.findall(r"\btileloadd\b", loop)) == len(re.findall(r"\btileloaddt1\b", loop)) == 2
    assert "(%rsp" not in loop
    assert len(set(re.findall(r"%tmm\d", code))) == 7  # sums, two of a, and one for all of b
    assert "ldtilecfg" in assembly(tmul.configure(), 0, 16, "sapphirerapids")
    assert "tilerelease" in assembly(tmul.release(), 0, 16, "sapphirerapids")


def test_a_product_of_split_fp32_loads_every_part_once_for_each_tile() -> None:
    code = assembly(tmul.tile(tmul.FORMATS["fp32"], 16, 32, stream="b"), 7, 16, "sapphirerapids")
    loop = inner_loop(code, "tdpbf16ps")
    assert len(re.findall(r"\btdpbf16ps\b", loop)) == 6 * 2
    assert len(re.findall(r"\btileloadd\b", loop)) == 4  # one part comes twice
    assert len(re.findall(r"\btileloaddt1\b", loop)) == 3 * 2
    assert len(set(re.findall(r"%tmm\d", code))) == 5  # sums, one of a and two of b


def test_a_product_of_fixed_point_adds_digits_of_one_weight_up_by_themselves() -> None:
    code = assembly(tmul.tile(tmul.FORMATS["fixed"], 16, 16, stream="a"), 7, 16, "sapphirerapids")
    loop = inner_loop(code, "tdpbssd")
    sums = re.findall(r"\btdpbssd\b.*%(tmm\d)\n", loop + "\n")
    assert sorted(sums.count(name) for name in set(sums)) == [1, 2, 3]
    assert len(re.findall(r"\btileloadd\b", loop)) == 3
    assert len(re.findall(r"\btileloaddt1\b", loop)) == 4  # one digit comes twice
    assert len(set(re.findall(r"%tmm\d", code))) == 5


def test_a_tile_that_is_too_large_is_seen_to_spill() -> None:
    assert "(%rsp" in inner_loop(assembly(tiles.tile(Format("fp32", 1), 8, 24), 5, 8, "znver3"), "vfmadd")


@pytest.mark.parametrize(("cpu", "width", "degree"), [("znver3", 8, 6), ("znver5", 16, 5)])
def test_exp2_is_fused_and_branch_free(cpu: str, width: int, degree: int) -> None:
    def emit(e: Any, x: Any, out: Any, n: Any) -> None:
        def body(chunk: Any, state: Any) -> list[Any]:
            chunk.store(e.exp2(chunk.load(x, "fp32"), degree), out, "fp32")
            return []

        e.loop(e.index(0), n, e.width, [], lambda at, _: body(vectors.Chunk(e, at, None), []))

    code = assembly(vectors.intrinsic([None] * 3, emit), 3, width, cpu)
    loop = inner_loop(code, "vfmadd")
    assert len(re.findall("vfmadd", loop)) == degree
    assert "call" not in loop
    assert ("vreduceps" in loop, "vscalefps" in loop) == (width == 16, width == 16)
    assert len(re.findall(r"\n\tj", loop)) == 1  # the loop's own jump


def test_the_next_panel_is_fetched_and_the_output_claimed() -> None:
    assert "prefetcht1" in assembly(tiles.touch(), 2, 8, "znver3")
    assert "prefetchw" in assembly(tiles.touch(write=True), 2, 8, "znver3")
