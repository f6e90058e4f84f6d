// What follows a matrix product, for one value: what is added, and the activation.
#pragma once
#include "rooftune.cuh"

namespace rt {

// The kinds, in the order of EPILOGUES in kernels/gemm: none, bias, bias and relu, bias and gelu, residual. A bias is
// one value a column, a residual one for each value of c.
constexpr int RESIDUAL = 4;

template <class T> struct Is16 { static constexpr int FORMAT = BF16; };  // which 16-bit format `pack` makes
template <> struct Is16<f16> { static constexpr int FORMAT = FP16; };

template <int KIND> __device__ __forceinline__ float finish(float value, float added) {
  if (KIND != 0) value += added;
  if (KIND == 2) value = value < 0 ? 0 : value;  // not fmaxf, which would drop a NaN
  if (KIND == 3) value = 0.5f * value * (1.0f + erff(value * 0.70710678118654752440f));
  return value;
}

}  // namespace rt
