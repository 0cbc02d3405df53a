// Generalised linear models with many right-hand sides: the threads compute XV of a chunk of rows together, and then
// multiply it back a block of X's columns each, so that no thread has a result of its own to be added up.
#pragma once

#include "base/gemm-inl.hpp"
#include "glm/cpu/glm-inl.hpp"

namespace onestep::glm::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Inner dimension over which the left operand is packed at once, for the second-level cache.
template <class T>
inline constexpr int64_t kWideDepth = 4 * kGemmDepth<T>;

// Work memory. For XV: packed rows of X, and one row of z with its y, weight and curvature. For XᵀZ: packed columns of
// X and a panel of their product.
template <class X, class T>
inline int64_t wide_work(const GlmData<X, T>&, const GlmColumns& columns, const GlmChunk<T>& chunk) {
    const int64_t there = kWideTileRows * kWideDepth<T> + columns.ld + 3 * columns.stride;
    const int64_t back = round_up_to(chunk.block, kTileRows) * (kWideDepth<T> + kPanel<T>);
    return maximum(there, back);
}

// to += left · right for one panel of the right operand, `left` being packed in segments of `height` × kGemmDepth. A
// segment of the panel stays in the first-level cache while the tiles of the left pass by.
template <class T>
inline void multiply_wide_panel(int64_t rows, int64_t height, int64_t depth, const T* left, const T* right,
                                const ProductTiles<T>& to) {
    for (int64_t p = 0; p < depth; p += kGemmDepth<T>) {
        const int64_t length = minimum(kGemmDepth<T>, depth - p);
        multiply_panels<T>((rows + kTileRows - 1) / kTileRows, 1, 1, length,
                           LeftTiles<T>::packed(left + p * height, length), {right + p * kPanel<T>, 0, 0}, true, to);
    }
}

// Copies one row out of the chunk's panels into contiguous memory, or back.
template <class T>
inline void gather_row(const GlmChunk<T>& chunk, int64_t row, int64_t ld, T* to) {
    const T* from = chunk.z + row * kPanel<T>;
    for (int64_t at = 0; at < ld; at += kPanel<T>, from += chunk.height * kPanel<T>) {
        __builtin_memcpy(to + at, from, sizeof(T) * kPanel<T>);
    }
}

template <class T>
inline void scatter_row(const GlmChunk<T>& chunk, int64_t row, int64_t ld, const T* from) {
    T* to = chunk.z + row * kPanel<T>;
    for (int64_t at = 0; at < ld; at += kPanel<T>, to += chunk.height * kPanel<T>) {
        __builtin_memcpy(to, from + at, sizeof(T) * kPanel<T>);
    }
}

// z = XV for `count` rows of the chunk.
template <class X, class T>
inline void wide_multiply(const GlmData<X, T>& data, const GlmColumns& columns, const GlmChunk<T>& chunk, int64_t first,
                          int64_t count, const T* packed, T* left) {
    for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
        T* to = chunk.z + at * chunk.height + first * kPanel<T>;
        __builtin_memset(to, 0, sizeof(T) * static_cast<size_t>(count * kPanel<T>));
        for (int64_t i = 0; data.intercept && i < count; ++i) {
            __builtin_memcpy(to + i * kPanel<T>, packed + data.d * columns.ld + at, sizeof(T) * kPanel<T>);
        }
    }
    for (int64_t p = 0; p < data.d; p += kWideDepth<T>) {
        const int64_t depth = minimum(kWideDepth<T>, data.d - p);
        for (int64_t s = 0; s < depth; s += kGemmDepth<T>) {
            pack_rows<kTileRows, T>(StridedRows<X>{data.x.data, data.x.row}, chunk.begin + first, count, data.x.col,
                                    p + s, minimum(kGemmDepth<T>, depth - s), left + s * kWideTileRows);
        }
        for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
            multiply_wide_panel<T>(count, kWideTileRows, depth, left, packed + at * data.d + p * kPanel<T>,
                                   {chunk.z + at * chunk.height + first * kPanel<T>, kPanel<T>, 0, count, kPanel<T>});
        }
    }
}

template <class X, class T>
inline double wide_point(const GlmPointArgs<X, T>& args, const GlmColumns& columns, const GlmChunk<T>& chunk,
                         int64_t first, const T* packed, T* work) {
    const int64_t count = minimum(kWideTileRows, chunk.rows - first);
    T* row = work + kWideTileRows * kWideDepth<T>;
    T* y = row + columns.ld;
    T* weight = y + columns.stride;
    T* curvature = weight + columns.stride;
    wide_multiply<X, T>(args.data, columns, chunk, first, count, packed, work);
    double loss = 0.0;
    for (int64_t i = first; i < first + count; ++i) {
        gather_row<T>(chunk, i, columns.ld, row);
        loss += evaluate_row<X, T>(args, columns, chunk.begin + i, row, y, weight, curvature);
        scatter_row<T>(chunk, i, columns.ld, row);
    }
    return loss;
}

template <class X, class T>
inline void wide_product(const GlmProductArgs<X, T>& args, const GlmColumns& columns, const GlmChunk<T>& chunk,
                         int64_t first, const T* packed, T* work) {
    const int64_t count = minimum(kWideTileRows, chunk.rows - first);
    T* row = work + kWideTileRows * kWideDepth<T>;
    wide_multiply<X, T>(args.data, columns, chunk, first, count, packed, work);
    for (int64_t i = first; i < first + count; ++i) {
        gather_row<T>(chunk, i, columns.ld, row);
        scale_row<X, T>(args.data, columns, chunk.begin + i, args.curvature + (chunk.begin + i) * args.data.k, row);
        scatter_row<T>(chunk, i, columns.ld, row);
    }
}

template <class X, class T>
inline void wide_back(const GlmData<X, T>& data, const GlmColumns& columns, const GlmChunk<T>& chunk, int64_t unit,
                      double* total, T* work) {
    const int64_t first = unit * chunk.block;
    const int64_t count = minimum(chunk.block, data.d - first);
    if (count <= 0) {
        for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
            const T* z = chunk.z + at * chunk.height;
            double sums[kPanel<T>] = {};
            for (int64_t i = 0; i < chunk.rows; ++i) {
                for (int64_t j = 0; j < kPanel<T>; ++j) {
                    sums[j] += static_cast<double>(z[i * kPanel<T> + j]);
                }
            }
            for (int64_t j = 0; j < kPanel<T>; ++j) {
                total[data.d * columns.ld + at + j] += sums[j];
            }
        }
        return;
    }
    const int64_t height = round_up_to(count, kTileRows);
    T* left = work;
    T* product = left + height * kWideDepth<T>;
    for (int64_t p = 0; p < chunk.rows; p += kWideDepth<T>) {
        const int64_t depth = minimum(kWideDepth<T>, chunk.rows - p);
        for (int64_t s = 0; s < depth; s += kGemmDepth<T>) {
            pack_columns_of_rows<kTileRows, T>(StridedRows<X>{data.x.data, data.x.row}, chunk.begin + p + s,
                                               minimum(kGemmDepth<T>, depth - s), data.x.col, first, count,
                                               left + s * height);
        }
        for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
            __builtin_memset(product, 0, sizeof(T) * static_cast<size_t>(height * kPanel<T>));
            multiply_wide_panel<T>(count, height, depth, left, chunk.z + at * chunk.height + p * kPanel<T>,
                                   {product, kPanel<T>, 0, height, kPanel<T>});
            for (int64_t i = 0; i < count; ++i) {
                double* to = total + (first + i) * columns.ld + at;
                for (int64_t j = 0; j < kPanel<T>; ++j) {
                    to[j] += static_cast<double>(product[i * kPanel<T> + j]);
                }
            }
        }
    }
}

}  // namespace onestep::glm::ONESTEP_NS
