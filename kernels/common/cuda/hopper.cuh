// Vocabulary of compute capability 9.0: barriers with phases, tensor copies (TMA), clusters, wgmma.
//
// As rooftune.cuh, with two meanings: PTX for sm_90a (hopper_device.cuh, hopper_wgmma.cuh), or checked
// operations of fibers (hopper_host.hpp). Asynchronous work is emulated pessimistically: what a copy or a
// product will write is poison from issue to completion, operands are read at issue or only at the wait.
#pragma once
#include "rooftune.cuh"

namespace rt {

// A barrier in shared memory: a phase ends when `count` threads have arrived and all announced bytes have
// landed. Waiting for the parity of the running phase blocks; the phase before it counts as done.
using Barrier = unsigned long long;

// Position in a ring of LENGTH buffers. `phase` is the parity to wait for at the full barrier; the empty
// barrier takes the other one, so that the first round passes.
template <int LENGTH> struct Ring {
  int stage = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void skip(int count) {
    stage += count;
    phase ^= stage / LENGTH & 1;
    stage %= LENGTH;
  }
  __device__ __forceinline__ void next() {
    if (++stage == LENGTH) stage = 0, phase ^= 1;
  }
};

// The 16-byte chunks of a tile in lines of WIDTH bytes, permuted as TMA and wgmma do ("swizzle"): bits 4 to 6
// of the address are combined with bits 7 to 9; fewer for 64 and 32 bytes. The tile starts at a multiple of 1024.
template <int WIDTH> __device__ __forceinline__ int swizzle(int offset) {
  static_assert(WIDTH == 128 || WIDTH == 64 || WIDTH == 32, "lines of 128, 64 or 32 bytes");
  return offset ^ (offset >> 7 & (WIDTH / 16 - 1)) << 4;
}

// A value that is one for all lanes, said so that the compiler knows: what is computed from it, or in a loop that it
// ends, stays in uniform registers.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ int warpgroup() { return uniform((int)threadIdx.x / 128); }

}  // namespace rt

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "hopper_device.cuh"
#include "hopper_wgmma.cuh"
#else
#include "hopper_host.hpp"
#endif

namespace rt {

// How wgmma finds an operand in shared memory (PTX ISA, "Matrix descriptor format" of wgmma): address,
// leading and stride offsets in units of 16 bytes, swizzle 1 (128 bytes) in bits 62 and 63.
__device__ __forceinline__ unsigned long long descriptor(const char* tile, unsigned leading, unsigned stride) {
  return (unsigned long long)((shared_address(tile) & 0x3FFFF) >> 4) | (unsigned long long)(leading >> 4) << 16 |
         (unsigned long long)(stride >> 4) << 32 | 1ull << 62;
}

// A tile of MN x DEPTH elements for wgmma, in lines of 128 bytes, swizzled.
//
// Along k (MN_MAJOR false): panels of 128 bytes of k, each a line for every m or n; eight lines repeat every
// 1024 bytes (stride). A step of 32 bytes of k stays inside the line: the hardware permutes the final address.
// Along m or n (16-bit elements only): panels of 64 of them, each a line for every k; the panels lie
// DEPTH lines apart (leading), eight lines of k repeat every 1024 bytes (stride).
template <class T, int MN, int DEPTH, bool MN_MAJOR> struct Operand {
  static constexpr int SIZE = sizeof(T), K_STEP = 32 / SIZE, STEPS = DEPTH / K_STEP, BYTES = MN * DEPTH * SIZE;
  static constexpr int WIDTH = 128 / SIZE;  // elements a line
  static constexpr int LINES = MN_MAJOR ? DEPTH : MN, PANELS = (MN_MAJOR ? MN : DEPTH) / WIDTH;
  static constexpr int PANEL_BYTES = LINES * 128;
  static_assert(!MN_MAJOR || SIZE == 2, "wgmma reads elements of other sizes along k only");
  static_assert((MN_MAJOR ? MN : DEPTH) % WIDTH == 0 && LINES % 8 == 0, "whole panels of whole 1024-byte groups");

  // Descriptor of the part from row or column `first` on, at the first step of k; `step` goes on from there. An
  // addition is all that is between two products: with whole descriptors it was 13 instructions.
  static __device__ __forceinline__ unsigned long long start(const char* tile, int first) {
    if (MN_MAJOR) return descriptor(tile + first / WIDTH * PANEL_BYTES, PANEL_BYTES, 1024);
    return descriptor(tile + first * 128, 16, 1024);
  }
  static __device__ __forceinline__ unsigned long long step(unsigned long long start, int step) {
    const int byte = MN_MAJOR ? step * K_STEP * 128 : step * 32 / 128 * PANEL_BYTES + step * 32 % 128;
    return start + (byte >> 4);
  }

  // Start the copy of this block's part (`share` of SHARERS) of the tile at (mn, k) to all blocks of `mask`.
  template <int SHARERS>
  static __device__ __forceinline__ void fetch(char* tile, const TensorMap& map, Barrier* full, int mn, int k,
                                               int batch, int share, unsigned short mask) {
    constexpr int PART = LINES / SHARERS;
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
      char* target = tile + panel * PANEL_BYTES + share * PART * 128;
      const int x = (MN_MAJOR ? mn : k) + panel * WIDTH, y = (MN_MAJOR ? k : mn) + share * PART;
      if (SHARERS == 1) tma_load(target, map, full, x, y, batch);
      else tma_load_multicast(target, map, full, x, y, batch, mask);
    }
  }
};

// A warpgroup's 64 rows of COLUMNS results in 16 bits to shared memory, in panels of 64 columns as a tensor store takes
// them. value(j): the thread's j-th accumulator.
template <int F, int COLUMNS, int PANEL_BYTES, class Value>
__device__ __forceinline__ void write_panels(char* place, Value value) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, matrix = lane / 8;
  const int line = 16 * warp + matrix % 2 * 8 + lane % 8;
#pragma unroll
  for (int q = 0; q < COLUMNS / 16; q++) {
    unsigned r[4];
#pragma unroll
    for (int m = 0; m < 4; m++) r[m] = pack<F>(value(8 * q + 2 * m), value(8 * q + 2 * m + 1));
    store_matrices(place + q / 4 * PANEL_BYTES + swizzle<128>(line * 128 + (2 * (q % 4) + matrix / 2) * 16), r);
  }
}

}  // namespace rt
