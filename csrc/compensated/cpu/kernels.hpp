// What one CPU target provides to the family: products with packed operands, and one block of columns of the sweep for
// some rows. Everything here is plain data.
#pragma once

#include <cstdint>

#include "base/target.hpp"
#include "compensated/compensated.hpp"

namespace onestep {

// Rows of W that are swept together: whole vectors of every target.
inline constexpr int64_t kSweepRows = 64;

// What some rows' blocks of columns hand on, −e or d, and where it goes to: w[:, end: until] += changes · right.
template <class T>
struct SweepChanges {
    T* run = nullptr;  // of the columns of a run as the left operand of a product: tiles of `width` columns
    int64_t width = 0;
    int64_t block = 0;  // the place in the run of the block that is swept
    int64_t first = 0;  // that of the first column of `depth` whose changes go on
    int64_t depth = 0;
    int64_t until = 0;
    const T* right = nullptr;  // those columns' rows of the factor, packed, from column `end` on
};

// W as it is while it is swept, and the factor where a block of columns meets itself.
template <class T>
struct SweepMatrices {
    T* w = nullptr;
    int64_t ld = 0;
    const T* diagonal = nullptr;  // contiguous
};

template <class T>
struct CompensatedKernels {
    int64_t panel;

    // Rows [0, depth) of `from`, `columns` wide, as the right operand of a product: panels, the last padded with zeros.
    void (*pack_right)(const T* from, int64_t ld, int64_t depth, int64_t columns, T* to);
    // −fromᵀ as the left operand: `from` has `depth` rows, the product `rows`, padded with zeros to whole tiles.
    void (*pack_left)(const T* from, int64_t ld, int64_t depth, int64_t rows, T* to);
    // c (rows × columns) += left · right.
    void (*multiply_add)(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* c, int64_t ld);

    // Columns [start, end) of rows [begin, begin + rows), rows at most kSweepRows: Ŵ, codes, grids and errors; and what
    // they do to columns behind them. Elements with w² / U_jj² up to `threshold` are removed. `work` holds
    // sweep_work elements.
    void (*sweep_block)(const SweepArgs<T>& args, int64_t begin, int64_t rows, int64_t start, int64_t end, T threshold,
                        const SweepMatrices<T>& matrices, const SweepChanges<T>& changes, T* work);
    int64_t (*sweep_work)(int64_t block);
};

ONESTEP_DECLARE_TABLE(compensated, f32, CompensatedKernels<float>)
ONESTEP_DECLARE_TABLE(compensated, f64, CompensatedKernels<double>)

}  // namespace onestep
