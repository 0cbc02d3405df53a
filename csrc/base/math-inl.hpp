// Elementary functions of whole vectors, and loads that widen bfloat16.
#pragma once

#include "base/bfloat16.hpp"
#include "base/simd-inl.hpp"

namespace onestep::ONESTEP_NS {

typedef uint16_t HalfBits __attribute__((vector_size(ONESTEP_VECTOR_BYTES / 2), aligned(2), may_alias));
typedef uint32_t WordBits __attribute__((vector_size(ONESTEP_VECTOR_BYTES)));

ONESTEP_INLINE float widen(float value) { return value; }
ONESTEP_INLINE double widen(double value) { return value; }
ONESTEP_INLINE float widen(BFloat16 value) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
}

// kLanes<T> consecutive elements as T: `load_widened<float>(const BFloat16*)`, or the plain load.
template <class T>
ONESTEP_INLINE Vec<T> load_widened(const T* from) {
    return load<T>(from);
}

template <class T>
ONESTEP_INLINE Vec<float> load_widened(const BFloat16* from) {
    static_assert(sizeof(T) == sizeof(float));
    const WordBits words = __builtin_convertvector(*reinterpret_cast<const HalfBits*>(from), WordBits);
    return reinterpret_cast<Vec<float>>(words << 16);
}

template <int S, class V, int... Lane>
ONESTEP_INLINE V swap_lanes(V value, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(value, value, (Lane ^ S)...);
}

template <class T, int S = kLanes<T> / 2>
ONESTEP_INLINE T sum_across(Vec<T> value) {
    if constexpr (S == 0) {
        return value[0];
    } else {
        return sum_across<T, S / 2>(value + swap_lanes<S>(value, std::make_integer_sequence<int, kLanes<T>>{}));
    }
}

template <class T, int S = kLanes<T> / 2>
ONESTEP_INLINE T maximum_across(Vec<T> value) {
    if constexpr (S == 0) {
        return value[0];
    } else {
        const Vec<T> swapped = swap_lanes<S>(value, std::make_integer_sequence<int, kLanes<T>>{});
        return maximum_across<T, S / 2>(maximum_lanes<T>(value, swapped));
    }
}

ONESTEP_INLINE float logarithm(float value) { return __builtin_logf(value); }
ONESTEP_INLINE double logarithm(double value) { return __builtin_log(value); }

template <class T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
    static constexpr float kLowest = -86.9F;  // e to it is 2^-125.4; below it the result is zero
    static constexpr float kHighest = 88.7228F;
    static constexpr float kLog2Hi = 0.693145752F;
    static constexpr float kLog2Lo = 1.42860677e-6F;
    static constexpr float kInvLog2 = 1.44269504F;
    static constexpr float kRound = 12582912.0F;  // 1.5·2²³: adding it rounds to an integer
    static constexpr int kMantissa = 23;
    static constexpr int32_t kBias = 126;
    // 2 (eʳ − 1 − r) / r², Chebyshev interpolation on |r| <= log(2)/2; relative error of eʳ 1.0e-8.
    static constexpr float kSeries[] = {2.7852367175e-3F, 1.6726358105e-2F, 8.3333109234e-2F, 3.3333153979e-1F, 1.0F};
};

template <>
struct ExpConstants<double> {
    static constexpr double kLowest = -708.0;
    static constexpr double kHighest = 709.782712893384;
    static constexpr double kLog2Hi = 6.93147180369123816490e-1;
    static constexpr double kLog2Lo = 1.90821492927058770002e-10;
    static constexpr double kInvLog2 = 1.4426950408889634;
    static constexpr double kRound = 6755399441055744.0;
    static constexpr int kMantissa = 52;
    static constexpr int64_t kBias = 1022;
    // Relative error 1.7e-17.
    static constexpr double kSeries[] = {5.0200770991020638e-8, 5.5240176890819496e-7,  5.5114536919994129e-6,
                                         4.9603042591908750e-5, 3.96825397261072338e-4, 2.7777777834427434e-3,
                                         1.6666666666660124e-2, 8.3333333333248256e-2,  3.3333333333333335e-1,
                                         1.0000000000000002};
};

// eˣ with an error under 2 ulp; infinity past the largest x, zero below kLowest, NaN for NaN.
template <class T>
ONESTEP_INLINE Vec<T> exp_lanes(Vec<T> x) {
    using C = ExpConstants<T>;
    const Vec<T> shifted = x * C::kInvLog2 + C::kRound;
    const Vec<T> n = shifted - C::kRound;
    const Vec<T> r = (x - n * C::kLog2Hi) - n * C::kLog2Lo;
    Vec<T> series = broadcast<T>(C::kSeries[0]);
#pragma GCC unroll 16
    for (unsigned term = 1; term < sizeof(C::kSeries) / sizeof(T); ++term) {
        series = series * r + C::kSeries[term];
    }
    // 2eʳ · 2ⁿ⁻¹ instead of eʳ · 2ⁿ, because 2ⁿ overflows for n = 128 (1024).
    const Vec<T> twice = (series * r + T(2)) * r + T(2);
    const Mask<T> exponent = (reinterpret_cast<Mask<T>>(shifted) << C::kMantissa) +
                             broadcast_integer<T>(static_cast<int64_t>(C::kBias) << C::kMantissa);
    Vec<T> result = twice * reinterpret_cast<Vec<T>>(exponent);
    result = x < broadcast<T>(C::kLowest) ? Vec<T>{} : result;
    return x > broadcast<T>(C::kHighest) ? broadcast<T>(__builtin_inf()) : result;
}

template <class T>
struct Log1pSeries;

// (2 artanh(s) − 2s) / s³ in s², Chebyshev interpolation on [0, 1/9].
template <>
struct Log1pSeries<float> {
    static constexpr float kTerms[] = {2.0787616857e-1F, 1.7464702465e-1F, 2.2264711209e-1F,
                                       2.8570305722e-1F, 4.0000010770e-1F, 6.6666666650e-1F};
};

template <>
struct Log1pSeries<double> {
    static constexpr double kTerms[] = {1.5231262619428985e-1, 6.3341108517702454e-2, 9.9420248965547346e-2,
                                        1.0480399234365274e-1, 1.1767997767242036e-1, 1.3333176949138178e-1,
                                        1.5384620253804162e-1, 1.8181818086005655e-1, 2.2222222223331987e-1,
                                        2.8571428571421943e-1, 4.0000000000000016e-1, 6.6666666666666667e-1};
};

// log(1 + u) for u in [0, 1], as 2 artanh(u / (2 + u)).
template <class T>
ONESTEP_INLINE Vec<T> log1p_unit_lanes(Vec<T> u) {
    using C = Log1pSeries<T>;
    const Vec<T> s = u / (u + T(2));
    const Vec<T> square = s * s;
    Vec<T> series = broadcast<T>(C::kTerms[0]);
#pragma GCC unroll 16
    for (unsigned term = 1; term < sizeof(C::kTerms) / sizeof(T); ++term) {
        series = series * square + C::kTerms[term];
    }
    return (s + s) + s * square * series;
}

}  // namespace onestep::ONESTEP_NS
