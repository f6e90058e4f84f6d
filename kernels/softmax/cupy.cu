// y[i, :] = softmax(x[i, :]), once through memory for rows that fit into registers, else twice in and once
// out: the first pass keeps a running maximum and a sum scaled to it (Milakov and Gimelshein, 2018).
//
// fmaxf passes over a NaN, but the sum does not: a NaN makes its row NaN. A row of -inf alone has
// -inf - -inf in every place: NaN too, as in torch. The maximum is subtracted before the scaling by
// log2(e), which would cost logits of 1e4 four decimals.
#include "rows.cuh"

using namespace rt;

ROW_KERNEL softmax_kernel(T* __restrict__ y, const T* __restrict__ x, int m, int n) {
  SHARED_MEMORY(shared);
  float* scratch_top = reinterpret_cast<float*>(shared);  // a float per warp each
  float* scratch_sum = scratch_top + BLOCK_THREADS / 32;
  const Row row(m, n);
  const T* in = x + row.start;
  T* out = y + row.start;
  float top = -infinity(), sum = 0.0f;

#if ITEMS > 0
  float v[ITEMS][VEC];
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = row.column(item);
#pragma unroll
    for (int i = 0; i < VEC; i++) v[item][i] = -infinity();  // of no weight
    if (col < n) unpack(in + col, [&](int i, float value) { v[item][i] = value; });
#pragma unroll
    for (int i = 0; i < VEC; i++) top = fmaxf(top, v[item][i]);
  }
  top = reduce_row(top, scratch_top, Max());
#pragma unroll
  for (int item = 0; item < ITEMS; item++)
#pragma unroll
    for (int i = 0; i < VEC; i++) sum += v[item][i] = fast_exp2((v[item][i] - top) * LOG2E);
  const float inverse = 1.0f / reduce_row(sum, scratch_sum, Sum());
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = row.column(item);
    if (row.active && col < n) store_vector(out + col, [&](int i) { return v[item][i] * inverse; });
  }
#else
  each_vector(in, row.thread, n, [&](int, const float(&v)[VEC]) {
    float higher = top;
#pragma unroll
    for (int i = 0; i < VEC; i++) higher = fmaxf(higher, v[i]);
    const float base = higher == -infinity() ? 0.0f : higher;  // nothing but -inf yet: keep the sum at 0
    sum *= fast_exp2((top - base) * LOG2E);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum += fast_exp2((v[i] - base) * LOG2E);
    top = higher;
  });
  const float highest = reduce_row(top, scratch_top, Max());
  sum *= fast_exp2((top - (highest == -infinity() ? 0.0f : highest)) * LOG2E);
  const float inverse = 1.0f / reduce_row(sum, scratch_sum, Sum());
  each_vector(in, row.thread, n, [&](int col, const float(&v)[VEC]) {
    if (row.active) store_vector(out + col, [&](int i) { return fast_exp2((v[i] - highest) * LOG2E) * inverse; });
  });
#endif
}
