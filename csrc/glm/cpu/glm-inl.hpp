// One piece of rows of a generalised linear model, tile by tile: a tile stays in the cache between its two products.
#pragma once

#include "glm/cpu/families-inl.hpp"
#include "glm/cpu/products-inl.hpp"

namespace onestep::glm::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// How the work memory of a piece is divided.
template <class T>
struct GlmWork {
    int64_t sizes[4];
    T* copy;  // a tile (a block, for a single right-hand side) of X, where it is not read in place
    T* z;     // the tile times the right-hand sides
    T* y;     // y, weight and curvature of the block's rows, or of one row
    T* weight;
    T* curvature;
    T* out;  // the tile's result for a single right-hand side

    template <class X>
    GlmWork(const GlmData<X, T>& data, const GlmColumns& columns) {
        const int64_t rows = columns.ld == 1 ? kBlockRows<T> : tile_rows(data);
        sizes[0] = read_in_place(data) ? 0 : rows * whole(data.d, kLanes<T>);
        sizes[1] = rows * columns.ld;
        sizes[2] = columns.ld == 1 ? rows : columns.stride;
        sizes[3] = whole(data.d, kLanes<T>);
    }

    template <class X>
    GlmWork(const GlmData<X, T>& data, const GlmColumns& columns, T* work) : GlmWork(data, columns) {
        copy = work;
        z = copy + sizes[0];
        y = z + sizes[1];
        weight = y + sizes[2];
        curvature = weight + sizes[2];
        out = curvature + sizes[2];
    }

    int64_t size() const { return sizes[0] + sizes[1] + 3 * sizes[2] + sizes[3]; }
};

template <class X, class T>
inline int64_t glm_work(const GlmData<X, T>& data, const GlmColumns& columns) {
    return GlmWork<T>(data, columns).size();
}

template <class X, class T>
inline void glm_pack(const GlmData<X, T>& data, const GlmColumns& columns, const T* from, int64_t group, int64_t row,
                     int64_t col, T* packed) {
    constexpr int64_t lanes = kLanes<T>;
    if (columns.ld == 1) {
        const RowVectors<X, T> vectors(data);
        for (int64_t q = 0; q < vectors.count; ++q) {
            const int64_t skipped = q == vectors.count - 1 ? vectors.overlap() : 0;
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t j = vectors.offset(q) + lane;
                packed[q * lanes + lane] = lane < skipped || j >= data.d ? T(0) : from[j * row];
            }
        }
        packed[vectors.count * lanes] = data.intercept ? from[data.d * row] : T(0);
        return;
    }
    // Where each column of a row comes from; -1: a column of zeros.
    const auto source = [&](int64_t column) {
        const int64_t g = column / columns.stride;
        const int64_t c = column % columns.stride;
        return g < columns.groups && c < columns.width ? g * group + c * col : int64_t{-1};
    };
    for (int64_t first = 0; first < columns.ld; first += kPanel<T>) {
        const int64_t wide = minimum(kPanel<T>, columns.ld - first);
        int64_t sources[kPanel<T>];
        for (int64_t c = 0; c < wide; ++c) {
            sources[c] = source(first + c);
        }
        for (int64_t j = 0; j < data.rows_of_w(); ++j) {
            T* to = j < data.d ? packed + first * data.d + j * wide : packed + data.d * columns.ld + first;
            for (int64_t c = 0; c < wide; ++c) {
                to[c] = sources[c] >= 0 ? from[j * row + sources[c]] : T(0);
            }
        }
    }
}

template <class X, class T>
inline double glm_point_rows(const GlmPointArgs<X, T>& args, const GlmColumns& columns, int64_t begin, int64_t end,
                             const T* packed, T* gradient, T* work) {
    const GlmData<X, T>& data = args.data;
    const GlmWork<T> buffer(data, columns, work);
    double loss = 0.0;
    if (columns.ld == 1) {
        single_rows<X, T>(
            data, begin, end, packed, gradient, buffer.copy, buffer.z, buffer.out, [&](int64_t at, int64_t rows, T* z) {
                for (int64_t i = 0; i < rows; ++i) {
                    buffer.y[i] = data.y.data[(at + i) * data.y.row];
                    buffer.weight[i] = weight_of(data, at + i);
                }
                for (int64_t i = rows; i < kBlockRows<T>; ++i) {
                    z[i] = buffer.y[i] = buffer.weight[i] = T(0);
                }
                loss += evaluate_family<T>(data.family, kBlockRows<T>, z, buffer.y, buffer.weight, buffer.curvature);
                for (int64_t i = 0; i < rows && args.curvature != nullptr; ++i) {
                    args.curvature[at + i] = buffer.curvature[i];
                }
            });
        return loss;
    }
    for (int64_t at = begin; at < end; at += tile_rows(data)) {
        const int64_t rows = minimum(tile_rows(data), end - at);
        const GlmTile<T> tile = take_tile<X, T>(data, at, rows, read_in_place(data), buffer.copy);
        multiply_block<X, T>(data, columns, tile, packed, buffer.z);
        for (int64_t i = 0; i < rows; ++i) {
            loss += evaluate_row<X, T>(args, columns, at + i, buffer.z + i * columns.ld, buffer.y, buffer.weight,
                                       buffer.curvature);
        }
        if (gradient != nullptr) {
            add_back<X, T>(data, columns, tile, buffer.z, gradient);
        }
    }
    return loss;
}

// z = C z for one row and every right-hand side. Whole vectors of the curvature are read; the elements after the row's
// end are multiplied by the zeros that pad z.
template <class X, class T>
inline void scale_row(const GlmData<X, T>& data, const GlmColumns& columns, int64_t row, const T* curvature, T* z) {
    if (columns.width == 1) {
        for (int64_t at = 0; at < columns.ld; at += kLanes<T>) {
            store<T>(z + at, load<T>(z + at) * curvature[0]);
        }
        return;
    }
    const T w = weight_of(data, row);
    for (int64_t group = 0; group < columns.groups; ++group, z += columns.stride) {
        if (data.family != GlmFamily::softmax) {
            for (int64_t at = 0; at < columns.stride; at += kLanes<T>) {
                store<T>(z + at, load<T>(z + at) * load<T>(curvature + at));
            }
            continue;
        }
        Vec<T> sum = {};
        for (int64_t at = 0; at < columns.stride; at += kLanes<T>) {
            sum += load<T>(z + at) * load<T>(curvature + at);
        }
        const T mean = sum_across<T>(sum);
        for (int64_t at = 0; at < columns.stride; at += kLanes<T>) {
            store<T>(z + at, w * load<T>(curvature + at) * (load<T>(z + at) - mean));
        }
    }
}

template <class X, class T>
inline void glm_product_rows(const GlmProductArgs<X, T>& args, const GlmColumns& columns, int64_t begin, int64_t end,
                             const T* packed, T* product, T* work) {
    const GlmData<X, T>& data = args.data;
    const GlmWork<T> buffer(data, columns, work);
    if (columns.ld == 1) {
        single_rows<X, T>(data, begin, end, packed, product, buffer.copy, buffer.z, buffer.out,
                          [&](int64_t at, int64_t, T* z) {
                              for (int r = 0; r < kBlockRows<T>; r += kLanes<T>) {
                                  store<T>(z + r, load<T>(z + r) * load<T>(args.curvature + at + r));
                              }
                          });
        return;
    }
    for (int64_t at = begin; at < end; at += tile_rows(data)) {
        const int64_t rows = minimum(tile_rows(data), end - at);
        const GlmTile<T> tile = take_tile<X, T>(data, at, rows, read_in_place(data), buffer.copy);
        const T* curvature = args.curvature + at * data.k;
        multiply_block<X, T>(data, columns, tile, packed, buffer.z);
        for (int64_t i = 0; i < rows; ++i) {
            scale_row<X, T>(data, columns, at + i, curvature + i * data.k, buffer.z + i * columns.ld);
        }
        add_back<X, T>(data, columns, tile, buffer.z, product);
    }
}

}  // namespace onestep::glm::ONESTEP_NS
