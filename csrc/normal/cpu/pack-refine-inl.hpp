// Refinement of small problems, one per vector lane: the residual's right-hand side in double, and the steps.
#pragma once

#include "normal/cpu/pack-factor-inl.hpp"
#include "normal/cpu/rows-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Vectors of double that hold the lanes of one vector of T.
template <class T>
inline constexpr int kWideParts = sizeof(double) / sizeof(T);

// As many lanes of T as a vector of double has.
template <class T>
struct NarrowVector {
    typedef T V __attribute__((vector_size(kLanes<double> * sizeof(T)), aligned(sizeof(T)), may_alias));
};

// The lanes of part `part` of a vector in memory, in double; and back.
template <class T>
ONESTEP_INLINE Vec<double> widen_part(const Vec<T>* from, int part) {
    using Narrow = typename NarrowVector<T>::V;
    return __builtin_convertvector(*(reinterpret_cast<const Narrow*>(from) + part), Vec<double>);
}

template <class T>
ONESTEP_INLINE void narrow_part(Vec<double> value, Vec<T>* to, int part) {
    using Narrow = typename NarrowVector<T>::V;
    *(reinterpret_cast<Narrow*>(to) + part) = __builtin_convertvector(value, Narrow);
}

// Rows or features whose sums are under way at once, of one or two columns: one sum alone would wait for itself.
inline constexpr int kRefineTile = 4;

// Work memory of refinement, in vectors of double: of each part of the lanes the solution W, d × k, and g, twice d × k
// as in residual_rows; and [X | E] of a block of rows.
template <class T>
struct Refinement {
    Vec<double>* w;
    Vec<double>* g;
    Vec<double>* rows;

    static int64_t work(int64_t d, int64_t k) { return (3 * kWideParts<T> * d * k + kPackRows * (d + k)) * kLanes<T>; }

    Refinement(int64_t d, int64_t k, T* work) {
        w = reinterpret_cast<Vec<double>*>(work);
        g = w + kWideParts<T> * d * k;
        rows = g + 2 * kWideParts<T> * d * k;
    }
};

// Columns [c, c + kColumns) of E = Y − XW, kRows rows from `rows` on; the rows have [X | Y] and get [X | E].
template <int kRows, int kColumns>
ONESTEP_INLINE void pack_residual(int64_t d, int64_t k, int64_t c, const Vec<double>* w, Vec<double>* rows) {
    const int64_t width = d + k;
    Vec<double> sum[kRows][kColumns] = {};
    for (int64_t j = 0; j < d; ++j) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec<double> x = rows[r * width + j];
#pragma GCC unroll 2
            for (int i = 0; i < kColumns; ++i) {
                sum[r][i] += x * w[j * k + c + i];
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < kColumns; ++i) {
            rows[r * width + d + c + i] -= sum[r][i];
        }
    }
}

// The same for all rows of a block.
template <int kColumns>
ONESTEP_INLINE void pack_residuals(int64_t count, int64_t d, int64_t k, int64_t c, const Vec<double>* w,
                                   Vec<double>* rows) {
    int64_t p = 0;
    for (; p + kRefineTile <= count; p += kRefineTile) {
        pack_residual<kRefineTile, kColumns>(d, k, c, w, rows + p * (d + k));
    }
    for (; p < count; ++p) {
        pack_residual<1, kColumns>(d, k, c, w, rows + p * (d + k));
    }
}

// g[j + r][c + i] += Σ_p x[p][j + r] e[p][c + i], r in [0, kRows), i in [0, kColumns). Where T is double, with the low
// parts, as residual_rows has them.
template <class T, int kRows, int kColumns>
ONESTEP_INLINE void pack_product(int64_t count, int64_t d, int64_t k, int64_t j, int64_t c, const Vec<double>* rows,
                                 Vec<double>* g) {
    constexpr bool compensated = sizeof(T) == sizeof(double);
    const int64_t width = d + k;
    Vec<double> sum[kRows][kColumns];
    Vec<double> rest[kRows][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < kColumns; ++i) {
            sum[r][i] = g[(j + r) * k + c + i];
            rest[r][i] = compensated ? g[(d + j + r) * k + c + i] : Vec<double>{};
        }
    }
    for (int64_t p = 0; p < count; ++p) {
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec<double> x = rows[p * width + j + r];
#pragma GCC unroll 2
            for (int i = 0; i < kColumns; ++i) {
                const Vec<double> e = rows[p * width + d + c + i];
                if constexpr (compensated) {
                    add_product_compensated(x, e, sum[r][i], rest[r][i]);
                } else {
                    sum[r][i] += x * e;
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < kColumns; ++i) {
            g[(j + r) * k + c + i] = sum[r][i];
            if constexpr (compensated) {
                g[(d + j + r) * k + c + i] = rest[r][i];
            }
        }
    }
}

// The same for all features.
template <class T, int kColumns>
ONESTEP_INLINE void pack_products(int64_t count, int64_t d, int64_t k, int64_t c, const Vec<double>* rows,
                                  Vec<double>* g) {
    int64_t j = 0;
    for (; j + kRefineTile <= d; j += kRefineTile) {
        pack_product<T, kRefineTile, kColumns>(count, d, k, j, c, rows, g);
    }
    for (; j < d; ++j) {
        pack_product<T, 1, kColumns>(count, d, k, j, c, rows, g);
    }
}

// g += XᵀD(Y − XW) over the rows of a block, for one part of the lanes.
template <class T>
inline void pack_residual_block(const Pack<T>& pack, const Vec<T>* weight, int64_t count, int part,
                                const Vec<double>* w, Vec<double>* rows, Vec<double>* g) {
    const int64_t d = pack.d;
    const int64_t k = pack.k;
    const int64_t width = d + k;
    for (int64_t p = 0; p < count; ++p) {
        for (int64_t j = 0; j < width; ++j) {
            rows[p * width + j] = widen_part<T>(pack.rows + p * pack.width + j, part);
        }
    }
    for (int64_t c = 0; c + 1 < k; c += 2) {
        pack_residuals<2>(count, d, k, c, w, rows);
    }
    if (k % 2 == 1) {
        pack_residuals<1>(count, d, k, k - 1, w, rows);
    }
    if (weight != nullptr) {
        for (int64_t p = 0; p < count; ++p) {
            const Vec<double> scale = widen_part<T>(weight + p, part);
            for (int64_t c = 0; c < k; ++c) {
                rows[p * width + d + c] *= scale;
            }
        }
    }
    for (int64_t c = 0; c + 1 < k; c += 2) {
        pack_products<T, 2>(count, d, k, c, rows, g);
    }
    if (k % 2 == 1) {
        pack_products<T, 1>(count, d, k, k - 1, rows, g);
    }
}

// The steps of Finish::refine in solve_normal.cpp, from the solutions beside the factors on, which they overwrite.
// `ridge` has one penalty, or, if it is not uniform, d.
template <class T>
inline void pack_refine(const PackArgs<T>& args, Pack<T>& pack, const Vec<T>* ridge, bool uniform, T* work) {
    const int64_t d = pack.d;
    const int64_t k = pack.k;
    const int64_t each = d * k;
    const Refinement<T> own(d, k, work);
    const auto solution = [&](int64_t at) { return pack.a + at / k * pack.width + d + at % k; };
    for (int part = 0; part < kWideParts<T>; ++part) {
        for (int64_t at = 0; at < each; ++at) {
            own.w[part * each + at] = widen_part<T>(solution(at), part);
        }
    }
    for (int64_t step = 0; step < args.refine; ++step) {
        for (int64_t at = 0; at < 2 * kWideParts<T> * each; ++at) {
            own.g[at] = Vec<double>{};
        }
        for (int64_t block = 0; block < args.n; block += kPackRows) {
            const int64_t count = minimum(kPackRows, args.n - block);
            Vec<T> weight[kPackRows];
            load_block<T>(args.x, block, count, d, pack.rows, pack.width);
            load_block<T>(args.y, block, count, k, pack.rows + d, pack.width);
            if (args.weight.given) {
                load_lanes<T>(args.weight, block * args.weight.row, args.weight.row, count, weight, 1);
            }
            for (int part = 0; part < kWideParts<T>; ++part) {
                pack_residual_block<T>(pack, args.weight.given ? weight : nullptr, count, part, own.w + part * each,
                                       own.rows, own.g + 2 * part * each);
            }
        }
        for (int part = 0; part < kWideParts<T>; ++part) {
            const Vec<double>* w = own.w + part * each;
            const Vec<double>* high = own.g + 2 * part * each;
            for (int64_t at = 0; at < each; ++at) {
                const Vec<double> penalty = widen_part<T>(ridge + (uniform ? 0 : at / k), part);
                narrow_part<T>((high[at] - penalty * w[at]) + high[each + at], solution(at), part);
            }
        }
        pack_substitute<T>(pack, true);
        for (int part = 0; part < kWideParts<T>; ++part) {
            for (int64_t at = 0; at < each; ++at) {
                own.w[part * each + at] += widen_part<T>(solution(at), part);
            }
        }
    }
    for (int part = 0; part < kWideParts<T>; ++part) {
        for (int64_t at = 0; at < each; ++at) {
            narrow_part<T>(own.w[part * each + at], solution(at), part);
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
