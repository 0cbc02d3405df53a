// Products with operands that are packed once and used by many pieces of work.
#pragma once

#include "base/gemm-inl.hpp"
#include "compensated/cpu/kernels.hpp"

namespace onestep::compensated::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
inline void pack_right(const T* from, int64_t ld, int64_t depth, int64_t columns, T* to) {
    pack_columns_of_rows<kPanel<T>, T>(StridedRows<T>{from, ld}, 0, depth, 1, 0, columns, to);
}

template <class T>
inline void pack_left(const T* from, int64_t ld, int64_t depth, int64_t rows, T* to) {
    pack_columns_of_rows<kTileRows, T>(StridedRows<T>{from, ld}, 0, depth, 1, 0, rows, to);
    const int64_t count = round_up_to(rows, kTileRows) * depth;
    for (int64_t i = 0; i < count; ++i) {
        to[i] = -to[i];
    }
}

template <class T>
inline void multiply_add(const T* left, const T* right, int64_t depth, int64_t rows, int64_t columns, T* c,
                         int64_t ld) {
    multiply_packed<T>(left, right, depth, rows, columns, true, c, ld);
}

}  // namespace onestep::compensated::ONESTEP_NS
