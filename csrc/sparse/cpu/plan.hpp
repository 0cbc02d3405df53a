// How a product with a sparse matrix runs on the CPU: pieces of rows with about as many elements, and the padded V.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "sparse/cpu/kernels.hpp"

namespace onestep {

template <class T>
struct SparsePlan {
    const SparseKernels<T>* kernels = nullptr;
    int64_t first_element = 0;
    EvenCut elements;  // in pieces of rows that have about as many
    int64_t piece_nanoseconds = 0;
    int64_t row_length = 0;  // of V as the kernel reads it

    Layout layout;
    Part<T> padded;  // V with rows of row_length; empty where that is k
};

template <class T>
SparsePlan<T> plan(const SparseMultiplyArgs<T>& args);
// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const SparsePlan<T>& plan, const SparseMultiplyArgs<T>& args, const Workspace& workspace);

}  // namespace onestep
