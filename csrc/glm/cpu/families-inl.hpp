// Loss, slope and curvature of each family; formulas in glm.hpp.
#pragma once

#include "base/math-inl.hpp"
#include "glm/cpu/kernels.hpp"

namespace onestep::glm::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
struct FamilyValue {
    Vec<T> loss, slope, curvature;
};

template <class T, GlmFamily Family>
ONESTEP_INLINE FamilyValue<T> family_value(Vec<T> eta, Vec<T> y, Vec<T> w) {
    if constexpr (Family == GlmFamily::gaussian) {
        const Vec<T> error = eta - y;
        return {w * error * error * T(0.5), w * error, w};
    } else if constexpr (Family == GlmFamily::poisson) {
        const Vec<T> mean = exp_lanes<T>(eta);
        return {w * (mean - y * eta), w * (mean - y), w * mean};
    } else {
        // With u = e^-|η| neither p nor 1 − p is a difference of nearly equal numbers.
        const Vec<T> u = exp_lanes<T>(-absolute_lanes<T>(eta));
        const Vec<T> large = T(1) / (u + T(1));
        const Vec<T> small = u * large;
        const Vec<T> p = eta < Vec<T>{} ? small : large;
        const Vec<T> not_p = eta < Vec<T>{} ? large : small;
        const Vec<T> log1p = log1p_unit_lanes<T>(u);
        const Vec<T> not_y = T(1) - y;
        // y softplus(−η) + (1 − y) softplus(η)
        const Vec<T> loss = log1p + (eta < Vec<T>{} ? -eta * y : eta * not_y);
        return {w * loss, w * (not_y * p - y * not_p), w * large * small};
    }
}

// For `count` elements (whole vectors): replaces eta by the slope and returns the loss.
template <class T, GlmFamily Family>
inline double evaluate_elements(int64_t count, T* eta, const T* y, const T* w, T* curvature) {
    Vec<T> loss = {};
    for (int64_t at = 0; at < count; at += kLanes<T>) {
        const FamilyValue<T> value = family_value<T, Family>(load<T>(eta + at), load<T>(y + at), load<T>(w + at));
        loss += value.loss;
        store<T>(eta + at, value.slope);
        store<T>(curvature + at, value.curvature);
    }
    return static_cast<double>(sum_across<T>(loss));
}

template <class T>
inline double evaluate_family(GlmFamily family, int64_t count, T* eta, const T* y, const T* w, T* curvature) {
    switch (family) {
        case GlmFamily::gaussian:
            return evaluate_elements<T, GlmFamily::gaussian>(count, eta, y, w, curvature);
        case GlmFamily::poisson:
            return evaluate_elements<T, GlmFamily::poisson>(count, eta, y, w, curvature);
        default:
            return evaluate_elements<T, GlmFamily::logistic>(count, eta, y, w, curvature);
    }
}

// One row under softmax: replaces eta by the slope w(P − y), writes P to `probabilities`, and returns the loss.
template <class T>
inline double evaluate_softmax(int64_t classes, int64_t padded, T* eta, const T* y, int64_t label, T w,
                               T* probabilities) {
    for (int64_t c = classes; c < padded; ++c) {
        eta[c] = -Simd<T>::kMax;
    }
    Vec<T> most_lanes = load<T>(eta);
    for (int64_t at = kLanes<T>; at < padded; at += kLanes<T>) {
        most_lanes = maximum_lanes<T>(most_lanes, load<T>(eta + at));
    }
    const T most = maximum_across<T>(most_lanes);
    Vec<T> sum = {};
    for (int64_t at = 0; at < padded; at += kLanes<T>) {
        const Vec<T> power = exp_lanes<T>(load<T>(eta + at) - most);
        store<T>(probabilities + at, power);
        sum += power;
    }
    const T total = sum_across<T>(sum);
    const T log_total = logarithm(total);
    double loss = 0.0;
    if (y == nullptr) {
        loss = static_cast<double>(log_total + (most - eta[label]));
    } else {
        for (int64_t c = 0; c < classes; ++c) {
            loss += static_cast<double>(y[c] * (log_total + (most - eta[c])));
        }
    }
    const T scale = T(1) / total;
    for (int64_t at = 0; at < padded; at += kLanes<T>) {
        const Vec<T> p = load<T>(probabilities + at) * scale;
        store<T>(probabilities + at, p);
        store<T>(eta + at, w * (y == nullptr ? p : p - load<T>(y + at)));
    }
    if (y == nullptr) {
        // 1 − p summed from the other classes would be more exact; the error here is one epsilon of w.
        eta[label] -= w;
    }
    return static_cast<double>(w) * loss;
}

template <class X, class T>
ONESTEP_INLINE T weight_of(const GlmData<X, T>& data, int64_t row) {
    return data.weight.data == nullptr ? T(1) : data.weight.data[row * data.weight.row];
}

// One row of y, and zeros up to whole vectors.
template <class X, class T>
inline void copy_targets(const GlmData<X, T>& data, int64_t row, int64_t padded, T* to) {
    for (int64_t c = 0; c < padded; ++c) {
        to[c] = c < data.k ? data.y.data[row * data.y.row + c * data.y.col] : T(0);
    }
}

// One row with several outputs: replaces eta by the slope, writes the curvature if it is asked for, and returns the
// loss. `y`, `weight` and `curvature` hold columns.stride elements.
template <class X, class T>
inline double evaluate_row(const GlmPointArgs<X, T>& args, const GlmColumns& columns, int64_t row, T* eta, T* y,
                           T* weight, T* curvature) {
    const GlmData<X, T>& data = args.data;
    const T w = weight_of(data, row);
    const bool labelled = data.labels.data != nullptr;
    double loss = 0.0;
    if (!labelled) {
        copy_targets<X, T>(data, row, columns.stride, y);
    }
    if (data.family == GlmFamily::softmax) {
        const int64_t label = labelled ? data.labels.data[row * data.labels.row] : 0;
        loss = evaluate_softmax<T>(data.k, columns.stride, eta, labelled ? nullptr : y, label, w, curvature);
    } else {
        for (int64_t c = 0; c < columns.stride; ++c) {
            weight[c] = c < data.k ? w : T(0);
        }
        loss = evaluate_family<T>(data.family, columns.stride, eta, y, weight, curvature);
    }
    for (int64_t c = 0; c < data.k && args.curvature != nullptr; ++c) {
        args.curvature[row * data.k + c] = curvature[c];
    }
    return loss;
}

}  // namespace onestep::glm::ONESTEP_NS
