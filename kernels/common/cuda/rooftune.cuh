// What every CUDA kernel of rooftune includes: one vocabulary with two meanings.
//
// Compiled by NVRTC, the wrappers are PTX instructions (device.cuh). Compiled by a C++ compiler, each
// CUDA thread is a fiber and the same wrappers are checked collectives (host.hpp), so a kernel's index
// arithmetic, masks, fragment layouts and barriers can be proved on a machine without a GPU.
//
// Rules for a kernel: one-dimensional grid and block, whole warps; all shared memory is dynamic and
// comes from SHARED_MEMORY(name); PTX only through the wrappers.
#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "device.cuh"
#else
#include "host.hpp"
#endif

namespace rt {

// ---- number formats: what a precision stores, accumulates and writes ----
template <int P> struct Format;
template <> struct Format<FP32> { using In = float;       using Acc = float; using Out = float; };
template <> struct Format<TF32> { using In = float;       using Acc = float; using Out = float; };
template <> struct Format<FP16> { using In = f16;         using Acc = float; using Out = f16; };
template <> struct Format<BF16> { using In = bf16;        using Acc = float; using Out = bf16; };
template <> struct Format<INT8> { using In = signed char; using Acc = int;   using Out = int; };
template <> struct Format<FP8>  { using In = e4m3;        using Acc = float; using Out = bf16; };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int x) { return (float)x; }
template <class T> struct Convert;
template <> struct Convert<float> { static __device__ __forceinline__ float from(float x) { return x; } };
template <> struct Convert<int> { static __device__ __forceinline__ int from(int x) { return x; } };
template <> struct Convert<f16> { static __device__ __forceinline__ f16 from(float x) { return to_f16(x); } };
template <> struct Convert<bf16> { static __device__ __forceinline__ bf16 from(float x) { return to_bf16(x); } };

// N neighbours moved by one instruction (up to 16 bytes); the address must be aligned to their size.
template <class T, int N> struct alignas(sizeof(T) * N) Vec { T v[N]; };

template <class T, int N> __device__ __forceinline__ Vec<T, N> load(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}
template <class T, int N> __device__ __forceinline__ void store(T* p, const Vec<T, N>& x) {
  *reinterpret_cast<Vec<T, N>*>(p) = x;
}

constexpr float LOG2E = 1.44269504088896340736f, LN2 = 0.69314718055994530942f;
__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// The natural logarithm of a sum of exponentials: `total` of them, each by 2^(top * scale) too small. No exponential
// at all gives infinity, so that exp(score - it) is 0 in a backward pass.
__device__ __forceinline__ float log_of_sum(float top, float scale, float total) {
  return total == 0.0f ? infinity() : LN2 * fmaf(top, scale, log2f(total));
}

// ---- reductions: every one of `WIDTH` neighbouring lanes gets the result ----
struct Max { __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); } };
struct Sum { __device__ __forceinline__ float operator()(float a, float b) const { return a + b; } };

template <int WIDTH, class Op> __device__ __forceinline__ float reduce_lanes(float x, Op op) {
#pragma unroll
  for (int step = WIDTH / 2; step > 0; step /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

// Over WIDTH consecutive threads (a power of two); above a warp through `scratch`: one float per warp of
// the block. Callers use a fresh scratch, or a barrier, for each reduction in a row.
template <int WIDTH, class Op> __device__ __forceinline__ float reduce_threads(float x, float* scratch, Op op) {
  constexpr int WARPS = WIDTH / 32;
  x = reduce_lanes<(WIDTH < 32 ? WIDTH : 32)>(x, op);
  if (WARPS > 1) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = reduce_lanes<(WARPS > 1 ? WARPS : 1)>(scratch[warp / WARPS * WARPS + lane % WARPS], op);
  }
  return x;
}

// ---- tiles in shared memory, as rows of 16-byte chunks ----
// Eight consecutive rows at one chunk must fall into the eight 16-byte bank groups of a 128-byte line:
// that is what one ldmatrix phase reads. A power of two of chunks is swizzled by exclusive or, at no
// cost in memory; any other count is padded to an odd one. SHIFT, PAIR pick the rows that a wider
// access pattern spreads: PAIR 2 keeps pairs of chunks together for four rows 2^SHIFT apart.
template <int CHUNKS, int SHIFT = 0, int PAIR = 1> struct Rows {
  static constexpr bool SWIZZLED = (CHUNKS & (CHUNKS - 1)) == 0;
  static constexpr int STRIDE = SWIZZLED ? CHUNKS : CHUNKS | 1;  // chunks from one row to the next
  static constexpr int MASK = (CHUNKS < 8 ? CHUNKS : 8) / PAIR - 1;
  static constexpr int SPREAD = CHUNKS >= 8 ? 0 : CHUNKS == 4 ? 1 : CHUNKS == 2 ? 2 : 3;

  // byte offset of a chunk
  static __device__ __forceinline__ int at(int row, int chunk) {
    if (SWIZZLED) chunk ^= ((row >> (SHIFT + SPREAD)) & MASK) * PAIR;
    return (row * STRIDE + chunk) * 16;
  }
};

// Start copying a tile of ROWS x COLS elements at (row, col) of a row-major matrix [rows, cols] to
// shared memory; outside the matrix it is zero. COPY bytes (16, 8 or 4) go at once, asynchronously; the
// matrix is aligned to them and so is its row stride. COPY below 4 means one element at a time, by a
// register: complete at the next barrier, like the others after their wait.
template <class Tile, int ROWS, int COLS, int COPY, int THREADS, class T>
__device__ __forceinline__ void copy_tile(char* tile, const T* matrix, long long stride, int row, int col, int rows,
                                          int cols) {
  constexpr int BYTES = COPY < 4 ? (int)sizeof(T) : COPY;
  constexpr int PER_ROW = COLS * (int)sizeof(T) / BYTES, TOTAL = ROWS * PER_ROW;
#pragma unroll
  for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; i++) {
    const int unit = i * THREADS + threadIdx.x;
    if (TOTAL % THREADS != 0 && unit >= TOTAL) break;
    const int r = unit / PER_ROW, byte = unit % PER_ROW * BYTES;
    const int c = col + byte / (int)sizeof(T);
    const bool inside = row + r < rows && c < cols;
    const T* source = inside ? matrix + (row + r) * stride + c : matrix;
    char* target = tile + Tile::at(r, byte / 16) + byte % 16;
    if constexpr (COPY < 4) {
      T x = {};
      if (inside) x = *source;
      *reinterpret_cast<T*>(target) = x;
    } else {
      copy_async<BYTES>(target, source, inside);
    }
  }
}

}  // namespace rt
