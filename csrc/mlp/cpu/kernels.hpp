// What one CPU target provides to mlp.cpp: one block of rows through all layers and back. Everything here is plain
// data.
#pragma once

#include <cstdint>

#include "base/target.hpp"
#include "base/work_memory.hpp"
#include "mlp/mlp.hpp"

namespace onestep {

// A network whose weights are packed for both directions; see pack in MlpKernels.
template <class T>
struct MlpNetwork {
    const MlpLayer* layers = nullptr;
    int64_t count = 0;
    Matrix<const T> x;
    Matrix<const T> y;  // null data: no target
    const T* parameters = nullptr;
    const T* packed = nullptr;
};

template <class T>
struct MlpKernels {
    int64_t panel;  // rows side by side

    // Elements of the packed weights, and packing them.
    int64_t (*packed_size)(const MlpLayer* layers, int64_t count);
    void (*pack)(const MlpNetwork<T>& network, T* to);

    // Elements of work memory that the kernels below need for a block of `rows` rows, a multiple of `panel`.
    int64_t (*work)(const MlpLayer* layers, int64_t count, int64_t rows);

    // Rows [begin, begin + rows): adds their gradient (unless null) and returns their loss.
    double (*gradient)(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T* gradient,
                       const WorkMemory<T>& work);
    // Adds the rows' part of 2 JᵀJ v, or of its diagonal; `direction` is v, packed as the weights are.
    void (*product)(const MlpNetwork<T>& network, const MlpNetwork<T>& direction, int64_t begin, int64_t rows,
                    T* product, const WorkMemory<T>& work);
    void (*diagonal)(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T* diagonal, const WorkMemory<T>& work);
    // The same rows of the Jacobian; `jacobian` is the whole.
    void (*jacobian)(const MlpNetwork<T>& network, int64_t begin, int64_t rows, T scale, T* jacobian,
                     const WorkMemory<T>& work);
};

ONESTEP_DECLARE_TABLE(mlp, f32, MlpKernels<float>)
ONESTEP_DECLARE_TABLE(mlp, f64, MlpKernels<double>)

}  // namespace onestep
