// Small problems, one per vector lane: what all algorithms on vectors of problems share. Loads, stores, and the sums of
// products in register tiles.
#pragma once

#include "base/tile-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Rows of the packed block that Gram sums over, and its register tile: as many sums as registers hold beside a row of
// them and a factor.
inline constexpr int64_t kPackRows = 16;
inline constexpr int kPackTileRows = 4;
inline constexpr int kPackTileColumns = ONESTEP_VECTOR_BYTES == 64 ? 4 : 3;

ONESTEP_INLINE int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Scratch of a pack: the augmented matrix [A | R], which becomes [U | W], and buffers.
template <class T>
struct Pack {
    int64_t d, k, width;       // width of the rows of `a`: d + k, and at least the padded d
    Vec<T>* a;                 // padded d × width
    Vec<T>* rows;              // kPackRows × width
    Vec<T>* inverse_diagonal;  // d
    Vec<T>* floor;             // d
    Vec<T>* out;               // what is written, d × max(d, k)
    Mask<T> info{};

    static int64_t width_for(int64_t d, int64_t k) { return maximum(d + k, round_up(d, kPackTileRows)); }

    static int64_t size(int64_t d, int64_t k) { return round_up(d, kPackTileRows) * width_for(d, k); }

    static int64_t work(int64_t d, int64_t k) {
        return (size(d, k) + kPackRows * width_for(d, k) + 2 * d + d * maximum(d, k)) * kLanes<T>;
    }

    Pack(int64_t d_, int64_t k_, T* work) : d(d_), k(k_), width(width_for(d_, k_)) {
        a = reinterpret_cast<Vec<T>*>(work);
        rows = a + size(d, k);
        inverse_diagonal = rows + kPackRows * width;
        floor = inverse_diagonal + d;
        out = floor + d;
        for (int64_t e = 0; e < size(d, k); ++e) {
            a[e] = Vec<T>{};
        }
        // Loads fill the other columns.
        for (int64_t p = 0; p < kPackRows; ++p) {
            for (int64_t c = d + k; c < width; ++c) {
                rows[p * width + c] = Vec<T>{};
            }
        }
    }
};

// `count` elements with the given stride from every lane's problem, as vectors across the lanes.
template <class T>
inline void load_lanes(const PackOperand<T>& from, int64_t offset, int64_t stride, int64_t count, Vec<T>* to,
                       int64_t step) {
    int64_t e = 0;
    if (stride == 1) {
        for (; e + kLanes<T> <= count; e += kLanes<T>) {
            Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                square[lane] = load<T>(from.data[lane] + offset + e);
            }
            transpose<T>(square);
#pragma GCC unroll 16
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                to[(e + lane) * step] = square[lane];
            }
        }
    }
    for (; e < count; ++e) {
        alignas(ONESTEP_VECTOR_BYTES) T lanes[kLanes<T>];
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            lanes[lane] = from.data[lane][offset + e * stride];
        }
        to[e * step] = load<T>(lanes);
    }
}

// rows × cols that follow each other in every lane's matrix, loaded as one run: whole vectors, whatever row they are
// of.
template <class T>
inline void load_run(const PackOperand<T>& from, int64_t offset, int64_t rows, int64_t cols, Vec<T>* to,
                     int64_t width) {
    const int64_t whole = rows * cols / kLanes<T> * kLanes<T>;
    int64_t c = 0;
    for (int64_t e = 0; e < whole; e += kLanes<T>) {
        Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            square[lane] = load<T>(from.data[lane] + offset + e);
        }
        transpose<T>(square);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            to[c] = square[lane];
            if (++c == cols) {
                c = 0;
                to += width;
            }
        }
    }
    // What is left is the end of the last rows, element by element.
    for (int64_t e = whole; e < rows * cols; ++e) {
        load_lanes<T>(from, offset + e, 1, 1, to + c, 1);
        if (++c == cols) {
            c = 0;
            to += width;
        }
    }
}

// A block of rows × cols from every lane's matrix, read along whichever stride is 1.
template <class T>
inline void load_block(const PackOperand<T>& from, int64_t first_row, int64_t rows, int64_t cols, Vec<T>* to,
                       int64_t width) {
    const int64_t row = from.row;
    const int64_t col = from.col;
    if (row == 1 && (col != 1 || cols == 1)) {
        for (int64_t c = 0; c < cols; ++c) {
            load_lanes<T>(from, first_row * row + c * col, row, rows, to + c, width);
        }
    } else if (col == 1 && row == cols && cols % kLanes<T> != 0) {
        load_run<T>(from, first_row * row, rows, cols, to, width);
    } else {
        for (int64_t r = 0; r < rows; ++r) {
            load_lanes<T>(from, (first_row + r) * row, col, cols, to + r * width, 1);
        }
    }
}

// Writes `count` vectors as contiguous elements of every lane's output.
template <class T>
inline void store_lanes(const Vec<T>* from, int64_t count, T* const* to) {
    int64_t e = 0;
    for (; e + kLanes<T> <= count; e += kLanes<T>) {
        Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            square[lane] = from[e + lane];
        }
        transpose<T>(square);
#pragma GCC unroll 16
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            if (to[lane] != nullptr) {
                store<T>(to[lane] + e, square[lane]);
            }
        }
    }
    for (; e < count; ++e) {
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            if (to[lane] != nullptr) {
                to[lane][e] = from[e][lane];
            }
        }
    }
}

// How sums over rows that come a block at a time are cut: they begin at zero with the first block of a run, are kept in
// `kept`, which is as large as the matrix, while others follow, and are added to the matrix after the last one.
template <class T>
struct PackRun {
    bool first = true;
    bool last = true;
    Vec<T>* kept = nullptr;
};

// a[i + r][j + c] += Sign · Σ_p left[p][i + r] · left[p][j + c] over rows p of `left`.
template <class T, int Sign, int kColumns>
ONESTEP_INLINE void update_pack_tile(const Vec<T>* left, int64_t depth, int64_t width, int64_t i, int64_t j, Vec<T>* a,
                                     PackRun<T> run) {
    Vec<T> acc[kPackTileRows][kColumns] = {};
    if (!run.first) {
#pragma GCC unroll 4
        for (int r = 0; r < kPackTileRows; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                acc[r][c] = run.kept[(i + r) * width + j + c];
            }
        }
    }
    for (int64_t p = 0; p < depth; ++p) {
        const Vec<T>* row = left + p * width;
#pragma GCC unroll 4
        for (int r = 0; r < kPackTileRows; ++r) {
            const Vec<T> scale = row[i + r];
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                acc[r][c] += scale * row[j + c];
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kPackTileRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            const int64_t at = (i + r) * width + j + c;
            if (run.last) {
                a[at] = Sign > 0 ? a[at] + acc[r][c] : a[at] - acc[r][c];
            } else {
                run.kept[at] = acc[r][c];
            }
        }
    }
}

// The same for all columns from the tile with column i to `columns`.
template <class T, int Sign>
ONESTEP_INLINE void update_pack_tiles(const Vec<T>* left, int64_t depth, int64_t width, int64_t i, int64_t columns,
                                      Vec<T>* a, PackRun<T> run = {}) {
    int64_t j = i / kPackTileColumns * kPackTileColumns;
    for (; j + kPackTileColumns <= columns; j += kPackTileColumns) {
        update_pack_tile<T, Sign, kPackTileColumns>(left, depth, width, i, j, a, run);
    }
    switch (columns - j) {
        case 3:
            update_pack_tile<T, Sign, 3>(left, depth, width, i, j, a, run);
            break;
        case 2:
            update_pack_tile<T, Sign, 2>(left, depth, width, i, j, a, run);
            break;
        case 1:
            update_pack_tile<T, Sign, 1>(left, depth, width, i, j, a, run);
            break;
        default:
            break;
    }
}

}  // namespace onestep::normal::ONESTEP_NS
