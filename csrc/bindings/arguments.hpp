// How Python hands over operands: addresses, sizes and strides as integers. Python has checked them; see ops/.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep::bindings {

using Address = std::uintptr_t;
using Sizes = std::vector<int64_t>;
// (data_ptr, strides: batch dimensions first, then rows and columns; the tensor, which keeps the memory), or None.
using Operand = std::optional<std::tuple<Address, Sizes, pybind11::object>>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

inline BatchShape batch_shape(const Sizes& sizes) {
    if (sizes.size() > static_cast<size_t>(kMaxBatchDims)) {
        throw std::invalid_argument("at most " + std::to_string(kMaxBatchDims) + " batch dimensions");
    }
    BatchShape shape;
    shape.dims = static_cast<int>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), shape.size);
    return shape;
}

// `own` is how many of the strides belong to the matrix: 2, 1 for a vector along the rows, or 0.
template <class T>
Batched<T> batched(const Operand& operand, size_t own) {
    Batched<T> result;
    if (!operand.has_value()) {
        return result;
    }
    const Sizes& strides = std::get<1>(*operand);
    if (strides.size() < own || strides.size() > own + static_cast<size_t>(kMaxBatchDims)) {
        throw std::invalid_argument("wrong number of strides");
    }
    result.data = pointer<T>(std::get<0>(*operand));
    const size_t dims = strides.size() - own;
    std::copy_n(strides.begin(), dims, result.batch);
    result.row = own >= 1 ? strides[dims] : 0;
    result.col = own >= 2 ? strides[dims + 1] : 0;
    return result;
}

// An operand with an element type, by its address and strides: batch dimensions, head, row, column.
inline HeadedOperand headed(Address address, const Sizes& strides, int element, int batch_dims) {
    const auto batch = static_cast<size_t>(batch_dims);
    if (strides.size() != batch + 3) {
        throw std::invalid_argument("wrong number of strides");
    }
    HeadedOperand result;
    result.data = pointer<const void>(address);
    result.element = static_cast<Element>(element);
    std::copy_n(strides.begin(), batch, result.batch);
    result.head = strides[batch];
    result.row = strides[batch + 1];
    result.col = strides[batch + 2];
    return result;
}

// Runs a kernel without the GIL and turns its status into an exception.
template <class Kernel>
void run(const Kernel& kernel) {
    Status status = Status::ok;
    {
        pybind11::gil_scoped_release release;
        status = kernel();
    }
    switch (status) {
        case Status::ok:
            break;
        case Status::out_of_memory:
            throw std::bad_alloc();
        case Status::thread_pool_error:
            throw std::runtime_error("torch reported an error when asked for its number of threads");
        case Status::unexpected_exception:
            throw std::runtime_error("a kernel threw an exception other than std::bad_alloc; please report this");
        case Status::negative_weight:
            throw pybind11::value_error("weight has negative values; expected values >= 0");
        case Status::negative_ridge:
            throw pybind11::value_error("ridge has negative values; expected values >= 0");
        case Status::bad_index:
            throw pybind11::value_error(
                "offsets or indices are out of range; expected offsets from 0 that never fall, to as many as there are "
                "values, and indices from 0, less than the number of columns");
        case Status::device_error:
            throw std::runtime_error("a CUDA kernel could not be launched");
    }
}

}  // namespace onestep::bindings
