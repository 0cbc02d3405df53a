// Products of a sparse matrix by rows (CSR): out = X V, X (n × d) with its elements in `values`, row r's at
// [offsets[r], offsets[r + 1]), in the columns `indices`. Elements may be in any order, and a column may come twice.
// A product with Xᵀ is one with the rows of Xᵀ.
//
// V (d × k) and out (n × k) are contiguous. Offsets and indices are of 64 bits where `wide`, else of 32.
// Instantiated for float and double.
#pragma once

#include <cstdint>

#include "base/status.hpp"

namespace onestep {

template <class T>
struct SparseMultiplyArgs {
    int64_t n = 0, d = 0, k = 0;
    int64_t elements = 0;           // of values and indices
    const void* offsets = nullptr;  // n + 1
    const void* indices = nullptr;
    bool wide = false;
    const T* values = nullptr;
    const T* v = nullptr;
    T* out = nullptr;
};

// Status::bad_index where offsets fall or leave [0, elements], or an index leaves [0, d): `out` is of no use then.
template <class T>
Status sparse_multiply(const SparseMultiplyArgs<T>& args);

// The same as plain loops: what the tests hold the tuned kernel against.
namespace reference {
template <class T>
Status sparse_multiply(const SparseMultiplyArgs<T>& args);
}  // namespace reference

}  // namespace onestep
