// Factors of small problems, one per vector lane, and the solves with them.
#pragma once

#include "normal/cpu/pack-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

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

// acc, which is what the known rows contribute, becomes a row of the solution, and is written over `row` of R.
template <class T, int kColumns>
ONESTEP_INLINE void pack_finish_row(Vec<T> inverse, Vec<T>* row, Vec<T> (&acc)[kColumns]) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
        acc[c] = (row[c] - acc[c]) * inverse;
        row[c] = acc[c];
    }
}

// Rows of U⁻ᵀR, [i, i + rows), of the columns [j, j + kColumns) beside the factor, in place; those above are known.
template <class T, int kColumns>
ONESTEP_INLINE void pack_forward_tile(Pack<T>& pack, int64_t i, int rows, int64_t j) {
    const int64_t width = pack.width;
    Vec<T> acc[kPackTileRows][kColumns] = {};
    for (int64_t p = 0; p < i; ++p) {
        const Vec<T>* above = pack.a + p * width;
#pragma GCC unroll 4
        for (int r = 0; r < kPackTileRows; ++r) {
            if (r < rows) {
                const Vec<T> scale = above[i + r];
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) {
                    acc[r][c] += scale * above[j + c];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kPackTileRows; ++r) {
        if (r < rows) {
#pragma GCC unroll 4
            for (int p = 0; p < r; ++p) {
                const Vec<T> scale = pack.a[(i + p) * width + i + r];
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) {
                    acc[r][c] += scale * acc[p][c];
                }
            }
            pack_finish_row<T, kColumns>(pack.inverse_diagonal[i + r], pack.a + (i + r) * width + j, acc[r]);
        }
    }
}

// The same of U⁻¹R; the rows below are known.
template <class T, int kColumns>
ONESTEP_INLINE void pack_backward_tile(Pack<T>& pack, int64_t i, int rows, int64_t j) {
    const int64_t width = pack.width;
    const Vec<T>* u = pack.a + i * width;
    Vec<T> acc[kPackTileRows][kColumns] = {};
    for (int64_t p = i + rows; p < pack.d; ++p) {
        const Vec<T>* below = pack.a + p * width + j;
#pragma GCC unroll 4
        for (int r = 0; r < kPackTileRows; ++r) {
            if (r < rows) {
                const Vec<T> scale = u[r * width + p];
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) {
                    acc[r][c] += scale * below[c];
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = kPackTileRows - 1; r >= 0; --r) {
        if (r < rows) {
#pragma GCC unroll 4
            for (int p = kPackTileRows - 1; p > r; --p) {
                if (p < rows) {
                    const Vec<T> scale = u[r * width + i + p];
#pragma GCC unroll 4
                    for (int c = 0; c < kColumns; ++c) {
                        acc[r][c] += scale * acc[p][c];
                    }
                }
            }
            pack_finish_row<T, kColumns>(pack.inverse_diagonal[i + r], pack.a + (i + r) * width + j, acc[r]);
        }
    }
}

// Columns [j, j + kColumns) beside the factor from R to A⁻¹R, or, if they are U⁻ᵀR already, from there.
template <class T, int kColumns>
ONESTEP_INLINE void pack_solve_columns(Pack<T>& pack, int64_t j, bool forward) {
    const int64_t whole = pack.d / kPackTileRows * kPackTileRows;
    const int rest = static_cast<int>(pack.d - whole);
    if (forward) {
        for (int64_t i = 0; i < whole; i += kPackTileRows) {
            pack_forward_tile<T, kColumns>(pack, i, kPackTileRows, j);
        }
        if (rest > 0) {
            pack_forward_tile<T, kColumns>(pack, whole, rest, j);
        }
    }
    if (rest > 0) {
        pack_backward_tile<T, kColumns>(pack, whole, rest, j);
    }
    for (int64_t i = whole - kPackTileRows; i >= 0; i -= kPackTileRows) {
        pack_backward_tile<T, kColumns>(pack, i, kPackTileRows, j);
    }
}

// All columns beside the factor.
template <class T>
inline void pack_substitute(Pack<T>& pack, bool forward) {
    int64_t j = pack.d;
    const int64_t end = pack.d + pack.k;
    for (; j + kPackTileColumns <= end; j += kPackTileColumns) {
        pack_solve_columns<T, kPackTileColumns>(pack, j, forward);
    }
    switch (end - j) {
        case 3:
            pack_solve_columns<T, 3>(pack, j, forward);
            break;
        case 2:
            pack_solve_columns<T, 2>(pack, j, forward);
            break;
        case 1:
            pack_solve_columns<T, 1>(pack, j, forward);
            break;
        default:
            break;
    }
}

template <class T>
inline Vec<T> nan_lanes() {
    return broadcast<T>(static_cast<T>(__builtin_nan("")));
}

template <class T>
inline void pack_write_info(const PackArgs<T>& args, const Pack<T>& pack) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (args.info[lane] != nullptr) {
            *args.info[lane] = static_cast<int32_t>(pack.info[lane]);
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
