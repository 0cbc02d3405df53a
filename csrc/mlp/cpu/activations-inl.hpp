// Activations of a perceptron and their slopes, a vector at a time.
#pragma once

#include "base/math-inl.hpp"
#include "mlp/cpu/kernels.hpp"

namespace onestep::mlp::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
struct TanhSeries;

// (tanh(x) / x − 1) / x² in x² for |x| < 0.625 (Cephes; Moshier 1989).
template <>
struct TanhSeries<float> {
    static constexpr float kNumerator[] = {-5.70498872745e-3F, 2.06390887954e-2F, -5.37397155531e-2F, 1.33314422036e-1F,
                                           -3.33332819422e-1F};
    static constexpr float kDenominator[] = {1.0F};
};

template <>
struct TanhSeries<double> {
    static constexpr double kNumerator[] = {-9.64399179425052238628e-1, -9.92877231001918586564e1,
                                            -1.61468768441708447952e3};
    static constexpr double kDenominator[] = {1.0, 1.12811678491632931402e2, 2.23548839060100448583e3,
                                              4.84406305325125486048e3};
};

template <class T, size_t N>
ONESTEP_INLINE Vec<T> polynomial(const T (&terms)[N], Vec<T> x) {
    Vec<T> sum = broadcast<T>(terms[0]);
#pragma GCC unroll 8
    for (size_t term = 1; term < N; ++term) {
        sum = sum * x + terms[term];
    }
    return sum;
}

template <class T>
ONESTEP_INLINE Vec<T> tanh_lanes(Vec<T> x) {
    const Vec<T> square = x * x;
    const Vec<T> series =
        polynomial<T>(TanhSeries<T>::kNumerator, square) / polynomial<T>(TanhSeries<T>::kDenominator, square);
    const Vec<T> size = absolute_lanes<T>(x);
    const Vec<T> large = T(1) - T(2) / (exp_lanes<T>(size + size) + T(1));
    const Vec<T> far = x < Vec<T>{} ? -large : large;
    return size < broadcast<T>(T(0.625)) ? x + x * square * series : far;
}

template <class T>
ONESTEP_INLINE Vec<T> activate(MlpActivation activation, Vec<T> z) {
    switch (activation) {
        case MlpActivation::relu:
            // NaN < 0 is false, so NaN is returned.
            return z < Vec<T>{} ? Vec<T>{} : z;
        case MlpActivation::tanh:
            return tanh_lanes<T>(z);
        case MlpActivation::sigmoid:
            return T(1) / (T(1) + exp_lanes<T>(-z));
        default:
            return z;
    }
}

// φ′(z) from a = φ(z).
template <class T>
ONESTEP_INLINE Vec<T> slope(MlpActivation activation, Vec<T> a) {
    switch (activation) {
        case MlpActivation::relu:
            return a > Vec<T>{} ? broadcast<T>(T(1)) : Vec<T>{};
        case MlpActivation::tanh:
            return T(1) - a * a;
        case MlpActivation::sigmoid:
            return a * (T(1) - a);
        default:
            return broadcast<T>(T(1));
    }
}

}  // namespace onestep::mlp::ONESTEP_NS
