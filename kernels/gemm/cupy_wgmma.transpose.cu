// to[cols, rows] = from[rows, cols], one byte an element: wgmma reads int8 along k only.
//
// A block takes a tile of 64 x 64 through shared memory, in lines of 68 bytes, so that a column lies in many
// banks. Grid: one block a tile, along the columns first. rows, cols: multiples of 4.
#include "rooftune.cuh"

using namespace rt;

constexpr int TILE = 64, PITCH = 68;

extern "C" __global__ void __launch_bounds__(256)
    transpose_kernel(char* __restrict__ to, const char* __restrict__ from, int rows, int cols) {
  SHARED_MEMORY(tile);
  const int across = (cols + TILE - 1) / TILE;
  const int row0 = blockIdx.x / across * TILE, col0 = blockIdx.x % across * TILE;
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < TILE; i += 16)
    if (row0 + y + i < rows && col0 + x < cols)
      store<char, 4>(tile + (y + i) * PITCH + x, load<char, 4>(from + (long long)(row0 + y + i) * cols + col0 + x));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < TILE; i += 16) {  // now x counts rows, y columns
    if (col0 + y + i >= cols || row0 + x >= rows) continue;
    Vec<char, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j++) four.v[j] = tile[(x + j) * PITCH + y + i];
    store<char, 4>(to + (long long)(col0 + y + i) * rows + row0 + x, four);
  }
}
