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

    // Where problem `index`, counted in row-major order, starts in an operand with these strides.
    constexpr int64_t offset(int64_t index, const int64_t (&strides)[kMaxBatchDims]) const {
        if (dims <= 1) {
            return index * strides[0];
        }
        int64_t result = 0;
        for (int dim = dims - 1; dim >= 0; --dim) {
            const int64_t rest = dim == 0 ? 0 : index / size[dim];
            result += (index - rest * size[dim]) * strides[dim];
            index = rest;
        }
        return result;
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
        return {data + shape.offset(index, batch), row, col};
    }
};

}  // namespace onestep
