// 16-bit floating point in memory, fp32 in registers; and the fast functions of the special-function unit.
#pragma once

#include "base/cuda/device.cuh"

#if !defined(ONESTEP_SIMT)
#include <cuda_fp16.h>
#endif

namespace onestep::cuda {

// Storage only: convert before computing.
struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ double to_float(double value) { return value; }

__device__ __forceinline__ float to_float(bfloat16 value) {
    return __uint_as_float(static_cast<unsigned>(value.bits) << 16);
}

#if defined(ONESTEP_SIMT)

// Round to nearest even; every NaN becomes CUDA's canonical one.
inline bfloat16 to_bfloat16(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) {
        return {0x7fff};
    }
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float to_float(float16 value) {
    const unsigned sign = (value.bits & 0x8000u) << 16;
    const unsigned exponent = value.bits >> 10 & 0x1fu;
    const unsigned fraction = value.bits & 0x3ffu;
    if (exponent == 0x1fu) {
        return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    }
    if (exponent == 0) {
        const float small = static_cast<float>(fraction) * 0x1p-24f;
        return sign != 0 ? -small : small;
    }
    return __uint_as_float(sign | (exponent + 112u) << 23 | fraction << 13);
}

inline float16 to_float16(float value) {
    const unsigned bits = __float_as_uint(value);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const unsigned magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return {0x7fff};
    }
    if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
        return {static_cast<uint16_t>(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {  // below 2^-14: units of 2^-24, rounded by the addition
        const float scaled = std::bit_cast<float>(magnitude) * 0x1p24f;
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(scaled)))};
    }
    return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}

// Two numbers in one register, `low` in the lower half.
inline unsigned pack_bfloat16(float low, float high) {
    return to_bfloat16(low).bits | static_cast<unsigned>(to_bfloat16(high).bits) << 16;
}
inline unsigned pack_float16(float low, float high) {
    return to_float16(low).bits | static_cast<unsigned>(to_float16(high).bits) << 16;
}

// Rounded to tf32 (10 bits of fraction), ties away from zero.
inline unsigned to_tf32(float value) {
    const unsigned bits = __float_as_uint(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

inline float fast_exp2(float value) { return std::exp2(value); }
inline float fast_log2(float value) { return std::log2(value); }
inline float fast_reciprocal(float value) { return 1.0f / value; }
inline float fast_rsqrt(float value) { return 1.0f / std::sqrt(value); }

#else

__device__ __forceinline__ float to_float(float16 value) { return __half2float(__ushort_as_half(value.bits)); }

__device__ __forceinline__ unsigned pack_bfloat16(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ unsigned pack_float16(float low, float high) {
    unsigned packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
__device__ __forceinline__ bfloat16 to_bfloat16(float value) {
    return {static_cast<uint16_t>(pack_bfloat16(value, 0.0f) & 0xffffu)};
}
__device__ __forceinline__ float16 to_float16(float value) { return {__half_as_ushort(__float2half_rn(value))}; }

__device__ __forceinline__ unsigned to_tf32(float value) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

#define ONESTEP_FAST(name, instruction)                          \
    __device__ __forceinline__ float name(float value) {         \
        float result;                                            \
        asm(instruction " %0, %1;" : "=f"(result) : "f"(value)); \
        return result;                                           \
    }
ONESTEP_FAST(fast_exp2, "ex2.approx.ftz.f32")
ONESTEP_FAST(fast_log2, "lg2.approx.ftz.f32")
ONESTEP_FAST(fast_reciprocal, "rcp.approx.ftz.f32")
ONESTEP_FAST(fast_rsqrt, "rsqrt.approx.ftz.f32")
#undef ONESTEP_FAST

#endif

// Of two packed numbers, the lower and the upper.
__device__ __forceinline__ float low_bfloat16(unsigned packed) { return __uint_as_float(packed << 16); }
__device__ __forceinline__ float high_bfloat16(unsigned packed) { return __uint_as_float(packed & 0xffff0000u); }
__device__ __forceinline__ float low_float16(unsigned packed) {
    return to_float(float16{static_cast<uint16_t>(packed & 0xffffu)});
}
__device__ __forceinline__ float high_float16(unsigned packed) {
    return to_float(float16{static_cast<uint16_t>(packed >> 16)});
}

// By type, for kernels that are templates of it.
template <class Half>
__device__ __forceinline__ unsigned pack(float low, float high) {
    if constexpr (std::is_same_v<Half, bfloat16>) {
        return pack_bfloat16(low, high);
    } else {
        return pack_float16(low, high);
    }
}
template <class T>
__device__ __forceinline__ T from_float(float value) {
    if constexpr (std::is_same_v<T, bfloat16>) {
        return to_bfloat16(value);
    } else if constexpr (std::is_same_v<T, float16>) {
        return to_float16(value);
    } else {
        return static_cast<T>(value);
    }
}

}  // namespace onestep::cuda
