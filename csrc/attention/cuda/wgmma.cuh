// Matrix products of a warp group (four warps) of Hopper: wgmma, sm_90a alone. Elsewhere kernels with these must not be
// launched.
//
// D = A B + D of 64 × N: each warp has 16 rows of D, and of A where that is in registers, in the fragments of
// mma_16x8x16. Operands in shared memory are made of panels of 64 columns: rows of 128 bytes one after the other, of
// which the 16-byte chunk c lies at c XOR row % 8. A panel starts at a multiple of 1024 bytes.
#pragma once

#include "base/cuda/device.cuh"
#include "base/cuda/numbers.cuh"

namespace onestep::attention::cuda {

using namespace onestep::cuda;

// An operand in shared memory. `panel_bytes`: from one panel of 64 columns to the next, where a product has several.
#if defined(ONESTEP_SIMT)
struct SharedMatrix {
    const void* start;
    int panel_bytes;
};
__device__ __forceinline__ SharedMatrix shared_matrix(const void* start, int panel_bytes) {
    return {start, panel_bytes};
}
#else
struct SharedMatrix {
    uint64_t bits;
};
__device__ __forceinline__ SharedMatrix shared_matrix(const void* start, int panel_bytes) {
    const auto address = static_cast<uint64_t>(__cvta_generic_to_shared(start));
    constexpr uint64_t kEightRows = 1024 >> 4;
    constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
    return {(address & 0x3ffff) >> 4 | static_cast<uint64_t>(panel_bytes >> 4) << 16 | kEightRows << 32 | kSwizzle128};
}
#endif

#if defined(ONESTEP_SIMT)
namespace emulated {

// Element (row, col) of rows of 128 bytes from `start` on, which may lie within a panel.
template <class Half>
float shared_element(const SharedMatrix& matrix, int row, int col) {
    auto address = reinterpret_cast<uintptr_t>(matrix.start) +
                   static_cast<uintptr_t>(col / 64) * static_cast<uintptr_t>(matrix.panel_bytes) +
                   static_cast<uintptr_t>(row) * 128 + static_cast<uintptr_t>(col % 64) * 2;
    address ^= (address >> 7 & 7) << 4;
    const auto* element = reinterpret_cast<const Half*>(address);
    simt::check_shared(ONESTEP_SIMT_SITE("wgmma"), element, sizeof(Half));
    return to_float(*element);
}

// a(row, k) in the fragment of mma_16x8x16, from the lane that has it.
template <class Half>
float fragment_element(const unsigned char* slots, int row, int k) {
    unsigned regs[4];
    simt::read_slot(slots, row % 8 * 4 + k % 8 / 2, regs, sizeof(regs));
    return to_float(Half{static_cast<uint16_t>(regs[row / 8 + 2 * (k / 8)] >> (16 * (k % 2)))});
}

template <class Half, int N, bool kDepthInRows, class Left>
void wgmma(float (&d)[N / 8][4], const Left& left, SharedMatrix b) {
    const int g = simt::lane() / 4;
    const int t = simt::lane() % 4;
    for (int n = 0; n < N / 8; ++n) {
        for (int e = 0; e < 4; ++e) {
            const int col = 8 * n + 2 * t + e % 2;
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) {
                const float right = kDepthInRows ? shared_element<Half>(b, k, col) : shared_element<Half>(b, col, k);
                sum += left(g + 8 * (e / 2), k) * right;
            }
            d[n][e] += sum;
        }
    }
}

}  // namespace emulated
#endif

// Orders what a thread wrote to registers before the products that follow.
__device__ __forceinline__ void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until all products of this warp group are complete.
__device__ __forceinline__ void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#endif
}

// Before a barrier: what this thread stored or copied to shared memory is seen by products after it.
__device__ __forceinline__ void publish_to_wgmma() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Keeps the compiler from moving an accumulator while products are under way.
template <int N>
__device__ __forceinline__ void wgmma_hold([[maybe_unused]] float (&d)[N][4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
    for (int n = 0; n < N; ++n) {
        asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
    }
#endif
}

__device__ __forceinline__ void wgmma_hold_left([[maybe_unused]] unsigned (&a)[4]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ONESTEP_WGMMA_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define ONESTEP_WGMMA_16(d, n) \
    ONESTEP_WGMMA_4(d, n), ONESTEP_WGMMA_4(d, n + 1), ONESTEP_WGMMA_4(d, n + 2), ONESTEP_WGMMA_4(d, n + 3)
#define ONESTEP_WGMMA_32(d, n) ONESTEP_WGMMA_16(d, n), ONESTEP_WGMMA_16(d, n + 4)
#define ONESTEP_WGMMA_64(d, n) ONESTEP_WGMMA_32(d, n), ONESTEP_WGMMA_32(d, n + 8)
#define ONESTEP_WGMMA_OUTPUTS_32 ONESTEP_WGMMA_16(d, 0)
#define ONESTEP_WGMMA_OUTPUTS_64 ONESTEP_WGMMA_32(d, 0)
#define ONESTEP_WGMMA_OUTPUTS_128 ONESTEP_WGMMA_64(d, 0)
#define ONESTEP_WGMMA_NAMES_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ONESTEP_WGMMA_NAMES_64 \
    ONESTEP_WGMMA_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ONESTEP_WGMMA_NAMES_128                                                          \
    ONESTEP_WGMMA_NAMES_64                                                               \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// One instruction. Operands count on from the accumulator's: A (`...`, by its names `left`), B, whether B's depth is in
// rows (after A's flag, if A has one), and 1: add to D.
#define ONESTEP_WGMMA_OF(type, N, left, right, flags, add, ...)                                               \
    asm volatile("{.reg .pred add; setp.ne.b32 add, " add                                                     \
                 ", 0;"                                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" ONESTEP_WGMMA_NAMES_##N \
                 "}, " left ", " right ", add, 1, 1, " flags ";}"                                             \
                 : ONESTEP_WGMMA_OUTPUTS_##N                                                                  \
                 : __VA_ARGS__, "l"(b.bits), "n"(kDepthInRows ? 1 : 0), "r"(1))
#define ONESTEP_WGMMA(...)                          \
    if constexpr (std::is_same_v<Half, bfloat16>) { \
        ONESTEP_WGMMA_OF("bf16", __VA_ARGS__);      \
    } else {                                        \
        ONESTEP_WGMMA_OF("f16", __VA_ARGS__);       \
    }
#define ONESTEP_WGMMA_SHARED "l"(a.bits)
#define ONESTEP_WGMMA_REGISTERS "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#endif

// D += A B of one step of depth 16, asynchronously: D is complete after wgmma_commit and wgmma_wait. `b` has N rows of
// depth in its columns; kDepthInRows: 16 rows, N columns.
template <class Half, int N, bool kDepthInRows>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], [[maybe_unused]] SharedMatrix a,
                                      [[maybe_unused]] SharedMatrix b) {
#if defined(ONESTEP_SIMT)
    const int first = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
    emulated::wgmma<Half, N, kDepthInRows>(
        d, [&](int row, int k) { return emulated::shared_element<Half>(a, first + row, k); }, b);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static_assert(N == 32 || N == 64 || N == 128, "no wgmma of this width");
    if constexpr (N == 32) {
        ONESTEP_WGMMA(32, "%16", "%17", "0, %18", "%19", ONESTEP_WGMMA_SHARED)
    } else if constexpr (N == 64) {
        ONESTEP_WGMMA(64, "%32", "%33", "0, %34", "%35", ONESTEP_WGMMA_SHARED)
    } else {
        ONESTEP_WGMMA(128, "%64", "%65", "0, %66", "%67", ONESTEP_WGMMA_SHARED)
    }
#else
    __trap();
#endif
}

// The same with A in registers, which must stay as they are until wgmma_wait.
template <class Half, int N, bool kDepthInRows>
__device__ __forceinline__ void wgmma(float (&d)[N / 8][4], [[maybe_unused]] const unsigned (&a)[4],
                                      [[maybe_unused]] SharedMatrix b) {
#if defined(ONESTEP_SIMT)
    const unsigned char* slots = simt::exchange(ONESTEP_SIMT_SITE("wgmma"), kFullWarp, a, sizeof(a));
    emulated::wgmma<Half, N, kDepthInRows>(
        d, [&](int row, int k) { return emulated::fragment_element<Half>(slots, row, k); }, b);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
    static_assert(N == 32 || N == 64 || N == 128, "no wgmma of this width");
    if constexpr (N == 32) {
        ONESTEP_WGMMA(32, "{%16, %17, %18, %19}", "%20", "%21", "%22", ONESTEP_WGMMA_REGISTERS)
    } else if constexpr (N == 64) {
        ONESTEP_WGMMA(64, "{%32, %33, %34, %35}", "%36", "%37", "%38", ONESTEP_WGMMA_REGISTERS)
    } else {
        ONESTEP_WGMMA(128, "{%64, %65, %66, %67}", "%68", "%69", "%70", ONESTEP_WGMMA_REGISTERS)
    }
#else
    __trap();
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#undef ONESTEP_WGMMA_4
#undef ONESTEP_WGMMA_16
#undef ONESTEP_WGMMA_32
#undef ONESTEP_WGMMA_64
#undef ONESTEP_WGMMA_OUTPUTS_32
#undef ONESTEP_WGMMA_OUTPUTS_64
#undef ONESTEP_WGMMA_OUTPUTS_128
#undef ONESTEP_WGMMA_NAMES_32
#undef ONESTEP_WGMMA_NAMES_64
#undef ONESTEP_WGMMA_NAMES_128
#undef ONESTEP_WGMMA_OF
#undef ONESTEP_WGMMA
#undef ONESTEP_WGMMA_SHARED
#undef ONESTEP_WGMMA_REGISTERS
#endif

}  // namespace onestep::attention::cuda
