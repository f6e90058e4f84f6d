"""How causal attention on wgmma deals its tiles out to persistent blocks."""

from __future__ import annotations

import pytest

from rooftune import registry
from rooftune.kernels.attention import cupy_wgmma


@pytest.mark.parametrize(
    ("heads", "group_heads", "sq", "sk"), [(64, 13, 4096, 4096), (5, 2, 1000, 300), (1, 1, 10, 10)]
)
@pytest.mark.parametrize("grid", [1, 7, 132])
def test_every_tile_is_dealt_once_and_a_block_ends_with_none(
    heads: int, group_heads: int, sq: int, sk: int, grid: int
) -> None:
    problem = registry.problem(f"attention[b=1,h={heads},sq={sq},sk={sk},d=128,causal,bf16]")
    lengths = cupy_wgmma._lengths(problem, 192, 80)
    assert len(lengths) == -(-sq // 192)
    assert lengths == sorted(lengths, reverse=True)  # the last queries see most
    dealt = cupy_wgmma._order(lengths, heads, group_heads, grid)
    assert {len(row) for row in dealt} == {grid}
    for block in zip(*dealt, strict=True):
        tiles = [tile for tile in block if tile >= 0]
        assert tiles == sorted(tiles)
        assert list(block) == [*tiles, *[-1] * (len(block) - len(tiles))]
        assert block[-1] == -1  # a block looks at the row after its last tile
    everything = sorted(tile for row in dealt for tile in row if tile >= 0)
    assert everything == list(range(len(lengths) * heads))


def test_blocks_end_together() -> None:
    """64 heads of 4096 queries on 132 blocks; in rounds that turn, the longest block has 1.09 times the mean."""
    problem = registry.problem("attention[b=4,h=16,sq=4096,d=128,causal,bf16]")
    lengths = cupy_wgmma._lengths(problem, 192, 80)
    group = 13
    dealt = cupy_wgmma._order(lengths, 64, group, 132)

    def length(tile: int) -> int:
        first = tile // (group * len(lengths)) * group
        return lengths[tile % (group * len(lengths)) // min(group, 64 - first)]

    loads = [sum(length(tile) for tile in block if tile >= 0) for block in zip(*dealt, strict=True)]
    assert sum(loads) == 64 * sum(lengths)
    assert max(loads) < 1.02 * sum(loads) / 132
