// c = epilogue(scale * sum of SPLIT_K partial products), each stored as c is, in the accumulators' format.
//
// Always in the same order, so that a result does not depend on which block came first. Macros: PRECISION,
// EPILOGUE, SPLIT_K, VEC (elements a thread, neighbours in a row; divides n).
#include "epilogue.cuh"

using namespace rt;
using F = Format<PRECISION>;
using Acc = F::Acc;
using Out = F::Out;

extern "C" __global__ void __launch_bounds__(256)
    reduce_kernel(Out* __restrict__ c, const Acc* __restrict__ partial, const float* __restrict__ scale_a,
                  const float* __restrict__ scale_b, const Out* __restrict__ more, int m, int n) {
  const long long first = ((long long)blockIdx.x * 256 + threadIdx.x) * VEC, size = (long long)m * n;
  if (first >= size) return;
  Acc sum[VEC] = {};
#pragma unroll
  for (int s = 0; s < SPLIT_K; s++) {
    const Vec<Acc, VEC> x = load<Acc, VEC>(partial + s * size + first);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[i] += x.v[i];
  }
  Vec<Out, VEC> result;
  if constexpr (PRECISION == INT8) {
#pragma unroll
    for (int i = 0; i < VEC; i++) result.v[i] = Convert<Out>::from(sum[i]);
  } else {
    const float scale = PRECISION == FP8 ? *scale_a * *scale_b : 1.0f;
    Vec<Out, VEC> added = {};
    if (EPILOGUE != 0) added = load<Out, VEC>(more + (EPILOGUE == RESIDUAL ? first : first % n));
#pragma unroll
    for (int i = 0; i < VEC; i++)
      result.v[i] = Convert<Out>::from(finish<EPILOGUE>(sum[i] * scale, to_float(added.v[i])));
  }
  store<Out, VEC>(c + first, result);
}
