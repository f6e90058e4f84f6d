// Which tiles of a product a persistent cluster of blocks does, and how partial sums of a tile meet.
#pragma once
#include "hopper.cuh"

namespace rt {

// A cluster's tiles, one after another. Clusters that run together take GROUP rows of tiles, column by column.
//
// With SPLITS above 1 each tile is done so many times, over parts of k. With STREAM (stream-K: Osama et al., 2023)
// whole tiles are dealt as long as everybody gets one, and the steps along k of the rest, one to two tiles for each
// cluster, are dealt out evenly: a cluster may end one tile, do others and begin a last one. Positions along that
// stream run against the clusters' numbers: a tile's first part waits for the later ones, which lower-numbered
// clusters do first of all, and those were started before it, so that all comes to an end whoever runs at once.
template <int ROWS, int COLS, int DEPTH, int CLUSTER_HEIGHT, int CLUSTER_WIDTH, int GROUP, int SPLITS, bool STREAM>
struct Tiles {
  static constexpr int BLOCKS = CLUSTER_HEIGHT * CLUSTER_WIDTH;
  static_assert(SPLITS == 1 || !STREAM, "k is either split or streamed");
  int tiles_rows, tiles_cols, tiles_k, total, next, step, rank;
  int position, at = 0, stop = 0;               // in the stream, in steps of k
  int row, col, split = 0, k_begin, k_end;      // of the current tile; k in steps

  __device__ __forceinline__ Tiles(int rows, int cols, int k) {
    tiles_rows = (rows + ROWS * CLUSTER_HEIGHT - 1) / (ROWS * CLUSTER_HEIGHT);
    tiles_cols = (cols + COLS * CLUSTER_WIDTH - 1) / (COLS * CLUSTER_WIDTH);
    tiles_k = (k + DEPTH - 1) / DEPTH;
    total = tiles_rows * tiles_cols * SPLITS;
    next = blockIdx.x / BLOCKS, step = gridDim.x / BLOCKS;
    rank = BLOCKS > 1 ? cluster_rank() : 0;
    position = step - 1 - next;
    if constexpr (STREAM) {
      if (total % step) total = max(total / step - 1, 0) * step;  // what is left of them as whole tiles
      at = start(position), stop = start(position + 1);
    }
  }
  // Where a position begins, counted from the first streamed step.
  __device__ __forceinline__ int start(int which) const {
    const int steps = (tiles_rows * tiles_cols - total) * tiles_k;
    return (int)((long long)steps * which / step);
  }

  __device__ __forceinline__ bool advance() {
    const int area = tiles_rows * tiles_cols;
    int tile;
    if (next < total) {
      tile = next % area;
      if (SPLITS > 1) split = next / area;
      k_begin = (int)((long long)tiles_k * split / SPLITS), k_end = (int)((long long)tiles_k * (split + 1) / SPLITS);
      next += step;
    } else if (STREAM && at < stop) {
      tile = total + at / tiles_k;
      k_begin = at % tiles_k, k_end = min(tiles_k, k_begin + stop - at);
      at += k_end - k_begin;
    } else {
      return false;
    }
    const int group = tile / (GROUP * tiles_cols), in_group = tile % (GROUP * tiles_cols);
    const int height = min(tiles_rows - group * GROUP, GROUP);
    row = ((group * GROUP + in_group % height) * CLUSTER_HEIGHT + rank % CLUSTER_HEIGHT) * ROWS;
    col = (in_group / height * CLUSTER_WIDTH + rank / CLUSTER_HEIGHT) * COLS;
    return true;
  }

  // The place of what this block leaves behind of a tile that another has begun: the first of its stream, if any.
  __device__ __forceinline__ int own_slot() const { return position * BLOCKS + rank; }
  // use(slot) for every later part of the current tile, in the order of k: a sum is always the same.
  template <class Use> __device__ __forceinline__ void later_parts(Use use) const {
    if (k_end == tiles_k) return;
    const int end = at + tiles_k - k_end;  // of the tile
    for (int which = position + 1; start(which) < end; which++) use(which * BLOCKS + rank);
  }
};

// A warpgroup's sums go to `place`, in the order of its registers: 16 bytes a thread, neighbours side by side.
template <class Acc, int PARTS, int SUMS>
__device__ __forceinline__ void leave_part(const Acc (&acc)[PARTS][SUMS], Acc* place, unsigned* flag, int barrier) {
  const int thread = threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int j = 0; j < SUMS; j += 4)
      store<Acc, 4>(place + (i * SUMS + j) * 128 + thread * 4,
                    Vec<Acc, 4>{acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]});
  named_sync(barrier, 128);
  if (thread == 0) raise_flag(flag);
}
// What another block's warpgroup left there is added. The flag is down again afterwards, for the next launch.
template <class Acc, int PARTS, int SUMS>
__device__ __forceinline__ void add_part(Acc (&acc)[PARTS][SUMS], const Acc* place, unsigned* flag, int barrier) {
  const int thread = threadIdx.x % 128;
  if (thread == 0) await_flag(flag);
  named_sync(barrier, 128);
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int j = 0; j < SUMS; j += 4) {
      if (j % 32 == 0) __syncwarp();  // eight loads in flight: with all of them, loop constants spill (24 bytes)
      const Vec<Acc, 4> x = load_written<Acc, 4>(place + (i * SUMS + j) * 128 + thread * 4);
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j + e] += x.v[e];
    }
}

}  // namespace rt
