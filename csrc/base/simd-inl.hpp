// Vector types of one CPU target, on GCC/Clang vector extensions.
//
// Included only by sources that CMake compiles once per target, with ONESTEP_NS (the target's namespace) and
// ONESTEP_VECTOR_BYTES set. Nothing here may include the standard library's function templates: the linker would be
// free to keep the copy that was compiled with the higher instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#if !defined(ONESTEP_NS) || !defined(ONESTEP_VECTOR_BYTES)
#error "compile this once per CPU target; see onestep_add_target_sources in CMakeLists.txt"
#endif

#define ONESTEP_INLINE inline __attribute__((always_inline))

namespace onestep::ONESTEP_NS {

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(ONESTEP_VECTOR_BYTES)));
    typedef float Unaligned __attribute__((vector_size(ONESTEP_VECTOR_BYTES), aligned(4), may_alias));
    typedef int32_t Integer;
    typedef int32_t Mask __attribute__((vector_size(ONESTEP_VECTOR_BYTES)));
    static constexpr float kMax = __FLT_MAX__;
    static constexpr float kEpsilon = __FLT_EPSILON__;
};

template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(ONESTEP_VECTOR_BYTES)));
    typedef double Unaligned __attribute__((vector_size(ONESTEP_VECTOR_BYTES), aligned(8), may_alias));
    typedef int64_t Integer;
    typedef int64_t Mask __attribute__((vector_size(ONESTEP_VECTOR_BYTES)));
    static constexpr double kMax = __DBL_MAX__;
    static constexpr double kEpsilon = __DBL_EPSILON__;
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using Mask = typename Simd<T>::Mask;

template <class T>
inline constexpr int kLanes = ONESTEP_VECTOR_BYTES / static_cast<int>(sizeof(T));

template <class T>
ONESTEP_INLINE Vec<T> load(const T* from) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(from);
}

template <class T>
ONESTEP_INLINE void store(T* to, Vec<T> value) {
    *reinterpret_cast<typename Simd<T>::Unaligned*>(to) = value;
}

template <class T>
ONESTEP_INLINE Vec<T> broadcast(T value) {
    return value - Vec<T>{};
}

// An integer in every lane of a mask-sized vector.
template <class T>
ONESTEP_INLINE Mask<T> broadcast_integer(int64_t value) {
    return Mask<T>{} + static_cast<typename Simd<T>::Integer>(value);
}

ONESTEP_INLINE float square_root(float value) { return __builtin_sqrtf(value); }
ONESTEP_INLINE double square_root(double value) { return __builtin_sqrt(value); }

template <class T>
ONESTEP_INLINE Vec<T> square_root_lanes(Vec<T> value) {
    alignas(ONESTEP_VECTOR_BYTES) T lanes[kLanes<T>];
    store<T>(lanes, value);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        lanes[lane] = square_root(lanes[lane]);
    }
    return load<T>(lanes);
}

// True for everything but NaN and the infinities.
template <class T>
ONESTEP_INLINE bool is_finite(T value) {
    return value >= -Simd<T>::kMax && value <= Simd<T>::kMax;
}

template <class T>
ONESTEP_INLINE Mask<T> is_finite_lanes(Vec<T> value) {
    return (value >= broadcast<T>(-Simd<T>::kMax)) & (value <= broadcast<T>(Simd<T>::kMax));
}

template <class T>
ONESTEP_INLINE T absolute(T value) {
    return value < T(0) ? -value : value;
}

template <class T>
ONESTEP_INLINE Vec<T> absolute_lanes(Vec<T> value) {
    return value < Vec<T>{} ? -value : value;
}

template <class T>
ONESTEP_INLINE Vec<T> maximum_lanes(Vec<T> a, Vec<T> b) {
    return a > b ? a : b;
}

ONESTEP_INLINE int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }
ONESTEP_INLINE int64_t maximum(int64_t a, int64_t b) { return a > b ? a : b; }

// Hides from the compiler how `value` was computed, so that it does not fuse a product in it with a later sum.
template <class V>
ONESTEP_INLINE V opaque(V value) {
#if defined(__x86_64__) && !(defined(ONESTEP_EMULATE) && ONESTEP_VECTOR_BYTES == 64)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#else
    asm("" : "+m"(value));
#endif
    return value;
}

// a·b − c, rounded once.
ONESTEP_INLINE Vec<double> multiply_subtract(Vec<double> a, Vec<double> b, Vec<double> c) {
    alignas(ONESTEP_VECTOR_BYTES) double x[kLanes<double>];
    alignas(ONESTEP_VECTOR_BYTES) double y[kLanes<double>];
    alignas(ONESTEP_VECTOR_BYTES) double z[kLanes<double>];
    store<double>(x, a);
    store<double>(y, b);
    store<double>(z, c);
    for (int lane = 0; lane < kLanes<double>; ++lane) {
        z[lane] = __builtin_fma(x[lane], y[lane], -z[lane]);
    }
    return load<double>(z);
}

// One step of Eklundh's matrix transposition: `a` has the upper halves of 2S × 2S blocks and `b` the lower ones. Their
// off-diagonal quarters change places.
template <class T, int S, int... Lane>
ONESTEP_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
    constexpr int P = kLanes<T>;
    const Vec<T> upper = __builtin_shufflevector(a, b, ((Lane & S) != 0 ? P + Lane - S : Lane)...);
    const Vec<T> lower = __builtin_shufflevector(a, b, ((Lane & S) != 0 ? P + Lane : Lane + S)...);
    a = upper;
    b = lower;
}

template <int S, class T>
ONESTEP_INLINE void transpose_steps(Vec<T>* rows) {
    if constexpr (S > 0) {
#pragma GCC unroll 16
        for (int row = 0; row < kLanes<T>; ++row) {
            if ((row & S) == 0) {
                exchange<T, S>(rows[row], rows[row + S], std::make_integer_sequence<int, kLanes<T>>{});
            }
        }
        transpose_steps<S / 2, T>(rows);
    }
}

// The sums of kLanes vectors, one in each lane. Start with S = half the lanes. The vectors are overwritten.
template <class T, int S = kLanes<T> / 2>
ONESTEP_INLINE Vec<T> sums_across(Vec<T>* vectors) {
    if constexpr (S > 0) {
#pragma GCC unroll 8
        for (int r = 0; r < S; ++r) {
            exchange<T, S>(vectors[r], vectors[r + S], std::make_integer_sequence<int, kLanes<T>>{});
            vectors[r] += vectors[r + S];
        }
        return sums_across<T, S / 2>(vectors);
    } else {
        return vectors[0];
    }
}

// Transposes the square of kLanes vectors in place.
template <class T>
ONESTEP_INLINE void transpose(Vec<T>* rows) {
    transpose_steps<kLanes<T> / 2, T>(rows);
}

}  // namespace onestep::ONESTEP_NS
