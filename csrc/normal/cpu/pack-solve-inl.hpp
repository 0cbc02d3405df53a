// Solves of small problems, one per vector lane: the whole algorithm runs on vectors of problems, without shuffles.
#pragma once

#include "base/singular.hpp"
#include "normal/cpu/cholesky-inl.hpp"
#include "normal/cpu/pack-factor-inl.hpp"
#include "normal/cpu/pack-gram-inl.hpp"
#include "normal/cpu/pack-refine-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
inline Vec<T> nan_lanes() {
    return broadcast<T>(static_cast<T>(__builtin_nan("")));
}

// W = U⁻¹(U⁻ᵀR) beside the factor.
template <class T>
inline void pack_substitute(Pack<T>& pack) {
    for (int64_t c = 0; c < pack.k; ++c) {
        pack_solve_upper<T>(pack, pack.a + pack.d + c, pack.width);
    }
}

// The check that the solution is finite, and the write.
template <class T>
inline void pack_write_solution(const PackArgs<T>& args, Pack<T>& pack) {
    Mask<T> finite = Mask<T>{} == 0;
    for (int64_t c = 0; c < pack.k; ++c) {
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
    pack_substitute<T>(pack);
    if (args.refine > 0) {
        pack_refine<T>(args, pack, pack.out, uniform, work + Pack<T>::work(pack.d, pack.k));
    }
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
        pack_substitute<T>(pack);
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
inline int64_t pack_work(int64_t d, int64_t k, bool refines) {
    return Pack<T>::work(d, k) + (refines ? Refinement<T>::work(d, k) : 0);
}

}  // namespace onestep::normal::ONESTEP_NS
