// The tile GEMM that Gram, factorisations and solves are made of: an M × (NV vectors) block of sums of outer products,
// held in registers over the whole inner dimension.
#pragma once

#include "base/simd-inl.hpp"

namespace onestep::ONESTEP_NS {

// Register block of kTileRows × kPanel accumulators: 16 registers hold 4×3 vectors with room for three operands and a
// broadcast, 32 registers hold 8×3. Tiles must not straddle panels, hence 4×2 where three vectors are 6 columns wide.
inline constexpr int kTileRows = ONESTEP_VECTOR_BYTES == 64 ? 8 : 4;
template <class T>
inline constexpr int kTileVectors = 3 * kLanes<T> % kTileRows == 0 ? 3 : 2;
template <class T>
inline constexpr int kPanel = kTileVectors<T> * kLanes<T>;
// Loops over the rows of a tile are unrolled this often, the number in the pragmas below: accumulators of a loop that
// is not unrolled in full live in memory, with a load and a store for each FMA.
inline constexpr int kUnrolledRows = 16;

// An operand whose elements are broadcast: element (i, p) is data[i * row + p * depth].
template <class T>
struct Broadcast {
    const T* data;
    int64_t row;
    int64_t depth;
};

// acc[i][v] += Σ_p a(i, p) · b[p * b_depth + v * lanes ...], p in [0, depth).
template <class T, int M, int NV>
ONESTEP_INLINE void multiply_tile(int64_t depth, Broadcast<T> a, const T* b, int64_t b_depth, Vec<T> (&acc)[M][NV]) {
    static_assert(M <= kUnrolledRows && NV <= 4);
    const T* a_at = a.data;
    for (int64_t p = 0; p < depth; ++p) {
        Vec<T> row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            row[v] = load<T>(b + v * kLanes<T>);
        }
#pragma GCC unroll 16
        for (int i = 0; i < M; ++i) {
            const Vec<T> scale = broadcast<T>(a_at[i * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                acc[i][v] += scale * row[v];
            }
        }
        a_at += a.depth;
        b += b_depth;
    }
}

// c[i][v] = c + sign · Σ_p a(i, p) b(p, v) over one tile of row-major c.
template <class T, int M, int NV, int Sign>
ONESTEP_INLINE void update_tile(int64_t depth, Broadcast<T> a, const T* b, int64_t b_depth, T* c, int64_t c_row) {
    Vec<T> acc[M][NV] = {};
    multiply_tile<T, M, NV>(depth, a, b, b_depth, acc);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            T* at = c + i * c_row + v * kLanes<T>;
            store<T>(at, Sign > 0 ? load<T>(at) + acc[i][v] : load<T>(at) - acc[i][v]);
        }
    }
}

// The same over `rows` × `vectors`, cut into tiles; for operands of any height and (padded) width.
template <class T, int M, int Sign>
ONESTEP_INLINE void update_tile_row(int64_t depth, Broadcast<T> a, const T* b, int64_t b_depth, T* c, int64_t c_row,
                                    int64_t vectors) {
    int64_t v = 0;
    for (; v + 3 <= vectors; v += 3) {
        update_tile<T, M, 3, Sign>(depth, a, b + v * kLanes<T>, b_depth, c + v * kLanes<T>, c_row);
    }
    if (vectors - v == 2) {
        update_tile<T, M, 2, Sign>(depth, a, b + v * kLanes<T>, b_depth, c + v * kLanes<T>, c_row);
    } else if (vectors - v == 1) {
        update_tile<T, M, 1, Sign>(depth, a, b + v * kLanes<T>, b_depth, c + v * kLanes<T>, c_row);
    }
}

template <class T, int Sign>
inline void update_block(int64_t rows, int64_t vectors, int64_t depth, Broadcast<T> a, const T* b, int64_t b_depth,
                         T* c, int64_t c_row) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        update_tile_row<T, kTileRows, Sign>(depth, {a.data + i * a.row, a.row, a.depth}, b, b_depth, c + i * c_row,
                                            c_row, vectors);
    }
    for (; i < rows; ++i) {
        update_tile_row<T, 1, Sign>(depth, {a.data + i * a.row, a.row, a.depth}, b, b_depth, c + i * c_row, c_row,
                                    vectors);
    }
}

}  // namespace onestep::ONESTEP_NS
