// What one CPU target provides to the family: products of strided matrices with packed operands. Plain data.
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/target.hpp"
#include "polar/polar.hpp"

namespace onestep {

template <class T>
struct PolarKernels {
    int64_t tile_rows;
    int64_t panel;

    // rows × depth of `from` as the left operand of a product, padded with zeros to whole tiles.
    void (*pack_left)(const Matrix<const T>& from, int64_t rows, int64_t depth, T* to);
    // depth × columns of `from` as the right operand: panels, the last padded with zeros.
    void (*pack_right)(const Matrix<const T>& from, int64_t depth, int64_t columns, T* to);
    // c (rows × columns) = left · right.
    void (*multiply)(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* c, int64_t ld);
    // The largest |x| of rows × columns; NaN or infinity where one is among them.
    T (*largest)(const Matrix<const T>& from, int64_t rows, int64_t columns);
};

ONESTEP_DECLARE_TABLE(polar, f32, PolarKernels<float>)

}  // namespace onestep
