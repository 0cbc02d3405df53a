// Cache-blocked matrix products on the tile GEMM: operands of any strides and of bfloat16 are packed into panels once
// and multiplied out of cache. Families choose the blocks, since they know what else is done to them there.
#pragma once

#include "base/math-inl.hpp"
#include "base/tile-inl.hpp"

namespace onestep::ONESTEP_NS {

// Inner dimension of one block: a right panel of this many rows fits a 32 KB first-level cache, next to a left tile.
template <class T>
inline constexpr int64_t kGemmDepth = 24576 / static_cast<int64_t>(sizeof(T)) / kPanel<T> / 8 * 8;

ONESTEP_INLINE int64_t round_up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Rows of a strided matrix, by their addresses.
template <class S>
struct StridedRows {
    const S* data;
    int64_t row;
    ONESTEP_INLINE const S* operator()(int64_t index) const { return data + index * row; }
};

template <class S>
struct ListedRows {
    const S* const* data;
    ONESTEP_INLINE const S* operator()(int64_t index) const { return data[index]; }
};

// Packs columns [first, first + depth) of the matrix rows [begin, begin + count) into panels of Width rows, for the
// left side of a product (or for the right side, transposed): to[i / Width][p][i % Width] = row(begin + i)[first + p].
// The last panel is padded with zeros. `step` is the stride along a row.
template <int Width, class T, class Rows>
inline void pack_rows(const Rows& rows, int64_t begin, int64_t count, int64_t step, int64_t first, int64_t depth,
                      T* to) {
    for (int64_t i = 0; i < count; i += Width) {
        const int64_t width = minimum(Width, count - i);
        if constexpr (Width <= kTileRows) {
            if (step == 1 && width == Width) {
                // A loop over rows inside one over columns: the compiler interleaves the rows in registers.
                decltype(rows(0)) from[Width];
                for (int j = 0; j < Width; ++j) {
                    from[j] = rows(begin + i + j) + first;
                }
                T* at = to + i * depth;
                for (int64_t p = 0; p < depth; ++p) {
#pragma GCC unroll 8
                    for (int j = 0; j < Width; ++j) {
                        at[p * Width + j] = widen(from[j][p]);
                    }
                }
                continue;
            }
        }
        for (int64_t j = 0; j < Width; ++j) {
            T* at = to + i * depth + j;
            if (j >= width) {
                for (int64_t p = 0; p < depth; ++p) {
                    at[p * Width] = T(0);
                }
                continue;
            }
            const auto* from = rows(begin + i + j) + first * step;
            if (step == 1) {
                for (int64_t p = 0; p < depth; ++p) {
                    at[p * Width] = widen(from[p]);
                }
            } else {
                for (int64_t p = 0; p < depth; ++p) {
                    at[p * Width] = widen(from[p * step]);
                }
            }
        }
    }
}

template <int Count, class S, class T>
ONESTEP_INLINE void copy_widened(const S* from, T* to) {
    if constexpr (std::is_same_v<S, T>) {
        __builtin_memcpy(to, from, sizeof(T) * Count);
    } else {
#pragma GCC unroll 48
        for (int j = 0; j < Count; ++j) {
            to[j] = widen(from[j]);
        }
    }
}

// Packs the transposed matrix: to[c / Width][p][c % Width] = row(begin + p)[first + c], c in [0, count).
template <int Width, class T, class Rows>
inline void pack_columns_of_rows(const Rows& rows, int64_t begin, int64_t depth, int64_t step, int64_t first,
                                 int64_t count, T* to) {
    // Several panels at a time, so that each cache line of a row is read once. The hardware does not prefetch here,
    // since rows are pages apart.
    constexpr int64_t kGroup = Width >= 16 ? Width : 16 / Width * Width;
    constexpr int64_t kAhead = 16;
    for (int64_t group = 0; group < count; group += kGroup) {
        const int64_t end = minimum(group + kGroup, count);
        const int64_t whole = step == 1 ? group + (end - group) / Width * Width : group;
        for (int64_t p = 0; p < depth; ++p) {
            const auto* from = rows(begin + p) + first * step;
            __builtin_prefetch(rows(begin + minimum(p + kAhead, depth - 1)) + (first + group) * step);
            T* at = to + p * Width;
            for (int64_t c = group; c < whole; c += Width) {
                copy_widened<Width>(from + c, at + c * depth);
            }
            for (int64_t c = whole; c < end; c += Width) {
                for (int64_t j = 0; j < Width; ++j) {
                    at[c * depth + j] = c + j < count ? widen(from[(c + j) * step]) : T(0);
                }
            }
        }
    }
}

// The left operand in tiles of kTileRows rows: element (i, p) of tile t and segment s of the inner dimension is
// data[t * tile + s * segment + i * row + p * depth].
template <class T>
struct LeftTiles {
    const T* data;
    int64_t tile;
    int64_t row;
    int64_t depth;
    int64_t segment;

    // As pack_rows and pack_columns_of_rows with Width = kTileRows leave it.
    static ONESTEP_INLINE LeftTiles packed(const T* data, int64_t depth) {
        return {data, depth * kTileRows, 1, kTileRows, 0};
    }
};

// The right operand in panels of kPanel columns: row p of segment s of panel q is data + q * panel + s * segment +
// p * kPanel.
template <class T>
struct RightPanels {
    const T* data;
    int64_t panel;
    int64_t segment;
};

// The result: element (i, j) of tile t and panel q is data[(t * kTileRows + i) * row + q * panel + j]. No more than
// `rows` × `columns` of it are written.
template <class T>
struct ProductTiles {
    T* data;
    int64_t row;
    int64_t panel;
    int64_t rows;
    int64_t columns;
};

template <class T, int NV>
ONESTEP_INLINE void add_to_row(const Vec<T> (&values)[NV], bool accumulate, T* to) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
        T* at = to + v * kLanes<T>;
        store<T>(at, accumulate ? load<T>(at) + values[v] : values[v]);
    }
}

// product = left · right, or added to it. The inner dimension has `segments` of `length`.
template <class T>
inline void multiply_panels(int64_t tiles, int64_t panels, int64_t segments, int64_t length, LeftTiles<T> left,
                            RightPanels<T> right, bool accumulate, ProductTiles<T> product) {
    constexpr int NV = kTileVectors<T>;
    for (int64_t q = 0; q < panels; ++q) {
        const int64_t columns = minimum(kPanel<T>, product.columns - q * kPanel<T>);
        for (int64_t t = 0; t < tiles; ++t) {
            T* to = product.data + t * kTileRows * product.row + q * product.panel;
            const int64_t rows = minimum(kTileRows, product.rows - t * kTileRows);
            for (int64_t i = 0; i < rows; ++i) {
                __builtin_prefetch(to + i * product.row, 1);
                __builtin_prefetch(to + i * product.row + columns - 1, 1);
            }
            Vec<T> acc[kTileRows][NV] = {};
            for (int64_t s = 0; s < segments; ++s) {
                multiply_tile<T, kTileRows, NV>(length,
                                                {left.data + t * left.tile + s * left.segment, left.row, left.depth},
                                                right.data + q * right.panel + s * right.segment, kPanel<T>, acc);
            }
            if (columns == kPanel<T> && rows == kTileRows) {
#pragma GCC unroll 8
                for (int i = 0; i < kTileRows; ++i) {
                    add_to_row<T, NV>(acc[i], accumulate, to + i * product.row);
                }
                continue;
            }
            alignas(ONESTEP_VECTOR_BYTES) T edge[kTileRows][kPanel<T>];
#pragma GCC unroll 8
            for (int i = 0; i < kTileRows; ++i) {
                add_to_row<T, NV>(acc[i], false, edge[i]);
            }
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < columns; ++j) {
                    T& at = to[i * product.row + j];
                    at = accumulate ? at + edge[i][j] : edge[i][j];
                }
            }
        }
    }
}

// c (rows × columns) = left · right, or added to it; both are packed whole, to tiles and to panels of depth `depth`.
template <class T>
inline void multiply_packed(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns,
                            bool accumulate, T* c, int64_t ld) {
    multiply_panels<T>(round_up_to(rows, kTileRows) / kTileRows, round_up_to(columns, kPanel<T>) / kPanel<T>, 1, depth,
                       LeftTiles<T>::packed(left, depth), {right, kPanel<T> * depth, 0}, accumulate,
                       {c, ld, kPanel<T>, rows, columns});
}

}  // namespace onestep::ONESTEP_NS
