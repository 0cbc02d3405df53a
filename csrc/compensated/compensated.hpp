// One layer of a network solved with the Gram matrix A of its inputs: factors of A and of A⁻¹, and the sweep that
// rounds or removes weights column by column and lets the columns to come make up for it.
//   inverse_cholesky  A⁻¹ = UᵀU, U upper, without the inverse: the Cholesky factor of A reversed, Ã = LLᵀ with
//                     Ã(i, j) = A(n−1−i, n−1−j), then L⁻¹, which reversed is U
//   unit_cholesky     A = R P² Rᵀ, R unit upper: L reversed, its columns over their diagonal elements P = 1 / diag U
//   compensated_sweep for each column j: q is what w_j becomes, e = (w_j − q) / U_jj, and w ← w − e U_j: in the columns
//                     after j. The output error Σ‖(W − Ŵ)x‖² grows by e² (Hassibi and Stork 1993; Frantar et al.
//                     2022-23). With R instead of U: w ← w + d R_j: in the columns after j, where d is w_j before the
//                     sweep, less q (LDLQ, Chee et al. 2023). Since U = P⁻¹R⁻¹, both give a column the same value by
//                     the time the sweep comes to it. Before that the values differ: those with R are of no use
// Instantiated for float and double.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

// What inverse_cholesky says of a matrix that is not finite; the order of a minor otherwise, or 0.
inline constexpr int32_t kNotFinite = -1;

template <class T>
struct InverseCholeskyArgs {
    BatchShape batch;
    int64_t n = 0;
    Batched<const T> a;        // n × n, of which the lower triangle is read
    Batched<const T> damping;  // times the mean of A's diagonal is added to the diagonal
    bool unit = false;         // R with P on its diagonal, not U
    T* factor = nullptr;       // row-major, zeros below the diagonal; NaN where info is not 0
    // 0; kNotFinite; or the order of the first trailing minor (the last features) that is not positive definite.
    int32_t* info = nullptr;
};
template <class T>
Status inverse_cholesky(const InverseCholeskyArgs<T>& args);

template <class T>
struct SweepArgs {
    int64_t rows = 0, columns = 0;
    const T* w = nullptr;       // W, rows × columns, contiguous
    T* swept = nullptr;         // Ŵ, likewise
    const T* factor = nullptr;  // U, or R with P on its diagonal, columns × columns, contiguous

    // The factor is R, which takes no inverse. Columns are not judged before they are reached then: no pruning, and
    // grids are given, or one is for all columns.
    bool unit = false;

    // Quantisation to code ∈ [0, 2^bits), q = scale (code − zero); bits = 0: none.
    int64_t bits = 0;
    bool symmetric = false;
    // Columns that share a scale; a grid is computed when the sweep comes to its first column.
    int64_t group_size = 1;
    // The group of each column, and its grid is given in scale and zero; null: column / group_size.
    const int64_t* group = nullptr;
    int64_t groups = 0;
    T* scale = nullptr;  // rows × groups
    T* zero = nullptr;
    uint8_t* codes = nullptr;  // rows × columns

    // Pruning by w² / U_jj²: a fraction of each block, all rows together; or all but `keep` of every `of` columns.
    double sparsity = 0.0;
    int64_t keep = 0, of = 0;

    double* error = nullptr;  // rows: Σ e²
};
template <class T>
Status compensated_sweep(const SweepArgs<T>& args);

// Columns that are finished before their changes go to all columns after them.
inline constexpr int64_t kSweepBlock = 128;

// The end of the block that starts at a column: no group of columns that are judged together is cut, but for groups of
// a grid that are longer than a block, which begin with one.
template <class T>
int64_t sweep_block_end(const SweepArgs<T>& args, int64_t start) {
    const auto whole = [](int64_t unit) { return std::max<int64_t>(kSweepBlock / unit, 1) * unit; };
    const bool grids = args.bits > 0 && args.group == nullptr;
    const int64_t unit = std::max<int64_t>(args.of, 1);
    if (!grids || args.group_size > kSweepBlock) {
        int64_t end = start + whole(unit);
        if (grids) {
            end = std::min(end, (start / args.group_size + 1) * args.group_size);
        }
        return std::min(end, args.columns);
    }
    return std::min(start + whole(args.group_size), args.columns);
}

// How many elements of a block of so many are removed.
inline int64_t sweep_removed(int64_t elements, double sparsity) {
    return static_cast<int64_t>(static_cast<double>(elements) * sparsity + 0.5);
}

// The same functions as plain loops: what the tests hold the tuned kernels against.
namespace reference {
template <class T>
Status inverse_cholesky(const InverseCholeskyArgs<T>& args);
template <class T>
Status compensated_sweep(const SweepArgs<T>& args);
}  // namespace reference

}  // namespace onestep
