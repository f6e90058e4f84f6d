// dx[i, :] = y[i, :] * (dy[i, :] - sum_j y[i, j] * dy[i, j]): rows that fit stay in registers (two reads, one
// write), longer ones are read twice. Macros: those of rows.cuh; VEC and ITEMS count places, of two values each.
#include "rows.cuh"

using namespace rt;

ROW_KERNEL softmax_backward_kernel(T* __restrict__ dx, const T* __restrict__ dy, const T* __restrict__ y, int m, int n) {
  SHARED_MEMORY(shared);
  float* scratch = reinterpret_cast<float*>(shared);  // a float per warp
  const Row row(m, n);
  const T* weight = y + row.start;
  const T* slope = dy + row.start;
  float sum = 0.0f;

#if ITEMS > 0
  float w[ITEMS][VEC], s[ITEMS][VEC];
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = row.column(item);
#pragma unroll
    for (int i = 0; i < VEC; i++) w[item][i] = s[item][i] = 0.0f;
    if (col < n) {
      unpack(weight + col, [&](int i, float value) { w[item][i] = value; });
      unpack(slope + col, [&](int i, float value) { s[item][i] = value; });
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) sum = fmaf(w[item][i], s[item][i], sum);
  }
  sum = reduce_row(sum, scratch, Sum());
#pragma unroll
  for (int item = 0; item < ITEMS; item++) {
    const int col = row.column(item);
    if (row.active && col < n)
      store_vector(dx + row.start + col, [&](int i) { return w[item][i] * (s[item][i] - sum); });
  }
#else
  each_vector(weight, row.thread, n, [&](int col, const float(&w)[VEC]) {
    unpack(slope + col, [&](int i, float value) { sum = fmaf(w[i], value, sum); });
  });
  sum = reduce_row(sum, scratch, Sum());
  each_vector(weight, row.thread, n, [&](int col, const float(&w)[VEC]) {
    float result[VEC];
    unpack(slope + col, [&](int i, float value) { result[i] = w[i] * (value - sum); });
    if (row.active) store_vector(dx + row.start + col, [&](int i) { return result[i]; });
  });
#endif
}
