// Rows of a matrix [m, n], each shared by ROW_THREADS neighbouring threads of a block of BLOCK_THREADS; or, with
// CLUSTER_SIZE above 1, each by all threads of that many blocks, which form a cluster and add up through each other's
// shared memory: so a row of 262144 stays in registers, and is read once.
//
// A thread reads VEC neighbours at once. It keeps ITEMS such vectors, which is the whole row, in
// registers; with ITEMS 0 the row is too long for that and every pass reads it again (from L2, mostly).
// Macros: PRECISION, BLOCK_THREADS, ROW_THREADS, VEC, ITEMS, CLUSTER_SIZE (above 1 ROW_THREADS is BLOCK_THREADS).
#pragma once
#include "rooftune.cuh"

#if CLUSTER_SIZE > 1
#include "cluster.cuh"
#define ROW_KERNEL extern "C" __global__ void __cluster_dims__(CLUSTER_SIZE, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
#else
#define ROW_KERNEL extern "C" __global__ void __launch_bounds__(BLOCK_THREADS, 1)
#endif

namespace rt {

using T = Format<PRECISION>::In;
constexpr int SPAN = ROW_THREADS * CLUSTER_SIZE;  // threads of a row

struct Row {
  int row, thread;  // which row, and which of its threads we are
  bool active;      // past the last row, threads repeat it (they must meet the barriers) and store nothing
  long long start;

  __device__ __forceinline__ Row(int m, int n) {
    row = blockIdx.x / CLUSTER_SIZE * (BLOCK_THREADS / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    thread = blockIdx.x % CLUSTER_SIZE * ROW_THREADS + threadIdx.x % ROW_THREADS;
    active = row < m;
    start = (long long)(active ? row : m - 1) * n;
#if CLUSTER_SIZE > 1
    cluster_barrier();  // no store to a block that has not begun
#endif
  }
  __device__ __forceinline__ int column(int item) const { return (item * SPAN + thread) * VEC; }
};

template <class Use> __device__ __forceinline__ void unpack(const T* p, Use use) {
  const Vec<T, VEC> x = load<T, VEC>(p);
#pragma unroll
  for (int i = 0; i < VEC; i++) use(i, to_float(x.v[i]));
}

// use(values[VEC]) for each of this thread's vectors of a row of n in memory
template <class Use> __device__ __forceinline__ void each_vector(const T* row, int thread, int n, Use use) {
#pragma unroll 4
  for (int col = thread * VEC; col < n; col += SPAN * VEC) {
    float values[VEC];
    unpack(row + col, [&](int i, float x) { values[i] = x; });
    use(col, values);
  }
}

template <class Value> __device__ __forceinline__ void store_vector(T* p, Value value) {
  Vec<T, VEC> y;
#pragma unroll
  for (int i = 0; i < VEC; i++) y.v[i] = Convert<T>::from(value(i));
  store<T, VEC>(p, y);
}

// `scratch`: a float per warp, of this reduction alone; in a cluster the floats 2 * warps behind it are used too.
template <class Op> __device__ __forceinline__ float reduce_row(float x, float* scratch, Op op) {
  x = reduce_threads<ROW_THREADS>(x, scratch, op);
#if CLUSTER_SIZE > 1
  float* slots = scratch + 2 * (BLOCK_THREADS / 32);  // a float per block
  if (threadIdx.x < CLUSTER_SIZE) cluster_store(slots + blockIdx.x % CLUSTER_SIZE, threadIdx.x, x);
  cluster_barrier();
  x = slots[0];
#pragma unroll
  for (int block = 1; block < CLUSTER_SIZE; block++) x = op(x, slots[block]);
#endif
  return x;
}

}  // namespace rt
