// The polar factor on a CUDA device: what torch lacks for it. The iteration (QDWH with Cholesky; Nakatsukasa, Bai and
// Gygi 2010) is X ← (b/c)X + (a − b/c)(I + cXXᵀ)⁻¹X; its products are torch's. Here are batches of the inverse, for
// orders to kMostInverseOrder; larger ones are made of blocks of that order (ops/polar/cuda.py).
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "base/status.hpp"

namespace onestep::polar::cuda {

using namespace onestep::cuda;

inline constexpr int64_t kMostInverseOrder = 128;

// inverse = A⁻¹ of symmetric positive definite matrices of order n, by symmetric Gauss-Jordan steps, whose pivots are
// the squared diagonal of the Cholesky factor. Rows are contiguous; A and the inverse may be the same memory.
template <class T>
struct SpdInverseArgs {
    int64_t batch = 0, n = 0;
    const T* a = nullptr;
    int64_t a_matrix = 0, a_row = 0;  // from a matrix to the next, and from a row to the next
    T* inverse = nullptr;
    int64_t inverse_matrix = 0, inverse_row = 0;
    // batch: stays, or if it is 0 becomes `offset` plus the 1-based order of the first pivot that is not positive and
    // finite. The inverse is NaN then.
    int* info = nullptr;
    int offset = 0;
};
template <class T>
Status spd_inverse(const SpdInverseArgs<T>& args, cudaStream_t stream);

}  // namespace onestep::polar::cuda
