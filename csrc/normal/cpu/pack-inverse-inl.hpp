// Factors of inverses of small matrices, one per vector lane: A⁻¹ = UᵀU by the factor of A reversed, Ã = LLᵀ, whose L⁻¹
// reversed is U.
#pragma once

#include "base/singular.hpp"
#include "normal/cpu/pack-factor-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Above the diagonal Ã, from A's lower triangle, which is read along whichever stride is 1.
template <class T>
inline void pack_load_reversed(const PackOperand<T>& from, Pack<T>& pack) {
    const int64_t last = pack.d - 1;
    if (from.row == 1 && from.col != 1) {
        for (int64_t j = 0; j < pack.d; ++j) {
            load_lanes<T>(from, j * (from.row + from.col), 1, pack.d - j, pack.a + (last - j) * (pack.width + 1),
                          -pack.width);
        }
    } else {
        for (int64_t i = 0; i < pack.d; ++i) {
            load_lanes<T>(from, i * from.row, from.col, i + 1, pack.a + (last - i) * pack.width + last, -1);
        }
    }
}

// The mean of each lane's diagonal times its damping, summed in double from A's first element on.
template <class T>
inline Vec<T> pack_damping(const PackArgs<T>& args) {
    alignas(ONESTEP_VECTOR_BYTES) T added[kLanes<T>];
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        double trace = 0.0;
        for (int64_t i = 0; i < args.d; ++i) {
            trace += static_cast<double>(args.a.data[lane][i * (args.a.row + args.a.col)]);
        }
        added[lane] =
            static_cast<T>(trace / static_cast<double>(args.d) * static_cast<double>(args.ridge.data[lane][0]));
    }
    return load<T>(added);
}

// Rows [i, i + rows) of the columns [j, j + columns) of L⁻¹, which `out` holds from its end backwards; the rows from
// `top` to i are known, and those above are zeros.
template <class T>
ONESTEP_INLINE void pack_inverse_tile(const Pack<T>& pack, int64_t top, int64_t i, int rows, int64_t j, int columns) {
    const int64_t width = pack.width;
    Vec<T>* const end = pack.out + pack.d * pack.d - 1;
    Vec<T> acc[kPackTileRows][kPackTileColumns] = {};
    for (int64_t p = top; p < i; ++p) {
        const Vec<T>* above = pack.a + p * width + i;
        const Vec<T>* known = end - p * pack.d - j;
#pragma GCC unroll 4
        for (int r = 0; r < kPackTileRows; ++r) {
#pragma GCC unroll 4
            for (int c = 0; c < kPackTileColumns; ++c) {
                if (r < rows && c < columns) {
                    acc[r][c] += above[r] * known[-c];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kPackTileRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kPackTileColumns; ++c) {
            if (r < rows && c < columns) {
                Vec<T> value = broadcast<T>(i + r == j + c ? T(1) : T(0)) - acc[r][c];
#pragma GCC unroll 4
                for (int p = 0; p < r; ++p) {
                    value -= pack.a[(i + p) * width + i + r] * acc[p][c];
                }
                acc[r][c] = value * pack.inverse_diagonal[i + r];
                end[-(i + r) * pack.d - j - c] = acc[r][c];
            }
        }
    }
}

// L⁻¹ reversed in `out`, from the factor.
template <class T>
inline void pack_invert_factor(const Pack<T>& pack) {
    const int64_t d = pack.d;
    for (int64_t e = 0; e < d * d; ++e) {
        pack.out[e] = Vec<T>{};
    }
    for (int64_t j = 0; j < d; j += kPackTileColumns) {
        const int columns = static_cast<int>(minimum(kPackTileColumns, d - j));
        const int64_t top = j / kPackTileRows * kPackTileRows;
        for (int64_t i = top; i < d; i += kPackTileRows) {
            const int rows = static_cast<int>(minimum(kPackTileRows, d - i));
            if (rows == kPackTileRows && columns == kPackTileColumns) {
                pack_inverse_tile<T>(pack, top, i, kPackTileRows, j, kPackTileColumns);
            } else {
                pack_inverse_tile<T>(pack, top, i, rows, j, columns);
            }
        }
    }
}

template <class T>
inline void pack_inverse(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, 0, work);
    pack_load_reversed<T>(args.a, pack);
    Mask<T> finite = Mask<T>{} == 0;
    for (int64_t i = 0; i < pack.d; ++i) {
        for (int64_t j = i; j < pack.d; ++j) {
            finite = finite & is_finite_lanes<T>(pack.a[i * pack.width + j]);
        }
    }
    const Vec<T> added = pack_damping<T>(args);
    const Vec<T> tolerance = broadcast<T>(kSingularEpsilons * Simd<T>::kEpsilon);
    for (int64_t i = 0; i < pack.d; ++i) {
        Vec<T>& diagonal = pack.a[i * pack.width + i];
        diagonal += added;
        pack.floor[i] = maximum_lanes<T>(diagonal * tolerance, Vec<T>{});
    }
    pack_factor<T>(pack);
    pack.info = finite ? pack.info : broadcast_integer<T>(-1);
    pack_invert_factor<T>(pack);
    for (int64_t e = 0; e < pack.d * pack.d; ++e) {
        pack.out[e] = pack.info == 0 ? pack.out[e] : nan_lanes<T>();
    }
    store_lanes<T>(pack.out, pack.d * pack.d, args.factor);
    pack_write_info<T>(args, pack);
}

}  // namespace onestep::normal::ONESTEP_NS
