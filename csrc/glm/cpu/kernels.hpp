// What one CPU target provides to glm.cpp: one piece of rows, and the packing of the right-hand sides.
#pragma once

#include "base/target.hpp"
#include "glm/glm.hpp"

namespace onestep {

// A tile has at most kMostTileRows rows. With several right-hand sides its part of X fits into kTileBytes.
inline constexpr int64_t kTileBytes = int64_t{64} << 10;
inline constexpr int64_t kMostTileRows = 64;

// How the columns of the right-hand sides lie in memory: `groups` of `width` columns, each padded to whole vectors if
// it is wider than one column; `ld` columns in all, also whole vectors.
struct GlmColumns {
    int64_t groups = 1, width = 1, stride = 1, ld = 1;

    // With more vectors of columns than this, columns are padded to whole panels and rows are processed in chunks.
    static constexpr int64_t kWideVectors = 12;
    bool wide = false;
};

// A chunk of rows: all threads compute its XV first, stored as panels of columns with `height` rows each, and then XᵀZ,
// which is cut into blocks of `block` columns of X.
template <class T>
struct GlmChunk {
    int64_t begin = 0, rows = 0, height = 0, block = 0;
    T* z = nullptr;
};
// Rows of one piece of the work on XV.
inline constexpr int64_t kWideTileRows = 64;

template <class X, class T>
struct GlmKernels {
    int64_t lanes, panel;

    // Elements of work memory for the rows functions.
    int64_t (*work)(const GlmData<X, T>& data, const GlmColumns& columns);

    // Packs the right-hand sides (group g at from.at(g), d (+ 1) × width) for the rows functions: (d + 1) × ld
    // elements.
    void (*pack)(const GlmData<X, T>& data, const GlmColumns& columns, const T* from, int64_t group, int64_t row,
                 int64_t col, T* packed);

    // Rows [begin, end): returns their loss; gradient (row-major (d + 1) × ld) += XᵀR unless null.
    double (*point_rows)(const GlmPointArgs<X, T>& args, const GlmColumns& columns, int64_t begin, int64_t end,
                         const T* packed, T* gradient, T* work);

    // Rows [begin, end): product (row-major (d + 1) × ld) += XᵀC(XV).
    void (*product_rows)(const GlmProductArgs<X, T>& args, const GlmColumns& columns, int64_t begin, int64_t end,
                         const T* packed, T* product, T* work);

    // The same for many columns. Rows [first, first + kWideTileRows) of a chunk: their slopes, with the loss returned,
    // or C(XV). Then for each block of X's columns, and one more for the intercept: total += Xᵀz.
    int64_t (*wide_work)(const GlmData<X, T>& data, const GlmColumns& columns, const GlmChunk<T>& chunk);
    double (*wide_point)(const GlmPointArgs<X, T>& args, const GlmColumns& columns, const GlmChunk<T>& chunk,
                         int64_t first, const T* packed, T* work);
    void (*wide_product)(const GlmProductArgs<X, T>& args, const GlmColumns& columns, const GlmChunk<T>& chunk,
                         int64_t first, const T* packed, T* work);
    void (*wide_back)(const GlmData<X, T>& data, const GlmColumns& columns, const GlmChunk<T>& chunk, int64_t unit,
                      double* total, T* work);
};

ONESTEP_DECLARE_TABLE(glm, f32, GlmKernels<float, float>)
ONESTEP_DECLARE_TABLE(glm, f64, GlmKernels<double, double>)
ONESTEP_DECLARE_TABLE(glm, bf16, GlmKernels<BFloat16, float>)

}  // namespace onestep
