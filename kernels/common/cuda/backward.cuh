// What the backward of attention walks over, with tensor cores or without: a block owns rows of one head, and blocks of
// rows pass by in shared memory.
#pragma once
#include "rooftune.cuh"

namespace rt {

// T: values; Tile: rows of DIM of them in shared memory. OWNED rows of TENSORS tensors (1 if p alone is needed);
// PASSING rows at a time, of two tensors, in a ring. OWN_KEYS: keys are owned, and the statistics of the queries pass
// with them; else queries are owned. (The kernels' macros have the other names.)
template <typename T, typename Tile, int DIM, int OWNED, int TENSORS, int PASSING, int RING, int TEAM,
          bool OWN_KEYS, bool MASKED>
struct Walk {
  static constexpr int OWN_BYTES = OWNED * Tile::STRIDE * 16, BLOCK_BYTES = PASSING * Tile::STRIDE * 16;
  static constexpr int STAGE_BYTES = 2 * BLOCK_BYTES + (OWN_KEYS ? PASSING * 8 : 0);

  const T *b1, *b2;
  const float* stats;
  char *own1, *own2;
  int group, own_rows, other_rows, head, own0, ahead;  // ahead: the last key that query 0 sees
  int first, each, total;                              // blocks of passing rows that matter: of a head, of all heads

  __device__ __forceinline__ Walk(const T* b1, const T* b2, const float* stats, char* shared, int group, int sq, int sk)
      : b1(b1), b2(b2), stats(stats), own1(shared), own2(shared + OWN_BYTES), group(group) {
    own_rows = OWN_KEYS ? sk : sq, other_rows = OWN_KEYS ? sq : sk, ahead = sk - sq;
    const int blocks = (own_rows + OWNED - 1) / OWNED, index = blockIdx.x % blocks;
    head = blockIdx.x / blocks;
    own0 = (MASKED && !OWN_KEYS ? blocks - 1 - index : index) * OWNED;  // causal: the longest first
    int end = (other_rows + PASSING - 1) / PASSING;
    first = MASKED && OWN_KEYS ? max(own0 - ahead, 0) / PASSING : 0;
    if (MASKED && !OWN_KEYS) end = min(end, max(own0 + OWNED + ahead + PASSING - 1, 0) / PASSING);
    each = max(end - first, 0), total = OWN_KEYS ? each * group : each;
  }
  // The first passing row of a step.
  __device__ __forceinline__ int row(int step) const { return (first + (OWN_KEYS ? step % each : step)) * PASSING; }
  __device__ __forceinline__ char* stage(int step) const {
    return own1 + TENSORS * OWN_BYTES + step % RING * STAGE_BYTES;
  }
  __device__ __forceinline__ void fetch(int step) const {
    if (step < total) {
      const long long other = OWN_KEYS ? (long long)head * group + step / each : head / group;
      const int at = row(step);
      copy_tile<Tile, PASSING, DIM, 16, TEAM>(stage(step), b1 + other * other_rows * DIM, DIM, at, 0, other_rows,
                                             DIM);
      copy_tile<Tile, PASSING, DIM, 16, TEAM>(stage(step) + BLOCK_BYTES, b2 + other * other_rows * DIM, DIM, at,
                                             0, other_rows, DIM);
      if (OWN_KEYS && threadIdx.x < PASSING) {
        const bool inside = at + (int)threadIdx.x < other_rows;
        const float* source = stats + 2 * (other * other_rows + at + (int)threadIdx.x);
        copy_async<8>(stage(step) + 2 * BLOCK_BYTES + threadIdx.x * 8, inside ? source : stats, inside);
      }
    }
    copy_commit();
  }
  // Owned rows and all stages but one on their way; the owned ones come with the first.
  __device__ __forceinline__ void begin(const T* a1, const T* a2) const {
    const long long at = ((long long)head * own_rows + own0) * DIM;
    copy_tile<Tile, OWNED, DIM, 16, TEAM>(own1, a1 + at, DIM, 0, 0, own_rows - own0, DIM);
    if (TENSORS == 2) copy_tile<Tile, OWNED, DIM, 16, TEAM>(own2, a2 + at, DIM, 0, 0, own_rows - own0, DIM);
#pragma unroll
    for (int step = 0; step < RING - 1; step++) fetch(step);
  }
};

}  // namespace rt
