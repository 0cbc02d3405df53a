// How the family's calls run on the CPU: steps of columns, pieces of rows, and work memory.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "compensated/cpu/kernels.hpp"
#include "normal/cpu/plan.hpp"

namespace onestep {

template <class T>
struct InverseCholeskyPlan {
    const CompensatedKernels<T>* kernels = nullptr;
    const NormalKernels<T>* factor = nullptr;
    PackPlan<T> pack;  // of small matrices, one in each vector lane; not for R
    int64_t ld = 0, rows_padded = 0;
    Layout layout;  // of the whole call: none

    // Of the thread that works on a matrix.
    Layout own_layout;
    Part<T> matrix;            // L⁻¹ below the diagonal blocks that are done, Lᵀ and what is left of Ã above
    Part<T> floor;             // the least pivots
    Part<T> inverse_diagonal;  // 1 / L_ii
    Part<T> diagonal;          // the inverse of a diagonal block
    Part<T> right;             // the rows of a step, packed
    Part<int32_t> bad;         // for each block of rows, whether it holds NaN or infinity

    // Of the thread that updates a block of rows.
    Layout rows_layout;
    Part<T> left;
};

template <class T>
struct SweepPlan {
    const CompensatedKernels<T>* kernels = nullptr;
    FixedCut pieces;        // of rows
    int64_t run_width = 0;  // the most columns of a run of blocks
    Layout layout;
    int64_t ld = 0;
    Part<T> w;         // W as it is while it is swept
    Part<T> diagonal;  // the factor where a block of columns meets itself
    Part<T> right;     // rows of the factor, packed
    Part<T> changes;   // of a run, for each piece
    Part<T> scores;    // of a block, where a threshold is looked for
    Layout own_layout;
    Part<T> work;
};

template <class T>
InverseCholeskyPlan<T> plan(const InverseCholeskyArgs<T>& args);
template <class T>
SweepPlan<T> plan(const SweepArgs<T>& args);

// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const InverseCholeskyPlan<T>& plan, const InverseCholeskyArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const SweepPlan<T>& plan, const SweepArgs<T>& args, const Workspace& workspace);

}  // namespace onestep
