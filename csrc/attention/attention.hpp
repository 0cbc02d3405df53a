// Scaled dot-product attention with the products that close its derivatives of order two:
// S = s·QKᵀ + mask, P = softmax(S), O = PV, L = logsumexp(S), at O(T) extra memory.
//
// All sizes and strides count elements; shapes are written (batch…, heads, rows, columns). Query head h reads key and
// value head h / (heads / kv_heads). Outputs are contiguous and in the type T that the kernel computes in; L alone is
// double always, since its rounding would be an error that all probabilities of a row have in common.
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

// Inputs, of the type T that the kernel computes in or of bfloat16 under T = float. A cotangent or a tangent that is
// absent is zero.
struct AttentionInputs {
    HeadedOperand q;         // heads × queries × d
    HeadedOperand k;         // kv_heads × keys × d
    HeadedOperand v;         // kv_heads × keys × dv
    HeadedOperand mask;      // heads × queries × keys, added to the scores; or boolean: 0 hides the key
    HeadedOperand out;       // heads × queries × dv: O
    HeadedOperand lse;       // heads × queries, double: L
    HeadedOperand grad;      // heads × queries × dv: G, the cotangent of O
    HeadedOperand grad_lse;  // heads × queries, double: the cotangent of L
};

// The gradient of the mask, summed over its dimensions of stride 0.
template <class T>
struct AttentionMaskGrad {
    T* data = nullptr;
    int64_t batch[kMaxBatchDims] = {};
    int64_t head = 0;
    int64_t row = 0;
    int64_t col = 0;
};

// Where results go.
template <class T>
struct AttentionResults {
    T* out = nullptr;
    double* lse = nullptr;  // may be null in attention_jvp
    T* q_grad = nullptr;
    T* k_grad = nullptr;
    T* v_grad = nullptr;
    AttentionMaskGrad<T> mask_grad;  // null data: not wanted
};

// The results of the function itself: tangents in the functions that compute nothing else.
template <class T>
struct AttentionArgs : AttentionResults<T> {
    BatchShape batch;
    int64_t heads = 0, kv_heads = 0, queries = 0, keys = 0, d = 0, dv = 0;
    T scale = T(1);
    bool causal = false;  // key j is seen by the queries i >= j
    AttentionInputs primal;
    AttentionInputs tangent;
    AttentionResults<T> tangents;  // of the functions that compute both
};

// O and L from q, k, v, mask. A query that sees no key gives O = 0 and L = −∞.
template <class T>
Status attention_forward(const AttentionArgs<T>& args);

// Ṡ = s(Q̇Kᵀ + QK̇ᵀ) + ṁask, L̇ = rowsum(P∘Ṡ), Ȯ = (P∘Ṡ)V − L̇∘O + PV̇. Reads O, L and the tangents of q, k, v, mask.
template <class T>
Status attention_jvp(const AttentionArgs<T>& args);

// δ = rowsum(G∘O) − grad_L, dP = GVᵀ, dS = P∘(dP − δ), dQ = s·dS K, dK = s·dSᵀQ, dV = PᵀG, dmask = dS.
template <class T>
Status attention_backward(const AttentionArgs<T>& args);

// Tangent of the above: Ṗ = P∘(Ṡ − L̇), dṖ = ĠVᵀ + GV̇ᵀ, δ̇ = rowsum(Ġ∘O + G∘Ȯ) − grad_L̇,
// dṠ = Ṗ∘(dP − δ) + P∘(dṖ − δ̇), dQ̇ = s(dṠK + dSK̇), dK̇ = s(dṠᵀQ + dSᵀQ̇), dV̇ = ṖᵀG + PᵀĠ. Ȯ and L̇ are read.
template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args);

// Values and tangents together, with one recompute of the scores: attention_forward and attention_jvp, and
// attention_backward and attention_backward_jvp, in 6 and 15 matrix products where one after the other takes 7 and 17.
template <class T>
Status attention_forward_and_jvp(const AttentionArgs<T>& args);
template <class T>
Status attention_backward_and_jvp(const AttentionArgs<T>& args);

// The same functions as plain loops: what the tests hold the tuned kernels against.
namespace reference {
template <class T>
Status attention_forward(const AttentionArgs<T>& args);
template <class T>
Status attention_jvp(const AttentionArgs<T>& args);
template <class T>
Status attention_backward(const AttentionArgs<T>& args);
template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args);
}  // namespace reference

}  // namespace onestep
