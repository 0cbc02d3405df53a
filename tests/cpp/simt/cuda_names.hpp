// CUDA's names in terms of the emulator: what kernels may use of the language and its intrinsics.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "simt.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define threadIdx (::simt::place().thread)
#define blockIdx (::simt::place().block)
#define blockDim (::simt::place().block_size)
#define gridDim (::simt::place().grid_size)

inline constexpr int warpSize = 32;

using cudaStream_t = struct SimtStream*;

// ---------------------------------------------------------------- vectors

#define ONESTEP_SIMT_VECTOR(T, name, bytes)                    \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
    struct alignas(bytes) name##4 { T x, y, z, w; };           \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

ONESTEP_SIMT_VECTOR(float, float, 16)
ONESTEP_SIMT_VECTOR(double, double, 16)
ONESTEP_SIMT_VECTOR(int, int, 16)
ONESTEP_SIMT_VECTOR(unsigned, uint, 16)
#undef ONESTEP_SIMT_VECTOR

// ---------------------------------------------------------------- barriers and collectives

#define ONESTEP_SIMT_SITE(name) (::simt::Site{__FILE__, __LINE__, name})

#define __syncthreads() (static_cast<void>(::simt::barrier(ONESTEP_SIMT_SITE("__syncthreads"), 0)))
#define __syncthreads_count(value) (::simt::barrier(ONESTEP_SIMT_SITE("__syncthreads_count"), (value) ? 1 : 0))
#define __syncthreads_or(value) (::simt::barrier(ONESTEP_SIMT_SITE("__syncthreads_or"), (value) ? 1 : 0) > 0)
#define __syncthreads_and(value) (::simt::barrier(ONESTEP_SIMT_SITE("__syncthreads_and"), (value) ? 0 : 1) == 0)

#define ONESTEP_SIMT_FIRST(first, ...) first
#define __syncwarp(...)                                                  \
    (static_cast<void>(::simt::exchange(ONESTEP_SIMT_SITE("__syncwarp"), \
                                        ONESTEP_SIMT_FIRST(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu, 0), "", 0, true)))
#define __shfl_sync(...) (::simt::shuffle_index(ONESTEP_SIMT_SITE("__shfl_sync"), __VA_ARGS__))
#define __shfl_up_sync(...) (::simt::shuffle_up(ONESTEP_SIMT_SITE("__shfl_up_sync"), __VA_ARGS__))
#define __shfl_down_sync(...) (::simt::shuffle_down(ONESTEP_SIMT_SITE("__shfl_down_sync"), __VA_ARGS__))
#define __shfl_xor_sync(...) (::simt::shuffle_xor(ONESTEP_SIMT_SITE("__shfl_xor_sync"), __VA_ARGS__))
#define __ballot_sync(mask, value) (::simt::ballot(ONESTEP_SIMT_SITE("__ballot_sync"), mask, (value) ? 1 : 0))
#define __any_sync(mask, value) (::simt::ballot(ONESTEP_SIMT_SITE("__any_sync"), mask, (value) ? 1 : 0) != 0)
#define __all_sync(mask, value) (::simt::ballot(ONESTEP_SIMT_SITE("__all_sync"), mask, (value) ? 0 : 1) == 0)
#define __reduce_add_sync(mask, value) \
    (::simt::reduce(ONESTEP_SIMT_SITE("__reduce_add_sync"), mask, value, [](auto a, auto b) { return a + b; }))
#define __reduce_max_sync(mask, value) \
    (::simt::reduce(ONESTEP_SIMT_SITE("__reduce_max_sync"), mask, value, [](auto a, auto b) { return a > b ? a : b; }))
#define __reduce_min_sync(mask, value) \
    (::simt::reduce(ONESTEP_SIMT_SITE("__reduce_min_sync"), mask, value, [](auto a, auto b) { return a < b ? a : b; }))

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { simt::yield(); }

// ---------------------------------------------------------------- memory

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, T value) {
    *address = value;
}

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T old) -> T { return old + value; });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T old) -> T { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T old) -> T { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T old) -> T { return old | value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T) -> T { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
    return simt::atomically(address, [&](T old) -> T { return old == compare ? value : old; });
}

// ---------------------------------------------------------------- arithmetic

using std::max;
using std::min;

inline int __popc(unsigned value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }
inline float __int_as_float(int value) { return std::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return std::bit_cast<float>(value); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }
inline double __longlong_as_double(long long value) { return std::bit_cast<double>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float rsqrtf(float a) { return 1.0f / std::sqrt(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
