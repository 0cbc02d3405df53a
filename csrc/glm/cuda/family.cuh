// The GLM families on a device: loss, slope and curvature of one output, and the checks of what a row holds.
//
// A target that the family does not know, or a negative weight, turns its row into NaN, which the results inherit; the
// status says which it was. No kernel waits for the host to look.
#pragma once

#include <cmath>

#include "base/cuda/device.cuh"
#include "glm/cuda/glm.hpp"

namespace onestep::glm::cuda {

// How far the probabilities of a row may be from a sum of 1; as in ops/glm.
inline constexpr double kSumTolerance = 1e-3;

template <class T>
__device__ T not_a_number() {
    return static_cast<T>(NAN);
}

// GlmData::rows_of_w, on the device too.
template <class X, class T>
__host__ __device__ int64_t height_of(const GlmData<X, T>& data) {
    return data.d + (data.intercept ? 1 : 0);
}

template <class T>
struct Terms {
    T loss, slope, curvature;
};

// ℓ, ℓ′ and ℓ″ of a family that acts on each output apart, times the row's weight.
template <class T>
__device__ Terms<T> terms(GlmFamily family, T eta, T y, T weight) {
    if (family == GlmFamily::gaussian) {
        const T error = eta - y;
        return {T(0.5) * weight * error * error, weight * error, weight};
    }
    if (family == GlmFamily::poisson) {
        const T rate = std::exp(eta);
        return {weight * (rate - y * eta), weight * (rate - y), weight * rate};
    }
    // t = exp(−|η|) cannot overflow; p = 1/(1 + t) or t/(1 + t).
    const T t = std::exp(-std::fabs(eta));
    const T larger = T(1) / (T(1) + t);
    const T p = eta >= T(0) ? larger : t * larger;
    return {weight * ((eta > T(0) ? eta : T(0)) + std::log1p(t) - y * eta), weight * (p - y),
            weight * (t * larger * larger)};
}

// Whether the family knows this target. NaN compares false. Of softmax it is an entry of a row of probabilities.
template <class T>
__device__ bool knows(GlmFamily family, T y) {
    switch (family) {
        case GlmFamily::gaussian:
            return y - y == T(0);
        case GlmFamily::poisson:
            return y >= T(0) && y - y == T(0);
        default:
            return y >= T(0) && y <= T(1);
    }
}

// A row's weight: NaN for a negative one, which goes into the status.
template <class X, class T>
__device__ T checked_weight(const GlmData<X, T>& data, int64_t row, int& status) {
    if (data.weight.data == nullptr) {
        return T(1);
    }
    const T weight = data.weight.data[row * data.weight.row];
    if (weight < T(0)) {
        status = max(status, static_cast<int>(GlmInfo::negative_weight));
        return not_a_number<T>();
    }
    return weight;
}

// Target (row, column) of a family that acts on each output apart: NaN for one that it does not know.
template <class X, class T>
__device__ T checked_target(const GlmData<X, T>& data, int64_t row, int64_t column, int& status) {
    const T y = data.y.data[row * data.y.row + column * data.y.col];
    if (!knows(data.family, y)) {
        status = max(status, static_cast<int>(GlmInfo::bad_target));
        return not_a_number<T>();
    }
    return y;
}

}  // namespace onestep::glm::cuda
