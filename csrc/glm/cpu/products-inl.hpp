// The two products of a tile of rows of X: z = XV with one right-hand side or several, and XᵀZ after the curvature has
// changed z.
#pragma once

#include "base/math-inl.hpp"
#include "base/tile-inl.hpp"
#include "glm/cpu/kernels.hpp"

namespace onestep::glm::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Inner dimension over which a panel of the right-hand sides stays in the first-level cache.
inline constexpr int64_t kGlmDepth = 256;

template <class X, class T>
inline constexpr bool kSameType = sizeof(X) == sizeof(T);

// Whether tiles of X are read in place. Otherwise they are copied, widened and padded to whole vectors.
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

// The columns of a row as vectors. If the last vector is not full, it is moved left until it is, and overlaps the one
// before it; overlapping elements count for the one before.
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

// Rows of one block. A block is multiplied by v, and its transpose by z, before the next block is read.
template <class T>
inline constexpr int kBlockRows = kLanes<T> < 8 ? 8 : kLanes<T>;

// The rows of a block; past its end the last row is repeated. The next block is prefetched in the order of its
// addresses at the same time: half of it during the product with v, half during the product with z.
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

// For rows [begin, end): z = Xv; change(first, rows, z) replaces z in place; product += Xᵀz, unless `product` is null.
// The sum over rows is added to the product every kMostTileRows rows, which keeps rounding errors small. `z`, `out`
// and, where X is not read in place, `copy` are work memory.
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

// With one vector of columns, a tile has twice the rows: fewer accumulators would not hide the latency of an FMA.
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

}  // namespace onestep::glm::ONESTEP_NS
