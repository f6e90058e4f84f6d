// Backward of fused attention with TMA and wgmma, from lse and the row sums delta = sum_j dout * out; for compute
// capability 9.0.
//
// One kernel in two roles. With KEYS a block owns keys (k, v) of one key head and goes through the queries (q, dout)
// of every head that reads them: dk and dv. Without, it owns queries (q, dout) and goes through the keys (k, v): dq.
// In both, with `a` the owned rows and `b` those that pass,
//   s = a1 b1^T,  p = exp2(scale * s - lse),  ds = p * (a2 b2^T - delta),  sum1 += ds b1,  KEYS: sum2 += p b2.
// With KEYS the scores are transposed that way: p and ds are always in the layout of a left operand, which stays in
// registers, and both products of a tile that passes read it where it is, along D and across it.
//
// A consumer warpgroup owns 64 rows, one producer thread fills a ring of STAGES pairs of passing tiles. The products
// of a step are under way beside the arithmetic of it: the exponentials meet a2 b2^T, the slopes meet p b2, and the
// scores of the next step are issued behind both sums. Nothing is added in memory, so results repeat to the bit.
//
// Macros: PRECISION (fp16, bf16), HEAD_DIM, CAUSAL, KEYS, OWN (rows owned: 64 a consumer), BLOCK (rows that pass at a
// time), STAGES (2 or more), STATS_BLOCK (queries in a block of the statistics: BLOCK with KEYS); or PREPARE beside
// PRECISION, HEAD_DIM, STATS_BLOCK, NUM_WARPS: the kernel that makes the statistics.
#include "hopper.cuh"

using namespace rt;
using T = Format<PRECISION>::In;
constexpr int D = HEAD_DIM;

// Statistics of a head: blocks of STATS_BLOCK times lse * log2(e), then as many delta. Where lse of a query is.
__device__ __forceinline__ long long stats_at(int head, int query, int sq) {
  const long long block = (long long)head * ((sq + STATS_BLOCK - 1) / STATS_BLOCK) + query / STATS_BLOCK;
  return block * 2 * STATS_BLOCK + query % STATS_BLOCK;
}

#if PREPARE
// `total` rows of all heads, filled up to whole blocks: a query that does not exist has weights of 0, as one that sees
// no key. D / 8 lanes a row.
extern "C" __global__ void __launch_bounds__(32 * NUM_WARPS)
    prepare_kernel(float* __restrict__ stats, const T* __restrict__ dout, const T* __restrict__ out,
                   const float* __restrict__ lse, int total, int sq) {
  constexpr int LANES = D / 8;
  const int padded = (sq + STATS_BLOCK - 1) / STATS_BLOCK * STATS_BLOCK;
  const int place = blockIdx.x * (32 * NUM_WARPS / LANES) + threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int head = place / padded, query = place % padded;
  const bool inside = place < total && query < sq;
  const long long row = (long long)head * sq + query;
  float delta = 0.0f;
  if (inside) {
    const Vec<T, 8> x = load<T, 8>(dout + row * D + 8 * lane), y = load<T, 8>(out + row * D + 8 * lane);
#pragma unroll
    for (int i = 0; i < 8; i++) delta = fmaf(to_float(x.v[i]), to_float(y.v[i]), delta);
  }
  delta = reduce_lanes<LANES>(delta, Sum());
  if (lane == 0 && place < total) {
    const long long at = stats_at(head, query, sq);
    stats[at] = inside ? lse[row] * LOG2E : infinity();
    stats[at + STATS_BLOCK] = delta;
  }
}
#else
constexpr int GROUPS = OWN / 64, THREADS = 128 * (GROUPS + 1), COLS = BLOCK / 2, SUMS = D / 2;
using Owned = Operand<T, OWN, D, false>;
using Along = Operand<T, BLOCK, D, false>;  // a tile that passes, as right operand of a b^T,
using Across = Operand<T, D, BLOCK, true>;  // and the same bytes as that of w b
constexpr int TILE = Along::BYTES, STATS_BYTES = KEYS ? 8 * BLOCK : 0, STATS_ROOM = KEYS ? 1024 : 0;
constexpr int STAGE = 2 * TILE + STATS_ROOM, RING = 2 * Owned::BYTES, BARRIERS = RING + STAGES * STAGE;
static_assert(Across::BYTES == TILE && Across::PANEL_BYTES == Along::PANEL_BYTES, "one tile, read both ways");
static_assert(STATS_BYTES <= STATS_ROOM && (!KEYS || STATS_BLOCK == BLOCK), "statistics of a tile are one copy");

// What a block owns and what passes by. Heads come in groups whose passing rows fit into L2, of a group the longest
// walks first.
struct Walk {
  int head, own0, ahead;                     // first owned row; ahead: the last key that query 0 sees
  int first, end, total, passing_heads = 1;  // blocks that pass: of a head, of all heads

  __device__ __forceinline__ Walk(int heads, int group_heads, int shared_by, int sq, int sk) {
    const int blocks = ((KEYS ? sk : sq) + OWN - 1) / OWN, part = blockIdx.x / (group_heads * blocks);
    const int in_part = blockIdx.x % (group_heads * blocks), width = min(group_heads, heads - part * group_heads);
    const int index = in_part / width;
    head = part * group_heads + in_part % width;
    own0 = (CAUSAL && !KEYS ? blocks - 1 - index : index) * OWN, ahead = sk - sq;
    first = CAUSAL && KEYS ? max(own0 - ahead, 0) / BLOCK : 0;
    const int seen = KEYS ? sq : CAUSAL ? max(min(sk, own0 + OWN + ahead), 0) : sk;
    end = (seen + BLOCK - 1) / BLOCK;
    if (KEYS) passing_heads = shared_by;
    total = (end - first) * passing_heads;
  }
};

// Tiles of a stage are given back together with KEYS, where the last products of a step read both; else a2 b2^T is all
// that reads the second one.
struct Pipe {
  char *own1, *own2, *ring;
  Barrier *own_full, *full1, *full2, *empty1, *empty2;
  __device__ __forceinline__ char* tile1(int stage) const { return ring + stage * STAGE; }
  __device__ __forceinline__ char* tile2(int stage) const { return ring + stage * STAGE + TILE; }
  __device__ __forceinline__ const char* stats(int stage) const { return ring + stage * STAGE + 2 * TILE; }
};

__device__ __forceinline__ void arrive_warp(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Statistics of columns `first` + 8j + 2t and the next, from lines of 32 as TMA permutes them. Only t is unknown to the
// compiler: two addresses serve all columns.
__device__ __forceinline__ Vec<float, 2> statistic(const char* stats, int first, int j) {
  const int fixed = 4 * first + 32 * j, line = fixed / 128 % 8, t = threadIdx.x % 4;
  return load<float, 2>(reinterpret_cast<const float*>(stats + (fixed ^ (line & 6) << 4) + (8 * t ^ (line & 1) << 4)));
}

// Accumulators of 16 columns are, in order, the registers of a left operand: (row g, columns 2t, 2t + 1), (g + 8,
// same), (g, columns 8 + 2t, ...), (g + 8, ...).
__device__ __forceinline__ void to_operand(unsigned (&w)[BLOCK / 16][4], const float (&s)[COLS]) {
#pragma unroll
  for (int i = 0; i < COLS / 2; i++) w[i / 4][i % 4] = pack<PRECISION>(s[2 * i], s[2 * i + 1]);
}

// d[64, BLOCK] = a[64, D] b[BLOCK, D]^T
__device__ __forceinline__ void issue_rows(float (&d)[COLS], const char* own, int group, const char* tile) {
  const unsigned long long a = Owned::start(own, 64 * group), b = Along::start(tile, 0);
#pragma unroll
  for (int step = 0; step < Owned::STEPS; step++)
    wgmma<PRECISION, BLOCK, 0, 0>(d, Owned::step(a, step), Along::step(b, step), step > 0);
  wgmma_commit();
}
// sum[64, D] += w[64, BLOCK] b[BLOCK, D]
__device__ __forceinline__ void issue_sum(float (&sum)[SUMS], const unsigned (&w)[BLOCK / 16][4], const char* tile) {
  const unsigned long long b = Across::start(tile, 0);
#pragma unroll
  for (int step = 0; step < Across::STEPS; step++)
    wgmma<PRECISION, D, 1>(sum, w[step], Across::step(b, step), 1);
  wgmma_commit();
}

struct Consumer {
  const Pipe& pipe;
  int group;
  float level[2] = {}, mean[2] = {};  // of rows g and g + 8, if queries are owned

  __device__ __forceinline__ int row() const {
    return 64 * group + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
  }

  // Scores of keys that a query does not see; `at` is the first passing row. With KEYS a query that does not exist
  // needs nothing (its lse is infinite), nor does a key: its row is not written.
  __device__ __forceinline__ void hide(float (&s)[COLS], const Walk& walk, int at, int sk) const {
    const int least = walk.own0 + 64 * group, own = walk.own0 + row(), t = threadIdx.x % 4;
    if (KEYS ? !(CAUSAL && least + 63 > at + walk.ahead)
             : at + BLOCK <= sk && !(CAUSAL && at + BLOCK - 1 > least + walk.ahead))
      return;  // one for all lanes
    const int limit = KEYS ? own - walk.ahead - at : CAUSAL ? own + walk.ahead - at + 1 : sk - at;
#pragma unroll
    for (int j = 0; j < COLS; j++) {
      const int col = 8 * (j / 4) + 2 * t + j % 2, seen = limit + (CAUSAL && j / 2 % 2 ? 8 : 0);
      if (KEYS ? col < seen : col >= min(seen, sk - at)) s[j] = -infinity();
    }
  }

  __device__ __forceinline__ void weigh(float (&s)[COLS], const char* stats, float scale) const {
#pragma unroll
    for (int j = 0; j < COLS / 4; j++) {
      const Vec<float, 2> column = KEYS ? statistic(stats, 0, j) : Vec<float, 2>{};
#pragma unroll
      for (int e = 0; e < 4; e++)
        s[4 * j + e] = fast_exp2(fmaf(s[4 * j + e], scale, -(KEYS ? column.v[e % 2] : level[e / 2])));
    }
  }
  __device__ __forceinline__ void slope(float (&p)[COLS], const float (&dp)[COLS], const char* stats) const {
#pragma unroll
    for (int j = 0; j < COLS / 4; j++) {
      const Vec<float, 2> column = KEYS ? statistic(stats, BLOCK, j) : Vec<float, 2>{};
#pragma unroll
      for (int e = 0; e < 4; e++) p[4 * j + e] *= dp[4 * j + e] - (KEYS ? column.v[e % 2] : mean[e / 2]);
    }
  }

  // Whether none of our rows meets any of those that pass from `at` on: 64 rows beside the diagonal.
  __device__ __forceinline__ bool apart(const Walk& walk, int at) const {
    const int least = walk.own0 + 64 * group;
    return CAUSAL && (KEYS ? least > at + BLOCK - 1 + walk.ahead : at > least + 63 + walk.ahead);
  }
  // The products that read a tile for the last time are done.
  __device__ __forceinline__ void give_back(int stage) const {
    if (stage >= 0) arrive_warp(pipe.empty1 + stage);
  }

  __device__ __forceinline__ void add_up(float (&sum1)[SUMS], float (&sum2)[SUMS], const Walk& walk, int sk,
                                         float scale) const {
    float s[COLS], dp[COLS];
    unsigned p[BLOCK / 16][4] = {}, ds[BLOCK / 16][4] = {};
    Ring<STAGES> now;
    int block = walk.first, before = -1;  // `before`: stage whose sums are under way
    wgmma_fence(sum1, sum2);
    for (int step = 0; step < walk.total; step++, now.next()) {
      const char *tile1 = pipe.tile1(now.stage), *tile2 = pipe.tile2(now.stage), *stats = pipe.stats(now.stage);
      const int at = block * BLOCK;
      if (++block == walk.end) block = walk.first;
      barrier_wait(pipe.full1 + now.stage, now.phase);
      if (apart(walk, at)) {
        wgmma_wait<0>(p, ds);
        give_back(before);
        before = now.stage;
        barrier_wait(pipe.full2 + now.stage, now.phase);
        if (!KEYS) arrive_warp(pipe.empty2 + now.stage);
        continue;
      }
      wgmma_fence(s);
      issue_rows(s, pipe.own1, group, tile1);
      wgmma_wait<1>(p, ds);  // the sums of the step before: its weights' registers are free for this one's
      give_back(before);
      before = now.stage;
      barrier_wait(pipe.full2 + now.stage, now.phase);
      wgmma_fence(dp);
      issue_rows(dp, pipe.own2, group, tile2);
      wgmma_wait<1>(s);
      hide(s, walk, at, sk);
      weigh(s, stats, scale);
      if constexpr (KEYS) {
        to_operand(p, s);
        wgmma_fence(p);
        issue_sum(sum2, p, tile2);
        wgmma_wait<1>(dp);
      } else {
        // Nothing else holds the exponentials above the wait for dp: ptxas moved them down to the slopes, but does not
        // past a loop. This one ends at once, its phase is over; the fence keeps them above it before ptxas.
        wgmma_fence(s);
        barrier_wait(pipe.full2 + now.stage, now.phase);
        wgmma_wait<0>(dp);
        arrive_warp(pipe.empty2 + now.stage);
      }
      slope(s, dp, stats);
      to_operand(ds, s);
      wgmma_fence(ds);
      issue_sum(sum1, ds, tile1);
    }
    wgmma_wait<0>(sum1, sum2);
  }

  // Through the place of our owned rows, which are no longer needed, to memory. value(j): our j-th accumulator.
  template <class Value>
  __device__ __forceinline__ void store(Value value, const TensorMap& out, char* own, const Walk& walk) const {
    char* place = own + group * 64 * 128;
    write_panels<PRECISION, D, Owned::PANEL_BYTES>(place, value);
    fence_async();
    named_sync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int panel = 0; panel < Owned::PANELS; panel++)
        tma_store(out, place + panel * Owned::PANEL_BYTES, panel * 64, walk.own0 + 64 * group, walk.head);
      bulk_commit();
    }
  }
};

__device__ __forceinline__ void produce(const Pipe& pipe, const Walk& walk, const TensorMap& a1, const TensorMap& a2,
                                        const TensorMap& b1, const TensorMap& b2, const TensorMap& stats,
                                        int shared_by) {
  barrier_expect(pipe.own_full, 2 * Owned::BYTES);
  Owned::fetch<1>(pipe.own1, a1, pipe.own_full, walk.own0, 0, walk.head, 0, 0);
  Owned::fetch<1>(pipe.own2, a2, pipe.own_full, walk.own0, 0, walk.head, 0, 0);
  Ring<STAGES> now;
  for (int i = 0; i < walk.passing_heads; i++) {
    const int head = KEYS ? walk.head * shared_by + i : walk.head / shared_by;
#pragma unroll 1  // four times was more than the 24 registers that are left
    for (int block = walk.first; block < walk.end; block++, now.next()) {
      Barrier *full1 = pipe.full1 + now.stage, *full2 = pipe.full2 + now.stage;
      barrier_wait(pipe.empty1 + now.stage, now.phase ^ 1);
      barrier_expect(full1, TILE + STATS_BYTES);
      Along::fetch<1>(pipe.tile1(now.stage), b1, full1, block * BLOCK, 0, head, 0, 0);
      if (KEYS) tma_load(const_cast<char*>(pipe.stats(now.stage)), stats, full1, 0, block * (BLOCK / 16), head);
      if (!KEYS) barrier_wait(pipe.empty2 + now.stage, now.phase ^ 1);
      barrier_expect(full2, TILE);
      Along::fetch<1>(pipe.tile2(now.stage), b2, full2, block * BLOCK, 0, head, 0, 0);
    }
  }
}

// a1, a2, b1, b2: k, v, q, dout with KEYS, else q, dout, k, v; out1 is dk or dq, out2 dv. `pairs` are the statistics
// as lines of 32, with KEYS. `shared_by` query heads read a key head; `heads` of owned rows, of which group_heads are
// scheduled together. Grid: a block for OWN rows of a head. `scale` is log2(e) / sqrt(D). Causal: query i sees keys up
// to i + sk - sq; so the last one sees them all, but a first one may see none.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    backward_kernel(const __grid_constant__ TensorMap out1, const __grid_constant__ TensorMap out2,
                    const __grid_constant__ TensorMap a1, const __grid_constant__ TensorMap a2,
                    const __grid_constant__ TensorMap b1, const __grid_constant__ TensorMap b2,
                    const __grid_constant__ TensorMap pairs, const float* __restrict__ stats, int heads,
                    int group_heads, int shared_by, int sq, int sk, float scale) {
  SHARED_MEMORY(shared);
  Pipe pipe{shared, shared + Owned::BYTES, shared + RING};
  pipe.own_full = reinterpret_cast<Barrier*>(shared + BARRIERS), pipe.full1 = pipe.own_full + 1;
  pipe.full2 = pipe.full1 + STAGES, pipe.empty1 = pipe.full2 + STAGES, pipe.empty2 = pipe.empty1 + STAGES;
  if (threadIdx.x == 0) {
    require_alignment(shared);
    barrier_init(pipe.own_full, 1);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(pipe.full1 + i, 1), barrier_init(pipe.full2 + i, 1);
      barrier_init(pipe.empty1 + i, 4 * GROUPS), barrier_init(pipe.empty2 + i, 4 * GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();

  const int group = warpgroup() - 1;
  if (group < 0) {
    if constexpr (GROUPS > 1) fewer_registers<GROUPS == 2 ? 24 : 32>();
    const Walk walk(heads, group_heads, shared_by, sq, sk);  // in both branches: kept across them, it was spilled
    if (threadIdx.x == 0 && walk.total) produce(pipe, walk, a1, a2, b1, b2, pairs, shared_by);
  } else {
    if constexpr (GROUPS > 1) more_registers<GROUPS == 2 ? 240 : 160>();
    const Walk walk(heads, group_heads, shared_by, sq, sk);
    Consumer consumer{pipe, group};
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int query = walk.own0 + consumer.row() + 8 * r;
      if (!KEYS && query < sq) {
        consumer.level[r] = stats[stats_at(walk.head, query, sq)];
        consumer.mean[r] = stats[stats_at(walk.head, query, sq) + STATS_BLOCK];
      }
    }
    float sum1[SUMS] = {}, sum2[SUMS] = {};
    if (walk.total) barrier_wait(pipe.own_full, 0);
    consumer.add_up(sum1, sum2, walk, sk, scale);
    named_sync(1 + group, 128);  // all of us have read the owned rows
    if constexpr (KEYS) consumer.store([&](int j) { return sum2[j]; }, out2, pipe.own2, walk);
    consumer.store([&](int j) { return sum1[j] * (scale * LN2); }, out1, pipe.own1, walk);
    if (threadIdx.x % 128 == 0) bulk_wait_read<0>();
  }
}
#endif
