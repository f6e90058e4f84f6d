// o from the sums of SPLITS parts of the keys: each part's weight is that of its maximum. A thread: four columns.
//
// Macros: PRECISION, HEAD_DIM, SPLITS, LSE.
#include "rooftune.cuh"

using namespace rt;
using T = Format<PRECISION>::In;

// partial: [SPLITS, rows, D], stats: [SPLITS, rows, 2] (maximum, sum), lse: [rows]; see cupy_decode.cu
extern "C" __global__ void __launch_bounds__(256)
    combine_kernel(T* __restrict__ o, const float* __restrict__ partial, const float* __restrict__ stats,
                   float* __restrict__ lse, int rows, float scale) {
  const long long unit = (long long)blockIdx.x * 256 + threadIdx.x, row = unit / (HEAD_DIM / 4);
  if (row >= rows) return;
  float top = -infinity(), total = 0.0f;
#pragma unroll 8
  for (int s = 0; s < SPLITS; s++) top = fmaxf(top, stats[2 * ((long long)s * rows + row)]);
  Vec<float, 4> value = {};
#pragma unroll 8
  for (int s = 0; s < SPLITS; s++) {
    const long long slot = (long long)s * rows + row;
    const Vec<float, 2> known = load<float, 2>(stats + 2 * slot);
    const float weight = top == -infinity() ? 0.0f : fast_exp2((known.v[0] - top) * scale);
    total += weight * known.v[1];
    const Vec<float, 4> x = load<float, 4>(partial + slot * HEAD_DIM + unit % (HEAD_DIM / 4) * 4);
#pragma unroll
    for (int e = 0; e < 4; e++) value.v[e] += weight * x.v[e];
  }
  Vec<T, 4> result;
#pragma unroll
  for (int e = 0; e < 4; e++) result.v[e] = Convert<T>::from(total == 0.0f ? 0.0f : value.v[e] / total);
  store<T, 4>(o + unit * 4, result);
  if (LSE && unit % (HEAD_DIM / 4) == 0) lse[row] = log_of_sum(top, scale, total);
}
