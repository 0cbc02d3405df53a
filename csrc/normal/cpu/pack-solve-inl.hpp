// Solves of small problems, one per vector lane: the whole algorithm runs on vectors of problems, without shuffles.
#pragma once

#include "base/singular.hpp"
#include "normal/cpu/cholesky-inl.hpp"
#include "normal/cpu/pack-gram-inl.hpp"

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
