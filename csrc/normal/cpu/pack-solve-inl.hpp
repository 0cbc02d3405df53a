// Solves of small problems, one per vector lane: the whole algorithm runs on vectors of problems, without shuffles.
#pragma once

#include "base/singular.hpp"
#include "normal/cpu/cholesky-inl.hpp"
#include "normal/cpu/pack-factor-inl.hpp"
#include "normal/cpu/pack-gram-inl.hpp"
#include "normal/cpu/pack-refine-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Writes the columns of W that lie beside the factor as those from `first` on of all `columns`; lanes of which they are
// not finite get the order d + 1 in `info`.
template <class T>
inline void pack_write_columns(const PackArgs<T>& args, Pack<T>& pack, int64_t first, int64_t columns) {
    Mask<T> finite = Mask<T>{} == 0;
    for (int64_t j = 0; j < pack.d; ++j) {
        for (int64_t c = 0; c < pack.k; ++c) {
            const Vec<T> value = pack.a[j * pack.width + pack.d + c];
            finite = finite & is_finite_lanes<T>(value);
            pack.out[j * pack.k + c] = value;
        }
    }
    pack.info = (pack.info == 0) & ~finite ? broadcast_integer<T>(pack.d + 1) : pack.info;
    if (pack.k == columns) {
        store_lanes<T>(pack.out, pack.d * columns, args.solution);
        return;
    }
    for (int64_t j = 0; j < pack.d; ++j) {
        T* to[kMostLanes];
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            to[lane] = args.solution[lane] != nullptr ? args.solution[lane] + j * columns + first : nullptr;
        }
        store_lanes<T>(pack.out + j * pack.k, pack.k, to);
    }
}

// NaN for the solutions of lanes that failed.
template <class T>
inline void pack_clear_failed(const PackArgs<T>& args, const Pack<T>& pack, int64_t columns) {
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (pack.info[lane] != 0 && args.solution[lane] != nullptr) {
            for (int64_t e = 0; e < pack.d * columns; ++e) {
                args.solution[lane][e] = static_cast<T>(__builtin_nan(""));
            }
        }
    }
}

// The columns of A⁻¹B after those that the pack has solved for, as many at a time.
template <class T>
inline void pack_solve_others(const PackArgs<T>& args, Pack<T>& pack) {
    for (int64_t first = pack.k; first < args.k; first += pack.k) {
        pack.k = minimum(pack.k, args.k - first);
        PackOperand<T> columns = args.b;
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            columns.data[lane] += first * columns.col;
        }
        load_block<T>(columns, 0, pack.d, pack.k, pack.a + pack.d, pack.width);
        pack_substitute<T>(pack, true);
        pack_write_columns<T>(args, pack, first, args.k);
    }
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
    pack_gram<T, kPackRows>(args, pack);
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
    pack_substitute<T>(pack, false);
    if (args.refine > 0) {
        pack_refine<T>(args, pack, pack.out, uniform, work + Pack<T>::work(pack.d, pack.k));
    }
    pack_write_columns<T>(args, pack, 0, pack.k);
    pack_clear_failed<T>(args, pack, pack.k);
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
    Pack<T> pack(args.d, minimum(args.k, kPackTargets), work);
    for (int64_t i = 0; i < pack.d; ++i) {
        pack.floor[i] = Vec<T>{};
        load_lanes<T>(args.a, i * args.a.row, args.a.col, i + 1, pack.a + i, pack.width);
    }
    if (pack.k > 0) {
        load_block<T>(args.b, 0, pack.d, pack.k, pack.a + pack.d, pack.width);
    }
    pack_factor<T>(pack);
    if (pack.k > 0) {
        pack_substitute<T>(pack, false);
        pack_write_columns<T>(args, pack, 0, args.k);
        pack_solve_others<T>(args, pack);
        pack_clear_failed<T>(args, pack, args.k);
    }
    if (args.factor[0] != nullptr) {
        pack_write_factor<T>(args, pack);
    }
    pack_write_info<T>(args, pack);
}

template <class T>
inline void pack_cholesky_solve(const PackArgs<T>& args, T* work) {
    Pack<T> pack(args.d, minimum(args.k, kPackTargets), work);
    for (int64_t i = 0; i < pack.d; ++i) {
        load_lanes<T>(args.a, i * (args.a.row + args.a.col), args.a.col, pack.d - i, pack.a + i * pack.width + i, 1);
        pack.inverse_diagonal[i] = broadcast<T>(T(1)) / pack.a[i * pack.width + i];
    }
    load_block<T>(args.b, 0, pack.d, pack.k, pack.a + pack.d, pack.width);
    pack_substitute<T>(pack, true);
    pack_write_columns<T>(args, pack, 0, args.k);
    pack_solve_others<T>(args, pack);
}

template <class T>
inline int64_t pack_work(int64_t d, int64_t k, bool refines) {
    return Pack<T>::work(d, k) + (refines ? Refinement<T>::work(d, k) : 0);
}

}  // namespace onestep::normal::ONESTEP_NS
