// The wrappers on a CPU: what device.cuh says in PTX, said in C++ on fibers (fibers.hpp).
//
// Sound for index arithmetic, tails, masks, fragment layouts, reductions, missing barriers and missing
// waits. Not modelled: memory ordering inside a warp, bank conflicts, launch limits, the last bits of
// ex2.approx and of the tensor cores' internal accumulation.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "fibers.hpp"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __shared__ static_assert(false, "use SHARED_MEMORY(name): the emulation poisons and fences it")
#define SHARED_MEMORY(name) char* name = rt::host::block().shared

namespace rt::host {
struct Index { unsigned x; };
inline Index thread_index() { return {fiber().index}; }
}  // namespace rt::host
#define threadIdx rt::host::thread_index()
#define blockIdx (rt::host::Index{rt::host::block().index})
#define blockDim (rt::host::Index{rt::host::block().threads})
#define gridDim (rt::host::Index{rt::host::block().grid})

template <class To, class From> inline To rooftune_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return rooftune_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return rooftune_bits<unsigned>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;

// Bytes of the pair (low: 0-3, high: 4-7), picked by the four digits of the selector.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= static_cast<unsigned>(both >> (selector >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

// ---- barriers and shuffles ----
inline void __syncthreads() { rt::host::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  rt::host::collective("__syncwarp", mask, nullptr, [](void**) {});
}

namespace rt::host {
template <class T> struct Exchange { T give, take; unsigned lane; };
// Each lane reads the value of the lane it names; a lane outside the mask has none to give.
template <class T> T shuffle(const char* name, unsigned mask, T value, unsigned lane) {
  Exchange<T> mine{value, value, lane};
  collective(name, mask, &mine, [name](void** slots) {
    for (unsigned i = 0; i < WARP; i++) {
      if (!slots[i]) continue;
      auto* e = static_cast<Exchange<T>*>(slots[i]);
      if (!slots[e->lane]) fail("lane %u reads lane %u by %s, which is not in the mask", i, e->lane, name);
      e->take = static_cast<Exchange<T>*>(slots[e->lane])->give;
    }
  });
  return mine.take;
}
inline unsigned lane() { return fiber().index % WARP; }
}  // namespace rt::host
template <class T> T __shfl_sync(unsigned mask, T value, int lane) {
  return rt::host::shuffle("__shfl_sync", mask, value, lane & 31);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return rt::host::shuffle("__shfl_xor_sync", mask, value, rt::host::lane() ^ bits);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned vote = predicate != 0;
  rt::host::collective("__ballot_sync", mask, &vote, [](void** slots) {
    unsigned all = 0;
    for (unsigned i = 0; i < 32; i++)
      if (slots[i]) all |= *static_cast<unsigned*>(slots[i]) << i;
    for (unsigned i = 0; i < 32; i++)
      if (slots[i]) *static_cast<unsigned*>(slots[i]) = all;
  });
  return vote;
}

namespace rt {

enum Precision { FP32, TF32, FP16, BF16, INT8, FP8 };
struct f16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
struct e4m3 { unsigned char bits; };

// ---- conversions, round to nearest even; a NaN stays one ----
inline float to_float(bf16 x) { return rooftune_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
// A float of 1 sign, E exponent and M mantissa bits, without its special values: shifted to the place of
// the wide format's exponent, then scaled by the difference of the biases, which also does subnormals.
template <int E, int M> float decode(unsigned bits) {
  const uint32_t size = (bits & ((1u << (E + M)) - 1)) << (23 - M), sign = (bits >> (E + M) & 1) << 31;
  const uint32_t scale = static_cast<uint32_t>(127 + 127 - ((1 << (E - 1)) - 1)) << 23;
  return rooftune_bits<float>(rooftune_bits<uint32_t>(rooftune_bits<float>(size) * rooftune_bits<float>(scale)) | sign);
}
inline float to_float(f16 x) {
  if ((x.bits & 0x7C00) == 0x7C00)  // infinity or NaN
    return rooftune_bits<float>((x.bits & 0x8000u) << 16 | 0x7F800000u | (x.bits & 0x3FFu) << 13);
  return decode<5, 10>(x.bits);
}
inline float to_float(e4m3 x) { return (x.bits & 0x7F) == 0x7F ? NAN : decode<4, 3>(x.bits); }  // no infinity

inline bf16 to_bf16(float x) {
  const uint32_t u = rooftune_bits<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {static_cast<unsigned short>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
  const unsigned sign = rooftune_bits<uint32_t>(x) >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (size >= 65520.0f) return {static_cast<unsigned short>(sign | 0x7C00)};  // halfway to 2^16 rounds up
  if (size < 0x1p-14f)  // subnormal: whole multiples of 2^-24, which may round up to the smallest normal
    return {static_cast<unsigned short>(sign | static_cast<unsigned>(std::nearbyint(size * 0x1p24f)))};
  const uint32_t u = rooftune_bits<uint32_t>(size) - (112u << 23);  // exponent bias 127 to 15
  return {static_cast<unsigned short>(sign | (u + 0xFFF + (u >> 13 & 1)) >> 13)};
}
template <int P> unsigned pack(float low, float high) {
  if (P == FP16) return to_f16(low).bits | static_cast<unsigned>(to_f16(high).bits) << 16;
  return to_bf16(low).bits | static_cast<unsigned>(to_bf16(high).bits) << 16;
}
inline unsigned to_tf32(float x) {
  const uint32_t u = rooftune_bits<uint32_t>(x);
  if (x != x) return 0x7FFFFFFF;
  return (u & 0x7F800000) == 0x7F800000 ? u : (u + 0x1000) & 0xFFFFE000;  // ties away from zero
}
inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // .ftz
}

// ---- asynchronous copies: the target is poison from issue to wait, as on the device it may be either ----
template <int BYTES> void copy_async(void* shared, const void* global, bool inside) {
  static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async moves 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(shared) % BYTES || (inside && reinterpret_cast<uintptr_t>(global) % BYTES))
    host::fail("thread %u: an asynchronous copy of %d bytes is not aligned to them", threadIdx.x, BYTES);
  std::memset(shared, host::POISON, BYTES);
  host::fiber().issued.push_back(
      {static_cast<char*>(shared), inside ? static_cast<const char*>(global) : nullptr, BYTES});
}
inline void copy_commit() {
  host::Fiber& me = host::fiber();
  me.groups.push_back(std::move(me.issued));
  me.issued.clear();
}
template <int PENDING> void copy_wait() {
  host::Fiber& me = host::fiber();
  while (me.groups.size() > PENDING) {
    for (const host::Copy& c : me.groups.front()) {
      if (c.source) std::memcpy(c.target, c.source, c.bytes);
      else std::memset(c.target, 0, c.bytes);
    }
    me.groups.erase(me.groups.begin());
  }
}

// ---- four 8x8 matrices of 16-bit elements (PTX ISA, "Warp-level matrix load instruction: ldmatrix") ----
namespace host {
struct Matrices { const void* row; unsigned* registers; };
inline void load_matrices(const char* name, unsigned* r, const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("thread %u: %s of a row not aligned to 16 bytes", threadIdx.x, name);
  Matrices mine{row, r};
  collective(name, 0xffffffffu, &mine, [transposed](void** slots) {
    for (unsigned matrix = 0; matrix < 4; matrix++) {
      uint16_t m[8][8];
      for (unsigned i = 0; i < 8; i++) std::memcpy(m[i], static_cast<Matrices*>(slots[8 * matrix + i])->row, 16);
      for (unsigned lane = 0; lane < WARP; lane++) {
        const unsigned i = lane / 4, j = lane % 4 * 2;
        const unsigned low = transposed ? m[j][i] : m[i][j], high = transposed ? m[j + 1][i] : m[i][j + 1];
        static_cast<Matrices*>(slots[lane])->registers[matrix] = low | high << 16;
      }
    }
  });
}
}  // namespace host
inline void load_matrices(unsigned (&r)[4], const void* row) { host::load_matrices("ldmatrix", r, row, false); }
inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  host::load_matrices("ldmatrix.trans", r, row, true);
}

// ---- d[16, 8] += a[16, k] b[k, 8]; layouts from the PTX ISA, "Matrix fragments for mma.m16n8k*" ----
// A register holds 4 bytes of a row of a (a column of b): lane 4g + t has, of group g, bytes 4t..4t+3 of
// the first or the second 16 bytes of k. Registers of a: (row g, half 0), (g + 8, 0), (g, 1), (g + 8, 1).
namespace host {
template <int P, class Acc> Acc element(unsigned word, unsigned index) {
  if constexpr (P == TF32) return rooftune_bits<float>(word & 0xFFFFE000u);  // the hardware ignores the low bits
  if constexpr (P == FP16) return to_float(f16{static_cast<unsigned short>(word >> 16 * index)});
  if constexpr (P == BF16) return to_float(bf16{static_cast<unsigned short>(word >> 16 * index)});
  if constexpr (P == INT8) return static_cast<signed char>(word >> 8 * index);
  if constexpr (P == FP8) return to_float(e4m3{static_cast<unsigned char>(word >> 8 * index)});
}
template <class Acc> struct Product { Acc* d; const unsigned *a, *b; };
template <int P, class Acc> void multiply(void** slots) {
  constexpr unsigned PER_WORD = P == TF32 ? 1 : P == FP16 || P == BF16 ? 2 : 4, K = 8 * PER_WORD;
  Acc a[16][K], b[8][K];
  for (unsigned lane = 0; lane < WARP; lane++) {
    auto* mine = static_cast<Product<Acc>*>(slots[lane]);
    for (unsigned half = 0; half < 2; half++)
      for (unsigned e = 0; e < PER_WORD; e++) {
        const unsigned k = (4 * half + lane % 4) * PER_WORD + e, g = lane / 4;
        a[g][k] = element<P, Acc>(mine->a[2 * half], e);
        a[g + 8][k] = element<P, Acc>(mine->a[2 * half + 1], e);
        b[g][k] = element<P, Acc>(mine->b[half], e);
      }
  }
  for (unsigned lane = 0; lane < WARP; lane++)
    for (unsigned i = 0; i < 4; i++) {
      const unsigned row = lane / 4 + 8 * (i / 2), col = lane % 4 * 2 + i % 2;
      Acc sum = static_cast<Product<Acc>*>(slots[lane])->d[i];
      for (unsigned k = 0; k < K; k++) sum += a[row][k] * b[col][k];
      static_cast<Product<Acc>*>(slots[lane])->d[i] = sum;
    }
}
}  // namespace host
template <int P, class Acc> void mma(Acc (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  host::Product<Acc> mine{d, a, b};
  host::collective("mma", 0xffffffffu, &mine, host::multiply<P, Acc>);
}

// ---- the entry that Python calls, with the arguments as cuLaunchKernel takes them ----
namespace host {
template <class... A, size_t... I>
std::function<void()> capture(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  auto values = std::make_tuple(*static_cast<std::remove_reference_t<A>*>(args[I])...);
  return [kernel, values] { std::apply(kernel, values); };
}
template <class... A> std::function<void()> capture(void (*kernel)(A...), void** args) {
  return capture(kernel, args, std::index_sequence_for<A...>{});
}
}  // namespace host
}  // namespace rt

#ifndef CLUSTER_SIZE  // a macro of the kernel: blocks that are scheduled together
#define CLUSTER_SIZE 1
#endif
#define ROOFTUNE_HOST_ENTRY(kernel)                                                                             \
  extern "C" void rooftune_launch(unsigned grid, unsigned threads, size_t shared, int order, unsigned seed,     \
                                  void** args) {                                                                \
    rt::host::launch(grid, threads, CLUSTER_SIZE, shared, static_cast<rt::host::Order>(order), seed,            \
                     rt::host::capture(kernel, args));                                                             \
  }
