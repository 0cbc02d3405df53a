// Tiles of an attention head: packed into fp32 or fp64, multiplied, masked.
#pragma once

#include "attention/cpu/kernels.hpp"
#include "base/math-inl.hpp"
#include "base/tile-inl.hpp"
#include "base/work-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
ONESTEP_INLINE int64_t whole_vectors(int64_t count) {
    return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// The address of element (row, col) of a slice.
template <class E>
ONESTEP_INLINE const E* element(const AttentionSlice& slice, int64_t row, int64_t col) {
    return static_cast<const E*>(slice.data) + row * slice.row + col * slice.col;
}

// pack_rows for elements of type E.
template <class T, class E>
inline void pack_rows_of(const E* from, int64_t row, int64_t col, int64_t rows, int64_t cols, T factor, T* to,
                         int64_t ld) {
    for (int64_t r = 0; r < rows; ++r) {
        const E* source = from + r * row;
        T* target = to + r * ld;
        int64_t c = 0;
        if (col == 1) {
            for (; c + kLanes<T> <= cols; c += kLanes<T>) {
                store<T>(target + c, load_widened<T>(source + c) * factor);
            }
        }
        for (; c < cols; ++c) {
            target[c] = static_cast<T>(widen(source[c * col])) * factor;
        }
        for (; c < ld; ++c) {
            target[c] = T(0);
        }
    }
}

// pack_columns for elements of type E. Whole squares of kLanes × kLanes are transposed in registers.
template <class T, class E>
inline void pack_columns_of(const E* from, int64_t row, int64_t col, int64_t rows, int64_t cols, T factor, T* to,
                            int64_t ld) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t square_rows = col == 1 ? rows / lanes * lanes : 0;
    const int64_t square_cols = cols / lanes * lanes;
    for (int64_t r = 0; r < square_rows; r += lanes) {
        for (int64_t c = 0; c < square_cols; c += lanes) {
            Vec<T> square[lanes];
#pragma GCC unroll 16
            for (int64_t lane = 0; lane < lanes; ++lane) {
                square[lane] = load_widened<T>(from + (r + lane) * row + c) * factor;
            }
            transpose<T>(square);
#pragma GCC unroll 16
            for (int64_t lane = 0; lane < lanes; ++lane) {
                store<T>(to + (c + lane) * ld + r, square[lane]);
            }
        }
    }
    for (int64_t c = 0; c < cols; ++c) {
        const E* source = from + c * col;
        T* target = to + c * ld;
        int64_t r = c < square_cols ? square_rows : 0;
        if (row == 1) {
            for (; r + lanes <= rows; r += lanes) {
                store<T>(target + r, load_widened<T>(source + r) * factor);
            }
        }
        for (; r < rows; ++r) {
            target[r] = static_cast<T>(widen(source[r * row])) * factor;
        }
        for (; r < ld; ++r) {
            target[r] = T(0);
        }
    }
}

// to[r][c] = factor · slice(row + r, col + c), widened to T. Rows of `to` have `ld` elements; those past `cols` are
// zero.
template <class T>
inline void pack_rows(const AttentionSlice& slice, int64_t row, int64_t col, int64_t rows, int64_t cols, T factor,
                      T* to, int64_t ld) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (slice.element == Element::bfloat16) {
            pack_rows_of<T>(element<BFloat16>(slice, row, col), slice.row, slice.col, rows, cols, factor, to, ld);
            return;
        }
    }
    pack_rows_of<T>(element<T>(slice, row, col), slice.row, slice.col, rows, cols, factor, to, ld);
}

// The transpose: to[c][r] = factor · slice(row + r, col + c). Rows of `to` have `ld` elements; those past `rows` are
// zero.
template <class T>
inline void pack_columns(const AttentionSlice& slice, int64_t row, int64_t col, int64_t rows, int64_t cols, T factor,
                         T* to, int64_t ld) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (slice.element == Element::bfloat16) {
            pack_columns_of<T>(element<BFloat16>(slice, row, col), slice.row, slice.col, rows, cols, factor, to, ld);
            return;
        }
    }
    pack_columns_of<T>(element<T>(slice, row, col), slice.row, slice.col, rows, cols, factor, to, ld);
}

// A sum of up to two products A·B of the same depth: c (+)= Σ_t Σ_p a[t](i, p) · b[t][p][·]. Two, since the tangent of
// a product is such a sum.
template <class T>
struct Products {
    int64_t depth;
    int64_t b_depth;
    int count = 0;
    Broadcast<T> a[2] = {};
    const T* b[2] = {};

    Products(int64_t depth_, int64_t b_depth_) : depth(depth_), b_depth(b_depth_) {}
    // A product with an absent operand is zero.
    void add(Broadcast<T> left, const T* right) {
        if (left.data != nullptr && right != nullptr) {
            a[count] = left;
            b[count] = right;
            ++count;
        }
    }
};

template <class T, bool Add, int M, int NV>
ONESTEP_INLINE void product_tile(const Products<T>& products, int64_t i, int64_t column, T* c, int64_t ldc) {
    Vec<T> acc[M][NV] = {};
    for (int term = 0; term < products.count; ++term) {
        const Broadcast<T>& a = products.a[term];
        multiply_tile<T, M, NV>(products.depth, {a.data + i * a.row, a.row, a.depth}, products.b[term] + column,
                                products.b_depth, acc);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            T* at = c + (i + m) * ldc + column + v * kLanes<T>;
            store<T>(at, Add ? load<T>(at) + acc[m][v] : acc[m][v]);
        }
    }
}

// All rows of a times NV vectors of columns of b, which stay in the first-level cache.
template <class T, bool Add, int NV>
inline void product_columns(int64_t rows, const Products<T>& products, int64_t column, T* c, int64_t ldc) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        product_tile<T, Add, kTileRows, NV>(products, i, column, c, ldc);
    }
    if (i + kTileRows / 2 <= rows) {
        product_tile<T, Add, kTileRows / 2, NV>(products, i, column, c, ldc);
        i += kTileRows / 2;
    }
    for (; i < rows; ++i) {
        product_tile<T, Add, 1, NV>(products, i, column, c, ldc);
    }
}

// c = Σ products over `rows` × `vectors`, or c += with Add.
template <class T, bool Add>
inline void multiply(int64_t rows, int64_t vectors, const Products<T>& products, T* c, int64_t ldc) {
    int64_t v = 0;
    for (; v + 3 <= vectors; v += 3) {
        product_columns<T, Add, 3>(rows, products, v * kLanes<T>, c, ldc);
    }
    if (vectors - v == 2) {
        product_columns<T, Add, 2>(rows, products, v * kLanes<T>, c, ldc);
    } else if (vectors - v == 1) {
        product_columns<T, Add, 1>(rows, products, v * kLanes<T>, c, ldc);
    }
}

// Whether the tile of queries [i, …) and keys [j, j + nj) holds anything that is added to the scores.
template <class T>
ONESTEP_INLINE bool is_masked(const AttentionHead<T>& head, int64_t i, int64_t j, int64_t nj) {
    return head.primal.mask.data != nullptr || (head.causal && j + nj - 1 > i);
}

// to[r][c] = what is added to the score of query i + r and key j + c: the mask, −∞ where the key is hidden.
template <class T>
inline void pack_mask(const AttentionHead<T>& head, int64_t i, int64_t j, int64_t ni, int64_t nj, T* to, int64_t ld) {
    const AttentionSlice& mask = head.primal.mask;
    const T hidden = -static_cast<T>(__builtin_inf());
    if (mask.data == nullptr) {
        __builtin_memset(to, 0, static_cast<size_t>(ni * ld) * sizeof(T));
    } else if (mask.element == Element::boolean) {
        for (int64_t r = 0; r < ni; ++r) {
            const uint8_t* seen = element<uint8_t>(mask, i + r, j);
            for (int64_t c = 0; c < nj; ++c) {
                to[r * ld + c] = seen[c * mask.col] != 0 ? T(0) : hidden;
            }
            for (int64_t c = nj; c < ld; ++c) {
                to[r * ld + c] = T(0);
            }
        }
    } else {
        pack_rows<T>(mask, i, j, ni, nj, T(1), to, ld);
    }
    if (head.causal) {
        for (int64_t r = 0; r < ni; ++r) {
            for (int64_t c = maximum(0, i + r + 1 - j); c < nj; ++c) {
                to[r * ld + c] = hidden;
            }
        }
    }
}

// The transpose of pack_mask's result: to[c][r]. `rows` is work memory for a tile.
template <class T>
inline void pack_mask_columns(const AttentionHead<T>& head, int64_t i, int64_t j, int64_t ni, int64_t nj, T* to,
                              int64_t ld, T* rows) {
    const int64_t width = whole_vectors<T>(nj);
    pack_mask<T>(head, i, j, ni, nj, rows, width);
    pack_columns_of<T>(rows, width, 1, ni, nj, T(1), to, ld);
}

// to += from; `count` is of whole vectors.
template <class T>
inline void add_tile(int64_t count, const T* from, T* to) {
    for (int64_t e = 0; e < count; e += kLanes<T>) {
        store<T>(to + e, load<T>(to + e) + load<T>(from + e));
    }
}

// L of a query as a sum of two T: rounded to one, L would be off for all probabilities of the row. +∞ if the query sees
// no key, so that exp(S − L) is 0 for every key.
template <class T>
struct Shift {
    T high, low;
};

template <class T>
ONESTEP_INLINE Shift<T> shift_of(const AttentionSlice& slice, int64_t row) {
    const double lse = *element<double>(slice, row, 0);
    if (lse == -__builtin_inf()) {
        return {static_cast<T>(__builtin_inf()), T(0)};
    }
    const T high = static_cast<T>(lse);
    return {high, static_cast<T>(lse - static_cast<double>(high))};
}

// Elements of work memory that are enough for any kernel here. backward_keys for values and tangents takes the most:
// eight parts with rows of d elements (two sums, four of keys, two of queries), six with rows of dv, five tiles of
// scores. forward_rows takes fewer of these, and four values for each query. Each part, 19 at most, is rounded up to a
// cache line. The rest is to spare.
template <class T>
inline int64_t attention_work(int64_t d, int64_t dv, int64_t tile) {
    const int64_t features = 8 * whole_vectors<T>(d) + 7 * whole_vectors<T>(dv);
    return tile * (features + 6 * tile + 6) + 32 * Work<T>::rounded(1);
}

}  // namespace onestep::attention::ONESTEP_NS
