// How the family's calls run on the CPU: a piece of work is a matrix, from beginning to end.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "normal/cpu/kernels.hpp"
#include "polar/cpu/kernels.hpp"

namespace onestep {

template <class T>
struct PolarPlan {
    const PolarKernels<T>* kernels = nullptr;
    const NormalKernels<T>* factor = nullptr;
    int64_t short_side = 0, long_side = 0;
    int64_t columns = 0;    // of the matrices of the short side's order: whole panels
    int64_t rows = 0;       // of these: whole tiles
    int64_t augmented = 0;  // columns of [A | 1]
    Layout layout;          // of the whole call: none

    // Of the thread that works on a matrix.
    Layout own_layout;
    Part<T> matrix;            // [A | 1], whose elimination leaves [L transposed | its inverse transposed]
    Part<T> a, b, other;       // A; its inverse; B² or the next inverse
    Part<T> product;           // P
    Part<T> inverse_diagonal;  // 1 / L_ii
    Part<T> floor;             // the least pivots
    Part<T> gram;              // a block of rows, packed for their Gram matrix
    Part<T> left, right;       // packed operands of products
    Part<T> scaled;            // M times a power of two
};

template <class T>
PolarPlan<T> plan(const PolarArgs<T>& args);

// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const PolarPlan<T>& plan, const PolarArgs<T>& args, const Workspace& workspace);

}  // namespace onestep
