// How a perceptron's call runs on the CPU: blocks of rows that fit into the cache, pieces of blocks, and work memory.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "mlp/cpu/kernels.hpp"

namespace onestep {

template <class T>
struct MlpPlan {
    const MlpKernels<T>* kernels = nullptr;
    FixedCut blocks;          // rows that pass through all layers together
    EvenCut pieces;           // blocks whose results are summed in T; the sums of pieces are added in double, in order
    int64_t result_size = 0;  // parameters, or 0 where there is no sum over rows
    int64_t row_nanoseconds = 0;  // about what one row takes through all layers and back

    // Memory of the whole call.
    Layout layout;
    Part<T> packed;     // the weights
    Part<T> direction;  // the vector of a product, packed likewise
    Part<T> partial;    // one result for each piece
    Part<double> losses;

    // Memory of a thread while it works on a piece or a block.
    Layout own_layout;
    Part<T> work;
};

template <class T>
MlpPlan<T> plan(const MlpGradientArgs<T>& args);
template <class T>
MlpPlan<T> plan(const MlpProductArgs<T>& args);
template <class T>
MlpPlan<T> plan(const MlpJacobianArgs<T>& args);

// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const MlpPlan<T>& plan, const MlpGradientArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const MlpPlan<T>& plan, const MlpProductArgs<T>& args, const Workspace& workspace);
template <class T>
Status run(const MlpPlan<T>& plan, const MlpJacobianArgs<T>& args, const Workspace& workspace);

}  // namespace onestep
