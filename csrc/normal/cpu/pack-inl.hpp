// Small problems, one per vector lane: the whole algorithm runs on vectors of problems, without shuffles.
#pragma once

#include "base/singular.hpp"
#include "normal/cpu/cholesky-inl.hpp"
#include "normal/cpu/gram-inl.hpp"

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

    static int64_t work(int64_t d, int64_t k) {
        const int64_t vectors = (round_up(d, kPackTileRows) + kPackRows) * width_for(d, k) + 2 * d + d * maximum(d, k);
        return vectors * kLanes<T>;
    }

    Pack(int64_t d_, int64_t k_, T* work) : d(d_), k(k_), width(width_for(d_, k_)) {
        const int64_t size = round_up(d, kPackTileRows) * width;
        a = reinterpret_cast<Vec<T>*>(work);
        rows = a + size;
        inverse_diagonal = rows + kPackRows * width;
        floor = inverse_diagonal + d;
        out = floor + d;
        for (int64_t e = 0; e < size; ++e) {
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

// a[i + r][j + c] += Sign · Σ_p left[p][i + r] · left[p][j + c] over rows p of `left`.
template <class T, int Sign, int kColumns>
ONESTEP_INLINE void update_pack_tile(const Vec<T>* left, int64_t depth, int64_t width, int64_t i, int64_t j,
                                     Vec<T>* a) {
    Vec<T> acc[kPackTileRows][kColumns] = {};
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
            Vec<T>& at = a[(i + r) * width + j + c];
            at = Sign > 0 ? at + acc[r][c] : at - acc[r][c];
        }
    }
}

// The same for all columns from the tile with column i to `columns`.
template <class T, int Sign>
ONESTEP_INLINE void update_pack_tiles(const Vec<T>* left, int64_t depth, int64_t width, int64_t i, int64_t columns,
                                      Vec<T>* a) {
    int64_t j = i / kPackTileColumns * kPackTileColumns;
    for (; j + kPackTileColumns <= columns; j += kPackTileColumns) {
        update_pack_tile<T, Sign, kPackTileColumns>(left, depth, width, i, j, a);
    }
    switch (columns - j) {
        case 3:
            update_pack_tile<T, Sign, 3>(left, depth, width, i, j, a);
            break;
        case 2:
            update_pack_tile<T, Sign, 2>(left, depth, width, i, j, a);
            break;
        case 1:
            update_pack_tile<T, Sign, 1>(left, depth, width, i, j, a);
            break;
        default:
            break;
    }
}

// Prefetches rows of the next pack into the second-level cache, since the rows of a small problem are too few for the
// hardware to recognise a stream. Rows are asked for while those of this pack are computed with: all at once, they
// would wait for one another. Matrices whose rows do not follow each other, and packs that would fill the cache, are
// left to the hardware. A prefetch of an address that does not exist does nothing.
template <class T>
class NextPack {
 public:
    NextPack(const PackOperand<T>& from, int64_t rows, int64_t cols) {
        constexpr int64_t kMostBytes = 128 * 1024;
        const int64_t row = cols * static_cast<int64_t>(sizeof(T));
        if (from.col != 1 || from.row != cols || rows * row * kLanes<T> > kMostBytes) {
            return;
        }
        row_ = static_cast<uintptr_t>(row);
        const auto first = reinterpret_cast<uintptr_t>(from.data[0]);
        apart_ = reinterpret_cast<uintptr_t>(from.data[1]) - first;
        next_ = first + apart_ * static_cast<uintptr_t>(kLanes<T>);
    }

    // The rows [begin, begin + count).
    void prefetch(int64_t begin, int64_t count) const {
        constexpr uintptr_t kLine = 64;
        const uintptr_t end = static_cast<uintptr_t>(begin + count) * row_;
        for (uintptr_t offset = static_cast<uintptr_t>(begin) * row_ / kLine * kLine; offset < end; offset += kLine) {
            for (int lane = 0; lane < kLanes<T>; ++lane) {
                const uintptr_t at = next_ + apart_ * static_cast<uintptr_t>(lane) + offset;
                __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
            }
        }
    }

 private:
    uintptr_t next_ = 0, apart_ = 0;
    uintptr_t row_ = 0;  // bytes; 0 prefetches nothing
};

template <class T>
inline void pack_gram(const PackArgs<T>& args, Pack<T>& pack) {
    const bool weighted = args.weight.given;
    const NextPack<T> next_x(args.x, args.n, pack.d);
    const NextPack<T> next_y(args.y, args.n, pack.k);
    // Rows of the next pack that are asked for with each row of tiles.
    const int64_t tile_rows = round_up(pack.d, kPackTileRows) / kPackTileRows;
    const int64_t share = round_up(kPackRows, tile_rows) / tile_rows;
    for (int64_t block = 0; block < args.n; block += kPackRows) {
        const int64_t rows = minimum(kPackRows, args.n - block);
        load_block<T>(args.x, block, rows, pack.d, pack.rows, pack.width);
        load_block<T>(args.y, block, rows, pack.k, pack.rows + pack.d, pack.width);
        if (weighted) {
            for (int64_t p = 0; p < rows; ++p) {
                Vec<T> weight;
                load_lanes<T>(args.weight, (block + p) * args.weight.row, 1, 1, &weight, 1);
                const Vec<T> scale = square_root_lanes<T>(weight);
                for (int64_t c = 0; c < pack.d + pack.k; ++c) {
                    pack.rows[p * pack.width + c] *= scale;
                }
            }
        }
        next_y.prefetch(block, rows);
        for (int64_t i = 0; i < pack.d; i += kPackTileRows) {
            const int64_t begin = i / kPackTileRows * share;
            if (begin < rows) {
                next_x.prefetch(block + begin, minimum(share, rows - begin));
            }
            update_pack_tiles<T, 1>(pack.rows, rows, pack.width, i, pack.d + pack.k, pack.a);
        }
    }
}

// Factors A = UᵀU in place and computes U⁻ᵀR beside it. A lane that fails records the order of its first bad minor in
// `info` and continues with the identity, so that its neighbours are not affected.
template <class T>
inline void pack_factor(Pack<T>& pack) {
    const int64_t width = pack.width;
    const Vec<T> one = broadcast<T>(T(1));
    for (int64_t i0 = 0; i0 < pack.d; i0 += kPackTileRows) {
        if (i0 > 0) {
            update_pack_tiles<T, -1>(pack.a, i0, width, i0, pack.d + pack.k, pack.a);
        }
        for (int64_t i = i0; i < minimum(i0 + kPackTileRows, pack.d); ++i) {
            Vec<T>* row = pack.a + i * width;
            for (int64_t l = i0; l < i; ++l) {
                const Vec<T>* above = pack.a + l * width;
                const Vec<T> scale = above[i];
                for (int64_t j = i; j < pack.d + pack.k; ++j) {
                    row[j] -= scale * above[j];
                }
            }
            const Mask<T> good = (row[i] > pack.floor[i]) & is_finite_lanes<T>(row[i]);
            const Mask<T> order = broadcast_integer<T>(i + 1);
            pack.info = (pack.info == 0) & ~good ? order : pack.info;
            const Vec<T> inverse = one / square_root_lanes<T>(good ? row[i] : one);
            pack.inverse_diagonal[i] = inverse;
            for (int64_t j = i; j < pack.d + pack.k; ++j) {
                row[j] *= inverse;
            }
        }
    }
}

// z = U⁻ᵀz and z = U⁻¹z for one column of vectors, `step` apart.
template <class T>
inline void pack_solve_transposed(const Pack<T>& pack, Vec<T>* z, int64_t step) {
    for (int64_t i = 0; i < pack.d; ++i) {
        const Vec<T> value = z[i * step] * pack.inverse_diagonal[i];
        z[i * step] = value;
        const Vec<T>* row = pack.a + i * pack.width;
        for (int64_t j = i + 1; j < pack.d; ++j) {
            z[j * step] -= row[j] * value;
        }
    }
}

template <class T>
inline void pack_solve_upper(const Pack<T>& pack, Vec<T>* z, int64_t step) {
    for (int64_t j = pack.d - 1; j >= 0; --j) {
        const Vec<T> value = z[j * step] * pack.inverse_diagonal[j];
        z[j * step] = value;
        for (int64_t i = 0; i < j; ++i) {
            z[i * step] -= pack.a[i * pack.width + j] * value;
        }
    }
}

template <class T>
inline Vec<T> nan_lanes() {
    return broadcast<T>(static_cast<T>(__builtin_nan("")));
}

// Back substitution, the check that the solution is finite, and the write.
template <class T>
inline void pack_write_solution(const PackArgs<T>& args, Pack<T>& pack) {
    Mask<T> finite = Mask<T>{} == 0;
    for (int64_t c = 0; c < pack.k; ++c) {
        pack_solve_upper<T>(pack, pack.a + pack.d + c, pack.width);
        for (int64_t j = 0; j < pack.d; ++j) {
            finite = finite & is_finite_lanes<T>(pack.a[j * pack.width + pack.d + c]);
        }
    }
    const Mask<T> order = broadcast_integer<T>(pack.d + 1);
    pack.info = (pack.info == 0) & ~finite ? order : pack.info;
    for (int64_t j = 0; j < pack.d; ++j) {
        for (int64_t c = 0; c < pack.k; ++c) {
            pack.out[j * pack.k + c] = pack.info == 0 ? pack.a[j * pack.width + pack.d + c] : nan_lanes<T>();
        }
    }
    store_lanes<T>(pack.out, pack.d * pack.k, args.solution);
}

// Lanes that have a factor, whether or not their solution is finite.
template <class T>
ONESTEP_INLINE Mask<T> pack_factored(const Pack<T>& pack) {
    return (pack.info == 0) | (pack.info == broadcast_integer<T>(pack.d + 1));
}

template <class T>
inline void pack_write_factor(const PackArgs<T>& args, Pack<T>& pack) {
    const Mask<T> factored = pack_factored<T>(pack);
    for (int64_t i = 0; i < pack.d; ++i) {
        for (int64_t j = 0; j < pack.d; ++j) {
            const Vec<T> value = j < i ? Vec<T>{} : pack.a[i * pack.width + j];
            pack.out[i * pack.d + j] = factored ? value : nan_lanes<T>();
        }
    }
    store_lanes<T>(pack.out, pack.d * pack.d, args.factor);
}

template <class T>
inline void pack_write_info(const PackArgs<T>& args, const Pack<T>& pack) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (args.info[lane] != nullptr) {
            *args.info[lane] = static_cast<int32_t>(pack.info[lane]);
        }
    }
}

template <class T>
inline Vec<T> pack_norm1(const Pack<T>& pack) {
    Vec<T> norm{};
    for (int64_t j = 0; j < pack.d; ++j) {
        Vec<T> sum{};
        for (int64_t i = 0; i < pack.d; ++i) {
            sum += absolute_lanes<T>(i <= j ? pack.a[i * pack.width + j] : pack.a[j * pack.width + i]);
        }
        norm = maximum_lanes<T>(norm, sum);
    }
    return norm;
}

template <class T>
inline void pack_write_rcond(const PackArgs<T>& args, const Pack<T>& pack, Vec<T> norm) {
    const Vec<T> inverse_norm = estimate_inverse_norm1<T>(pack.d, pack.out, [&](Vec<T>* x) {
        pack_solve_transposed<T>(pack, x, 1);
        pack_solve_upper<T>(pack, x, 1);
    });
    const Mask<T> factored = pack_factored<T>(pack);
    const Vec<T> rcond = factored ? broadcast<T>(T(1)) / (norm * inverse_norm) : Vec<T>{};
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (args.rcond[lane] != nullptr) {
            *args.rcond[lane] = rcond[lane];
        }
    }
}

template <class T>
inline void pack_solve_normal(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, args.k, work);
    pack_gram<T>(args, pack);
    const Vec<T> tolerance = broadcast<T>(kSingularEpsilons * Simd<T>::kEpsilon);
    // One penalty for all features is loaded once: lane by lane, a load takes as long as some dozen sums.
    const bool uniform = args.ridge.row == 0;
    load_lanes<T>(args.ridge, 0, args.ridge.row, uniform ? 1 : pack.d, pack.out, 1);
    for (int64_t i = 0; i < pack.d; ++i) {
        Vec<T>& diagonal = pack.a[i * pack.width + i];
        diagonal += pack.out[uniform ? 0 : i];
        pack.floor[i] = maximum_lanes<T>(diagonal * tolerance, Vec<T>{});
    }
    const bool wants_rcond = args.rcond[0] != nullptr;
    const Vec<T> norm = wants_rcond ? pack_norm1<T>(pack) : Vec<T>{};
    pack_factor<T>(pack);
    pack_write_solution<T>(args, pack);
    if (wants_rcond) {
        pack_write_rcond<T>(args, pack, norm);
    }
    if (args.factor[0] != nullptr) {
        pack_write_factor<T>(args, pack);
    }
    pack_write_info<T>(args, pack);
}

template <class T>
inline void pack_solve_spd(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, args.k, work);
    for (int64_t i = 0; i < pack.d; ++i) {
        pack.floor[i] = Vec<T>{};
        load_lanes<T>(args.a, i * args.a.row, args.a.col, i + 1, pack.a + i, pack.width);
    }
    if (pack.k > 0) {
        load_block<T>(args.b, 0, pack.d, pack.k, pack.a + pack.d, pack.width);
    }
    pack_factor<T>(pack);
    if (pack.k > 0) {
        pack_write_solution<T>(args, pack);
    }
    if (args.factor[0] != nullptr) {
        pack_write_factor<T>(args, pack);
    }
    pack_write_info<T>(args, pack);
}

template <class T>
inline void pack_cholesky_solve(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, args.k, work);
    for (int64_t i = 0; i < pack.d; ++i) {
        load_lanes<T>(args.a, i * (args.a.row + args.a.col), args.a.col, pack.d - i, pack.a + i * pack.width + i, 1);
        pack.inverse_diagonal[i] = broadcast<T>(T(1)) / pack.a[i * pack.width + i];
    }
    load_block<T>(args.b, 0, pack.d, pack.k, pack.a + pack.d, pack.width);
    for (int64_t c = 0; c < pack.k; ++c) {
        pack_solve_transposed<T>(pack, pack.a + pack.d + c, pack.width);
        pack_solve_upper<T>(pack, pack.a + pack.d + c, pack.width);
    }
    for (int64_t j = 0; j < pack.d; ++j) {
        for (int64_t c = 0; c < pack.k; ++c) {
            pack.out[j * pack.k + c] = pack.a[j * pack.width + pack.d + c];
        }
    }
    store_lanes<T>(pack.out, pack.d * pack.k, args.solution);
}

template <class T>
inline int64_t pack_work(int64_t d, int64_t k) {
    return Pack<T>::work(d, k);
}

}  // namespace onestep::normal::ONESTEP_NS
