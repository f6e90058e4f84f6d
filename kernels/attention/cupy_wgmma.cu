// o = softmax(q k^T / sqrt(D)) v with TMA and wgmma: FlashAttention-3's scheme (Shah et al., 2024), for compute
// capability 9.0.
//
// Persistent blocks take BLOCK_M queries of a head, or BLOCK_M / PACK queries of each of PACK heads that share keys
// (grouped queries: few queries fill a tile), 64 a consumer warpgroup, and go through the keys BLOCK_N at a time,
// from the diagonal down. One producer thread fills rings of k and v tiles. A consumer overlaps the
// products with its own softmax: q k^T of the next keys is issued before the product of the last probabilities
// with v, which then runs beside the exponentials. The probabilities stay in registers, as left operand.
// With PINGPONG the warpgroups issue their products in turn, so that one's softmax meets another's products.
//
// Macros: PRECISION (fp16, bf16), HEAD_DIM, BLOCK_M, BLOCK_N, STAGES (2 or more), CAUSAL, LSE, PINGPONG,
// PACK (1 or all heads of q to a head of k and v), OUT_APART (1: results have shared memory of their own, and the next
// queries are fetched as soon as the last scores are there; 0: they take the place of the queries), LATE_WAIT (1: ptxas
// is kept from waiting for the product with v before the exponentials that should run beside it).
#include "hopper.cuh"

using namespace rt;
using T = Format<PRECISION>::In;

constexpr int D = HEAD_DIM, GROUPS = BLOCK_M / 64, THREADS = 128 * (GROUPS + 1);
using Q = Operand<T, BLOCK_M, D, false>;
using K = Operand<T, BLOCK_N, D, false>;
using V = Operand<T, D, BLOCK_N, true>;
// Row r of a tile is query r % QUERIES of its head r / QUERIES. A thread has rows r and r + 8 of 16 side by side: their
// queries are NEXT apart. Fewer than 8 queries would begin inside a swizzle's 1024 bytes.
constexpr int QUERIES = BLOCK_M / PACK, SEGMENT = QUERIES < 64 ? QUERIES : 64, NEXT = QUERIES < 16 ? 0 : 8;
static_assert(QUERIES * PACK == BLOCK_M && QUERIES >= 8 && 64 % SEGMENT == 0 && QUERIES % SEGMENT == 0, "whole heads");
__device__ __forceinline__ int query_of(int row) { return PACK == 1 ? row : row % QUERIES; }
__device__ __forceinline__ int head_of(int row) { return PACK == 1 ? 0 : row / QUERIES; }

constexpr int KEYS = BLOCK_N / 2, COLS = D / 2;  // scores and outputs of a thread: two rows, g and g + 8
constexpr int V_TILES = Q::BYTES + STAGES * K::BYTES, RESULTS = V_TILES + STAGES * V::BYTES;
constexpr int BARRIERS = RESULTS + (OUT_APART ? Q::BYTES : 0);

// A block's tiles: heads (packs of them) in groups whose keys and values fit into L2, within a group the longest first.
// Causal tiles differ in length: `order` deals them out evenly, [rounds, grid], -1 after a block's last.
struct Schedule {
  const int* order;
  int blocks, heads, group_heads, total, round = 0;
  int m0, head, kv_head, count;  // of the current tile: first query, first head of q, head of k and v, key blocks

  // ALONE: one thread of its warp asks.
  template <bool ALONE> __device__ __forceinline__ bool advance(int q_heads, int kv_heads, int sq, int sk) {
    int tile = round++ * gridDim.x + blockIdx.x;
    if (CAUSAL) tile = ALONE ? order[tile] : uniform(order[tile]);
    if (CAUSAL ? tile < 0 : tile >= total) return false;
    const int group = tile / (group_heads * blocks), in_group = tile % (group_heads * blocks);
    const int width = min(group_heads, heads - group * group_heads), index = in_group / width;
    m0 = (CAUSAL ? blocks - 1 - index : index) * QUERIES;
    head = (group * group_heads + in_group % width) * PACK;
    kv_head = head / q_heads * kv_heads + head % q_heads * kv_heads / q_heads;
    const int seen = CAUSAL ? max(min(sk, m0 + QUERIES + sk - sq), 0) : sk;
    count = (seen + BLOCK_N - 1) / BLOCK_N;
    return true;
  }
};

struct Pipe {
  char *q, *k, *v, *out;
  Barrier *q_full, *q_empty, *k_full, *k_empty, *v_full, *v_empty, *turn;
};

__device__ __forceinline__ void arrive_warp(Barrier* barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Scores of one block of keys become probabilities; the maximum and the sum of each row go on.
struct Softmax {
  float top[2] = {-infinity(), -infinity()}, sum[2] = {}, shrink[2];

  // Keys from `hidden` on are hidden from the thread's first row, from `hidden8` on from its second.
  __device__ __forceinline__ void mask(float (&s)[KEYS], int hidden, int hidden8) {
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < KEYS; j++) {
      const int key = 8 * (j / 4) + 2 * t + j % 2;
      if (key >= (j / 2 % 2 ? hidden8 : hidden)) s[j] = -infinity();
    }
  }

  __device__ __forceinline__ void step(float (&s)[KEYS], float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float highest = top[r];
#pragma unroll
      for (int j = 0; j < KEYS; j += 4) highest = fmaxf(highest, fmaxf(s[j + 2 * r], s[j + 2 * r + 1]));
      highest = reduce_lanes<4>(highest, Max());
      const float base = highest == -infinity() ? 0.0f : highest * scale;  // no key seen yet: everything is 0
      shrink[r] = fast_exp2(fmaf(top[r], scale, -base));
      top[r] = highest;
      sum[r] *= shrink[r];
#pragma unroll
      for (int j = 0; j < KEYS; j += 4)
#pragma unroll
        for (int e = 2 * r; e < 2 * r + 2; e++) sum[r] += s[j + e] = fast_exp2(fmaf(s[j + e], scale, -base));
    }
  }

  __device__ __forceinline__ void rescale(float (&o)[COLS]) const {
#pragma unroll
    for (int j = 0; j < COLS; j++) o[j] *= shrink[j / 2 % 2];
  }

  // What rows are multiplied by in the end; one that sees no key becomes 0. `lse`: of the first head, with LSE only.
  __device__ __forceinline__ void finish(float (&inverse)[2], float* lse, int first, int m0, int sq,
                                         float scale) const {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float total = reduce_lanes<4>(sum[r], Sum());
      inverse[r] = total == 0.0f ? 0.0f : 1.0f / total;
      const int row = first + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 + 8 * r, query = m0 + query_of(row);
      if (LSE && threadIdx.x % 4 == 0 && query < sq)
        lse[(long long)head_of(row) * sq + query] = log_of_sum(top[r], scale, total);
    }
  }
};

// Accumulators of 16 keys are, in order, the registers of a left operand: (row g, keys 2t, 2t + 1), (g + 8, same),
// (g, keys 8 + 2t, ...), (g + 8, ...).
__device__ __forceinline__ void to_operand(unsigned (&p)[BLOCK_N / 16][4], const float (&s)[KEYS]) {
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) p[i / 4][i % 4] = pack<PRECISION>(s[2 * i], s[2 * i + 1]);
}

struct Consumer {
  const Pipe& pipe;
  int group;
  Ring<STAGES> k_at, v_at;
  int turns = 0;

  // Our n-th turn: group 0's follows the last group's turn before, another's that of the group below it.
  __device__ __forceinline__ void take_turn() {
    if (PINGPONG) barrier_wait(pipe.turn + group, (turns++ & 1) ^ (group == 0));
  }
  __device__ __forceinline__ void pass_turn() {
    if (PINGPONG) arrive_warp(pipe.turn + (group + 1) % GROUPS);
  }

  __device__ __forceinline__ void give_queries_back() {
    if (OUT_APART) arrive_warp(pipe.q_empty);
  }

  __device__ __forceinline__ void issue_scores(float (&s)[KEYS]) {
    const unsigned long long q = Q::start(pipe.q, 64 * group), k = K::start(pipe.k + k_at.stage * K::BYTES, 0);
#pragma unroll
    for (int step = 0; step < Q::STEPS; step++)
      wgmma<PRECISION, BLOCK_N, 0, 0>(s, Q::step(q, step), K::step(k, step), step > 0);
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_values(float (&o)[COLS], const unsigned (&p)[BLOCK_N / 16][4], bool add) {
    const unsigned long long v = V::start(pipe.v + v_at.stage * V::BYTES, 0);
#pragma unroll
    for (int step = 0; step < V::STEPS; step++)
      wgmma<PRECISION, D, 1>(o, p[step], V::step(v, step), add || step > 0);
    wgmma_commit();
  }

  // o of 64 rows: unnormalised sums, with what `softmax` still knows of their rows.
  __device__ __forceinline__ void attend(float (&o)[COLS], Softmax& softmax, int count, int m0, int sq, int sk,
                                         float scale) {
    const int ahead = sk - sq, least = m0 + query_of(64 * group);
    const int row = m0 + query_of(64 * group + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4);
    float s[KEYS];
    unsigned p[BLOCK_N / 16][4];
    const auto hide = [&](int block) {
      const int key0 = block * BLOCK_N;
      if (key0 + BLOCK_N <= sk && !(CAUSAL && key0 + BLOCK_N - 1 > least + ahead)) return;  // one for all lanes
      const int end = sk - key0, seen = CAUSAL ? row + ahead - key0 + 1 : end;
      softmax.mask(s, min(end, seen), min(end, CAUSAL ? seen + NEXT : end));
    };
    take_turn();
    barrier_wait(pipe.k_full + k_at.stage, k_at.phase);
    wgmma_fence(s);
    issue_scores(s);
    pass_turn();
    wgmma_wait<0>(s);
    arrive_warp(pipe.k_empty + k_at.stage);
    if (count == 1) give_queries_back();
    k_at.next();
    hide(count - 1);
    softmax.step(s, scale);
    to_operand(p, s);
    for (int block = count - 2; block >= 0; block--) {
      take_turn();
      barrier_wait(pipe.k_full + k_at.stage, k_at.phase);
      wgmma_fence(s, o, p);
      issue_scores(s);
      barrier_wait(pipe.v_full + v_at.stage, v_at.phase);
      issue_values(o, p, block < count - 2);
      pass_turn();
      wgmma_wait<1>(s);
      arrive_warp(pipe.k_empty + k_at.stage);
      if (block == 0) give_queries_back();
      k_at.next();
      hide(block);
      softmax.step(s, scale);
      if (LATE_WAIT) {
        wgmma_fence(s, softmax.sum, softmax.shrink);
        barrier_wait(pipe.v_full + v_at.stage, v_at.phase);  // over since long: a loop that ptxas moves nothing past
      }
      wgmma_wait<0>(o, p);
      arrive_warp(pipe.v_empty + v_at.stage);
      v_at.next();
      softmax.rescale(o);
      to_operand(p, s);
    }
    barrier_wait(pipe.v_full + v_at.stage, v_at.phase);
    wgmma_fence(o, p);
    issue_values(o, p, count > 1);
    wgmma_wait<0>(o);
    arrive_warp(pipe.v_empty + v_at.stage);
    v_at.next();
  }

  // Through shared memory to o: that of our queries, which are no longer needed, or with OUT_APART our own, from which
  // the copy of the tile before may still read. value(j): our j-th accumulator.
  template <class Value>
  __device__ __forceinline__ void store(Value value, const TensorMap& out, int m0, int head) {
    char* place = pipe.out + group * 64 * 128;
    if (OUT_APART && threadIdx.x % 128 == 0) bulk_wait_read<0>();
    named_sync(1 + group, 128);  // all of us have read the queries, or the copy has read the last results
    write_panels<PRECISION, D, Q::PANEL_BYTES>(place, value);
    fence_async();
    named_sync(1 + group, 128);
    if (threadIdx.x % 128 == 0) {
#pragma unroll
      for (int panel = 0; panel < Q::PANELS; panel++)
#pragma unroll
        for (int row = 0; row < 64; row += SEGMENT)
          tma_store(out, place + panel * Q::PANEL_BYTES + row * 128, panel * 64, m0 + query_of(64 * group + row),
                    head + head_of(64 * group + row));
      bulk_commit();
      if (!OUT_APART) {
        bulk_wait_read<0>();
        barrier_arrive(pipe.q_empty);
      }
    }
  }
};

__device__ __forceinline__ void produce(const Pipe& pipe, Schedule tiles, const TensorMap& q, const TensorMap& k,
                                        const TensorMap& v, int q_heads, int kv_heads, int sq, int sk) {
  Ring<STAGES> k_at, v_at;
  for (int turn = 0; tiles.advance<true>(q_heads, kv_heads, sq, sk); turn++) {
    barrier_wait(pipe.q_empty, (turn & 1) ^ 1);
    barrier_expect(pipe.q_full, Q::BYTES);
#pragma unroll
    for (int panel = 0; panel < Q::PANELS; panel++)
      for (int head = 0; head < PACK; head++)
        tma_load(pipe.q + panel * Q::PANEL_BYTES + head * QUERIES * 128, q, pipe.q_full, panel * 64, tiles.m0,
                 tiles.head + head);
    // The keys of a block before the values of the block before it: that is the order of use.
    for (int block = tiles.count - 1; block >= -1; block--) {
      if (block >= 0) {
        barrier_wait(pipe.k_empty + k_at.stage, k_at.phase ^ 1);
        barrier_expect(pipe.k_full + k_at.stage, K::BYTES);
        K::fetch<1>(pipe.k + k_at.stage * K::BYTES, k, pipe.k_full + k_at.stage, block * BLOCK_N, 0,
                    tiles.kv_head, 0, 0);
        k_at.next();
      }
      if (block + 1 < tiles.count) {
        barrier_wait(pipe.v_empty + v_at.stage, v_at.phase ^ 1);
        barrier_expect(pipe.v_full + v_at.stage, V::BYTES);
        V::fetch<1>(pipe.v + v_at.stage * V::BYTES, v, pipe.v_full + v_at.stage, 0, (block + 1) * BLOCK_N,
                    tiles.kv_head, 0, 0);
        v_at.next();
      }
    }
  }
}

// q, out: maps of [b h, sq, D]; k, v: of [b hkv, sk, D]; lse: [b h, sq], with LSE only; order: see Schedule. `scale` is
// log2(e) / sqrt(D); `heads` = b h / PACK; group_heads: of those, scheduled together. Causal: query i sees keys up to
// i + sk - sq; one that sees none is 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_kernel(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
                     const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap out,
                     float* __restrict__ lse, const int* __restrict__ order, int heads, int q_heads, int kv_heads,
                     int sq, int sk, int group_heads, float scale) {
  SHARED_MEMORY(shared);
  Pipe pipe{shared, shared + Q::BYTES, shared + V_TILES, OUT_APART ? shared + RESULTS : shared};
  pipe.q_full = reinterpret_cast<Barrier*>(shared + BARRIERS), pipe.q_empty = pipe.q_full + 1;
  pipe.k_full = pipe.q_empty + 1, pipe.k_empty = pipe.k_full + STAGES, pipe.v_full = pipe.k_empty + STAGES;
  pipe.v_empty = pipe.v_full + STAGES, pipe.turn = pipe.v_empty + STAGES;
  if (threadIdx.x == 0) {
    require_alignment(shared);
    barrier_init(pipe.q_full, 1);
    barrier_init(pipe.q_empty, OUT_APART ? 4 * GROUPS : GROUPS);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(pipe.k_full + i, 1), barrier_init(pipe.v_full + i, 1);
      barrier_init(pipe.k_empty + i, 4 * GROUPS), barrier_init(pipe.v_empty + i, 4 * GROUPS);
    }
    for (int i = 0; i < GROUPS; i++) barrier_init(pipe.turn + i, 4);
    barrier_init_fence();
  }
  __syncthreads();

  Schedule tiles;
  tiles.blocks = (sq + QUERIES - 1) / QUERIES, tiles.heads = heads, tiles.group_heads = group_heads;
  tiles.total = tiles.blocks * heads, tiles.order = order;
  const int group = warpgroup() - 1;
  if (group < 0) {
    if constexpr (GROUPS > 1) fewer_registers<GROUPS == 2 ? 24 : 32>();
    if (threadIdx.x == 0) produce(pipe, tiles, q, k, v, q_heads, kv_heads, sq, sk);
  } else {
    if constexpr (GROUPS > 1) more_registers<GROUPS == 2 ? 240 : 160>();
    Consumer consumer{pipe, group};
    for (int turn = 0; tiles.advance<false>(q_heads, kv_heads, sq, sk); turn++) {
      barrier_wait(pipe.q_full, turn & 1);
      if (CAUSAL && tiles.count == 0) {  // apart from the others: merged with these, 256 columns did not fit (spills)
        consumer.give_queries_back();
        consumer.store([](int) { return 0.0f; }, out, tiles.m0, tiles.head);
        const int row = 64 * group + threadIdx.x % 128, query = tiles.m0 + query_of(row);
        if (LSE && threadIdx.x % 128 < 64 && query < sq)
          lse[(long long)(tiles.head + head_of(row)) * sq + query] = infinity();
        continue;
      }
      float o[COLS], inverse[2];
      Softmax softmax;
      consumer.attend(o, softmax, tiles.count, tiles.m0, sq, sk, scale);
      softmax.finish(inverse, lse + (LSE ? (long long)tiles.head * sq : 0), 64 * group, tiles.m0, sq, scale);
      consumer.store([&](int j) { return o[j] * inverse[j / 2 % 2]; }, out, tiles.m0, tiles.head);
    }
    if (OUT_APART && threadIdx.x % 128 == 0) bulk_wait_read<0>();  // shared memory stays until it is read
  }
}
