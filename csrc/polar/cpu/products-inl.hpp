// Products of strided matrices with packed operands, and the largest element of a matrix.
#pragma once

#include "base/gemm-inl.hpp"
#include "polar/cpu/kernels.hpp"

namespace onestep::polar::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Packs the matrix `from`, columns × depth if `transposed`, into panels of Width rows, along the stride that is 1.
template <int Width, class T>
inline void pack(const Matrix<const T>& from, int64_t count, int64_t depth, T* to) {
    if (from.row == 1 && from.col != 1) {
        pack_columns_of_rows<Width, T>(StridedRows<T>{from.data, from.col}, 0, depth, 1, 0, count, to);
    } else {
        pack_rows<Width, T>(StridedRows<T>{from.data, from.row}, 0, count, from.col, 0, depth, to);
    }
}

template <class T>
inline void pack_left(const Matrix<const T>& from, int64_t rows, int64_t depth, T* to) {
    pack<kTileRows, T>(from, rows, depth, to);
}

template <class T>
inline void pack_right(const Matrix<const T>& from, int64_t depth, int64_t columns, T* to) {
    pack<kPanel<T>, T>({from.data, from.col, from.row}, columns, depth, to);
}

template <class T>
inline void multiply(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* c, int64_t ld) {
    multiply_packed<T>(left, right, depth, rows, columns, false, c, ld);
}

template <class T>
inline T largest(const Matrix<const T>& from, int64_t rows, int64_t columns) {
    // Along the stride that is 1. Several maxima at a time; 0·x is NaN for NaN and infinity alone.
    const bool by_columns = from.row == 1 && from.col != 1;
    const int64_t lines = by_columns ? columns : rows;
    const int64_t length = by_columns ? rows : columns;
    const int64_t line = by_columns ? from.col : from.row;
    const int64_t step = by_columns ? from.row : from.col;
    Vec<T> most{};
    Vec<T> bad{};
    T rest_most = T(0);
    T rest_bad = T(0);
    for (int64_t i = 0; i < lines; ++i) {
        const T* at = from.data + i * line;
        const int64_t whole = step == 1 ? length / kLanes<T> * kLanes<T> : 0;
        for (int64_t j = 0; j < whole; j += kLanes<T>) {
            const Vec<T> value = load<T>(at + j);
            bad += value * Vec<T>{};
            most = maximum_lanes<T>(most, absolute_lanes<T>(value));
        }
        for (int64_t j = whole; j < length; ++j) {
            const T value = at[j * step];
            const T size = value < T(0) ? -value : value;
            rest_bad += value * T(0);
            rest_most = size > rest_most ? size : rest_most;
        }
    }
    for (int l = 0; l < kLanes<T>; ++l) {
        rest_bad += bad[l];
        rest_most = most[l] > rest_most ? most[l] : rest_most;
    }
    return rest_bad == T(0) ? rest_most : rest_bad;
}

}  // namespace onestep::polar::ONESTEP_NS
