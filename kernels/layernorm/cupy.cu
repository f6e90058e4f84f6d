// y = (x - mean) / sqrt(variance + eps) * weight + bias by rows, or with RMS: x / sqrt(mean square + eps) * weight.
//
// The mean first, then the mean square of what is left: a one-pass variance loses all digits of rows whose
// mean is large. Rows that fit stay in registers: one read, one write. Macros: those of rows.cuh, and RMS.
#include "rows.cuh"

using namespace rt;

ROW_KERNEL layernorm_kernel(T* __restrict__ y, const T* __restrict__ x, const T* __restrict__ weight,
                     const T* __restrict__ bias, int m, int n, float eps) {
  SHARED_MEMORY(shared);
  float* scratch_mean = reinterpret_cast<float*>(shared);  // a float per warp each
  float* scratch_square = scratch_mean + BLOCK_THREADS / 32;
  const Row row(m, n);
  const T* in = x + row.start;
  T* out = y + row.start;
  float mean = 0.0f, square = 0.0f;

  auto write = [&](int col, const float(&v)[VEC], float scale) {
    if (!row.active) return;
    float result[VEC];
    unpack(weight + col, [&](int i, float w) { result[i] = (v[i] - mean) * scale * w; });
    if (!RMS) unpack(bias + col, [&](int i, float b) { result[i] += b; });
    store_vector(out + col, [&](int i) { return result[i]; });
  };

#if ITEMS > 0
  float v[ITEMS][VEC];
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = row.column(item);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[item][i] = 0.0f;
    if (col < n) unpack(in + col, [&](int i, float value) { v[item][i] = value; });
    if (!RMS)
#pragma unroll
      for (int i = 0; i < VEC; i++) mean += v[item][i];
  }
  if (!RMS) mean = reduce_row(mean, scratch_mean, Sum()) / n;
#pragma unroll
  for (int item = 0; item < ITEMS; item++)
    if (row.column(item) < n)
#pragma unroll
      for (int i = 0; i < VEC; i++) square = fmaf(v[item][i] - mean, v[item][i] - mean, square);
  const float scale = rsqrtf(reduce_row(square, scratch_square, Sum()) / n + eps);
#pragma unroll
  for (int item = 0; item < ITEMS; item++)
    if (row.column(item) < n) write(row.column(item), v[item], scale);
#else
  if (!RMS) {
    each_vector(in, row.thread, n, [&](int, const float(&v)[VEC]) {
#pragma unroll
      for (int i = 0; i < VEC; i++) mean += v[i];
    });
    mean = reduce_row(mean, scratch_mean, Sum()) / n;
  }
  each_vector(in, row.thread, n, [&](int, const float(&v)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; i++) square = fmaf(v[i] - mean, v[i] - mean, square);
  });
  const float scale = rsqrtf(reduce_row(square, scratch_square, Sum()) / n + eps);
  each_vector(in, row.thread, n, [&](int col, const float(&v)[VEC]) { write(col, v, scale); });
#endif
}
