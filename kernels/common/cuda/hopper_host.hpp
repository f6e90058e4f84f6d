// The wrappers of hopper.cuh on a CPU, on the fibers of fibers.hpp, after the PTX ISA.
//
// Barriers count arrivals, announced and landed bytes, and phases. Tensor copies move boxes between memory
// and swizzled shared memory; wgmma follows its descriptors through that memory, warp by warp. Both are as
// late, or as early, as the hardware may be: the order of threads says which (forward: copies land when all
// threads wait, products read their operands at their wait; reverse: soon, at issue; random: either), so a
// missing wait and a buffer given back too early show.
// Not modelled: registers between warpgroups, that the four warps of a warpgroup issue the same product, memory
// order between blocks (of a cluster or, by flags, of a grid), products from shared memory that ordinary
// instructions wrote, and the tensor cores' rounding inside a sum (in fp8 they keep fewer bits than fp32).
#pragma once

namespace rt {

// What cupy_tensormap.py packs for the emulation in place of the driver's 128 bytes.
struct TensorMap {
  uint64_t magic, address, sizes[3], strides[2];  // elements, inner first; bytes between lines, between batches
  uint32_t box[3], element_bytes, swizzle_bytes, to_tf32, unused[12];
};
static_assert(sizeof(TensorMap) == 128, "as the driver's");

namespace host {

constexpr uint64_t MAP_MAGIC = 0x70616d726f736e74ull, BARRIER_MAGIC = 0xba221e12ba221e12ull;

struct Phases { unsigned count; long pending, bytes; unsigned phase; std::vector<Fiber*> waiting; };

// Accumulators of a warp that products under way will write: the registers hold poison meanwhile.
struct Shadow { std::vector<char> values; std::vector<void*> lanes; size_t bytes; unsigned products; };
struct Issued { void* key; std::function<void()> run; };
struct TensorWarp {
  std::map<void*, Shadow> shadows;  // by the address of lane 0's registers
  std::vector<Issued> issued;
  std::vector<std::vector<Issued>> groups;
  bool fenced = false;
};
struct Stores { std::vector<std::function<void()>> issued; std::vector<std::vector<std::function<void()>>> groups; };

struct Hardware {
  std::map<unsigned, Phases> barriers;  // by offset in shared memory
  std::vector<TensorWarp> warps;
  std::map<unsigned, Stores> stores;  // by thread
};
inline Hardware& hardware(Block& b) {
  if (!b.hardware) b.hardware = std::make_shared<Hardware>(), b.hardware->warps.resize(b.threads / WARP);
  return *b.hardware;
}
inline bool late() { return pool().order == Order::forward || (pool().order == Order::random && pool().random() % 2); }

// ---- barriers ----
inline Phases& phases(Block& b, unsigned offset, const char* what) {
  auto found = hardware(b).barriers.find(offset);
  if (found == hardware(b).barriers.end())
    fail("thread %u: %s at %u, where no barrier was initialised", fiber().index, what, offset);
  uint64_t word;
  std::memcpy(&word, b.shared + offset, 8);
  if (word != BARRIER_MAGIC) fail("block %u: the barrier at %u was overwritten", b.index, offset);
  return found->second;
}
inline void settle(Phases& p) {
  if (p.pending < 0) fail("thread %u: more than %u arrivals in a phase of a barrier", fiber().index, p.count);
  if (p.pending > 0 || p.bytes != 0) return;
  p.phase++;
  p.pending = p.count;
  for (Fiber* f : std::exchange(p.waiting, {})) f->state = State::ready;
}
inline void arrive(Block& b, unsigned offset, long bytes, const char* what) {
  if (!b.live) fail("thread %u: %s of block %u, which has returned", fiber().index, what, b.index);
  Phases& p = phases(b, offset, what);
  p.bytes += bytes;
  p.pending--;
  settle(p);
}

}  // namespace host

inline unsigned shared_address(const void* p) { return host::offset_of(p); }
inline void require_alignment(const char*) {}

inline void barrier_init(Barrier* barrier, unsigned count) {
  const unsigned at = host::offset_of(barrier);
  if (at % 8 || count == 0 || count >= 1u << 20) host::fail("a barrier at %u for %u arrivals", at, count);
  if (host::hardware(host::block()).barriers.count(at)) host::fail("the barrier at %u is initialised twice", at);
  std::memcpy(barrier, &host::BARRIER_MAGIC, 8);
  host::hardware(host::block()).barriers[at] = {count, count, 0, 0, {}};
}
inline void barrier_init_fence() {}
inline void barrier_expect(Barrier* barrier, unsigned bytes) {
  host::arrive(host::block(), host::offset_of(barrier), bytes, "expect_tx");
}
inline void barrier_arrive(Barrier* barrier) { host::arrive(host::block(), host::offset_of(barrier), 0, "arrive"); }
inline void barrier_arrive_at(Barrier* barrier, unsigned rank) {
  host::arrive(host::reached(rank), host::offset_of(barrier), 0, "arrive");
}
inline void barrier_wait(Barrier* barrier, unsigned parity) {
  if (parity > 1) host::fail("thread %u waits for parity %u", host::fiber().index, parity);
  host::Phases& p = host::phases(host::block(), host::offset_of(barrier), "wait");
  while ((p.phase & 1) == parity) {  // again after waking: another phase may have passed meanwhile
    p.waiting.push_back(&host::fiber());
    host::wait_for("mbarrier.try_wait");
  }
}

inline unsigned cluster_rank() { return host::block().rank; }
inline void cluster_sync() { host::cluster_meet(); }
inline void named_meet(int number, int threads, bool stay) {
  if (number < 1 || number > 15 || threads % host::WARP) host::fail("named barrier %d for %d threads", number, threads);
  host::meet(host::block().named[number], threads, "a named barrier", stay);
}
inline void named_sync(int number, int threads) { named_meet(number, threads, true); }
inline void named_arrive(int number, int threads) { named_meet(number, threads, false); }

template <int COUNT> void fewer_registers() { host::collective("setmaxnreg", 0xffffffffu, nullptr, [](void**) {}); }
template <int COUNT> void more_registers() { host::collective("setmaxnreg", 0xffffffffu, nullptr, [](void**) {}); }

// ---- tensor copies ----
namespace host {

inline unsigned swizzled(unsigned address, unsigned width) { return address ^ (address >> 7 & (width / 16 - 1)) << 4; }

// use(offset in shared memory, address in memory or null outside the tensor) for each byte of a box
template <class Use> void each_byte(const TensorMap& map, const int (&at)[3], unsigned target, Use use) {
  const unsigned line = map.box[0] * map.element_bytes;
  for (unsigned z = 0; z < map.box[2]; z++)
    for (unsigned y = 0; y < map.box[1]; y++)
      for (unsigned byte = 0; byte < line; byte++) {
        const int64_t i = at[0] + int64_t(byte / map.element_bytes), j = at[1] + int64_t(y), k = at[2] + int64_t(z);
        const bool inside = i >= 0 && j >= 0 && k >= 0 && uint64_t(i) < map.sizes[0] && uint64_t(j) < map.sizes[1] &&
                            uint64_t(k) < map.sizes[2];
        char* memory = reinterpret_cast<char*>(map.address) + i * map.element_bytes + byte % map.element_bytes +
                       j * int64_t(map.strides[0]) + k * int64_t(map.strides[1]);
        use(swizzled(target + (z * map.box[1] + y) * line + byte, map.swizzle_bytes), inside ? memory : nullptr);
      }
}
// A byte on its way to shared memory: of an element that the copy rounds to tf32, ties to even, or as it is.
inline char loaded(const TensorMap& map, const char* memory) {
  if (!memory) return 0;
  if (!map.to_tf32) return *memory;
  const uintptr_t place = reinterpret_cast<uintptr_t>(memory);
  uint32_t u;
  std::memcpy(&u, reinterpret_cast<const char*>(place & ~uintptr_t(3)), 4);
  if ((u & 0x7F800000) != 0x7F800000) u = (u + 0xFFF + (u >> 13 & 1)) & 0xFFFFE000;
  return static_cast<char>(u >> 8 * (place & 3));
}
inline unsigned box_bytes(const TensorMap& map) { return map.box[0] * map.box[1] * map.box[2] * map.element_bytes; }

inline unsigned check_box(const TensorMap& map, const char* shared, const char* what) {
  const unsigned at = offset_of(shared);
  if (map.magic != MAP_MAGIC) fail("thread %u: %s with something that is no tensor map", fiber().index, what);
  if (at % 128) fail("thread %u: %s at %u, which is no multiple of 128", fiber().index, what, at);
  if (at + box_bytes(map) > SHARED_BYTES) fail("thread %u: %s beyond shared memory", fiber().index, what);
  return at;
}

inline void load_box(char* to, const TensorMap& map, Barrier* full, int x, int y, int z, unsigned mask) {
  const unsigned target = check_box(map, to, "a tensor load"), barrier = offset_of(full);
  for (auto& b : pool().blocks)
    if (mask >> b->rank & 1) std::memset(reached(b->rank).shared + target, POISON, box_bytes(map));
  const size_t cluster = pool().blocks.size();
  if (mask >> cluster) fail("thread %u: mask %x for a cluster of %zu", fiber().index, mask, cluster);
  const TensorMap copy = map;
  pool().flight.push_back([=] {
    for (auto& b : pool().blocks) {
      if (!(mask >> b->rank & 1)) continue;
      if (!b->live) fail("a tensor load lands in block %u, which has returned", b->index);
      each_byte(copy, {x, y, z}, target, [&](unsigned at, char* memory) { b->shared[at] = loaded(copy, memory); });
      Phases& p = phases(*b, barrier, "a tensor load");
      p.bytes -= box_bytes(copy);
      settle(p);
    }
  });
}
}  // namespace host

inline void tma_load(char* to, const TensorMap& map, Barrier* full, int x, int y, int z) {
  host::load_box(to, map, full, x, y, z, 1u << host::block().rank);
}
inline void tma_load_multicast(char* to, const TensorMap& map, Barrier* full, int x, int y, int z,
                               unsigned short mask) {
  host::load_box(to, map, full, x, y, z, mask);
}
inline void tma_store(const TensorMap& map, const char* from, int x, int y, int z) {
  const unsigned source = host::check_box(map, from, "a tensor store");
  for (host::Fiber& f : host::block().fibers)
    for (const host::Range& r : f.unfenced)
      if (r.from < from + host::box_bytes(map) && from < r.from + r.bytes)
        host::fail("thread %u stores what thread %u wrote without fence.proxy.async", host::fiber().index, f.index);
  const TensorMap copy = map;
  char* shared = host::block().shared;
  auto store = [=] {
    host::each_byte(copy, {x, y, z}, source, [&](unsigned at, char* memory) { if (memory) *memory = shared[at]; });
  };
  if (!host::late()) return store();
  host::hardware(host::block()).stores[host::fiber().index].issued.push_back(store);
  host::pool().reading++;
}
inline void bulk_commit() {
  host::Stores& s = host::hardware(host::block()).stores[host::fiber().index];
  s.groups.push_back(std::exchange(s.issued, {}));
}
template <int PENDING> void bulk_wait_read() {
  host::Stores& s = host::hardware(host::block()).stores[host::fiber().index];
  while (s.groups.size() > PENDING) {
    for (auto& store : s.groups.front()) store(), host::pool().reading--;
    s.groups.erase(s.groups.begin());
  }
}
inline void fence_async() { host::fiber().unfenced.clear(); }

// ---- between blocks of a grid: they run one after another here, so only an earlier one can have raised a flag ----
inline void raise_flag(unsigned* flag) {
  if (*flag) host::fail("block %u raises a flag that is up", host::block().index);
  *flag = 1;
}
inline void await_flag(unsigned* flag) {
  if (!*flag) host::fail("block %u awaits a flag that no block before it has raised", host::block().index);
  *flag = 0;
}
template <class T, int N> Vec<T, N> load_written(const T* p) { return load<T, N>(p); }

// ---- stmatrix ----
namespace host {
struct MatrixRows { char* row; const unsigned* registers; };
inline void store_matrices(const char* name, char* row, const unsigned* r, bool transposed) {
  if (offset_of(row) % 16) fail("thread %u: %s to a row not aligned to 16 bytes", fiber().index, name);
  fiber().unfenced.push_back({row, 16});
  MatrixRows mine{row, r};
  collective(name, 0xffffffffu, &mine, [transposed](void** slots) {
    for (unsigned matrix = 0; matrix < 4; matrix++)
      for (unsigned lane = 0; lane < WARP; lane++)
        for (unsigned half = 0; half < 2; half++) {
          const unsigned i = lane / 4, j = lane % 4 * 2 + half, to = transposed ? j : i, at = transposed ? i : j;
          const uint16_t value = static_cast<MatrixRows*>(slots[lane])->registers[matrix] >> 16 * half;
          std::memcpy(static_cast<MatrixRows*>(slots[8 * matrix + to])->row + 2 * at, &value, 2);
        }
  });
}
}  // namespace host
inline void store_matrices(char* row, const unsigned (&r)[4]) { host::store_matrices("stmatrix", row, r, false); }
inline void store_matrices_transposed(char* row, const unsigned (&r)[4]) {
  host::store_matrices("stmatrix.trans", row, r, true);
}

}  // namespace rt
#include "hopper_wgmma.hpp"
