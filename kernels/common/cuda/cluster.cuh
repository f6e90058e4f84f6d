// Blocks of one cluster talk through each other's shared memory: compute capability 9.0 and newer, NVRTC only.
// The host emulation runs one block at a time and has no word for it: what uses this is compiled, not emulated.
#pragma once
#include "rooftune.cuh"

namespace rt {

// All threads of all blocks of the cluster; what was written before is seen after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// To the place of `p` in the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void cluster_store(float* p, unsigned rank, float x) {
  asm volatile("{\n\t.reg .u32 place;\n\tmapa.shared::cluster.u32 place, %0, %1;\n\t"
               "st.shared::cluster.f32 [place], %2;\n\t}" ::"r"(shared_address(p)), "r"(rank), "f"(x) : "memory");
}

}  // namespace rt
