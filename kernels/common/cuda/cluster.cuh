// Blocks of one cluster talk through each other's shared memory: compute capability 9.0 and newer, or the emulation.
#pragma once
#include "rooftune.cuh"

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
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
#else
// On fibers, as late as the hardware may be: from the store to the next cluster barrier of its thread (complete:
// when all threads have come to it) the place is poison, so a missing barrier shows on either side of it in every
// order of threads. A block may be written from the cluster's first barrier until it returns. Not modelled: a cluster
// barrier does not wait for threads that have returned; here it does, and says so as a deadlock.
namespace rt {
namespace host {
inline float* place_in(unsigned rank, unsigned at) {
  return reinterpret_cast<float*>(reached(rank).shared + at);
}
}  // namespace host

inline void cluster_barrier() {
  host::collective("barrier.cluster", 0xffffffffu, nullptr, [](void**) {});  // .aligned: whole warps
  host::cluster_meet();
}
inline void cluster_store(float* p, unsigned rank, float x) {
  const unsigned at = host::offset_of(p);
  if (at % sizeof(float)) host::fail("thread %u stores 4 bytes to another block at %u", threadIdx.x, at);
  std::memset(host::place_in(rank, at), host::POISON, sizeof(float));
  host::fiber().remote.push_back([=] { std::memcpy(host::place_in(rank, at), &x, sizeof x); });
}

}  // namespace rt
#endif
