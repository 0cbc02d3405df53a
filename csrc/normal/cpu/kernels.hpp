// What one CPU target provides to normal.cpp: tight loops on one problem (blocked) or one pack of problems (a problem
// per vector lane). Everything here is plain data, so that it can be shared between targets.
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/target.hpp"
#include "normal/normal.hpp"

namespace onestep {

// The largest problem that is solved one per vector lane, and the most lanes of any target.
inline constexpr int kMostLanes = 16;         // float under AVX-512
inline constexpr int64_t kPackFeatures = 32;  // d; beyond it a problem alone fills the vectors
inline constexpr int64_t kPackTargets = 16;   // k
inline constexpr int64_t kPackGradients = 4;  // k of gradients; beyond it the columns of one problem fill the vectors

// How rows are blocked.
inline constexpr int64_t kBlockRows = 128;  // rows that are packed at a time
inline constexpr int64_t kSlabRows = 4096;  // rows that are summed in T before they are added to a sum in double

// Rows of the factor that are computed before the rest of the matrix is updated.
inline constexpr int64_t kFactorRows = 96;

// One problem's rows. The columns of Z = [X | 1? | Y] less `shift`, times sqrt(weight), are what Gram sums over.
template <class T>
struct RowsArgs {
    int64_t d = 0, k = 0;
    bool ones = false;
    Matrix<const T> x;
    Element element = Element::float32;
    Matrix<const uint16_t> x_half;  // in place of x, if is_half(element)
    Matrix<const T> y;
    Matrix<const T> weight;          // null data: ones
    const T* shift = nullptr;        // one per column of Z, padded to whole panels; or null
    const int64_t* index = nullptr;  // the row of x that each row has; null: x is in order
};

// Rows of `ld` elements, whole vectors, that the entries of ragged problems name.
template <class T>
struct SegmentRows {
    const T* data = nullptr;
    int64_t ld = 0;
    int64_t entries = 0;
    const int64_t* index = nullptr;  // null: entry e names row e
};

// An operand of a pack: a matrix per lane, all with the same strides.
template <class T>
struct PackOperand {
    const T* data[kMostLanes];
    int64_t row = 0;
    int64_t col = 0;
    bool given = false;

    void set(int64_t lane, const Matrix<const T>& matrix) {
        data[lane] = matrix.data;
        row = matrix.row;
        col = matrix.col;
        given = matrix.data != nullptr;
    }
};

// Up to kMostLanes problems for one pack. Outputs that are not wanted are null; `clear` sets those of a lane to null.
template <class T>
struct PackArgs {
    int64_t n = 0, d = 0, k = 0;
    int64_t refine = 0;  // steps
    PackOperand<T> x, y, weight, ridge, a, b;
    T* widened = nullptr;  // memory for the lanes' x, where that is of 16 bits
    T* solution[kMostLanes];
    T* factor[kMostLanes];
    T* rcond[kMostLanes];
    int32_t* info[kMostLanes];
    T* gram[kMostLanes];  // of pack_gram_matrices, as is `cross`
    T* cross[kMostLanes];

    void clear(int64_t lane) {
        solution[lane] = factor[lane] = rcond[lane] = gram[lane] = cross[lane] = nullptr;
        info[lane] = nullptr;
    }
};

template <class T>
struct BackwardRowsArgs {
    int64_t d = 0, k = 0;
    Matrix<const T> x;
    Matrix<const T> y;
    Matrix<const T> weight;
    const T* solution = nullptr;  // d × k
    const T* adjoint = nullptr;   // V = A⁻¹ grad, d × k
    T* grad_x = nullptr;
    T* grad_y = nullptr;
    T* grad_weight = nullptr;
};

// Up to kMostLanes problems whose gradients one pack computes. Outputs that are not wanted are null, as are those of
// lanes beyond the last problem; the first lane always has a problem. Gradients of failed problems are zeros.
template <class T>
struct PackGradientArgs {
    int64_t n = 0, d = 0, k = 0;
    PackOperand<T> x, y, weight, solution, adjoint;
    bool failed[kMostLanes];
    T* grad_x[kMostLanes];
    T* grad_y[kMostLanes];
    T* grad_weight[kMostLanes];
    T* grad_ridge[kMostLanes];
};

template <class T>
struct NormalKernels {
    int64_t lanes;
    int64_t tile_rows;
    int64_t panel;

    // c += ZᵀZ over rows [begin, end), upper triangle in whole tiles: its columns in the panels [first, last), the
    // first of them at c. Rows are padded to whole tiles, ld is a multiple of the panel. `packed` holds kBlockRows ×
    // the columns up to the last.
    void (*gram_rows)(const RowsArgs<T>& args, int64_t begin, int64_t end, int64_t first, int64_t last, T* packed, T* c,
                      int64_t ld);

    // Upper factor of c in place, cut into three steps so that normal.cpp can share the wide ones among threads.
    // Rows [k0, k1) of the columns up to k1; returns 0 or the 1-based order of the failed minor. floor[i]: least pivot.
    int64_t (*factor_diagonal)(T* c, int64_t ld, int64_t k0, int64_t k1, const T* floor, T* inverse_diagonal);
    // Rows [k0, k1) of the columns [c0, c1), which start and end with a panel.
    void (*factor_panel)(T* c, int64_t ld, int64_t k0, int64_t k1, int64_t c0, int64_t c1, const T* inverse_diagonal);
    // Rows [k1, d) of the columns [c0, c1): c -= UᵀU over rows [k0, k1).
    void (*factor_update)(T* c, int64_t ld, int64_t k0, int64_t k1, int64_t d, int64_t c0, int64_t c1);

    // z = U⁻ᵀz, z = U⁻¹z; z is d × ldz, ldz whole vectors.
    void (*solve_transposed)(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* z, int64_t ldz);
    void (*solve_upper)(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* z, int64_t ldz);

    // Hager's and Higham's estimate of ‖A⁻¹‖₁ from the factor (LAPACK xLACN2). `work` holds d × lanes.
    T (*inverse_norm1)(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* work);

    // g += XᵀD(Y − XW) over rows [begin, end) in double; w and g are d × ldk with ldk = whole vectors of double, and
    // behind g lie as many low-order parts: the sum is g[0] + g[1] (for float input the low parts stay 0).
    // `work` holds kBlockRows × (d + ldk).
    void (*residual_rows)(const RowsArgs<T>& args, int64_t begin, int64_t end, const double* w, double* g, int64_t ldk,
                          double* work);

    // Rows [begin, end) of the gradients. `work` holds backward_work(d, k) elements.
    void (*backward_rows)(const BackwardRowsArgs<T>& args, int64_t begin, int64_t end, T* work);
    int64_t (*backward_work)(int64_t d, int64_t k);

    // to (contiguous) = rows × cols of 16-bit numbers; float alone.
    void (*widen_rows)(Element element, const Matrix<const uint16_t>& from, int64_t rows, int64_t cols, T* to);

    // Of ragged problems; see segments-inl.hpp.
    void (*multiply_rows)(int64_t rows, int64_t depth, const Matrix<const T>& a, const T* b, int64_t ldb, T* c);
    void (*dual_gram)(const SegmentRows<T>& rows, int64_t begin, int64_t n, const T* scale, T* packed, T* c,
                      int64_t ld);
    void (*dual_back)(const SegmentRows<T>& rows, int64_t begin, int64_t n, const T* scale, const T* a, int64_t step,
                      T* v);

    // Gram matrices of a pack of `lanes` problems, with the bits of gram_rows over all rows. `work` holds
    // pack_gram_work(d, k) elements.
    void (*pack_gram_matrices)(const PackArgs<T>& args, T* work);
    int64_t (*pack_gram_work)(int64_t d, int64_t k);

    // A pack of `lanes` problems. `work` holds pack_work(d, k, whether args.refine > 0) elements.
    void (*pack_solve_normal)(const PackArgs<T>& args, T* work);
    void (*pack_solve_spd)(const PackArgs<T>& args, T* work);       // k = 0 and null solutions: the factor alone
    void (*pack_cholesky_solve)(const PackArgs<T>& args, T* work);  // args.a holds U
    int64_t (*pack_work)(int64_t d, int64_t k, bool refines);

    // The factors of inverses, reversed as compensated/compensated.hpp has them, of a pack of `lanes` matrices args.a
    // with the damping args.ridge. `work` holds pack_work(d, 0, false) elements; info −1: not finite.
    void (*pack_inverse)(const PackArgs<T>& args, T* work);

    // Gradients of a pack. `work` holds pack_gradient_work(d, k) elements.
    void (*pack_gradient)(const PackGradientArgs<T>& args, T* work);
    int64_t (*pack_gradient_work)(int64_t d, int64_t k);
};

// What the amx target does not share with avx512.
struct HalfGramKernels {
    // gram_rows of bfloat16 rows without weights, shift, ones or targets.
    decltype(NormalKernels<float>::gram_rows) gram_rows;
};

ONESTEP_DECLARE_TABLE(normal, f32, NormalKernels<float>)
ONESTEP_DECLARE_TABLE(normal, f64, NormalKernels<double>)
ONESTEP_DECLARE_TABLE(normal, bf16, HalfGramKernels)
ONESTEP_DECLARE_AMX_TABLE(normal, bf16, HalfGramKernels)

}  // namespace onestep
