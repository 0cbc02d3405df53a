// Checks of values that kernels make before they compute anything.
#pragma once

#include <algorithm>
#include <cstdint>

#include "base/operand.hpp"

namespace onestep {

// Whether any element of the vectors (row stride) is negative. Broadcast dimensions are read once.
template <class T>
bool any_negative(const Batched<const T>& vectors, BatchShape batch, int64_t length) {
    if (!vectors || batch.count() == 0) {
        return false;
    }
    for (int dim = 0; dim < batch.dims; ++dim) {
        batch.size[dim] = vectors.batch[dim] == 0 ? 1 : batch.size[dim];
    }
    length = vectors.row == 0 ? std::min<int64_t>(length, 1) : length;
    for (int64_t index = 0; index < batch.count(); ++index) {
        const Matrix<const T> vector = vectors.at(batch, index);
        for (int64_t i = 0; i < length; ++i) {
            if (vector.data[i * vector.row] < T(0)) {
                return true;
            }
        }
    }
    return false;
}

template <class T>
bool any_negative(const Matrix<const T>& vector, int64_t length) {
    return any_negative(Batched<const T>{vector.data, vector.row, vector.col, {}}, BatchShape{}, length);
}

}  // namespace onestep
