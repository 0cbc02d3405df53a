// What ragged problems need beside the kernels of one problem: products with a small matrix, and the dual form
// (I + SSᵀ)a = t of a problem of n rows S.
#pragma once

#include "normal/cpu/gram-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// c += ab: a is rows × depth of any strides, b is depth × ldb, whole vectors, and so is c.
template <class T>
inline void multiply_rows(int64_t rows, int64_t depth, const Matrix<const T>& a, const T* b, int64_t ldb, T* c) {
    update_block<T, 1>(rows, ldb / kLanes<T>, depth, {a.data, a.row, a.col}, b, ldb, c, ldb);
}

template <class T>
ONESTEP_INLINE const T* row_of(const SegmentRows<T>& rows, int64_t entry) {
    return rows.data + (rows.index != nullptr ? rows.index[entry] : entry) * rows.ld;
}

template <class T>
ONESTEP_INLINE void ask_for_row(const SegmentRows<T>& rows, int64_t entry) {
    if (entry < rows.entries) {
        const char* at = reinterpret_cast<const char*>(row_of<T>(rows, entry));
        for (int64_t byte = 0; byte < rows.ld * static_cast<int64_t>(sizeof(T)); byte += 64) {
            __builtin_prefetch(at + byte);
        }
    }
}

// c += SSᵀ, upper triangle in whole tiles as gram_rows leaves it, S = diag(scale) rows [begin, begin + n). `packed`
// holds kBlockRows × the columns of c.
template <class T>
inline void dual_gram(const SegmentRows<T>& rows, int64_t begin, int64_t n, const T* scale, T* packed, T* c,
                      int64_t ld) {
    constexpr int64_t lanes = kLanes<T>;
    constexpr int64_t panel = kPanel<T>;
    for (int64_t first = 0; first < rows.ld; first += kBlockRows) {
        const int64_t depth = minimum(kBlockRows, rows.ld - first);
        // Rows become columns. Whole tiles of them: those after the last are zero.
        for (int64_t e = 0; e < (n + kTileRows - 1) / kTileRows * kTileRows; e += lanes) {
            T* to = packed + e / panel * kBlockRows * panel + e % panel;
            for (int64_t lane = 0; lane < lanes && first == 0; ++lane) {
                ask_for_row<T>(rows, begin + e + lane + kRowsAhead);
            }
            for (int64_t p = 0; p < depth; p += lanes) {
                Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
                for (int lane = 0; lane < lanes; ++lane) {
                    square[lane] = e + lane < n
                                       ? load<T>(row_of<T>(rows, begin + e + lane) + first + p) * scale[e + lane]
                                       : Vec<T>{};
                }
                transpose<T>(square);
#pragma GCC unroll 16
                for (int lane = 0; lane < lanes; ++lane) {
                    store<T>(to + (p + lane) * panel, square[lane]);
                }
            }
        }
        for (int64_t q = 0; q * panel < n; ++q) {
            gram_panel<T>(packed, depth, q, 0, minimum(n, (q + 1) * panel), n, c + q * panel, ld);
        }
    }
}

// v = Sᵀa for one column of a, whose elements are `step` apart.
template <class T>
inline void dual_back(const SegmentRows<T>& rows, int64_t begin, int64_t n, const T* scale, const T* a, int64_t step,
                      T* v) {
    for (int64_t j = 0; j < rows.ld; j += kLanes<T>) {
        store<T>(v + j, Vec<T>{});
    }
    for (int64_t e = 0; e < n; ++e) {
        const Vec<T> factor = broadcast<T>(scale[e] * a[e * step]);
        const T* row = row_of<T>(rows, begin + e);
        for (int64_t j = 0; j < rows.ld; j += kLanes<T>) {
            store<T>(v + j, load<T>(v + j) + factor * load<T>(row + j));
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
