"""What the CUDA C++ row kernels (softmax, layernorm) share: their space and how a row is dealt out (cuda/rows.cuh)."""

from __future__ import annotations

from pathlib import Path

from rooftune.core import Config, Problem, Space, UsageError
from rooftune.kernels.common.cupy_kernel import ALIGNMENT, PRECISION_CODE, REGISTERS, Kernel, bytes_in, chunk

KEPT_VALUES = 64  # fp32 values a thread keeps in registers at most
OTHER_REGISTERS = 32  # beside them; 1024 threads have 64 registers each, so 32 values
CLUSTER_FROM = 16384  # columns: shorter rows fit one block, whose barriers are cheaper than a cluster's
WANTED_VALUES = 32  # of the untuned config: four 16-byte loads of bf16 under way in each thread


def _vec(config: Config, problem: Problem) -> int:
    """Elements a load: the config's, or fewer where rows of n elements are not aligned to that."""
    return int(min(config["vec"], chunk(problem["n"], bytes_in(problem))))


def _values(threads: int, vec: int, n: int) -> int:
    """Values of a row that one thread handles, tail included."""
    return -(-n // (threads * vec)) * vec


def _one_load(config: Config, problem: Problem) -> bool:
    return bool(config["vec"] * bytes_in(problem) <= ALIGNMENT)


def _block(config: Config, problem: Problem) -> bool:
    """A block holds whole rows."""
    return bool(config["threads_per_row"] <= config["num_threads"])


def _clustered(config: Config, problem: Problem) -> bool:
    """A cluster is for rows that fill its blocks; each warp of a block has a float for its answers."""
    blocks = config["cluster"]
    whole = config["threads_per_row"] == config["num_threads"] >= 32 * blocks
    return bool(blocks == 1 or (whole and problem["n"] >= CLUSTER_FROM))


def space(held: int = 1) -> Space:
    """Threads of a row, threads of a block, elements a load, blocks of a row (compute capability 9.0 and newer).

    `held`: values kept for each place of a row.
    """

    def default(problem: Problem) -> Config:
        widest = ALIGNMENT // bytes_in(problem)
        vec, threads = _vec({"vec": widest}, problem), 8
        while threads < 1024 and held * _values(threads, vec, problem["n"]) > WANTED_VALUES:
            threads *= 2
        return {"threads_per_row": threads, "num_threads": max(threads, 128), "vec": widest, "cluster": 1}

    axes = {
        "threads_per_row": (8, 16, 32, 64, 128, 256, 512, 1024),
        "num_threads": (64, 128, 256, 512, 1024),
        "vec": (1, 2, 4, 8),
        "cluster": (1, 2, 4, 8),
    }
    return Space(axes=axes, where=(_one_load, _block, _clustered), default=default)


SPACE = space()


def kernel(
    source: Path,
    entry: str,
    problem: Problem,
    config: Config,
    beside: int = OTHER_REGISTERS,
    held: int = 1,
    **macros: int,
) -> Kernel:
    """The kernel of a row operator. Rows that a thread cannot keep in registers are read again in every pass.

    `beside` is what it needs of registers apart from the row's values, `held` how many values a place has.
    """
    vec, threads = _vec(config, problem), config["num_threads"]
    kept = min(KEPT_VALUES, REGISTERS // threads - beside)
    cluster = config["cluster"]
    values = _values(config["threads_per_row"] * cluster, vec, problem["n"])
    settings = {
        "PRECISION": PRECISION_CODE[problem.precision],
        "BLOCK_THREADS": threads,
        "ROW_THREADS": config["threads_per_row"],
        "VEC": vec,
        "CLUSTER_SIZE": cluster,
        "ITEMS": values // vec if held * values <= kept else 0,
        **macros,
    }
    return Kernel(source, entry, tuple(settings.items()), threads, (2 if cluster == 1 else 4) * threads // 32 * 4)


def grid(problem: Problem, config: Config) -> int:
    """Blocks for all rows."""
    return -(-problem["m"] * config["threads_per_row"] // config["num_threads"]) * int(config["cluster"])


def compilable(config: Config, arch: str) -> Config:
    """The config, if the architecture has what it needs.

    Raises:
        UsageError: clusters before compute capability 9.0.
    """
    if config["cluster"] > 1 and int(arch.removeprefix("sm_").rstrip("a")) < 90:
        raise UsageError(f"{arch} has no clusters of blocks; they begin with sm_90")
    return config
