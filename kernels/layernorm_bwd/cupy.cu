// Backward of layer norm, or with RMS of the RMS norm: dx by rows, and the sums over rows for dweight and dbias.
//
// Rows that fit stay in registers: blocks (or clusters of them) walk over the rows, one pass over dy and x makes dx
// and adds to the thread's own columns of the two sums; each group of ROW_THREADS (or cluster) writes them as a
// partial row. Longer rows (ITEMS 0) are read twice for dx, and sums_kernel reads dy and x once more by columns.
// add_kernel adds the partial rows up, always in the same order. Macros: those of rows.cuh, RMS, and KERNEL: which of
// the three is compiled. out is [m + 2, n] or, with RMS, [m + 1, n]; parts: fp32 [2 or 1, partial rows, n], dweight
// first.
#include "rows.cuh"

using namespace rt;

#if KERNEL == 0
ROW_KERNEL rows_kernel(T* __restrict__ out, float* __restrict__ parts, const T* __restrict__ dy,
                       const T* __restrict__ x, const T* __restrict__ weight, const float* __restrict__ mean,
                       const float* __restrict__ rstd, int m, int n) {
  SHARED_MEMORY(shared);
  constexpr int WARPS = BLOCK_THREADS / 32, GROUPS = BLOCK_THREADS / ROW_THREADS;
  constexpr int TURN = (CLUSTER_SIZE > 1 ? 4 : 2) * WARPS;  // floats of both reductions of a row
  float* scratch = reinterpret_cast<float*>(shared);        // those twice: rows take turns
  const Row place(m, n);
  const float share = 1.0f / n;

#if ITEMS > 0
  float by_weight[ITEMS][VEC] = {}, by_bias[ITEMS][VEC] = {};
  const int walkers = gridDim.x / CLUSTER_SIZE * GROUPS, group = threadIdx.x / ROW_THREADS;
  int turn = 0;
  for (int first = place.row - group; first < m; first += walkers, turn ^= TURN) {
    const bool active = first + group < m;  // past the last row: a repeated one, neither stored nor added
    const int row = active ? first + group : m - 1;
    const long long start = (long long)row * n;
    const float inverse = rstd[row], centre = RMS ? 0.0f : mean[row];
    float g[ITEMS][VEC], normed[ITEMS][VEC], level = 0.0f, along = 0.0f;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const int col = place.column(item);
#pragma unroll
      for (int i = 0; i < VEC; i++) g[item][i] = normed[item][i] = 0.0f;
      if (col < n) {
        unpack(x + start + col, [&](int i, float value) { normed[item][i] = (value - centre) * inverse; });
        unpack(dy + start + col, [&](int i, float value) { g[item][i] = value; });
#pragma unroll
        for (int i = 0; i < VEC; i++)
          if (active) {
            by_weight[item][i] = fmaf(g[item][i], normed[item][i], by_weight[item][i]);
            if (!RMS) by_bias[item][i] += g[item][i];
          }
        unpack(weight + col, [&](int i, float value) { g[item][i] *= value; });
      }
#pragma unroll
      for (int i = 0; i < VEC; i++) {
        level += g[item][i];
        along = fmaf(g[item][i], normed[item][i], along);
      }
    }
    along = reduce_row(along, scratch + turn, Sum()) * share;
    level = RMS ? 0.0f : reduce_row(level, scratch + turn + WARPS, Sum()) * share;
#pragma unroll
    for (int item = 0; item < ITEMS; item++) {
      const int col = place.column(item);
      if (active && col < n)
        store_vector(out + start + col,
                     [&](int i) { return (g[item][i] - level - normed[item][i] * along) * inverse; });
    }
  }
  float* mine = parts + (long long)place.row * n;
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = place.column(item);
    if (col >= n) continue;
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      mine[col + i] = by_weight[item][i];
      if (!RMS) mine[(long long)walkers * n + col + i] = by_bias[item][i];
    }
  }
#else
  const int at = place.active ? place.row : m - 1;
  const float inverse = rstd[at], centre = RMS ? 0.0f : mean[at];
  const T* values = x + place.start;
  const T* slopes = dy + place.start;
  float level = 0.0f, along = 0.0f;
  auto each = [&](auto use) {  // use(column, dy * weight, xhat) of this thread's vectors
    each_vector(values, place.thread, n, [&](int col, const float(&v)[VEC]) {
      float g[VEC], normed[VEC];
      unpack(slopes + col, [&](int i, float value) { g[i] = value; });
      unpack(weight + col, [&](int i, float value) { g[i] *= value; });
#pragma unroll
      for (int i = 0; i < VEC; i++) normed[i] = (v[i] - centre) * inverse;
      use(col, g, normed);
    });
  };
  each([&](int, const float(&g)[VEC], const float(&normed)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; i++) {
      level += g[i];
      along = fmaf(g[i], normed[i], along);
    }
  });
  along = reduce_row(along, scratch, Sum()) * share;
  level = RMS ? 0.0f : reduce_row(level, scratch + WARPS, Sum()) * share;
  each([&](int col, const float(&g)[VEC], const float(&normed)[VEC]) {
    if (place.active)
      store_vector(out + place.start + col, [&](int i) { return (g[i] - level - normed[i] * along) * inverse; });
  });
#endif
}

#elif KERNEL == 1
// A thread sums VEC columns over every `splits`-th row; blocks are `splits` times over the columns.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    sums_kernel(float* __restrict__ parts, const T* __restrict__ dy, const T* __restrict__ x,
                const float* __restrict__ mean, const float* __restrict__ rstd, int m, int n, int splits) {
  const int split = blockIdx.x % splits;
  const int col = (blockIdx.x / splits * BLOCK_THREADS + threadIdx.x) * VEC;
  if (col >= n) return;
  float by_weight[VEC] = {}, by_bias[VEC] = {};
#pragma unroll 4
  for (int row = split; row < m; row += splits) {
    const long long at = (long long)row * n + col;
    const float inverse = rstd[row], centre = RMS ? 0.0f : mean[row];
    float g[VEC];
    unpack(dy + at, [&](int i, float value) { g[i] = value; });
    unpack(x + at, [&](int i, float value) { by_weight[i] = fmaf(g[i], (value - centre) * inverse, by_weight[i]); });
    if (!RMS)
#pragma unroll
      for (int i = 0; i < VEC; i++) by_bias[i] += g[i];
  }
  float* mine = parts + (long long)split * n + col;
#pragma unroll
  for (int i = 0; i < VEC; i++) {
    mine[i] = by_weight[i];
    if (!RMS) mine[(long long)splits * n + i] = by_bias[i];
  }
}

#else
// out[m + which, :] = sum of `count` partial rows: 32 columns a block, its warps take turns in the rows.
extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
    add_kernel(T* __restrict__ out, const float* __restrict__ parts, int m, int n, int count) {
  SHARED_MEMORY(shared);
  constexpr int WARPS = BLOCK_THREADS / 32;
  float* sums = reinterpret_cast<float*>(shared);  // [WARPS][32]
  const int blocks = (n + 31) / 32, which = blockIdx.x / blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int col = blockIdx.x % blocks * 32 + lane;
  const float* column = parts + (long long)which * count * n + col;
  float sum = 0.0f;
  if (col < n)
#pragma unroll 8
    for (int row = warp; row < count; row += WARPS) sum += column[(long long)row * n];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || col >= n) return;
#pragma unroll
  for (int other = 1; other < WARPS; other++) sum += sums[other * 32 + lane];
  out[(long long)(m + which) * n + col] = Convert<T>::from(sum);
}
#endif
