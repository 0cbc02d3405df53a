// Batched operands read in place: a pointer, strides for rows and columns, and one stride per batch dimension.
#pragma once

#include <cstdint>

namespace onestep {

inline constexpr int kMaxBatchDims = 8;

// The broadcast batch shape that all operands of a call share.
struct BatchShape {
    int dims = 0;
    int64_t size[kMaxBatchDims] = {};

    constexpr int64_t count() const {
        int64_t total = 1;
        for (int dim = 0; dim < dims; ++dim) {
            total *= size[dim];
        }
        return total;
    }
};

// A strided matrix per problem. All strides count elements; a broadcast dimension has stride 0.
template <class T>
struct Matrix {
    T* data = nullptr;
    int64_t row = 0;
    int64_t col = 0;
};

template <class T>
struct Batched {
    T* data = nullptr;
    int64_t row = 0;
    int64_t col = 0;
    int64_t batch[kMaxBatchDims] = {};

    constexpr explicit operator bool() const { return data != nullptr; }

    // The matrix of problem `index`, counted in row-major order over the batch shape.
    constexpr Matrix<T> at(const BatchShape& shape, int64_t index) const {
        if (data == nullptr) {
            return {};
        }
        if (shape.dims <= 1) {
            return {data + index * batch[0], row, col};
        }
        int64_t offset = 0;
        for (int dim = shape.dims - 1; dim >= 0; --dim) {
            const int64_t rest = dim == 0 ? 0 : index / shape.size[dim];
            offset += (index - rest * shape.size[dim]) * batch[dim];
            index = rest;
        }
        return {data + offset, row, col};
    }
};

}  // namespace onestep
