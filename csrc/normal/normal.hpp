// The normal-equations family: Gram matrices, Cholesky factors, and the solves that stand on them.
//
// Every function works on a batch of independent problems in float or double, reads its operands in place through their
// strides, and writes contiguous row-major results. A problem that fails is reported in its `info`. It cannot affect
// another one, because every problem is computed apart or in a vector lane of its own.
//
// Cholesky factors are stored as U with A = UᵀU, row-major; seen column-major that is LAPACK's lower L = Uᵀ.
//
// `info`, as LAPACK's xPOTRF: 0, or the 1-based order of the leading minor that is not positive definite; and one
// value more, d + 1: the factor exists but the solution is not finite (a NaN or Inf in the right-hand side, or
// overflow).
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

// Rows of bfloat16 or float16 that are read in place of x, and widened while they are packed; T is float then.
struct HalfRows {
    Element element = Element::float32;
    Batched<const uint16_t> rows;

    constexpr explicit operator bool() const { return is_half(element); }
};

// A = XᵀDX and R = XᵀDY, D = diag(weight).
template <class T>
struct GramArgs {
    BatchShape batch;
    int64_t n = 0, d = 0, k = 0;
    Batched<const T> x;       // n × d
    HalfRows x_half;          // likewise; see HalfRows
    Batched<const T> y;       // n × k
    Batched<const T> weight;  // n (row stride), or null for ones
    T* gram = nullptr;        // d × d, both triangles
    T* cross = nullptr;       // d × k
};
template <class T>
Status gram(const GramArgs<T>& args);

// Weighted means and (centred) second moments of one table, accumulated in double: S = Σ w (x − x̄)(x − x̄)ᵀ.
// Rows are centred on provisional means while they are loaded, so that a large offset does not cancel
// (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", 1983).
template <class T>
struct MomentsArgs {
    int64_t n = 0, d = 0, k = 0;
    Matrix<const T> x;
    HalfRows x_half;  // without batch dimensions
    Matrix<const T> y;
    Matrix<const T> weight;  // row stride; null data for ones
    bool center = false;
    double* gram = nullptr;        // d × d, both triangles
    double* cross = nullptr;       // d × k
    double* mean = nullptr;        // d + k; zeros unless `center`
    double* weight_sum = nullptr;  // 1
};
template <class T>
Status moments(const MomentsArgs<T>& args);

// W = (XᵀDX + diag(ridge))⁻¹ XᵀDY. Negative weights or penalties are refused before anything is computed.
template <class T>
struct SolveNormalArgs {
    BatchShape batch;
    int64_t n = 0, d = 0, k = 0;
    Batched<const T> x;       // n × d
    HalfRows x_half;          // likewise; see HalfRows
    Batched<const T> y;       // n × k
    Batched<const T> weight;  // n (row stride), or null for ones
    Batched<const T> ridge;   // d (row stride), or null for uniform_ridge
    double uniform_ridge = 0.0;
    int64_t refine = 0;     // steps of corrected semi-normal equations, residuals in double
    double jitter = 0.0;    // first multiple of mean(diag A) added to a failed problem, escalated tenfold; 0: never
    T* solution = nullptr;  // d × k
    T* factor = nullptr;    // d × d, U; may be null
    int32_t* info = nullptr;
    T* rcond = nullptr;     // estimate of 1 / (‖A‖₁ ‖A⁻¹‖₁); may be null
    T* jittered = nullptr;  // what was added to the diagonal; may be null
};
template <class T>
Status solve_normal(SolveNormalArgs<T> args);

// Ragged problems: problem b has the entries e from offsets[b] to offsets[b + 1], and entry e the row i(e) of X:
// W_b = (Σ w_e x_i(e) x_i(e)ᵀ + ½(base + baseᵀ) + diag(ridge_b))⁻¹ Σ w_e x_i(e) y_eᵀ. Offsets and indices are in range.
template <class T>
struct SolveSegmentsArgs {
    int64_t segments = 0, entries = 0, rows = 0, d = 0, k = 0;
    const int64_t* offsets = nullptr;  // segments + 1: from 0 to entries, none less than the one before
    const int64_t* indices = nullptr;  // entries: the rows of X; null: i(e) = e
    Matrix<const T> x;                 // rows × d
    Matrix<const T> y;                 // entries × k
    Matrix<const T> weight;            // entries (row stride), or null for ones
    Matrix<const T> base;              // d × d, or null for zeros
    Matrix<const T> ridge;             // segments × d, or null for uniform_ridge
    double uniform_ridge = 0.0;
    T* solution = nullptr;    // segments × d × k; NaN where it failed
    T* factor = nullptr;      // segments × d × d, U; may be null
    int32_t* info = nullptr;  // segments
};
template <class T>
Status solve_segments(const SolveSegmentsArgs<T>& args);

// Gradients of W for the cotangent `grad`: V = A⁻¹ grad, E = Y − XW,
// ∂X = D(EVᵀ − XVWᵀ), ∂Y = DXV, ∂weight = rowsum(XV∘E), ∂ridge = −rowsum(V∘W); zeros where info ≠ 0.
template <class T>
struct SolveNormalBackwardArgs {
    BatchShape batch;
    int64_t n = 0, d = 0, k = 0;
    Batched<const T> grad;      // d × k
    Batched<const T> x;         // n × d
    Batched<const T> y;         // n × k
    Batched<const T> weight;    // n (row stride), or null for ones
    Batched<const T> solution;  // d × k
    Batched<const T> factor;    // d × d, U
    Batched<const int32_t> info;
    T* grad_x = nullptr;       // n × d; may be null
    T* grad_y = nullptr;       // n × k; may be null
    T* grad_weight = nullptr;  // n; may be null
    T* grad_ridge = nullptr;   // d
};
template <class T>
Status solve_normal_backward(const SolveNormalBackwardArgs<T>& args);

// UᵀU = A, of which the lower triangle is read.
template <class T>
struct CholeskyArgs {
    BatchShape batch;
    int64_t d = 0;
    Batched<const T> a;   // d × d
    T* factor = nullptr;  // d × d, U; NaN where it failed
    int32_t* info = nullptr;
};
template <class T>
Status cholesky(const CholeskyArgs<T>& args);

// A⁻¹B from the factor.
template <class T>
struct CholeskySolveArgs {
    BatchShape batch;
    int64_t d = 0, k = 0;
    Batched<const T> factor;  // d × d, U (upper triangle read)
    Batched<const T> b;       // d × k
    T* solution = nullptr;    // d × k
};
template <class T>
Status cholesky_solve(const CholeskySolveArgs<T>& args);

// Factor and A⁻¹B in one call.
template <class T>
struct SolveSpdArgs {
    BatchShape batch;
    int64_t d = 0, k = 0;
    Batched<const T> a;     // d × d, lower triangle read
    Batched<const T> b;     // d × k
    T* solution = nullptr;  // d × k; NaN where it failed
    T* factor = nullptr;    // d × d, U; may be null
    int32_t* info = nullptr;
};
template <class T>
Status solve_spd(const SolveSpdArgs<T>& args);

// The same functions as plain loops: what the tests hold the tuned kernels against.
namespace reference {
template <class T>
Status gram(const GramArgs<T>& args);
template <class T>
Status moments(const MomentsArgs<T>& args);
template <class T>
Status solve_normal(SolveNormalArgs<T> args);
template <class T>
Status solve_segments(const SolveSegmentsArgs<T>& args);
template <class T>
Status solve_normal_backward(const SolveNormalBackwardArgs<T>& args);
template <class T>
Status cholesky(const CholeskyArgs<T>& args);
template <class T>
Status cholesky_solve(const CholeskySolveArgs<T>& args);
template <class T>
Status solve_spd(const SolveSpdArgs<T>& args);
}  // namespace reference

}  // namespace onestep
