// Backward of fused attention in fp32 without tensor cores: the roles, sums and order of cupy.cu, whose row
// statistics it reads.
//
// A warp is 4 x 8 lanes and owns 16 rows. Each lane has MINE of them (every fourth) and, of those, every eighth
// passing row's weight and every eighth 16-byte chunk of the sums; the eight lanes of a row exchange weights by
// shuffles. Macros: those of cupy.cu; BLOCK may be 8.
#include "backward.cuh"

using namespace rt;

constexpr int D = HEAD_DIM, THREADS = 32 * NUM_WARPS, OWN = 16 * NUM_WARPS, MINE = 4, PASSING = BLOCK / 8;
constexpr int CHUNKS = D / 4, SHARE = (CHUNKS + 7) / 8;  // 16-byte chunks of a row; at most so many in a lane
constexpr bool SLOPES = SUMS & 1, WEIGHTS = SUMS & 2;    // which sums this launch makes: sum1 (of ds), sum2 (of p)
using Tile = Rows<CHUNKS>;
constexpr int OWN_TILES = SLOPES ? 2 : 1;  // p alone needs no v
using Passing = Walk<float, Tile, D, OWN, OWN_TILES, BLOCK, STAGES, THREADS, KEYS, CAUSAL>;

__device__ __forceinline__ Vec<float, 4> quad(const char* tile, int row, int chunk) {
  return load<float, 4>(reinterpret_cast<const float*>(tile + Tile::at(row, chunk)));
}
// w[i][j] = a[row + 4 i] . b[8 j + x]
__device__ __forceinline__ void multiply_rows(float (&w)[MINE][PASSING], const char* a, int row, const char* b, int x) {
#pragma unroll 2
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    Vec<float, 4> left[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) left[i] = quad(a, row + 4 * i, chunk);
#pragma unroll
    for (int j = 0; j < PASSING; j++) {
      const Vec<float, 4> right = quad(b, 8 * j + x, chunk);
#pragma unroll
      for (int i = 0; i < MINE; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) w[i][j] = fmaf(left[i].v[e], right.v[e], w[i][j]);
    }
  }
}
// sum[i][c] += sum over the passing rows of w times their chunk 8 c + x
__device__ __forceinline__ void add_product(float (&sum)[MINE][SHARE][4], const float (&w)[MINE][PASSING],
                                            const char* b, int lane) {
  const int x = lane % 8;
#pragma unroll
  for (int j = 0; j < PASSING; j++)
#pragma unroll 2
    for (int other = 0; other < 8; other++) {
      float p[MINE];
#pragma unroll
      for (int i = 0; i < MINE; i++) p[i] = __shfl_sync(0xffffffffu, w[i][j], lane / 8 * 8 + other);
#pragma unroll
      for (int c = 0; c < SHARE; c++) {
        if (CHUNKS % 8 != 0 && 8 * c + x >= CHUNKS) continue;
        const Vec<float, 4> right = quad(b, 8 * j + other, 8 * c + x);
#pragma unroll
        for (int i = 0; i < MINE; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) sum[i][c][e] = fmaf(p[i], right.v[e], sum[i][c][e]);
      }
    }
}
__device__ __forceinline__ void write_rows(float* out, const float (&sum)[MINE][SHARE][4], float factor, int row, int x,
                                           int rows) {
#pragma unroll
  for (int i = 0; i < MINE; i++)
#pragma unroll
    for (int c = 0; c < SHARE; c++) {
      if (row + 4 * i >= rows || 8 * c + x >= CHUNKS) continue;
      Vec<float, 4> y;
#pragma unroll
      for (int e = 0; e < 4; e++) y.v[e] = sum[i][c][e] * factor;
      store<float, 4>(out + (long long)(row + 4 * i) * D + 4 * (8 * c + x), y);
    }
}

// Arguments as in cupy.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(float* __restrict__ out, const float* __restrict__ a1, const float* __restrict__ a2,
                    const float* __restrict__ b1, const float* __restrict__ b2, const float* __restrict__ stats,
                    int group, int sq, int sk, int row1, int row2, float scale) {
  SHARED_MEMORY(shared);
  const Passing walk(b1, b2, stats, shared, group, sq, sk);
  const int own_rows = walk.own_rows, other_rows = walk.other_rows, head = walk.head, own0 = walk.own0;
  const int ahead = walk.ahead;
  walk.begin(a1, a2);

  const int lane = threadIdx.x % 32, x = lane % 8, row = threadIdx.x / 32 * 16 + lane / 8;  // then every 4th
  float level[MINE] = {}, mean[MINE] = {};  // of the queries, if they are owned
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int query = own0 + row + 4 * i;
    if (!KEYS && query < sq) {
      level[i] = stats[2 * ((long long)head * sq + query)];
      mean[i] = stats[2 * ((long long)head * sq + query) + 1];
    }
  }
  float sum1[MINE][SHARE][4] = {}, sum2[MINE][SHARE][4] = {};  // one that is not made takes no registers

  for (int step = 0; step < walk.total; step++) {
    copy_wait<STAGES - 2>();
    __syncthreads();
    walk.fetch(step + STAGES - 1);
    const char *tile1 = walk.stage(step), *tile2 = tile1 + Passing::BLOCK_BYTES;
    const float* pairs = reinterpret_cast<const float*>(tile2 + Passing::BLOCK_BYTES);
    const int other0 = walk.row(step);
    float w[MINE][PASSING] = {};
    multiply_rows(w, walk.own1, row, tile1, x);
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
      for (int j = 0; j < PASSING; j++) {
        const int other = other0 + 8 * j + x, own = own0 + row + 4 * i;
        const int query = KEYS ? other : own, key = KEYS ? own : other;
        const bool seen = other < other_rows && (!CAUSAL || key <= query + ahead);
        const float base = KEYS ? pairs[2 * (8 * j + x)] : level[i];
        w[i][j] = seen ? fast_exp2(fmaf(w[i][j], scale, -base)) : 0.0f;
      }
    if (WEIGHTS) add_product(sum2, w, tile2, lane);
    if (!SLOPES) continue;
    float slope[MINE][PASSING] = {};
    multiply_rows(slope, walk.own2, row, tile2, x);
#pragma unroll
    for (int i = 0; i < MINE; i++)
#pragma unroll
      for (int j = 0; j < PASSING; j++) w[i][j] *= slope[i][j] - (KEYS ? pairs[2 * (8 * j + x) + 1] : mean[i]);
    add_product(sum1, w, tile1, lane);
  }

  copy_wait<0>();  // nothing may be under way when a block ends
  const int rows = own_rows - own0;
  const long long at = (long long)head * own_rows + own0;
  if (SLOPES) write_rows(out + (row1 + at) * D, sum1, scale / LOG2E, row, x, rows);
  if (WEIGHTS) write_rows(out + (row2 + at) * D, sum2, 1.0f, row, x, rows);
}
