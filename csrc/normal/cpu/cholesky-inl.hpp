// Blocked Cholesky A = UᵀU (LAPACK xPOTRF, upper), triangular solves, and the condition estimate, one problem at a
// time.
#pragma once

#include "base/tile-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Finishes the tile of rows [i, i + M) in registers: acc holds the updated rows, the triangle in c their factor.
template <class T, int M, int NV>
ONESTEP_INLINE void eliminate_tile(const T* c, int64_t ld, int64_t i, const T* inverse_diagonal, Vec<T> (&acc)[M][NV]) {
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 8
        for (int l = 0; l < r; ++l) {
            const Vec<T> scale = broadcast<T>(c[(i + l) * ld + i + r]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                acc[r][v] -= scale * acc[l][v];
            }
        }
        const Vec<T> inverse = broadcast<T>(inverse_diagonal[i + r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            acc[r][v] *= inverse;
        }
    }
}

// Rows [i, i + M) of z = U⁻ᵀz in NV vectors of columns, given the rows from `first` to i: the step that the panel
// factorisation and the forward substitution share.
template <class T, int M, int NV>
ONESTEP_INLINE void eliminate_rows(const T* u, int64_t ld, int64_t first, int64_t i, const T* inverse_diagonal, T* z,
                                   int64_t ldz) {
    Vec<T> sum[M][NV] = {};
    multiply_tile<T, M, NV>(i - first, {u + first * ld + i, 1, ld}, z + first * ldz, ldz, sum);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            sum[r][v] = load<T>(z + (i + r) * ldz + v * kLanes<T>) - sum[r][v];
        }
    }
    eliminate_tile<T, M, NV>(u, ld, i, inverse_diagonal, sum);
#pragma GCC unroll 8
    for (int r = 0; r < M; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            store<T>(z + (i + r) * ldz + v * kLanes<T>, sum[r][v]);
        }
    }
}

// Rows [begin, end) of z = U⁻ᵀz, NV vectors wide, given that nothing before `begin` is to be eliminated.
template <class T, int NV>
inline void eliminate(const T* u, int64_t ld, int64_t begin, int64_t end, const T* inverse_diagonal, T* z,
                      int64_t ldz) {
    int64_t i = begin;
    for (; i + kTileRows <= end; i += kTileRows) {
        eliminate_rows<T, kTileRows, NV>(u, ld, begin, i, inverse_diagonal, z, ldz);
    }
    for (; i < end; ++i) {
        eliminate_rows<T, 1, NV>(u, ld, begin, i, inverse_diagonal, z, ldz);
    }
}

template <class T>
inline void factor_panel(T* c, int64_t ld, int64_t k0, int64_t k1, int64_t c0, int64_t c1, const T* inverse_diagonal) {
    for (int64_t j = c0; j < c1; j += kPanel<T>) {
        // Rows of the panel live in the same matrix as the factor: z row r is c row r.
        eliminate<T, kTileVectors<T>>(c, ld, k0, k1, inverse_diagonal, c + j, ld);
    }
}

template <class T>
inline int64_t factor_diagonal(T* c, int64_t ld, int64_t k0, int64_t k1, const T* floor, T* inverse_diagonal) {
    const int64_t panel = kPanel<T>;
    for (int64_t i0 = k0; i0 < k1; i0 += kTileRows) {
        const int64_t i1 = minimum(i0 + kTileRows, k1);
        const int64_t own = i0 / panel * panel;  // the panel that holds the diagonal tile
        T* column = c + own;
        update_tile<T, kTileRows, kTileVectors<T>, -1>(i0 - k0, {c + k0 * ld + i0, 1, ld}, column + k0 * ld, ld,
                                                       column + i0 * ld, ld);
        for (int64_t i = i0; i < i1; ++i) {
            T* row = column + i * ld;
            for (int64_t l = i0; l < i; ++l) {
                const T scale = c[l * ld + i];
                const T* above = column + l * ld;
                for (int64_t j = 0; j < panel; ++j) {
                    row[j] -= scale * above[j];
                }
            }
            const T pivot = c[i * ld + i];
            if (!(pivot > floor[i]) || !is_finite(pivot)) {
                return i + 1;
            }
            const T inverse = T(1) / square_root(pivot);
            inverse_diagonal[i] = inverse;
            for (int64_t j = 0; j < panel; ++j) {
                row[j] *= inverse;
            }
        }
        for (int64_t j = own + panel; j < k1; j += panel) {
            if (i1 - i0 == kTileRows) {
                eliminate_rows<T, kTileRows, kTileVectors<T>>(c, ld, k0, i0, inverse_diagonal, c + j, ld);
            } else {
                for (int64_t i = i0; i < i1; ++i) {
                    eliminate_rows<T, 1, kTileVectors<T>>(c, ld, k0, i, inverse_diagonal, c + j, ld);
                }
            }
        }
    }
    return 0;
}

template <class T>
inline void factor_update(T* c, int64_t ld, int64_t k0, int64_t k1, int64_t d, int64_t c0, int64_t c1) {
    const int64_t panel = kPanel<T>;
    for (int64_t j = c0; j < c1; j += panel) {
        for (int64_t i = k1; i < minimum(d, j + panel); i += kTileRows) {
            update_tile<T, kTileRows, kTileVectors<T>, -1>(k1 - k0, {c + k0 * ld + i, 1, ld}, c + k0 * ld + j, ld,
                                                           c + i * ld + j, ld);
        }
    }
}

template <class T>
inline void solve_transposed(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* z, int64_t ldz) {
    const int64_t vectors = ldz / kLanes<T>;
    int64_t v = 0;
    for (; v + 3 <= vectors; v += 3) {
        eliminate<T, 3>(u, ld, 0, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    }
    if (vectors - v == 2) {
        eliminate<T, 2>(u, ld, 0, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    } else if (vectors - v == 1) {
        eliminate<T, 1>(u, ld, 0, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    }
}

// Rows [i, i + M) of z = U⁻¹z, given the rows after them.
template <class T, int M, int NV>
ONESTEP_INLINE void substitute_rows(const T* u, int64_t ld, int64_t d, int64_t i, const T* inverse_diagonal, T* z,
                                    int64_t ldz) {
    Vec<T> sum[M][NV] = {};
    multiply_tile<T, M, NV>(d - i - M, {u + i * ld + i + M, ld, 1}, z + (i + M) * ldz, ldz, sum);
#pragma GCC unroll 8
    for (int r = M - 1; r >= 0; --r) {
        Vec<T> row[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            row[v] = load<T>(z + (i + r) * ldz + v * kLanes<T>) - sum[r][v];
        }
#pragma GCC unroll 8
        for (int l = M - 1; l > r; --l) {
            const Vec<T> scale = broadcast<T>(u[(i + r) * ld + i + l]);
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                row[v] -= scale * sum[l][v];
            }
        }
        const Vec<T> inverse = broadcast<T>(inverse_diagonal[i + r]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
            sum[r][v] = row[v] * inverse;  // from here on the solution's row
            store<T>(z + (i + r) * ldz + v * kLanes<T>, sum[r][v]);
        }
    }
}

template <class T, int NV>
inline void substitute(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* z, int64_t ldz) {
    int64_t i = d;
    for (; i % kTileRows != 0; --i) {
        substitute_rows<T, 1, NV>(u, ld, d, i - 1, inverse_diagonal, z, ldz);
    }
    for (; i > 0; i -= kTileRows) {
        substitute_rows<T, kTileRows, NV>(u, ld, d, i - kTileRows, inverse_diagonal, z, ldz);
    }
}

template <class T>
inline void solve_upper(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* z, int64_t ldz) {
    const int64_t vectors = ldz / kLanes<T>;
    int64_t v = 0;
    for (; v + 3 <= vectors; v += 3) {
        substitute<T, 3>(u, ld, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    }
    if (vectors - v == 2) {
        substitute<T, 2>(u, ld, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    } else if (vectors - v == 1) {
        substitute<T, 1>(u, ld, d, inverse_diagonal, z + v * kLanes<T>, ldz);
    }
}

// Estimates ‖A⁻¹‖₁ for symmetric A in every lane, given `solve`, which replaces d vectors x by A⁻¹x.
// Higham, "FORTRAN codes for estimating the one-norm", ACM TOMS 14 (1988), Algorithm 4.1, with at most two gradient
// steps; the alternating vector at the end guards against the known counterexamples.
template <class T, class Solve>
inline Vec<T> estimate_inverse_norm1(int64_t d, Vec<T>* x, const Solve& solve) {
    const auto norm1 = [&] {
        Vec<T> sum{};
        for (int64_t i = 0; i < d; ++i) {
            sum += absolute_lanes<T>(x[i]);
        }
        return sum;
    };
    for (int64_t i = 0; i < d; ++i) {
        x[i] = broadcast<T>(T(1) / static_cast<T>(d));
    }
    solve(x);
    Vec<T> estimate = norm1();
    for (int step = 0; step < 2 && d > 1; ++step) {
        const Vec<T> one = broadcast<T>(T(1));
        for (int64_t i = 0; i < d; ++i) {
            x[i] = x[i] < Vec<T>{} ? -one : one;
        }
        solve(x);
        Vec<T> most = broadcast<T>(T(-1));
        Vec<T> at{};
        for (int64_t i = 0; i < d; ++i) {
            const Vec<T> size = absolute_lanes<T>(x[i]);
            const Mask<T> more = size > most;
            most = more ? size : most;
            at = more ? broadcast<T>(static_cast<T>(i)) : at;
        }
        for (int64_t i = 0; i < d; ++i) {
            x[i] = at == broadcast<T>(static_cast<T>(i)) ? one : Vec<T>{};
        }
        solve(x);
        estimate = maximum_lanes<T>(estimate, norm1());
    }
    for (int64_t i = 0; i < d; ++i) {
        const T size = T(1) + (d > 1 ? static_cast<T>(i) / static_cast<T>(d - 1) : T(0));
        x[i] = broadcast<T>(i % 2 == 0 ? size : -size);
    }
    solve(x);
    return maximum_lanes<T>(estimate, norm1() * (T(2) / (T(3) * static_cast<T>(d))));
}

template <class T>
inline T inverse_norm1(const T* u, int64_t ld, int64_t d, const T* inverse_diagonal, T* work) {
    // One problem in every lane: a vector of lanes is then a row of right-hand sides for the solves above.
    const Vec<T> estimate = estimate_inverse_norm1<T>(d, reinterpret_cast<Vec<T>*>(work), [&](Vec<T>* x) {
        T* z = reinterpret_cast<T*>(x);
        solve_transposed<T>(u, ld, d, inverse_diagonal, z, kLanes<T>);
        solve_upper<T>(u, ld, d, inverse_diagonal, z, kLanes<T>);
    });
    return estimate[0];
}

}  // namespace onestep::normal::ONESTEP_NS
