// The compensated sweep on a CUDA device: what torch lacks for it, the columns of one block. What they hand on to the
// columns behind the block is a matrix product, and torch's; so are the factors (ops/compensated/cuda.py).
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "base/status.hpp"
#include "compensated/compensated.hpp"

namespace onestep::compensated::cuda {

using namespace onestep::cuda;

// Columns that a call takes.
inline constexpr int64_t kMostBlockColumns = 128;

// Columns [start, start + width) of W, to which all columns before them have handed on what they had to.
template <class T>
struct SweepBlockArgs {
    // `swept` holds W as it is; these columns of it become Ŵ. `error` is added to. `sparsity` is not read.
    SweepArgs<T> sweep;
    int64_t start = 0, width = 0;
    // Where an element is removed: of row r and column start + c, removed[r * removed_row + c] is not 0. Null: `of`
    // tells, whose runs lie within the block; with `of` = 0, too, nothing is removed.
    const uint8_t* removed = nullptr;
    int64_t removed_row = 0;
    // rows × width, rows kMostBlockColumns apart: what each element hands on, to be multiplied with the factor's rows
    // and added to the columns behind. Null: there are none.
    T* change = nullptr;
};
template <class T>
Status sweep_block(const SweepBlockArgs<T>& args, cudaStream_t stream);

}  // namespace onestep::compensated::cuda
