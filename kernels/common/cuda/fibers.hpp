// One fiber per CUDA thread: the scheduler under the host emulation.
//
// Clusters of blocks (usually of one) run one after another. A thread runs until it meets a barrier or a
// warp collective that others have not reached, then the next one runs; the order of threads is forward,
// reverse, or shuffled anew in every pass, so a result that depends on it (a missing barrier) shows as a
// difference. Between two passes an operation of the asynchronous hardware may take effect, as late or
// as soon as the order says. When nobody can go on, the process says where everybody stands and aborts.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(ROOFTUNE_UCONTEXT)
#define ROOFTUNE_ASSEMBLY 1   // ucontext makes a system call at every switch
#else
#include <ucontext.h>
#endif

namespace rt::host {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 128 << 10;  // accumulators and fragments of a thread take some KiB
constexpr size_t SHARED_BYTES = 232448;    // the most a block may have on compute capability 9.0
constexpr size_t FENCE_BYTES = 1024;       // behind the shared memory: a write there is an error
constexpr unsigned MAX_CLUSTER = 8;        // blocks; more is not portable
constexpr int POISON = 0xFF;               // every byte: NaN in each float format, -1 in integers

[[noreturn]] inline void fail(const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::fputs("rooftune emulation: ", stderr);
  std::vfprintf(stderr, format, args);
  std::fputc('\n', stderr);
  va_end(args);
  std::abort();
}

// ---- switching stacks ----
#if defined(ROOFTUNE_ASSEMBLY)
struct Context { void* stack_pointer = nullptr; };
// Save the callee-saved registers and the stack of `from`, continue on that of `to` (System V ABI).
extern "C" void rooftune_switch(Context* from, Context* to);
asm(R"(
.text
.weak rooftune_switch
.type rooftune_switch, @function
rooftune_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rooftune_switch, .-rooftune_switch
)");
inline void switch_to(Context& from, Context& to) { rooftune_switch(&from, &to); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  // entry's return address (never used) sits where the ABI wants it: 8 below a multiple of 16
  void** top = reinterpret_cast<void**>(stack + STACK_BYTES - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  context.stack_pointer = top;
}
#else
struct Context { ucontext_t state; };
inline void switch_to(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
inline void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = STACK_BYTES;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}
#endif

enum class State : unsigned char { ready, at_block_barrier, at_warp_collective, waiting, done };
enum class Order : int { forward, reverse, random };

struct Copy { char* target; const char* source; int bytes; };  // no source: zeros

struct Block;
struct Range { const char* from; size_t bytes; };

struct Fiber {
  Context context;
  Block* block = nullptr;
  std::unique_ptr<char[]> stack;
  unsigned index = 0;
  State state = State::ready;
  const char* at = "";          // the warp collective, or what else this thread waits for
  unsigned mask = 0;            // the lanes it expects there
  void* slot = nullptr;         // what it brings, on its own stack
  std::vector<std::vector<Copy>> groups;  // asynchronous copies under way, oldest first
  std::vector<Copy> issued;               // not yet committed
  std::vector<Range> unfenced;            // shared memory it wrote that the asynchronous hardware may not see yet
  std::vector<std::function<void()>> remote;  // its stores to shared memory of the cluster, until a barrier of it
};

// A barrier that threads reach one by one: who waits at it, and how many came without waiting.
struct Meeting { std::vector<Fiber*> waiting; unsigned arrived = 0; };
struct Hardware;  // what of the asynchronous hardware belongs to a block (hopper_host.hpp)

struct Block {
  std::vector<Fiber> fibers;
  std::vector<unsigned> waiting;  // per warp: lanes that have arrived at a collective
  unsigned threads = 0, live = 0, at_barrier = 0, index = 0, grid = 0, rank = 0;
  std::map<unsigned, Meeting> named;  // barriers by number
  std::shared_ptr<Hardware> hardware;
  alignas(1024) char shared[SHARED_BYTES + FENCE_BYTES];
};

// The cluster that runs.
struct Pool {
  std::vector<std::unique_ptr<Block>> blocks;
  Fiber* current = nullptr;
  Context scheduler;
  std::function<void()> body;
  Meeting meeting;                            // of all the cluster's threads
  bool met = false;                           // once: only then each block knows that the others have begun
  std::vector<std::function<void()>> arrived;  // stores that take effect when that meeting is complete
  std::vector<std::function<void()>> flight;  // asynchronous operations: each takes effect when called
  long reading = 0;                           // tensor stores that may still read their shared memory
  Order order = Order::forward;
  uint32_t seed = 1;
  uint32_t random() { return (seed = seed * 1664525u + 1013904223u) >> 8; }  // as in Numerical Recipes
};
static Pool the_pool;  // not inline: g++ would make it one for all libraries of a process, whatever their layout
inline Pool& pool() { return the_pool; }
inline Fiber& fiber() { return *the_pool.current; }
inline Block& block() { return *the_pool.current->block; }

// Let others run; comes back when somebody has made this thread ready.
inline void suspend(State state) {
  Fiber& me = fiber();
  me.state = state;
  switch_to(me.context, pool().scheduler);
}
inline void wait_for(const char* what) {
  fiber().at = what;
  suspend(State::waiting);
}

// Come to a meeting of `expected` threads; the last one wakes those that wait.
inline void meet(Meeting& m, unsigned expected, const char* name, bool stay) {
  if (++m.arrived > expected) fail("%u threads came to %s, which is for %u", m.arrived, name, expected);
  if (m.arrived == expected) {
    m.arrived = 0;
    for (Fiber* f : std::exchange(m.waiting, {})) f->state = State::ready;
  } else if (stay) {
    m.waiting.push_back(&fiber());
    wait_for(name);
  }
}

// All threads of the cluster, and all stores between its blocks (barrier.cluster with release and acquire).
inline void cluster_meet() {
  Pool& p = pool();
  const unsigned all = block().threads * static_cast<unsigned>(p.blocks.size());
  for (auto& store : std::exchange(fiber().remote, {})) p.arrived.push_back(std::move(store));
  if (p.meeting.arrived + 1 == all) {
    for (auto& store : std::exchange(p.arrived, {})) store();
    p.met = true;
  }
  meet(p.meeting, all, "barrier.cluster", true);
}
// Block `rank` of the cluster, whose shared memory a thread is about to write, or to arrive at a barrier in.
inline Block& reached(unsigned rank) {
  Pool& p = pool();
  const unsigned by = fiber().index;
  if (rank >= p.blocks.size()) fail("thread %u: rank %u of a cluster of %zu", by, rank, p.blocks.size());
  Block& b = *p.blocks[rank];
  if (&b != &block() && !p.met) fail("thread %u reaches block %u, which may not have begun", by, b.index);
  if (!b.live) fail("thread %u reaches block %u, which has returned", by, b.index);
  return b;
}

// Where in this block's shared memory.
inline unsigned offset_of(const void* p) {
  const char *at = static_cast<const char*>(p), *start = block().shared;
  if (at < start || at >= start + SHARED_BYTES) fail("thread %u: an address outside shared memory", fiber().index);
  return static_cast<unsigned>(at - start);
}

inline void release_barrier_if_complete() {
  Block& b = block();
  if (b.at_barrier == 0 || b.at_barrier < b.live) return;
  b.at_barrier = 0;
  for (Fiber& f : b.fibers)
    if (f.state == State::at_block_barrier) f.state = State::ready;
}

// Every thread that has not returned must come here (as on compute capability 7.0 and newer).
inline void block_barrier() {
  Block& b = block();
  if (++b.at_barrier < b.live) return suspend(State::at_block_barrier);
  fiber().state = State::ready;
  release_barrier_if_complete();
}

// All lanes of `mask` meet; the last to come runs `combine(slots)`, with the slots of all 32 lanes (null
// outside the mask), and each goes on with what combine left in its own slot.
template <class Combine> void collective(const char* name, unsigned mask, void* slot, Combine combine) {
  Block& b = block();
  Fiber& me = fiber();
  const unsigned lane = me.index % WARP, first = me.index - lane;
  unsigned& waiting = b.waiting[me.index / WARP];
  if (!(mask >> lane & 1)) fail("thread %u calls %s with mask %08x, which leaves it out", me.index, name, mask);
  me.at = name;
  me.mask = mask;
  me.slot = slot;
  waiting |= 1u << lane;
  if ((waiting & mask) != mask) return suspend(State::at_warp_collective);
  void* slots[WARP] = {};
  for (unsigned i = 0; i < WARP; i++) {
    if (!(mask >> i & 1)) continue;
    Fiber& other = b.fibers[first + i];
    if (other.mask != mask || std::strcmp(other.at, name) != 0)
      fail("thread %u is at %s (mask %08x) while thread %u of its warp is at %s (mask %08x)", me.index, name, mask,
           other.index, other.at, other.mask);
    slots[i] = other.slot;
  }
  combine(slots);
  waiting &= ~mask;
  for (unsigned i = 0; i < WARP; i++)
    if (mask >> i & 1) b.fibers[first + i].state = State::ready;
}

[[noreturn]] inline void report_deadlock() {
  for (auto& b : pool().blocks) {
    if (!b->live) continue;
    std::string where;
    unsigned listed = 0, apart = 0;
    for (Fiber& f : b->fibers) {
      if (f.state == State::waiting) apart++;
      const bool named = f.state == State::at_warp_collective || f.state == State::waiting;
      if (named && (listed < 4 || f.index % 128 == 0) && listed++ < 8)
        where += "; thread " + std::to_string(f.index) + " at " + f.at;
    }
    fail("deadlock in block %u: of %u threads %u have returned, %u wait at __syncthreads, %u in a warp collective, "
         "%u elsewhere%s", b->index, b->threads, b->threads - b->live, b->at_barrier,
         b->live - b->at_barrier - apart, apart, where.c_str());
  }
  std::abort();
}

inline void fiber_main() {
  Block& b = block();
  pool().body();
  if (!fiber().remote.empty())
    fail("thread %u returns before a cluster barrier after its stores to other blocks", fiber().index);
  b.live--;
  fiber().state = State::done;
  release_barrier_if_complete();
  switch_to(fiber().context, pool().scheduler);
  std::abort();  // a finished thread is never resumed
}

// Let one asynchronous operation take effect: the oldest, the newest, or any one, as the order says.
inline bool land_one() {
  auto& flight = pool().flight;
  if (flight.empty()) return false;
  const size_t last = flight.size() - 1;
  const size_t i = pool().order == Order::forward ? 0 : pool().order == Order::reverse ? last
                   : pool().random() % flight.size();
  auto operation = std::move(flight[i]);
  flight.erase(flight.begin() + i);
  operation();
  return true;
}

inline void run_cluster() {
  Pool& p = pool();
  std::vector<Fiber*> turn;
  for (auto& b : p.blocks) {
    b->live = b->threads;
    b->at_barrier = 0;
    b->waiting.assign(b->threads / WARP, 0);
    b->named.clear();
    b->hardware.reset();
    for (Fiber& f : b->fibers) {
      f.state = State::ready;
      f.groups.clear();
      f.issued.clear();
      f.unfenced.clear();
      f.remote.clear();
      prepare(f.context, f.stack.get(), fiber_main);
      turn.push_back(&f);
    }
  }
  p.meeting = {};
  p.met = false;
  p.arrived.clear();
  if (p.order == Order::reverse) std::reverse(turn.begin(), turn.end());
  const auto alive = [&] { return std::any_of(p.blocks.begin(), p.blocks.end(), [](auto& b) { return b->live > 0; }); };
  while (alive()) {
    if (p.order == Order::random)
      for (size_t i = turn.size() - 1; i; i--) std::swap(turn[i], turn[p.random() % (i + 1)]);
    bool progress = false;
    for (Fiber* f : turn) {
      if (f->state != State::ready) continue;
      progress = true;
      p.current = f;
      switch_to(p.scheduler, f->context);
    }
    // Forward: as late as can be, when nobody else can go on. Reverse: soon. Random: either.
    if (!progress || p.order == Order::reverse || (p.order == Order::random && p.random() % 2)) progress |= land_one();
    if (!progress && alive()) report_deadlock();
  }
  if (!p.flight.empty()) fail("block %u returned with %zu asynchronous operations under way", p.blocks[0]->index,
                              p.flight.size());
  if (p.reading) fail("block %u returned while %ld tensor stores may still read its shared memory", p.blocks[0]->index,
                      p.reading);
}

// Run a grid: shared memory holds POISON when a block starts, and its fence is looked at when it ends.
inline void launch(unsigned grid, unsigned threads, unsigned cluster, size_t shared, Order order, uint32_t seed,
                   std::function<void()> body) {
  Pool& p = pool();
  if (threads == 0 || threads > 1024 || threads % WARP) fail("a block of %u threads: 32 to 1024, whole warps", threads);
  if (shared > SHARED_BYTES) fail("%zu bytes of shared memory: a block may have %zu", shared, SHARED_BYTES);
  if (cluster == 0 || cluster > MAX_CLUSTER || grid % cluster) fail("%u blocks in clusters of %u", grid, cluster);
  while (p.blocks.size() < cluster) p.blocks.push_back(std::make_unique<Block>());
  p.order = order;
  p.seed = seed;
  p.body = std::move(body);
  for (unsigned rank = 0; rank < cluster; rank++) {
    Block& b = *p.blocks[rank];
    b.fibers.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
      b.fibers[i].index = i;
      b.fibers[i].block = &b;
      if (!b.fibers[i].stack) b.fibers[i].stack.reset(new char[STACK_BYTES]);
    }
    b.threads = threads;
    b.grid = grid;
    b.rank = rank;
  }
  for (unsigned first = 0; first < grid; first += cluster) {
    for (auto& b : p.blocks) {
      b->index = first + b->rank;
      std::memset(b->shared, POISON, shared + FENCE_BYTES);
    }
    run_cluster();
    for (auto& b : p.blocks)
      for (size_t i = shared; i < shared + FENCE_BYTES; i++)
        if (static_cast<unsigned char>(b->shared[i]) != POISON)
          fail("block %u wrote %zu bytes behind its %zu bytes of shared memory", b->index, i - shared + 1, shared);
  }
  p.blocks.clear();
}

}  // namespace rt::host
