// wgmma.mma_async: d[64, N] = a[64, k] b[k, N] + d by a warpgroup, k is 32 bytes of the format.
//
// d lies in registers: warp w of the group has rows 16w to 16w + 15; of its 16 x 8 parts j, lane 4g + t has
// d[4j], d[4j + 1] in row g, columns 2t, 2t + 1, and d[4j + 2], d[4j + 3] in row g + 8. b is in shared memory, a
// there too, or (16-bit) in registers laid out as for mma.m16n8k16. The instruction reads and writes after it was
// issued: wgmma_fence before it, wgmma_wait before its registers are touched or its tiles given back.
#pragma once

namespace rt {

__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(int& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void pin(unsigned& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class T, int COUNT> __device__ __forceinline__ void pin(T (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) pin(x[i]);
}

// Registers `d` were written by ordinary instructions, which the compiler must not move below this.
template <class... D> __device__ __forceinline__ void wgmma_fence(D&... d) {
  (pin(d), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most `PENDING` groups are under way. Name the registers that are read next: no read moves above this.
template <int PENDING, class... D> __device__ __forceinline__ void wgmma_wait(D&... d) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (pin(d), ...);
}

// Text and operands for 8 registers, then for 8 times 2, 4, 6, ... of them (N = 16, 32, ...).
#define RT_T0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define RT_T1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define RT_T2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define RT_T3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define RT_T4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define RT_T5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define RT_T6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define RT_T7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define RT_T8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define RT_T9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define RT_T10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define RT_T11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define RT_T12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define RT_T13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define RT_T14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define RT_T15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define RT_8f(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]),                                     \
  "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RT_8r(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]),                                     \
  "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define RT_TEXT16 RT_T0
#define RT_REGS16(C) RT_8##C(0)
#define RT_TEXT32 RT_TEXT16 ", " RT_T1
#define RT_REGS32(C) RT_REGS16(C), RT_8##C(8)
#define RT_TEXT48 RT_TEXT32 ", " RT_T2
#define RT_REGS48(C) RT_REGS32(C), RT_8##C(16)
#define RT_TEXT64 RT_TEXT48 ", " RT_T3
#define RT_REGS64(C) RT_REGS48(C), RT_8##C(24)
#define RT_TEXT80 RT_TEXT64 ", " RT_T4
#define RT_REGS80(C) RT_REGS64(C), RT_8##C(32)
#define RT_TEXT96 RT_TEXT80 ", " RT_T5
#define RT_REGS96(C) RT_REGS80(C), RT_8##C(40)
#define RT_TEXT112 RT_TEXT96 ", " RT_T6
#define RT_REGS112(C) RT_REGS96(C), RT_8##C(48)
#define RT_TEXT128 RT_TEXT112 ", " RT_T7
#define RT_REGS128(C) RT_REGS112(C), RT_8##C(56)
#define RT_TEXT144 RT_TEXT128 ", " RT_T8
#define RT_REGS144(C) RT_REGS128(C), RT_8##C(64)
#define RT_TEXT160 RT_TEXT144 ", " RT_T9
#define RT_REGS160(C) RT_REGS144(C), RT_8##C(72)
#define RT_TEXT176 RT_TEXT160 ", " RT_T10
#define RT_REGS176(C) RT_REGS160(C), RT_8##C(80)
#define RT_TEXT192 RT_TEXT176 ", " RT_T11
#define RT_REGS192(C) RT_REGS176(C), RT_8##C(88)
#define RT_TEXT208 RT_TEXT192 ", " RT_T12
#define RT_REGS208(C) RT_REGS192(C), RT_8##C(96)
#define RT_TEXT224 RT_TEXT208 ", " RT_T13
#define RT_REGS224(C) RT_REGS208(C), RT_8##C(104)
#define RT_TEXT240 RT_TEXT224 ", " RT_T14
#define RT_REGS240(C) RT_REGS224(C), RT_8##C(112)
#define RT_TEXT256 RT_TEXT240 ", " RT_T15
#define RT_REGS256(C) RT_REGS240(C), RT_8##C(120)

// SHAPE and types, registers, then the numbers of the operands after them. Predicate false: d is not added.
#define RT_WGMMA(N, C, TYPES, TAIL, A, B, P, ...)                                                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N TYPES " {" \
               RT_TEXT##N "}, %" #A ", %" #B ", p" TAIL ";\n}"                                                 \
               : RT_REGS##N(C) : "l"(a), "l"(b), "r"(add) __VA_ARGS__)
// Scales of a and b are 1; 16-bit formats may have either stored along m or n.
#define RT_SHARED(N, A, B, P, TA, TB)                                                                            \
  if constexpr (WIDTH == N) {                                                                                    \
    if constexpr (F == BF16) RT_WGMMA(N, f, "k16.f32.bf16.bf16", ", 1, 1, %" #TA ", %" #TB, A, B, P,             \
                                      RT_COMMA "n"(TRANS_A), "n"(TRANS_B));                                      \
    else if constexpr (F == FP16) RT_WGMMA(N, f, "k16.f32.f16.f16", ", 1, 1, %" #TA ", %" #TB, A, B, P,          \
                                           RT_COMMA "n"(TRANS_A), "n"(TRANS_B));                                 \
    else if constexpr (F == FP8) RT_WGMMA(N, f, "k32.f32.e4m3.e4m3", ", 1, 1", A, B, P, );                       \
    else if constexpr (F == TF32) RT_WGMMA(N, f, "k8.f32.tf32.tf32", ", 1, 1", A, B, P, );                       \
  }
#define RT_INTEGER(N, A, B, P, TA, TB)                                                                           \
  if constexpr (WIDTH == N) RT_WGMMA(N, r, "k32.s32.s8.s8", "", A, B, P, );
#define RT_COMMA ,

// From two descriptors (hopper.cuh). TRANS_A, TRANS_B: stored along m, n.
template <int F, int WIDTH, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma(float (&d)[WIDTH / 2], unsigned long long a, unsigned long long b, int add) {
  RT_SHARED(16, 8, 9, 10, 11, 12)
  RT_SHARED(32, 16, 17, 18, 19, 20)
  RT_SHARED(48, 24, 25, 26, 27, 28)
  RT_SHARED(64, 32, 33, 34, 35, 36)
  RT_SHARED(80, 40, 41, 42, 43, 44)
  RT_SHARED(96, 48, 49, 50, 51, 52)
  RT_SHARED(112, 56, 57, 58, 59, 60)
  RT_SHARED(128, 64, 65, 66, 67, 68)
  RT_SHARED(144, 72, 73, 74, 75, 76)
  RT_SHARED(160, 80, 81, 82, 83, 84)
  RT_SHARED(176, 88, 89, 90, 91, 92)
  RT_SHARED(192, 96, 97, 98, 99, 100)
  RT_SHARED(208, 104, 105, 106, 107, 108)
  RT_SHARED(224, 112, 113, 114, 115, 116)
  RT_SHARED(240, 120, 121, 122, 123, 124)
  RT_SHARED(256, 128, 129, 130, 131, 132)
}
template <int F, int WIDTH, int TRANS_A, int TRANS_B>
__device__ __forceinline__ void wgmma(int (&d)[WIDTH / 2], unsigned long long a, unsigned long long b, int add) {
  static_assert(F == INT8 && !TRANS_A && !TRANS_B, "integers accumulate int8 products along k only");
  RT_INTEGER(16, 8, 9, 10, 11, 12)
  RT_INTEGER(32, 16, 17, 18, 19, 20)
  RT_INTEGER(48, 24, 25, 26, 27, 28)
  RT_INTEGER(64, 32, 33, 34, 35, 36)
  RT_INTEGER(80, 40, 41, 42, 43, 44)
  RT_INTEGER(96, 48, 49, 50, 51, 52)
  RT_INTEGER(112, 56, 57, 58, 59, 60)
  RT_INTEGER(128, 64, 65, 66, 67, 68)
  RT_INTEGER(144, 72, 73, 74, 75, 76)
  RT_INTEGER(160, 80, 81, 82, 83, 84)
  RT_INTEGER(176, 88, 89, 90, 91, 92)
  RT_INTEGER(192, 96, 97, 98, 99, 100)
  RT_INTEGER(208, 104, 105, 106, 107, 108)
  RT_INTEGER(224, 112, 113, 114, 115, 116)
  RT_INTEGER(240, 120, 121, 122, 123, 124)
  RT_INTEGER(256, 128, 129, 130, 131, 132)
}

// a from registers, 16-bit formats.
#define RT_REGISTERS(N, A0, A1, A2, A3, B, P, TB)                                                                \
  if constexpr (WIDTH == N) {                                                                                    \
    if constexpr (F == BF16) RT_LEFT(N, "bf16.bf16", A0, A1, A2, A3, B, P, TB);                                  \
    else RT_LEFT(N, "f16.f16", A0, A1, A2, A3, B, P, TB);                                                        \
  }
#define RT_LEFT(N, TYPES, A0, A1, A2, A3, B, P, TB)                                                              \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N            \
               "k16.f32." TYPES " {" RT_TEXT##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B                \
               ", p, 1, 1, %" #TB ";\n}"                                                                       \
               : RT_REGS##N(f) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B))
template <int F, int WIDTH, int TRANS_B>
__device__ __forceinline__ void wgmma(float (&d)[WIDTH / 2], const unsigned (&a)[4], unsigned long long b, int add) {
  static_assert(F == BF16 || F == FP16, "the left operand in registers: 16-bit formats");
  RT_REGISTERS(16, 8, 9, 10, 11, 12, 13, 14)
  RT_REGISTERS(32, 16, 17, 18, 19, 20, 21, 22)
  RT_REGISTERS(48, 24, 25, 26, 27, 28, 29, 30)
  RT_REGISTERS(64, 32, 33, 34, 35, 36, 37, 38)
  RT_REGISTERS(80, 40, 41, 42, 43, 44, 45, 46)
  RT_REGISTERS(96, 48, 49, 50, 51, 52, 53, 54)
  RT_REGISTERS(112, 56, 57, 58, 59, 60, 61, 62)
  RT_REGISTERS(128, 64, 65, 66, 67, 68, 69, 70)
  RT_REGISTERS(144, 72, 73, 74, 75, 76, 77, 78)
  RT_REGISTERS(160, 80, 81, 82, 83, 84, 85, 86)
  RT_REGISTERS(176, 88, 89, 90, 91, 92, 93, 94)
  RT_REGISTERS(192, 96, 97, 98, 99, 100, 101, 102)
  RT_REGISTERS(208, 104, 105, 106, 107, 108, 109, 110)
  RT_REGISTERS(224, 112, 113, 114, 115, 116, 117, 118)
  RT_REGISTERS(240, 120, 121, 122, 123, 124, 125, 126)
  RT_REGISTERS(256, 128, 129, 130, 131, 132, 133, 134)
}

}  // namespace rt
