// How a GLM call runs on the CPU: the columns of its right-hand sides, how its rows are cut, and its work memory.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "glm/cpu/kernels.hpp"

namespace onestep {

template <class X, class T>
struct GlmPlan {
    const GlmKernels<X, T>* kernels = nullptr;
    GlmColumns columns;

    // Of the whole call.
    Layout layout;
    Part<T> packed;       // right-hand sides as the kernels read them
    Part<double> losses;  // one for each piece, or for each tile of rows

    // Few columns: every piece of rows has a partial result, and these are added up in order.
    FixedCut pieces;
    Part<T> partial;

    // Many columns: chunks of rows that all threads share, first XV and then XᵀZ.
    FixedCut chunks;
    GlmChunk<T> chunk;
    Part<T> z;
    Part<double> total;

    // Of the thread that works on a piece, a tile or a block.
    Layout own_layout;
    Part<T> work;

    int64_t height = 0;           // rows of W
    int64_t row_nanoseconds = 0;  // about what one row takes, one way

    int64_t result_size() const { return height * columns.ld; }
};

template <class X, class T>
GlmPlan<X, T> plan(const GlmPointArgs<X, T>& args);
template <class X, class T>
GlmPlan<X, T> plan(const GlmProductArgs<X, T>& args);

// `workspace` holds plan.layout.bytes().
template <class X, class T>
Status run(const GlmPlan<X, T>& plan, const GlmPointArgs<X, T>& args, const Workspace& workspace);
template <class X, class T>
Status run(const GlmPlan<X, T>& plan, const GlmProductArgs<X, T>& args, const Workspace& workspace);

}  // namespace onestep
