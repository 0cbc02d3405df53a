// What one CPU target provides to the family: products with packed operands, and one block of columns of the sweep for
// some rows. Everything here is plain data.
#pragma once

#include <cstdint>

#include "base/target.hpp"
#include "compensated/compensated.hpp"

namespace onestep {

// Rows of W that are swept together: whole vectors of every target.
inline constexpr int64_t kSweepRows = 64;

// The errors that some rows' blocks of columns leave, and where they go to: w[:, end: until] −= e · right.
template <class T>
struct SweepErrors {
    T* block = nullptr;        // [column][kSweepRows], −e: of the block that is swept
    const T* first = nullptr;  // that of the first column of `depth` whose errors go on
    int64_t depth = 0;
    int64_t until = 0;
    const T* right = nullptr;  // those columns' rows of u, packed, from column `end` on
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
    // the errors do to columns behind them. Elements with w² / U_jj² up to `threshold` are removed. `work` holds
    // sweep_work elements.
    void (*sweep_block)(const SweepArgs<T>& args, int64_t begin, int64_t rows, int64_t start, int64_t end, T threshold,
                        const SweepErrors<T>& errors, T* work);
    int64_t (*sweep_work)(int64_t block);
};

ONESTEP_DECLARE_TABLE(compensated, f32, CompensatedKernels<float>)
ONESTEP_DECLARE_TABLE(compensated, f64, CompensatedKernels<double>)

}  // namespace onestep
