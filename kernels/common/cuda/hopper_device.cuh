// The wrappers of hopper.cuh on the device: PTX ISA 8.0 for sm_90a. One instruction each, and what it relies on.
#pragma once

namespace rt {

struct alignas(64) TensorMap { char opaque[128]; };  // made by the driver (cuTensorMapEncodeTiled)

// ---- barriers: "mbarrier" ----
__device__ __forceinline__ void barrier_init(Barrier* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
// Initialised barriers become visible to the cluster and to asynchronous copies (then: a cluster or block barrier).
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrive, and announce bytes that copies will land in this phase.
__device__ __forceinline__ void barrier_expect(Barrier* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// At the barrier of the same place in another block of the cluster, to give back what this thread has read. Not with
// .release.cluster: nothing was written, and that is a MEMBAR.GPU before each arrival, which took as long as the
// products of a stage (GEMM in clusters of 2: 0.75 of the speed without, on an H200).
__device__ __forceinline__ void barrier_arrive_at(Barrier* barrier, unsigned rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(shared_address(barrier)),
      "r"(rank) : "memory");
}
// try_wait may come back before the phase has ended: it is a loop. Labels in braces are local.
__device__ __forceinline__ void barrier_wait(Barrier* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
}

// ---- clusters ----
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster; without .aligned, so that the lanes of a warp may come apart.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// ---- barriers of some warps of a block; number 0 is __syncthreads ----
__device__ __forceinline__ void named_sync(int number, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- tensor copies: "cp.async.bulk.tensor", always with three coordinates, the inner one first ----
// What lies outside the tensor arrives as zeros and counts as landed bytes; stores leave it out.
__device__ __forceinline__ void tma_load(char* to, const TensorMap& map, Barrier* full, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(full)), "r"(x), "r"(y), "r"(z) : "memory");
}
// To the same place, and the barrier at the same place, of each block whose bit is set.
__device__ __forceinline__ void tma_load_multicast(char* to, const TensorMap& map, Barrier* full, int x, int y, int z,
                                                   unsigned short mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(to)), "l"(&map), "r"(shared_address(full)), "r"(x),
      "r"(y), "r"(z), "h"(mask) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap& map, const char* from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(shared_address(from)), "r"(x), "r"(y), "r"(z) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but `PENDING` of this thread's newest groups have read their shared memory.
template <int PENDING> __device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// This thread's ordinary writes to shared memory become visible to tensor copies ("async proxy").
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- four 8x8 matrices of 16-bit elements to shared memory, the inverse of ldmatrix ----
__device__ __forceinline__ void store_matrices(char* row, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(char* row, const unsigned (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
}

// ---- between blocks of a grid, through memory ----
// What this thread wrote, and those that met it at a barrier since, is seen by whoever has awaited the flag.
__device__ __forceinline__ void raise_flag(unsigned* flag) {
  asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
// By one thread of the grid, which takes it down again.
__device__ __forceinline__ void await_flag(unsigned* flag) {
  unsigned up;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(up) : "l"(flag) : "memory");
  } while (!up);
  asm volatile("st.relaxed.gpu.global.u32 [%0], 0;" ::"l"(flag) : "memory");
}
// 16 bytes that another block wrote during this launch: past L1, which may hold what was there before.
template <class T, int N> __device__ __forceinline__ Vec<T, N> load_written(const T* p) {
  static_assert(sizeof(T) * N == 16, "one load");
  union { unsigned word[4]; Vec<T, N> value; } read;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(read.word[0]), "=r"(read.word[1]), "=r"(read.word[2]), "=r"(read.word[3]) : "l"(p) : "memory");
  return read.value;
}

// ---- registers between warpgroups: each warp of one must execute it; ptxas allocates by it (C7508 if it cannot) ----
template <int COUNT> __device__ __forceinline__ void fewer_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void more_registers() {
  static_assert(COUNT % 8 == 0 && COUNT >= 24 && COUNT <= 256, "multiples of 8 from 24 to 256");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// The swizzle works on address bits: all tiles rely on a start at a multiple of 1024.
__device__ __forceinline__ void require_alignment(const char* shared) {
  if (shared_address(shared) % 1024) __trap();
}

}  // namespace rt
