// The generalised-linear-model family: loss, gradient and Hessian-vector products of Σ wᵢ ℓ(ηᵢ, yᵢ), η = XW, in one
// pass over X each. A tile of rows is multiplied by the right-hand sides, put through the curvature, and multiplied
// back while it is in the cache; no n × d or n × d × k intermediate exists, and X is read in place through its strides.
//
//   family     ℓ(η, y)          curvature C                    kept per row
//   gaussian   ½(η − y)²        w                              w
//   logistic   log(1 + eᶯ) − yη w p(1 − p), p = 1/(1 + e⁻ᶯ)    w p(1 − p)
//   poisson    eᶯ − yη          w eᶯ                           w eᶯ
//   softmax    lse(η) − Σ yη    w (diag(P) − PPᵀ)              P
//
// A row of y sums to 1 under softmax. X is float, double, or BFloat16 with everything else in float. The first three
// act on each of k outputs apart. With `intercept`, X has one more column of ones at the end, which is not stored: W, V
// and the results have d + 1 rows.
#pragma once

#include <cstdint>

#include "base/bfloat16.hpp"
#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

enum class GlmFamily : int { gaussian = 0, logistic = 1, softmax = 2, poisson = 3 };

// Elements that the kernels may read (and ignore) behind a curvature of n × k.
inline constexpr int64_t kCurvatureSlack = 16;

template <class X, class T>
struct GlmData {
    GlmFamily family = GlmFamily::gaussian;
    bool intercept = false;
    int64_t n = 0, d = 0, k = 0;
    Matrix<const X> x;             // n × d
    Matrix<const T> weight;        // n (row stride); null data for ones
    Matrix<const T> y;             // n × k; null data where labels are given
    Matrix<const int64_t> labels;  // n (row stride), in [0, k): softmax; null data where y is given

    int64_t rows_of_w() const { return d + (intercept ? 1 : 0); }
};

// The loss at W, and on request its gradient XᵀR and the curvature there.
template <class X, class T>
struct GlmPointArgs {
    GlmData<X, T> data;
    Matrix<const T> w;       // d (+ 1) × k
    double* loss = nullptr;  // 1
    T* gradient = nullptr;   // d (+ 1) × k, or null
    T* curvature = nullptr;  // n × k and kCurvatureSlack more, or null
};
template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args);

// XᵀC(XV) for m right-hand sides V of shape d (+ 1) × k, with the curvature of a point; y is not read.
template <class X, class T>
struct GlmProductArgs {
    GlmData<X, T> data;
    const T* curvature = nullptr;
    int64_t m = 1;
    Batched<const T> v;    // m × d (+ 1) × k
    T* product = nullptr;  // m × d (+ 1) × k
};
template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args);

// The same functions as plain loops: what the tests hold the tuned kernels against.
namespace reference {
template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args);
template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args);
}  // namespace reference

}  // namespace onestep
