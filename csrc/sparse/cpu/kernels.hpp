// What one CPU target provides to sparse.cpp. Everything here is plain data.
#pragma once

#include <cstdint>

#include "base/target.hpp"
#include "sparse/sparse.hpp"

namespace onestep {

template <class T>
struct SparseKernels {
    // Rows of V as the kernel reads them: k, or more, padded with zeros, where k columns are less than a vector.
    int64_t (*row_length)(int64_t k);
    // Rows [begin, end) of the product. `v` has rows of row_length(k) elements. False where an index is out of range.
    bool (*multiply)(const SparseMultiplyArgs<T>& args, const T* v, int64_t begin, int64_t end);
};

ONESTEP_DECLARE_TABLE(sparse, f32, SparseKernels<float>)
ONESTEP_DECLARE_TABLE(sparse, f64, SparseKernels<double>)

}  // namespace onestep
