// Operands read in place: a pointer, the element type, strides for rows and columns, and one stride for each batch
// dimension. All strides count elements; a broadcast dimension has stride 0. Null data: the operand is absent.
//
// The element type is a template parameter where it is one for all calls of a kernel (Matrix, Batched), and a tag where
// operands of one call may differ (HeadedOperand).
#pragma once

#include <cstdint>

#include "base/bfloat16.hpp"

namespace onestep {

// ops/operands.py has the same limit.
inline constexpr int kMaxBatchDims = 8;

// Element types of a tagged operand. ops/operands.py has the same numbers.
enum class Element : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, boolean = 4 };

// Bytes of an element.
constexpr int64_t size_of(Element element) {
    switch (element) {
        case Element::float32:
            return 4;
        case Element::float64:
            return 8;
        case Element::bfloat16:
        case Element::float16:
            return 2;
        case Element::boolean:
            break;
    }
    return 1;
}

constexpr bool is_half(Element element) { return element == Element::bfloat16 || element == Element::float16; }

// The tag of float, double or BFloat16.
template <class T>
inline constexpr Element kElement = Element::float32;
template <>
inline constexpr Element kElement<double> = Element::float64;
template <>
inline constexpr Element kElement<BFloat16> = Element::bfloat16;

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

// One matrix.
template <class T>
struct Matrix {
    T* data = nullptr;
    int64_t row = 0;
    int64_t col = 0;
};

// A matrix for each problem.
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

// A matrix for each problem and head, of an element type that is known at run time.
struct HeadedOperand {
    const void* data = nullptr;
    Element element = Element::float32;
    int64_t batch[kMaxBatchDims] = {};
    int64_t head = 0;
    int64_t row = 0;
    int64_t col = 0;

    constexpr explicit operator bool() const { return data != nullptr; }
};

}  // namespace onestep
