// to[cols, rows] = from[rows, cols], SIZE bytes an element (1 or 4): those wgmma reads along k only.
//
// A block takes a tile of 64 x 64 through shared memory, in lines a little longer, so that a column lies in many
// banks. A thread moves 4 bytes at a time. Grid: one block a tile, along the columns first. rows, cols: multiples of 4
// bytes. Macro: SIZE.
#include "rooftune.cuh"

using namespace rt;

constexpr int TILE = 64, VEC = 4 / SIZE, PITCH = TILE + (SIZE == 1 ? 4 : 1);  // elements
constexpr int ACROSS = TILE / VEC, DOWN = 256 / ACROSS;  // threads

extern "C" __global__ void __launch_bounds__(256)
    transpose_kernel(char* __restrict__ to, const char* __restrict__ from, int rows, int cols) {
  SHARED_MEMORY(shared);
  const int across = (cols + TILE - 1) / TILE;
  const int row0 = blockIdx.x / across * TILE, col0 = blockIdx.x % across * TILE;
  const int x = threadIdx.x % ACROSS * VEC, y = threadIdx.x / ACROSS;
#pragma unroll
  for (int i = 0; i < TILE; i += DOWN)
    if (row0 + y + i < rows && col0 + x < cols)
      store<char, 4>(shared + ((y + i) * PITCH + x) * SIZE,
                     load<char, 4>(from + ((long long)(row0 + y + i) * cols + col0 + x) * SIZE));
  __syncthreads();
#pragma unroll
  for (int i = 0; i < TILE; i += DOWN) {  // now x counts rows, y columns
    if (col0 + y + i >= cols || row0 + x >= rows) continue;
    Vec<char, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j++) four.v[j] = shared[((x + j / SIZE) * PITCH + y + i) * SIZE + j % SIZE];
    store<char, 4>(to + ((long long)(col0 + y + i) * rows + row0 + x) * SIZE, four);
  }
}
