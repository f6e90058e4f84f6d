// Rows of a matrix [m, n], each shared by ROW_THREADS neighbouring threads of a block of BLOCK_THREADS.
//
// A thread reads VEC neighbours at once. It keeps ITEMS such vectors, which is the whole row, in
// registers; with ITEMS 0 the row is too long for that and every pass reads it again (from L2, mostly).
// Macros: PRECISION, BLOCK_THREADS, ROW_THREADS, VEC, ITEMS.
#pragma once
#include "rooftune.cuh"

namespace rt {

using T = Format<PRECISION>::In;

struct Row {
  int row, thread;  // which row, and which of its threads we are
  bool active;      // past the last row, threads repeat it (they must meet the barriers) and store nothing
  long long start;

  __device__ __forceinline__ Row(int m, int n) {
    row = blockIdx.x * (BLOCK_THREADS / ROW_THREADS) + threadIdx.x / ROW_THREADS;
    thread = threadIdx.x % ROW_THREADS;
    active = row < m;
    start = (long long)(active ? row : m - 1) * n;
  }
  __device__ __forceinline__ int column(int item) const { return (item * ROW_THREADS + thread) * VEC; }
};

template <class Use> __device__ __forceinline__ void unpack(const T* p, Use use) {
  const Vec<T, VEC> x = load<T, VEC>(p);
#pragma unroll
  for (int i = 0; i < VEC; i++) use(i, to_float(x.v[i]));
}

// use(values[VEC]) for each of this thread's vectors of a row of n in memory
template <class Use> __device__ __forceinline__ void each_vector(const T* row, int thread, int n, Use use) {
#pragma unroll 4
  for (int col = thread * VEC; col < n; col += ROW_THREADS * VEC) {
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

template <class Op> __device__ __forceinline__ float reduce_row(float x, float* scratch, Op op) {
  return reduce_threads<ROW_THREADS>(x, scratch, op);
}

}  // namespace rt
