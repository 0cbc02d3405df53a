// The language-model head: cross-entropy of a linear layer's outputs, and its derivatives, without the N × V logits.
//
// z = HWᵀ + b, P = softmax(z), q = (1 − ε) Y + ε/V with Y the one-hot targets and ε the label smoothing:
//   loss        ℓ_i = logsumexp(z_i) − Σ_v q_iv z_iv
//   value       L = Σ_i c_i ℓ_i, c the row weights
//   gradient    g = c∘(P − q);  ∂H = gW, ∂W = gᵀH, ∂b = colsum g
// and along (ċ, Ḣ, Ẇ, ḃ), with ż = ḢWᵀ + HẆᵀ + ḃ and μ = rowsum(P∘ż):
//   loss        ℓ̇_i = μ_i − Σ_v q_iv ż_iv;  value  L̇ = Σ_i c_i ℓ̇_i + ċ_i ℓ_i
//   gradient    ġ = c∘P∘(ż − μ) + ċ∘(P − q);  ∂H: ġW + gẆ, ∂W: ġᵀH + gᵀḢ, ∂b: colsum ġ
// The Gauss-Newton product leaves the terms with g out. Rows whose target is ignored count as c = ċ = 0, ℓ = 0.
//
// Operands are read in place through their strides; results are contiguous. Input is float, double or BFloat16, of
// which the last is computed in float.
#pragma once

#include <cstdint>

#include "base/bfloat16.hpp"
#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

template <class T, class Input>
struct LinearCrossEntropyArgs {
    BatchShape rows;  // the leading dimensions of the input: N rows in all
    int64_t d = 0, v = 0;
    Batched<const Input> input;     // per row: d (row stride)
    Matrix<const Input> weight;     // v × d
    Matrix<const Input> bias;       // v (row stride), or null
    Batched<const int64_t> target;  // per row: a class in [0, v), or ignore_index
    Batched<const T> row_weight;    // per row: c
    int64_t ignore_index = -100;
    double label_smoothing = 0.0;

    // Of which derivative: the gradient, or its tangent along these (null for zeros).
    bool tangent = false;
    bool gauss_newton = false;
    Batched<const Input> input_tangent;  // as input
    Matrix<const Input> weight_tangent;  // v × d
    Matrix<const Input> bias_tangent;    // v
    Batched<const T> row_weight_tangent;

    // Results, null where not wanted.
    T* value = nullptr;        // 1: L, or L̇
    T* loss = nullptr;         // N: ℓ, or ℓ̇
    T* grad_input = nullptr;   // N × d
    T* grad_weight = nullptr;  // v × d
    T* grad_bias = nullptr;    // v
};
template <class T, class Input>
Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>& args);

// The same as plain loops: what the tests hold the tuned kernel against.
namespace reference {
template <class T, class Input>
Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>& args);
}  // namespace reference

}  // namespace onestep
