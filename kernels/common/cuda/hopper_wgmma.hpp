// wgmma on a CPU: what hopper_wgmma.cuh says in PTX. A warp multiplies its 16 rows; it does not wait for the other
// three, so a tile that is given back while one of them still reads shows.
#pragma once

namespace rt {
namespace host {

inline TensorWarp& tensor_warp() { return hardware(block()).warps[fiber().index / WARP]; }

// Where a descriptor finds an element: PTX ISA, "Canonical layouts", 128-byte swizzle.
struct Matrix {
  unsigned address, leading, stride;
  bool mn_major;
  Matrix(uint64_t d, bool mn_major) : mn_major(mn_major) {
    address = (d & 0x3FFF) << 4, leading = (d >> 16 & 0x3FFF) << 4, stride = (d >> 32 & 0x3FFF) << 4;
    if (d >> 62 != 1) fail("a descriptor with swizzle %u: only that of 128 bytes is modelled", unsigned(d >> 62));
    if (address & 0x380 || d >> 49 & 7) fail("a descriptor at %u: not the first line of its pattern", address);
    if (stride % 1024 || (mn_major && leading % 1024))
      fail("a descriptor whose groups lie %u and %u apart", leading, stride);
  }
  unsigned at(unsigned mn, unsigned k, unsigned size) const {
    const unsigned linear = mn_major ? address + mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                     : address + mn / 8 * stride + mn % 8 * 128 + k * size;
    if (linear >= SHARED_BYTES) fail("a descriptor reaches byte %u of shared memory", linear);
    return swizzled(linear, 128);
  }
};

template <int F> using Element = typename Format<F>::In;
template <int F, class Acc> Acc number(const char* p) {
  Element<F> x;
  std::memcpy(&x, p, sizeof x);
  if constexpr (F == INT8) return x;
  else if constexpr (F == TF32) return rooftune_bits<float>(rooftune_bits<uint32_t>(x) & 0xFFFFE000u);
  else return to_float(x);
}

struct Operands { void* d; const unsigned* a; uint64_t left, right; int add; };

// d[16, N] of a warp += a b, from shared memory or (left) registers; `values` is [32 lanes][N / 2].
template <int F, int N, int TRANS_A, int TRANS_B, class Acc>
void multiply_rows(Acc* values, const std::array<const unsigned*, WARP>& a, uint64_t left, uint64_t right, bool add,
                   const char* shared, unsigned first_row) {
  constexpr unsigned SIZE = sizeof(Element<F>), K = 32 / SIZE;
  static_assert(K <= 32, "k of one product");
  Acc rows[16][K], cols[K][N];
  for (unsigned r = 0; r < 16; r++)
    for (unsigned k = 0; k < K; k++) {
      if (a[0]) {  // as for mma: lane 4g + t, pairs (row g, k 2t), (g + 8, 2t), (g, 8 + 2t), (g + 8, 8 + 2t)
        const unsigned word = a[r % 8 * 4 + k % 8 / 2][r / 8 + k / 8 * 2] >> 16 * (k % 2);
        rows[r][k] = number<F, Acc>(reinterpret_cast<const char*>(&word));
      } else {
        rows[r][k] = number<F, Acc>(shared + Matrix(left, TRANS_A).at(first_row + r, k, SIZE));
      }
    }
  const Matrix b(right, TRANS_B);
  for (unsigned n = 0; n < N; n++)
    for (unsigned k = 0; k < K; k++) cols[k][n] = number<F, Acc>(shared + b.at(n, k, SIZE));
  for (unsigned r = 0; r < 16; r++) {
    Acc sum[N] = {};
    for (unsigned k = 0; k < K; k++)
      for (unsigned n = 0; n < N; n++) sum[n] += rows[r][k] * cols[k][n];
    for (unsigned n = 0; n < N; n++) {
      Acc& d = values[(r % 8 * 4 + n % 8 / 2) * (N / 2) + n / 8 * 4 + r / 8 * 2 + n % 2];
      d = add ? d + sum[n] : sum[n];
    }
  }
}

// Run what was issued so far, in order; registers still change at the wait only.
inline void catch_up(TensorWarp& warp) {
  const auto run = [](std::vector<Issued>& products) {
    for (Issued& product : products)
      if (product.run) std::exchange(product.run, nullptr)();
  };
  for (auto& group : warp.groups) run(group);
  run(warp.issued);
}

template <int F, int N, int TRANS_A, int TRANS_B, class Acc> void issue(Operands mine) {
  if (!tensor_warp().fenced) fail("thread %u: wgmma without wgmma.fence after its registers were free", fiber().index);
  collective("wgmma", 0xffffffffu, &mine, [](void** slots) {
    TensorWarp& warp = tensor_warp();
    const Operands first = *static_cast<Operands*>(slots[0]);
    std::array<const unsigned*, WARP> a;
    for (unsigned lane = 0; lane < WARP; lane++) {
      const Operands& o = *static_cast<Operands*>(slots[lane]);
      if (o.left != first.left || o.right != first.right || o.add != first.add) fail("wgmma: lanes of a warp disagree");
      a[lane] = o.a;
    }
    constexpr size_t BYTES = N / 2 * sizeof(Acc);
    Shadow& shadow = warp.shadows[first.d];
    if (shadow.lanes.empty()) {
      shadow.bytes = BYTES, shadow.products = 0;
      shadow.values.resize(WARP * BYTES);
      for (unsigned lane = 0; lane < WARP; lane++) {
        void* d = static_cast<Operands*>(slots[lane])->d;
        shadow.lanes.push_back(d);
        std::memcpy(shadow.values.data() + lane * BYTES, d, BYTES);
        std::memset(d, POISON, BYTES);
      }
    }
    if (shadow.bytes != BYTES) fail("wgmma: another shape on registers that a product under way will write");
    shadow.products++;
    Acc* values = reinterpret_cast<Acc*>(shadow.values.data());
    const unsigned row = fiber().index / WARP % 4 * 16;
    const char* shared = block().shared;
    auto run = [=] {
      multiply_rows<F, N, TRANS_A, TRANS_B>(values, a, first.left, first.right, first.add != 0, shared, row);
    };
    warp.issued.push_back({first.d, run});
    if (!late()) catch_up(warp);
  });
}

inline void complete(TensorWarp& warp, const Issued& product) {
  if (product.run) product.run();
  Shadow& shadow = warp.shadows[product.key];
  if (--shadow.products) return;
  for (unsigned lane = 0; lane < WARP; lane++)
    std::memcpy(shadow.lanes[lane], shadow.values.data() + lane * shadow.bytes, shadow.bytes);
  warp.shadows.erase(product.key);
}

}  // namespace host

template <class... D> void wgmma_fence(D&...) {
  host::collective("wgmma.fence", 0xffffffffu, nullptr, [](void**) { host::tensor_warp().fenced = true; });
}
inline void wgmma_commit() {
  host::collective("wgmma.commit_group", 0xffffffffu, nullptr, [](void**) {
    host::TensorWarp& warp = host::tensor_warp();
    warp.groups.push_back(std::exchange(warp.issued, {}));
  });
}
template <int PENDING, class... D> void wgmma_wait(D&...) {
  host::collective("wgmma.wait_group", 0xffffffffu, nullptr, [](void**) {
    host::TensorWarp& warp = host::tensor_warp();
    while (warp.groups.size() > PENDING) {
      for (const host::Issued& product : warp.groups.front()) host::complete(warp, product);
      warp.groups.erase(warp.groups.begin());
    }
    warp.fenced = false;
  });
}

template <int F, int N, int TRANS_A, int TRANS_B, class Acc> void wgmma(Acc* d, uint64_t a, uint64_t b, int add) {
  host::issue<F, N, TRANS_A, TRANS_B, Acc>({d, nullptr, a, b, add});
}
template <int F, int N, int TRANS_B> void wgmma(float* d, const unsigned (&a)[4], uint64_t b, int add) {
  host::issue<F, N, 0, TRANS_B, float>({d, a, 0, b, add});
}

}  // namespace rt
