// The language-model head on a CUDA device: what lies between the matrix products, which are torch's. Formulas in
// lmhead.hpp.
//
// Rows go by chunks whose logits fit a buffer, all classes of them. Classes go by blocks: after each block's product
// head_statistics takes it into the rows' running statistics (an online log-sum-exp). After
// the last block head_gradient replaces the logits by what is multiplied back. No N × V array exists.
//
// Nothing here waits for the device. A row whose target is no class gets NaN for its loss, and so do the sums it is in.
// Sums have a fixed order: results are bitwise repeatable on one device.
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "base/status.hpp"

namespace onestep::lmhead::cuda {

using namespace onestep::cuda;

// What is kept of a row: `kHeadStatistics` arrays of a chunk's rows.
enum HeadStatistic : int {
    kPeak,  // over the blocks so far: the largest logit, Σ exp(z − peak), Σ exp(z − peak) ż, Σ z, Σ ż
    kSum,
    kMoment,
    kTotal,
    kTotalTangent,
    kOfTarget,  // z and ż of the target
    kOfTargetTangent,
    kLogSumExp,  // after the last block: logsumexp(z), μ = rowsum(P∘ż), c and ċ (0 where ignored, NaN for no class)
    kMean,
    kWeight,
    kWeightTangent,
    kHeadStatistics
};

// A vector with a stride, or null.
template <class U>
struct Strided {
    const U* data = nullptr;
    int64_t stride = 0;
};

// One chunk of rows. T is what is computed in, Input the type of the operands and of what is multiplied back.
template <class T, class Input>
struct HeadChunk {
    int64_t rows = 0, classes = 0;
    T* logits = nullptr;          // rows × leading, 16-byte aligned, leading a multiple of 8: z without the bias
    T* logits_tangent = nullptr;  // the same for ż, or null: then everything is of the value, not the tangent
    int64_t leading = 0;
    Strided<Input> bias, bias_tangent;          // classes
    Strided<int64_t> target;                    // rows
    Strided<T> row_weight, row_weight_tangent;  // rows
    int64_t ignore_index = -100;
    double label_smoothing = 0.0;
    T* statistics = nullptr;  // kHeadStatistics × rows
};

// Takes classes [first, first + count) into the statistics. With the last of them, stores each row's loss (or its
// tangent) and what it adds to the weighted sum.
template <class T, class Input>
Status head_statistics(const HeadChunk<T, Input>& chunk, int64_t first, int64_t count, T* losses, double* values,
                       cudaStream_t stream);

// grad_bias (classes) += Σ over the chunk's rows of g, or ġ. Before head_gradient.
template <class T, class Input>
Status head_bias_gradient(const HeadChunk<T, Input>& chunk, T* grad_bias, cudaStream_t stream);

// Replaces the logits by g: g · scale, rounded to Input, a row where the row of logits began. With a tangent, ġ
// replaces the logits' tangent, and g the logits only if `cross`. `scale` (1) keeps float16 in range; null for 1.
template <class T, class Input>
Status head_gradient(const HeadChunk<T, Input>& chunk, bool cross, const T* scale, cudaStream_t stream);

// value = Σ of `count` numbers.
template <class T>
Status head_value(int64_t count, const double* values, T* value, cudaStream_t stream);

}  // namespace onestep::lmhead::cuda
