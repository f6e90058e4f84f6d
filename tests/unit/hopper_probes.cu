// Small kernels on the wrappers of hopper.cuh, right ones and broken ones: tests/unit/test_hopper_host.py.
#include "hopper.cuh"
using namespace rt;

constexpr int DEPTH = 64;
using KMajor = Operand<bf16, 64, DEPTH, false>;
using MnMajor = Operand<bf16, 64, DEPTH, true>;
using Bytes = Operand<signed char, 64, 128, false>;

struct Places {
  char *a, *b;
  Barrier *full, *empty;
  __device__ Places(char* shared) : a(shared), b(shared + 8192) {
    full = reinterpret_cast<Barrier*>(shared + 32768), empty = full + 1;
    if (threadIdx.x == 0) {
      barrier_init(full, 1);
      barrier_init(empty, 4);
      barrier_init_fence();
    }
    cluster_sync();
  }
};

template <class Acc> __device__ void write(void* out, const Acc (&d)[32]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int j = 0; j < 32; j++) {
    const int row = 16 * warp + g + j / 2 % 2 * 8, col = j / 4 * 8 + 2 * t + j % 2;
    static_cast<Acc*>(out)[blockIdx.x * 4096 + row * 64 + col] = d[j];
  }
}

// d = a b of 64 x 64 x one tile; fault 1: no wait for the tiles, 2: none for the product, 3: no fence before it
template <int F, class A, class B, int TA, int TB, class Acc>
__device__ void product(void* out, const TensorMap& a, const TensorMap& b, char* shared, int fault) {
  Places at(shared);
  if (threadIdx.x == 0) {
    barrier_expect(at.full, A::BYTES + B::BYTES);
    A::template fetch<1>(at.a, a, at.full, 0, 0, 0, 0, 0);
    B::template fetch<1>(at.b, b, at.full, 0, 0, 0, 0, 0);
  }
  if (fault != 1) barrier_wait(at.full, 0);
  Acc d[32];
  if (fault != 3) wgmma_fence(d);
  for (int step = 0; step < A::STEPS; step++)
    wgmma<F, 64, TA, TB>(d, A::step(A::start(at.a, 0), step), B::step(B::start(at.b, 0), step), step > 0);
  wgmma_commit();
  if (fault != 2) wgmma_wait<0>(d);
  write(out, d);
  if (fault == 1) barrier_wait(at.full, 0);
  if (fault == 2) wgmma_wait<0>(d);
  cluster_sync();
}

extern "C" __global__ void probe(int what, int fault, void* out, const __grid_constant__ TensorMap a,
                                 const __grid_constant__ TensorMap b) {
  SHARED_MEMORY(shared);
  const int i = threadIdx.x;
  switch (what) {
    case 0: product<BF16, KMajor, KMajor, 0, 0, float>(out, a, b, shared, fault); break;
    case 1: product<BF16, MnMajor, MnMajor, 1, 1, float>(out, a, b, shared, fault); break;
    case 2: product<INT8, Bytes, Bytes, 0, 0, int>(out, a, b, shared, fault); break;
    case 3: {  // a box at (-32, 56) as it lies in shared memory
      Places at(shared);
      if (i == 0) {
        barrier_expect(at.full, 8192);
        tma_load(at.a, a, at.full, -32, 56, 0);
      }
      barrier_wait(at.full, 0);
      for (int j = i; j < 2048; j += 128) static_cast<int*>(out)[blockIdx.x * 2048 + j] = reinterpret_cast<int*>(shared)[j];
      cluster_sync();
      break;
    }
    case 4: {  // each block fetches half of a tile for both, twice; fault 1: gives it back before it has read
      Places at(shared);
      const unsigned rank = cluster_rank();
      if (i == 0) barrier_init(at.empty + 1, 8), barrier_init_fence();
      cluster_sync();
      for (int round = 0; round < 2; round++) {
        if (i == 127) {
          barrier_wait(at.empty + 1, round & 1 ^ 1);
          barrier_expect(at.full, 8192);
          tma_load_multicast(at.a + rank * 4096, b, at.full, 0, 32 * rank + 64 * round, 0, 3);
        }
        barrier_wait(at.full, round & 1);
        if (fault == 1 && i % 32 < 2) barrier_arrive_at(at.empty + 1, i % 32);
        if (fault == 1) __syncthreads();
        for (int j = i; j < 2048; j += 128)
          static_cast<int*>(out)[(blockIdx.x * 2 + round) * 2048 + j] = reinterpret_cast<int*>(at.a)[j];
        __syncwarp();
        if (fault != 1 && i % 32 < 2) barrier_arrive_at(at.empty + 1, i % 32);
      }
      cluster_sync();
      break;
    }
    case 5: {  // 64 x 64 through stmatrix and a tensor store; 1: no proxy fence, 2: overwritten before it was read
      unsigned r[4];
      const int lane = i % 32, warp = i / 32;
      for (int q = 0; q < 4; q++) {
        for (int m = 0; m < 4; m++)
          for (int e = 0; e < 2; e++) {
            const unsigned row = 16 * warp + lane / 4 + m % 2 * 8, col = 16 * q + m / 2 * 8 + lane % 4 * 2 + e;
            r[m] = e ? r[m] | (row * 64 + col) << 16 : row * 64 + col;
          }
        const int y = 16 * warp + lane / 8 % 2 * 8 + lane % 8, x = 2 * q + lane / 16;
        store_matrices(shared + swizzle<128>(y * 128 + x * 16), r);
      }
      if (fault != 1) fence_async();
      named_sync(1, 128);
      if (i == 0) {
        tma_store(a, shared, 0, 64 * blockIdx.x, 0);
        bulk_commit();
        if (fault == 0) bulk_wait_read<0>();
      }
      named_sync(1, 128);
      if (fault == 2) reinterpret_cast<int*>(shared)[i] = -1;
      if (fault == 2 && i == 0) bulk_wait_read<0>();
      break;
    }
    case 6: {  // nobody arrives; fault 1: a wait where no barrier is; 2: more arrivals than a phase has
      Places at(shared);
      if (fault == 2 && i == 0) barrier_expect(at.full, 16);
      if (fault == 2 && i == 1) barrier_arrive(at.full);
      barrier_wait(fault == 1 ? at.empty + 5 : at.full, 0);
      break;
    }
    case 7: {  // returns with a copy to itself under way (0) or to its neighbour, which has returned (1)
      Places at(shared);
      if (i == 0) tma_load_multicast(at.a, b, at.full, 0, 0, 0, fault ? 3 : 1 << cluster_rank());
      break;
    }
  }
}
