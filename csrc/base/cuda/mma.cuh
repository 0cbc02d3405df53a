// Matrix products of a warp (mma.sync) and the loads of their operands (ldmatrix), in fragments as PTX defines them.
//
// With g = lane / 4 and t = lane % 4, D = A B + C of 16 × 8:
//   C, D (fp32):            c[0], c[1] at (g, 2t), (g, 2t + 1); c[2], c[3] at (g + 8, 2t), (g + 8, 2t + 1)
//   A, 16 × 16 of 16 bits:  a[0] at (g, 2t..), a[1] at (g + 8, 2t..), a[2] at (g, 2t + 8..), a[3] at (g + 8, 2t + 8..)
//   B, 16 × 8 of 16 bits:   b[0] at (2t.., g), b[1] at (2t + 8.., g): two rows of a column per register
//   A, 16 × 8 of tf32:      a[0] at (g, t), a[1] at (g + 8, t), a[2] at (g, t + 4), a[3] at (g + 8, t + 4)
//   B, 8 × 8 of tf32:       b[0] at (t, g), b[1] at (t + 4, g)
// and of 8 × 8 in fp64:     A, 8 × 4: a at (g, t); B, 4 × 8: b at (t, g); C: c[0], c[1] at (g, 2t), (g, 2t + 1)
#pragma once

#include "base/cuda/device.cuh"
#include "base/cuda/numbers.cuh"

namespace onestep::cuda {

#if defined(ONESTEP_SIMT)
namespace emulated {

template <class Half>
void mma_16x8x16(simt::Site site, float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* slots = simt::exchange(site, kFullWarp, own, sizeof(own));
    const auto half_of = [&](int lane, int reg, int half) {
        unsigned regs[6];
        simt::read_slot(slots, lane, regs, sizeof(regs));
        return to_float(Half{static_cast<uint16_t>(regs[reg] >> (16 * half))});
    };
    const int g = simt::lane() / 4;
    const int t = simt::lane() % 4;
    for (int e = 0; e < 4; ++e) {
        const int row = g + 8 * (e / 2);
        const int col = 2 * t + e % 2;
        float sum = 0.0f;
        for (int k = 0; k < 16; ++k) {
            const float left = half_of(row % 8 * 4 + k % 8 / 2, row / 8 + 2 * (k / 8), k % 2);
            const float right = half_of(col * 4 + k % 8 / 2, 4 + k / 8, k % 2);
            sum += left * right;
        }
        c[e] += sum;
    }
}

}  // namespace emulated
#endif

// c += a b, operands bfloat16 or float16.
template <class Half>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(ONESTEP_SIMT)
    emulated::mma_16x8x16<Half>(ONESTEP_SIMT_SITE("mma_16x8x16"), c, a, b);
#else
    if constexpr (std::is_same_v<Half, bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same_v<Half, float16>);
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// c += a b, or c = a b. Of an operand's 23 bits of fraction 10 are used: what is not from to_tf32 is truncated.
template <bool kFromZero = false>
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if defined(ONESTEP_SIMT)
    unsigned own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const unsigned char* slots = simt::exchange(ONESTEP_SIMT_SITE("mma_16x8x8_tf32"), kFullWarp, own, sizeof(own));
    const auto at = [&](int lane, int reg) {
        unsigned regs[6];
        simt::read_slot(slots, lane, regs, sizeof(regs));
        return __uint_as_float(regs[reg] & ~0x1fffu);
    };
    const int g = simt::lane() / 4;
    const int t = simt::lane() % 4;
    for (int e = 0; e < 4; ++e) {
        const int row = g + 8 * (e / 2);
        const int col = 2 * t + e % 2;
        float sum = 0.0f;
        for (int k = 0; k < 8; ++k) {
            sum += at(row % 8 * 4 + k % 4, row / 8 + 2 * (k / 4)) * at(col * 4 + k % 4, 4 + k / 4);
        }
        c[e] = kFromZero ? sum : c[e] + sum;
    }
#else
    if constexpr (kFromZero) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %10, %10, %10};"
            : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#endif
}

// c += a b in fp64.
__device__ __forceinline__ void mma_8x8x4(double (&c)[2], double a, double b) {
#if defined(ONESTEP_SIMT)
    const double own[2] = {a, b};
    const unsigned char* slots = simt::exchange(ONESTEP_SIMT_SITE("mma_8x8x4"), kFullWarp, own, sizeof(own));
    const auto at = [&](int lane, int which) {
        double values[2];
        simt::read_slot(slots, lane, values, sizeof(values));
        return values[which];
    };
    const int g = simt::lane() / 4;
    const int t = simt::lane() % 4;
    for (int e = 0; e < 2; ++e) {
        for (int k = 0; k < 4; ++k) {
            c[e] = std::fma(at(g * 4 + k, 0), at((2 * t + e) * 4 + k, 1), c[e]);
        }
    }
#else
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(c[0]), "+d"(c[1])
                 : "d"(a), "d"(b));
#endif
}

// kCount (1, 2, 4) matrices of 8 × 8 16-bit numbers: lane i hands in the shared address of row i % 8 of matrix i / 8,
// 16-byte aligned; registers[m] gets of matrix m row g, columns 2t, 2t + 1. Transposed: of rows 2t, 2t + 1 column g.
template <int kCount, bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&registers)[kCount], const void* row_address) {
    static_assert(kCount == 1 || kCount == 2 || kCount == 4);
#if defined(ONESTEP_SIMT)
    const simt::Site site = ONESTEP_SIMT_SITE("ldmatrix");
    if (simt::lane() < 8 * kCount) {
        simt::check_shared(site, row_address, 16);
        if (reinterpret_cast<uintptr_t>(row_address) % 16 != 0) {
            simt::fail("ldmatrix: a row's address is not a multiple of 16 bytes");
        }
    }
    const unsigned char* slots = simt::exchange(site, kFullWarp, &row_address, sizeof(row_address));
    const int g = simt::lane() / 4;
    const int t = simt::lane() % 4;
    for (int m = 0; m < kCount; ++m) {
        uint16_t halves[2];
        for (int e = 0; e < 2; ++e) {
            const int row = kTransposed ? 2 * t + e : g;
            const int col = kTransposed ? g : 2 * t + e;
            halves[e] = simt::slot<const uint16_t*>(slots, 8 * m + row)[col];
        }
        registers[m] = halves[0] | static_cast<unsigned>(halves[1]) << 16;
    }
    // The hardware reads all rows before any lane goes on.
    simt::exchange(site, kFullWarp, "", 0);
#else
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row_address));
    if constexpr (kCount == 1 && !kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(registers[0])
                     : "r"(address)
                     : "memory");
    } else if constexpr (kCount == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(registers[0])
                     : "r"(address)
                     : "memory");
    } else if constexpr (kCount == 2 && !kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(registers[0]), "=r"(registers[1])
                     : "r"(address)
                     : "memory");
    } else if constexpr (kCount == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(registers[0]), "=r"(registers[1])
                     : "r"(address)
                     : "memory");
    } else if constexpr (!kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                     : "r"(address)
                     : "memory");
    }
#endif
}

}  // namespace onestep::cuda
