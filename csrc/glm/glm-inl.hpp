// One piece of rows of a generalised linear model, by tiles that stay in the cache between their two products.
#pragma once

#include "base/math-inl.hpp"
#include "base/tile-inl.hpp"
#include "glm/kernels.hpp"

namespace onestep::ONESTEP_NS {

// Inner dimension over which a panel of the right-hand sides stays in the first-level cache.
inline constexpr int64_t kGlmDepth = 256;

template <class X, class T>
inline constexpr bool kSameType = sizeof(X) == sizeof(T);

// Whether tiles of X are read where they lie; else they are copied, widened and padded to whole vectors.
template <class X, class T>
inline bool read_in_place(const GlmData<X, T>& data) {
    return kSameType<X, T> && data.x.col == 1 && data.d >= kLanes<T>;
}

inline int64_t whole(int64_t count, int64_t lanes) { return (count + lanes - 1) / lanes * lanes; }

template <class X, class T>
inline int64_t tile_rows(const GlmData<X, T>& data) {
    const int64_t fitting = kTileBytes / (maximum(data.d, 1) * static_cast<int64_t>(sizeof(T)));
    return whole(minimum(maximum(fitting, kLanes<T>), kMostTileRows), kLanes<T>);
}

// A tile of rows of X: element (i, j) is data[i * row + j].
template <class T>
struct GlmTile {
    const T* data;
    int64_t row;
    int64_t rows;
};

template <class X, class T>
inline void copy_tile(const GlmData<X, T>& data, int64_t begin, int64_t rows, T* to, int64_t ld) {
    constexpr int64_t lanes = kLanes<T>;
    const X* from = data.x.data + begin * data.x.row;
    int64_t done = 0;  // columns that all rows have
    if (data.x.col == 1) {
        done = data.d / lanes * lanes;
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < done; j += lanes) {
                store<T>(to + i * ld + j, load_widened<T>(from + i * data.x.row + j));
            }
        }
    } else if (data.x.row == 1 && rows % lanes == 0) {
        done = data.d / lanes * lanes;
        for (int64_t i = 0; i < rows; i += lanes) {
            for (int64_t j = 0; j < done; j += lanes) {
                Vec<T> square[kLanes<T>];
                for (int64_t c = 0; c < lanes; ++c) {
                    square[c] = load_widened<T>(from + i + (j + c) * data.x.col);
                }
                transpose<T>(square);
                for (int64_t r = 0; r < lanes; ++r) {
                    store<T>(to + (i + r) * ld + j, square[r]);
                }
            }
        }
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = done; j < data.d; ++j) {
            to[i * ld + j] = widen(from[i * data.x.row + j * data.x.col]);
        }
        for (int64_t j = data.d; j < ld; ++j) {
            to[i * ld + j] = T(0);
        }
    }
}

template <class X, class T>
ONESTEP_INLINE GlmTile<T> take_tile(const GlmData<X, T>& data, int64_t begin, int64_t rows, bool in_place, T* copy) {
    if constexpr (kSameType<X, T>) {
        if (in_place) {
            return {data.x.data + begin * data.x.row, data.x.row, rows};
        }
    }
    const int64_t ld = whole(data.d, kLanes<T>);
    copy_tile<X, T>(data, begin, rows, copy, ld);
    return {copy, ld, rows};
}

// ------------------------------------------------------------------------------------------------- one right-hand side

// The columns of a row as vectors. If the last one is not full it lies over the end of the one before, which counts.
template <class X, class T>
struct RowVectors {
    int64_t count, last;

    explicit RowVectors(const GlmData<X, T>& data)
        : count((data.d + kLanes<T> - 1) / kLanes<T>),
          last(read_in_place(data) ? data.d - kLanes<T> : (count - 1) * kLanes<T>) {}

    int64_t offset(int64_t vector) const { return vector == count - 1 ? last : vector * kLanes<T>; }
    // Vectors in front of an overlapping one.
    int64_t apart() const { return overlap() == 0 ? count : count - 1; }
    // Elements at the front of the last vector that belong to the one before.
    int64_t overlap() const { return (count - 1) * kLanes<T> - last; }
};

// Rows of one block: they are multiplied both ways before the next ones are read.
template <class T>
inline constexpr int kBlockRows = kLanes<T> < 8 ? 8 : kLanes<T>;

// The rows of a block; past its end the last one is repeated. Meanwhile the next block is asked for in memory's order,
// half of it on the way there and half on the way back, so that memory never waits for arithmetic.
template <class T>
struct BlockRows {
    static constexpr int64_t kAskedPerVector = kBlockRows<T> * ONESTEP_VECTOR_BYTES / 2;

    const T* row[kBlockRows<T>];
    const char* next;
    int64_t asked;

    // `contiguous`: the next block follows in memory.
    BlockRows(const GlmTile<T>& tile, bool contiguous) {
        row[0] = tile.data;
        for (int r = 1; r < kBlockRows<T>; ++r) {
            row[r] = row[r - 1] + (r < tile.rows ? tile.row : 0);
        }
        next = reinterpret_cast<const char*>(contiguous ? tile.data + kBlockRows<T> * tile.row : tile.data);
        asked = contiguous ? kAskedPerVector : 0;
    }

    ONESTEP_INLINE void ask() {
#pragma GCC unroll 8
        for (int64_t byte = 0; byte < kAskedPerVector; byte += 64) {
            __builtin_prefetch(next + byte);
        }
        next += asked;
    }
};

// z[i] = x_i · v.
template <class X, class T>
ONESTEP_INLINE void multiply_rows(const RowVectors<X, T>& vectors, BlockRows<T>& block, const T* v, T intercept, T* z) {
    constexpr int lanes = kLanes<T>;
    constexpr int rows = kBlockRows<T>;
    Vec<T> sum[rows] = {};
    const auto add = [&](int64_t q, int64_t at) {
        const Vec<T> right = load<T>(v + q * lanes);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            sum[r] += load<T>(block.row[r] + at) * right;
        }
    };
    for (int64_t q = 0; q < vectors.apart(); ++q) {
        block.ask();
        add(q, q * lanes);
    }
    if (vectors.apart() < vectors.count) {
        add(vectors.count - 1, vectors.last);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r += lanes) {
        store<T>(z + r, sums_across<T>(sum + r) + intercept);
    }
}

// out += Σ_i z[i] x_i in the layout of v.
template <class X, class T>
ONESTEP_INLINE void add_rows(const RowVectors<X, T>& vectors, BlockRows<T>& block, const T* z, T* out) {
    constexpr int rows = kBlockRows<T>;
    Vec<T> scale[rows];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        scale[r] = broadcast<T>(z[r]);
    }
    const auto add = [&](int64_t q, int64_t at) {
        Vec<T> sums[2] = {load<T>(out + q * kLanes<T>), Vec<T>{}};
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            sums[r % 2] += scale[r] * load<T>(block.row[r] + at);
        }
        store<T>(out + q * kLanes<T>, sums[0] + sums[1]);
    };
    for (int64_t q = 0; q < vectors.apart(); ++q) {
        block.ask();
        add(q, q * kLanes<T>);
    }
    if (vectors.apart() < vectors.count) {
        add(vectors.count - 1, vectors.last);
    }
}

// product[j] += out, from the layout of v.
template <class X, class T>
inline void add_single(const GlmData<X, T>& data, const RowVectors<X, T>& vectors, const T* out, T* product) {
    for (int64_t q = 0; q < vectors.count; ++q) {
        const int64_t skipped = q == vectors.count - 1 ? vectors.overlap() : 0;
        for (int64_t lane = skipped; lane < minimum(kLanes<T>, data.d - vectors.offset(q)); ++lane) {
            product[vectors.offset(q) + lane] += out[q * kLanes<T> + lane];
        }
    }
}

// For rows [begin, end): z = Xv, which change(first, rows, z) makes to what is multiplied back and added to the
// product, unless that is null. Sums of kMostTileRows rows are added up, for the sake of their rounding. `z` and `out`
// are work memory, as is `copy`, where X is not read in place.
template <class X, class T, class Change>
inline void single_rows(const GlmData<X, T>& data, int64_t begin, int64_t end, const T* packed, T* product, T* copy,
                        T* z, T* out, const Change& change) {
    const RowVectors<X, T> vectors(data);
    const bool in_place = read_in_place(data);
    const bool contiguous = in_place && data.x.row == data.d;
    const T intercept = packed[vectors.count * kLanes<T>];
    const int64_t half = (end - begin + 2 * kBlockRows<T> - 1) / (2 * kBlockRows<T>);
    constexpr int64_t kPairs = kMostTileRows / kBlockRows<T> / 2;
    for (int64_t first = 0; first < half; first += kPairs) {
        for (int64_t q = 0; q < vectors.count; ++q) {
            store<T>(out + q * kLanes<T>, Vec<T>{});
        }
        Vec<T> ones = {};
        const int64_t last = 2 * minimum(first + kPairs, half);
        for (int64_t index = 2 * first; index < last; ++index) {
            const int64_t at = begin + (index / 2 + index % 2 * half) * kBlockRows<T>;
            if (at >= end) {
                continue;
            }
            const int64_t rows = minimum(kBlockRows<T>, end - at);
            BlockRows<T> block(take_tile<X, T>(data, at, rows, in_place, copy), contiguous);
            multiply_rows<X, T>(vectors, block, packed, intercept, z);
            change(at, rows, z);
            if (product == nullptr) {
                continue;
            }
            for (int64_t r = rows; r < kBlockRows<T>; ++r) {
                z[r] = T(0);
            }
            for (int r = 0; r < kBlockRows<T>; r += kLanes<T>) {
                ones += load<T>(z + r);
            }
            add_rows<X, T>(vectors, block, z, out);
        }
        if (product != nullptr) {
            add_single<X, T>(data, vectors, out, product);
            if (data.intercept) {
                product[data.d] += sum_across<T>(ones);
            }
        }
    }
}

// -------------------------------------------------------------------------------------------- several right-hand sides

// Tiles of a single vector of columns hold twice the rows, or too few sums would be under way at once.
template <class T>
inline void add_block(int64_t rows, int64_t vectors, int64_t depth, Broadcast<T> a, const T* b, int64_t b_depth, T* c,
                      int64_t c_row) {
    int64_t done = 0;
    if (vectors == 1) {
        for (; done + 2 * kTileRows <= rows; done += 2 * kTileRows) {
            update_tile<T, 2 * kTileRows, 1, 1>(depth, {a.data + done * a.row, a.row, a.depth}, b, b_depth,
                                                c + done * c_row, c_row);
        }
    }
    update_block<T, 1>(rows - done, vectors, depth, {a.data + done * a.row, a.row, a.depth}, b, b_depth,
                       c + done * c_row, c_row);
}

// z = X V over a tile; z is rows × ld.
template <class X, class T>
inline void multiply_block(const GlmData<X, T>& data, const GlmColumns& columns, const GlmTile<T>& tile,
                           const T* packed, T* z) {
    const T* ones = packed + data.d * columns.ld;
    for (int64_t i = 0; i < tile.rows; ++i) {
        for (int64_t q = 0; q < columns.ld; q += kLanes<T>) {
            store<T>(z + i * columns.ld + q, data.intercept ? load<T>(ones + q) : Vec<T>{});
        }
    }
    for (int64_t depth = 0; depth < data.d; depth += kGlmDepth) {
        for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
            const int64_t wide = minimum(kPanel<T>, columns.ld - at);
            add_block<T>(tile.rows, wide / kLanes<T>, minimum(kGlmDepth, data.d - depth),
                         {tile.data + depth, tile.row, 1}, packed + at * data.d + depth * wide, wide, z + at,
                         columns.ld);
        }
    }
}

// product += XᵀZ over a tile.
template <class X, class T>
inline void add_back(const GlmData<X, T>& data, const GlmColumns& columns, const GlmTile<T>& tile, const T* z,
                     T* product) {
    for (int64_t at = 0; at < columns.ld; at += kPanel<T>) {
        add_block<T>(data.d, minimum(kPanel<T>, columns.ld - at) / kLanes<T>, tile.rows, {tile.data, 1, tile.row},
                     z + at, columns.ld, product + at, columns.ld);
    }
    if (data.intercept) {
        T* ones = product + data.d * columns.ld;
        for (int64_t i = 0; i < tile.rows; ++i) {
            for (int64_t q = 0; q < columns.ld; q += kLanes<T>) {
                store<T>(ones + q, load<T>(ones + q) + load<T>(z + i * columns.ld + q));
            }
        }
    }
}

// -------------------------------------------------------------------------------------------------------------
// families

template <class T>
struct FamilyValue {
    Vec<T> loss, slope, curvature;
};

template <class T, GlmFamily Family>
ONESTEP_INLINE FamilyValue<T> family_value(Vec<T> eta, Vec<T> y, Vec<T> w) {
    if constexpr (Family == GlmFamily::gaussian) {
        const Vec<T> error = eta - y;
        return {w * error * error * T(0.5), w * error, w};
    } else if constexpr (Family == GlmFamily::poisson) {
        const Vec<T> mean = exp_lanes<T>(eta);
        return {w * (mean - y * eta), w * (mean - y), w * mean};
    } else {
        // With u = e^-|η| neither p nor 1 − p is a difference of nearly equal numbers.
        const Vec<T> u = exp_lanes<T>(-absolute_lanes<T>(eta));
        const Vec<T> large = T(1) / (u + T(1));
        const Vec<T> small = u * large;
        const Vec<T> p = eta < Vec<T>{} ? small : large;
        const Vec<T> not_p = eta < Vec<T>{} ? large : small;
        const Vec<T> log1p = log1p_unit_lanes<T>(u);
        const Vec<T> not_y = T(1) - y;
        // y softplus(−η) + (1 − y) softplus(η)
        const Vec<T> loss = log1p + (eta < Vec<T>{} ? -eta * y : eta * not_y);
        return {w * loss, w * (not_y * p - y * not_p), w * large * small};
    }
}

// Over `count` elements (whole vectors): eta becomes the slope; returns the loss.
template <class T, GlmFamily Family>
inline double evaluate_elements(int64_t count, T* eta, const T* y, const T* w, T* curvature) {
    Vec<T> loss = {};
    for (int64_t at = 0; at < count; at += kLanes<T>) {
        const FamilyValue<T> value = family_value<T, Family>(load<T>(eta + at), load<T>(y + at), load<T>(w + at));
        loss += value.loss;
        store<T>(eta + at, value.slope);
        store<T>(curvature + at, value.curvature);
    }
    return static_cast<double>(sum_across<T>(loss));
}

template <class T>
inline double evaluate_family(GlmFamily family, int64_t count, T* eta, const T* y, const T* w, T* curvature) {
    switch (family) {
        case GlmFamily::gaussian:
            return evaluate_elements<T, GlmFamily::gaussian>(count, eta, y, w, curvature);
        case GlmFamily::poisson:
            return evaluate_elements<T, GlmFamily::poisson>(count, eta, y, w, curvature);
        default:
            return evaluate_elements<T, GlmFamily::logistic>(count, eta, y, w, curvature);
    }
}

// One row under softmax: eta becomes the slope w(P − y), `probabilities` P; returns the loss.
template <class T>
inline double evaluate_softmax(int64_t classes, int64_t padded, T* eta, const T* y, int64_t label, T w,
                               T* probabilities) {
    for (int64_t c = classes; c < padded; ++c) {
        eta[c] = -Simd<T>::kMax;
    }
    Vec<T> most_lanes = load<T>(eta);
    for (int64_t at = kLanes<T>; at < padded; at += kLanes<T>) {
        most_lanes = maximum_lanes<T>(most_lanes, load<T>(eta + at));
    }
    const T most = maximum_across<T>(most_lanes);
    Vec<T> sum = {};
    for (int64_t at = 0; at < padded; at += kLanes<T>) {
        const Vec<T> power = exp_lanes<T>(load<T>(eta + at) - most);
        store<T>(probabilities + at, power);
        sum += power;
    }
    const T total = sum_across<T>(sum);
    const T log_total = logarithm(total);
    double loss = 0.0;
    if (y == nullptr) {
        loss = static_cast<double>(log_total + (most - eta[label]));
    } else {
        for (int64_t c = 0; c < classes; ++c) {
            loss += static_cast<double>(y[c] * (log_total + (most - eta[c])));
        }
    }
    const T scale = T(1) / total;
    for (int64_t at = 0; at < padded; at += kLanes<T>) {
        const Vec<T> p = load<T>(probabilities + at) * scale;
        store<T>(probabilities + at, p);
        store<T>(eta + at, w * (y == nullptr ? p : p - load<T>(y + at)));
    }
    if (y == nullptr) {
        // 1 − p as the sum of the others would be more exact still; the error here is an epsilon of w.
        eta[label] -= w;
    }
    return static_cast<double>(w) * loss;
}

template <class X, class T>
ONESTEP_INLINE T weight_of(const GlmData<X, T>& data, int64_t row) {
    return data.weight.data == nullptr ? T(1) : data.weight.data[row * data.weight.row];
}

// One row of y, and zeros up to whole vectors.
template <class X, class T>
inline void copy_targets(const GlmData<X, T>& data, int64_t row, int64_t padded, T* to) {
    for (int64_t c = 0; c < padded; ++c) {
        to[c] = c < data.k ? data.y.data[row * data.y.row + c * data.y.col] : T(0);
    }
}

// One row at which several outputs are: eta becomes the slope, and the curvature goes where it is asked for; returns
// the loss. `y`, `weight` and `curvature` hold columns.stride elements.
template <class X, class T>
inline double evaluate_row(const GlmPointArgs<X, T>& args, const GlmColumns& columns, int64_t row, T* eta, T* y,
                           T* weight, T* curvature) {
    const GlmData<X, T>& data = args.data;
    const T w = weight_of(data, row);
    const bool labelled = data.labels.data != nullptr;
    double loss = 0.0;
    if (!labelled) {
        copy_targets<X, T>(data, row, columns.stride, y);
    }
    if (data.family == GlmFamily::softmax) {
        const int64_t label = labelled ? data.labels.data[row * data.labels.row] : 0;
        loss = evaluate_softmax<T>(data.k, columns.stride, eta, labelled ? nullptr : y, label, w, curvature);
    } else {
        for (int64_t c = 0; c < columns.stride; ++c) {
            weight[c] = c < data.k ? w : T(0);
        }
        loss = evaluate_family<T>(data.family, columns.stride, eta, y, weight, curvature);
    }
    for (int64_t c = 0; c < data.k && args.curvature != nullptr; ++c) {
        args.curvature[row * data.k + c] = curvature[c];
    }
    return loss;
}

// ------------------------------------------------------------------------------------------------------ rows of a
// piece

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

// z = C z for one row and every right-hand side. What lies behind a row of the curvature meets columns of zeros.
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

}  // namespace onestep::ONESTEP_NS
