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

}  // namespace onestep::normal::ONESTEP_NS
