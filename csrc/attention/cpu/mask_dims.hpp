// How the gradient of a mask is laid out over problems and heads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/attention.hpp"

namespace onestep {

// The dimensions of a mask before its matrix: those of the batch, then heads. Over dimensions of stride 0 the mask is
// shared, and its gradient is a sum; the others are its own. The mask has `own` matrices, and each of them is shared by
// `shared` query heads.
struct MaskDims {
    int count = 0;  // of the dimensions
    int64_t size[kMaxBatchDims + 1];
    int64_t stride[kMaxBatchDims + 1];
    int64_t own = 1;
    int64_t shared = 1;

    template <class T>
    MaskDims(const BatchShape& batch, int64_t heads, const AttentionMaskGrad<T>& grad) : count(batch.dims + 1) {
        std::copy_n(batch.size, batch.dims, size);
        std::copy_n(grad.batch, batch.dims, stride);
        size[count - 1] = heads;
        stride[count - 1] = grad.head;
        for (int dim = 0; dim < count; ++dim) {
            (stride[dim] != 0 ? own : shared) *= size[dim];
        }
    }

    // Where the mask's own matrix `index` starts.
    int64_t offset(int64_t index) const {
        int64_t result = 0;
        for (int dim = count - 1; dim >= 0; --dim) {
            if (stride[dim] != 0) {
                result += index % size[dim] * stride[dim];
                index /= size[dim];
            }
        }
        return result;
    }

    // The query head, counted over all problems, that is number `member` of those that share the mask's matrix `index`.
    int64_t head(int64_t index, int64_t member) const {
        int64_t result = 0;
        int64_t step = 1;
        for (int dim = count - 1; dim >= 0; --dim) {
            int64_t& rest = stride[dim] != 0 ? index : member;
            result += rest % size[dim] * step;
            rest /= size[dim];
            step *= size[dim];
        }
        return result;
    }
};

}  // namespace onestep
