// c = epilogue(op(a) op(b)) with TMA and wgmma: persistent, warp-specialised, for compute capability 9.0.
//
// The kernel computes out[rows, cols] from a left operand (rows, k) and a right one (cols, k); these are a
// and b, or with SWAP_AB b and a: then few rows of c become few columns, of which wgmma wants 8 only, not 64.
// Warpgroup 0 is the producer: one thread fills a ring of STAGES tiles by tensor copies, for a cluster
// of blocks together: blocks with the same rows share the left tile, with the same columns the right one, and
// each fetches a part for all of them (multicast). The other warpgroups multiply. They share a tile
// (cooperative) or take tiles in turn, one's epilogue beside the other's products (PINGPONG).
//
// Macros: PRECISION, LEFT_MN, RIGHT_MN (1: stored along rows, cols instead of k), SWAP_AB, EPILOGUE, TILE_ROWS,
// TILE_COLS (of a block's tile), BLOCK_K, STAGES, CLUSTER_ROWS, CLUSTER_COLS, CLUSTER_SIZE, PINGPONG, GROUP_M, SPLIT_K
// (above 1: partial sums go to `raw`, cupy_wgmma.reduce.cu adds them), STREAM_K (1: the work left after whole rounds
// of tiles is dealt out evenly, see schedule.cuh), PROMOTE (1: fp8 sums leave the tensor cores, which keep about 14
// bits, after each tile of k).
#include "epilogue.cuh"
#include "schedule.cuh"

using namespace rt;
using F = Format<PRECISION>;
using In = F::In;
using Acc = F::Acc;
using Out = F::Out;

constexpr int GROUPS = PINGPONG || TILE_ROWS == 256 ? 2 : TILE_ROWS / 64;  // of consumers
constexpr int PER_TILE = PINGPONG ? 1 : GROUPS, HEIGHT = TILE_ROWS / PER_TILE;  // rows of a consumer warpgroup
constexpr int PARTS = HEIGHT / 64, SUMS = TILE_COLS / 2;                        // accumulators: PARTS x SUMS a thread
constexpr int THREADS = 128 * (GROUPS + 1);

using Left = Operand<In, TILE_ROWS, BLOCK_K, LEFT_MN>;
using Right = Operand<In, TILE_COLS, BLOCK_K, RIGHT_MN>;
constexpr int STAGE_BYTES = Left::BYTES + Right::BYTES;

constexpr bool RAW = sizeof(Out) == 4 || SPLIT_K > 1;  // 4-byte values go straight from registers to memory
// Otherwise through two buffers a warpgroup, each a box of a tensor store: 64 rows and STORE_COLS columns, or
// transposed, TILE_COLS lines of 64.
constexpr int STORE_COLS = SWAP_AB ? 64 : TILE_COLS % 64 == 0 ? 64 : TILE_COLS % 32 == 0 ? 32 : 16;
constexpr int BUFFER_BYTES = RAW ? 0 : SWAP_AB ? TILE_COLS * 128 : 64 * STORE_COLS * 2;
constexpr int BUFFERS = STAGES * STAGE_BYTES, BARRIERS = BUFFERS + 2 * GROUPS * BUFFER_BYTES;

using Schedule = Tiles<TILE_ROWS, TILE_COLS, BLOCK_K, CLUSTER_ROWS, CLUSTER_COLS, GROUP_M, SPLIT_K, STREAM_K != 0>;

struct Pipe {
  char* ring;
  Barrier *full, *empty, *turn;
  unsigned short same_rows, same_cols;  // blocks of the cluster that get our part of the left, of the right tile
};

__device__ __forceinline__ void produce(const Pipe& pipe, Schedule tiles, const TensorMap& left,
                                        const TensorMap& right) {
  Ring<STAGES> at;
  while (tiles.advance()) {
    for (int k = tiles.k_begin; k < tiles.k_end; k++, at.next()) {
      char* stage = pipe.ring + at.stage * STAGE_BYTES;
      Barrier* full = pipe.full + at.stage;
      barrier_wait(pipe.empty + at.stage, at.phase ^ 1);
      barrier_expect(full, STAGE_BYTES);  // what lands here, whoever fetches it
      Left::fetch<CLUSTER_COLS>(stage, left, full, tiles.row, k * BLOCK_K, 0, tiles.rank / CLUSTER_ROWS,
                                pipe.same_rows);
      Right::fetch<CLUSTER_ROWS>(stage + Left::BYTES, right, full, tiles.col, k * BLOCK_K, 0,
                                 tiles.rank % CLUSTER_ROWS, pipe.same_cols);
    }
  }
}

// Give a stage back to every block that writes to it: one arrival a warp, as a warp alone knows that it has read.
__device__ __forceinline__ void release(const Pipe& pipe, int stage) {
  const int lane = threadIdx.x % 32;
  if (CLUSTER_SIZE == 1) {
    if (lane == 0) barrier_arrive(pipe.empty + stage);
  } else if (lane < CLUSTER_SIZE && ((pipe.same_rows | pipe.same_cols) >> lane & 1)) {
    barrier_arrive_at(pipe.empty + stage, lane);
  }
}

__device__ __forceinline__ void multiply(Acc (&acc)[PARTS][SUMS], const char* stage, int first_row, bool add) {
  const unsigned long long right = Right::start(stage + Left::BYTES, 0);
#pragma unroll
  for (int step = 0; step < Left::STEPS; step++)
#pragma unroll
    for (int i = 0; i < PARTS; i++)
      wgmma<PRECISION, TILE_COLS, LEFT_MN, RIGHT_MN>(acc[i], Left::step(Left::start(stage, first_row + 64 * i), step),
                                                     Right::step(right, step), add || step > 0);
}

// acc = the sum over the tile's k. The products of a stage run while the one before is given back.
__device__ __forceinline__ void accumulate(Acc (&acc)[PARTS][SUMS], const Pipe& pipe, Ring<STAGES>& at, int count,
                                           int first_row) {
  int previous = 0;
  for (int k = 0; k < count; k++, at.next()) {
    barrier_wait(pipe.full + at.stage, at.phase);
    const char* stage = pipe.ring + at.stage * STAGE_BYTES;
    if constexpr (PROMOTE) {
      Acc part[PARTS][SUMS];
      wgmma_fence(part);
      multiply(part, stage, first_row, false);
      wgmma_commit();
      wgmma_wait<0>(part);
      release(pipe, at.stage);
#pragma unroll
      for (int i = 0; i < PARTS; i++)
#pragma unroll
        for (int j = 0; j < SUMS; j++) acc[i][j] = k ? acc[i][j] + part[i][j] : part[i][j];
    } else {
      wgmma_fence();
      multiply(acc, stage, first_row, k > 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (k > 0) release(pipe, previous);
      previous = at.stage;
    }
  }
  if constexpr (!PROMOTE) {
    wgmma_wait<0>(acc);
    release(pipe, previous);
  }
}

// The accumulators' places: lane 4g + t of warp w has rows 16w + g, + 8 and columns 8j + 2t, + 1 of each part.
struct Place {
  int warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
};

// Values to `raw`, which has the storage order of c: a quad of lanes writes 32 bytes, or eight lanes do. Those of c
// itself are finished here.
__device__ __forceinline__ void store_raw(const Acc (&acc)[PARTS][SUMS], Acc* raw, const Out* more, int row, int col,
                                          int rows, int cols) {
  const Place at;
#pragma unroll
  for (int i = 0; i < PARTS; i++)
#pragma unroll
    for (int j = 0; j < TILE_COLS / 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = row + 64 * i + 16 * at.warp + at.g + 8 * half, s = col + 8 * j + 2 * at.t;
        if (r >= rows || s >= cols) continue;
        const long long at = SWAP_AB ? (long long)s * rows + r : (long long)r * cols + s, next = SWAP_AB ? rows : 1;
        const bool both = s + 1 < cols;
        Vec<Acc, 2> pair{acc[i][4 * j + 2 * half], acc[i][4 * j + 2 * half + 1]};
        if constexpr (EPILOGUE != 0 && SPLIT_K == 1 && PRECISION == TF32) {
          const long long from = EPILOGUE == RESIDUAL ? at : SWAP_AB ? r : s;
          const long long step = EPILOGUE == RESIDUAL ? next : SWAP_AB ? 0 : 1;
          pair.v[0] = finish<EPILOGUE>(pair.v[0], to_float(more[from]));
          pair.v[1] = finish<EPILOGUE>(pair.v[1], both ? to_float(more[from + step]) : 0.0f);
        }
        if (!SWAP_AB && cols % 2 == 0) {
          store<Acc, 2>(raw + at, pair);
        } else {
          raw[at] = pair.v[0];
          if (both) raw[at + next] = pair.v[1];
        }
      }
}

// Of two neighbours in row r: those in memory, or with SWAP_AB one below the other, of which there are few.
__device__ __forceinline__ void read_residual(float (&x)[2], const Out* residual, int r, int s, int rows, int cols) {
  if (r >= rows || s >= cols) return;
  if (SWAP_AB) {
    x[0] = to_float(residual[(long long)s * rows + r]);
    if (s + 1 < cols) x[1] = to_float(residual[(long long)(s + 1) * rows + r]);
  } else {  // columns of c come in eights
    const Vec<Out, 2> pair = load<Out, 2>(residual + (long long)r * cols + s);
    x[0] = to_float(pair.v[0]), x[1] = to_float(pair.v[1]);
  }
}

// Finished 16-bit values through the warpgroup's two buffers. A box is stored while the next one is written.
struct Store {
  char* buffers;
  int number, leader, turn = 0;  // the warpgroup's named barrier; its thread that issues the copies

  template <class Write> __device__ __forceinline__ void box(const TensorMap& out, int x, int y, Write write) {
    char* buffer = buffers + turn * BUFFER_BYTES;
    turn ^= 1;
    if (leader) bulk_wait_read<1>();  // the copy from this buffer has read it
    named_sync(number, 128);
    write(buffer);
    fence_async();
    named_sync(number, 128);
    if (leader) tma_store(out, buffer, x, y, 0), bulk_commit();
  }

  __device__ __forceinline__ void tile(const Acc (&acc)[PARTS][SUMS], const TensorMap& out, const Out* more,
                                       float scale, int row, int col, int rows, int cols) {
    const Place at;
    const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
      float row_bias[2] = {};
      if (EPILOGUE != 0 && EPILOGUE != RESIDUAL && SWAP_AB)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int r = row + 64 * i + 16 * at.warp + at.g + 8 * half;
          if (r < rows) row_bias[half] = to_float(more[r]);
        }
      // four 8x8 matrices: (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
      const auto pack16 = [&](unsigned(&r)[4], int q) {
#pragma unroll
        for (int m = 0; m < 4; m++) {
          const int j = 2 * q + m / 2, s = col + 8 * j + 2 * at.t;
          float add[2] = {row_bias[m % 2], row_bias[m % 2]};
          if constexpr (EPILOGUE == RESIDUAL) {
            read_residual(add, more, row + 64 * i + 16 * at.warp + at.g + 8 * (m % 2), s, rows, cols);
          } else if (EPILOGUE != 0 && !SWAP_AB && s < cols) {  // columns of c come in eights
            const Vec<Out, 2> pair = load<Out, 2>(more + s);
            add[0] = to_float(pair.v[0]), add[1] = to_float(pair.v[1]);
          }
          const Acc low = acc[i][4 * j + 2 * (m % 2)], high = acc[i][4 * j + 2 * (m % 2) + 1];
          r[m] = pack<Is16<Out>::FORMAT>(finish<EPILOGUE>(to_float(low) * scale, add[0]),
                                         finish<EPILOGUE>(to_float(high) * scale, add[1]));
        }
      };
      if constexpr (SWAP_AB) {
        box(out, row + 64 * i, col, [&](char* buffer) {
#pragma unroll
          for (int q = 0; q < TILE_COLS / 16; q++) {
            unsigned r[4];
            pack16(r, q);
            const int y = 16 * q + matrix / 2 * 8 + line, x = 2 * at.warp + matrix % 2;
            store_matrices_transposed(buffer + swizzle<128>(y * 128 + x * 16), r);
          }
        });
      } else {
        constexpr int WIDTH = STORE_COLS * 2;
#pragma unroll
        for (int part = 0; part < TILE_COLS / STORE_COLS; part++)
          box(out, col + part * STORE_COLS, row + 64 * i, [&](char* buffer) {
#pragma unroll
            for (int q = 0; q < STORE_COLS / 16; q++) {
              unsigned r[4];
              pack16(r, part * (STORE_COLS / 16) + q);
              const int y = 16 * at.warp + matrix % 2 * 8 + line, x = 2 * q + matrix / 2;
              store_matrices(buffer + swizzle<WIDTH>(y * WIDTH + x * 16), r);
            }
          });
      }
    }
  }
};

// left, right: the operands; out: c, unless `raw` ([SPLIT_K,] c) is written instead. scale_a, scale_b: [1], fp8
// only; more: bias [n] or residual [m, n], with an epilogue only; parts: [grid, TILE_ROWS, TILE_COLS], flags: [grid,
// PER_TILE], down, with STREAM_K only. `more` may not be __restrict__: then ptxas reads a residual of the whole tile
// before the first box of it is stored, and spills (4 bytes). Grid: a multiple of the cluster, at most what runs at
// once.
extern "C" __global__ void
#if CLUSTER_SIZE > 1
__cluster_dims__(CLUSTER_SIZE, 1, 1)
#endif
__launch_bounds__(THREADS, 1)
gemm_kernel(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
            const __grid_constant__ TensorMap out, Acc* __restrict__ raw, Acc* parts, unsigned* flags,
            const float* __restrict__ scale_a, const float* __restrict__ scale_b, const Out* more,
            int rows, int cols, int k) {
  SHARED_MEMORY(shared);
  const Schedule tiles(rows, cols, k);
  Pipe pipe;
  pipe.ring = shared;
  pipe.full = reinterpret_cast<Barrier*>(shared + BARRIERS);
  pipe.empty = pipe.full + STAGES, pipe.turn = pipe.empty + STAGES;
  pipe.same_rows = pipe.same_cols = 0;
#pragma unroll
  for (int i = 0; i < CLUSTER_COLS; i++) pipe.same_rows |= 1 << (tiles.rank % CLUSTER_ROWS + i * CLUSTER_ROWS);
  pipe.same_cols = ((1 << CLUSTER_ROWS) - 1) << (tiles.rank / CLUSTER_ROWS * CLUSTER_ROWS);

  if (threadIdx.x == 0) {
    require_alignment(shared);
    for (int i = 0; i < STAGES; i++) {
      barrier_init(pipe.full + i, 1);
      barrier_init(pipe.empty + i, 4 * PER_TILE * (CLUSTER_ROWS + CLUSTER_COLS - 1));
    }
    for (int i = 0; PINGPONG && i < 2; i++) barrier_init(pipe.turn + i, 4);
    barrier_init_fence();
  }
  if (CLUSTER_SIZE > 1) cluster_sync();
  else __syncthreads();

  const int group = warpgroup() - 1;
  if (group < 0) {
    if constexpr (GROUPS > 1) fewer_registers<GROUPS == 2 ? 40 : 32>();
    if (threadIdx.x == 0) produce(pipe, tiles, left, right);
  } else {
    if constexpr (GROUPS > 1) more_registers<GROUPS == 2 ? 232 : 160>();
    const float scale = PRECISION == FP8 && !RAW ? *scale_a * *scale_b : 1.0f;
    Store store{shared + BUFFERS + group * 2 * BUFFER_BYTES, 1 + group, threadIdx.x % 128 == 0};
    const int first_row = PINGPONG ? 0 : group * HEIGHT;
    Ring<STAGES> at;
    Acc acc[PARTS][SUMS];
    Schedule mine = tiles;
    for (int count = 0; mine.advance(); count++) {
      if (PINGPONG && count % 2 != group) {  // the other one's tile
        at.skip(mine.k_end - mine.k_begin);
        continue;
      }
      // The turn of our n-th tile ends a phase: group 1's after group 0's n-th, group 0's after group 1's before.
      if (PINGPONG) barrier_wait(pipe.turn + group, (count / 2 & 1) ^ (group == 0));
      accumulate(acc, pipe, at, mine.k_end - mine.k_begin, first_row);
      if (PINGPONG && threadIdx.x % 32 == 0) barrier_arrive(pipe.turn + (group ^ 1));
      if constexpr (STREAM_K) {
        const auto part = [&](int slot) { return parts + ((long long)slot * TILE_ROWS + first_row) * TILE_COLS; };
        const auto flag = [&](int slot) { return flags + slot * PER_TILE + (PINGPONG ? 0 : group); };
        if (mine.k_begin > 0) {  // the tile is another's, who began it
          leave_part(acc, part(mine.own_slot()), flag(mine.own_slot()), 1 + group);
          continue;
        }
        mine.later_parts([&](int slot) { add_part(acc, part(slot), flag(slot), 1 + group); });
      }
      if constexpr (RAW) {
        store_raw(acc, raw + (long long)mine.split * rows * cols, more, mine.row + first_row, mine.col, rows, cols);
      } else {
        store.tile(acc, out, more, scale, mine.row + first_row, mine.col, rows, cols);
      }
    }
    if (!RAW && store.leader) bulk_wait_read<0>();
  }
  if (CLUSTER_SIZE > 1) cluster_sync();  // nobody leaves while another may write to it or arrive at its barriers
}
