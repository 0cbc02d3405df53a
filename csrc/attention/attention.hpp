// Scaled dot-product attention, S = s·QKᵀ + mask, P = softmax(S), O = PV, L = logsumexp(S), with its tangents, its
// gradients and the tangents of its gradients. Derivatives up to order two need no other products. S and P are computed
// by tiles, anew in each function, and never stored, so that the extra memory grows with the length T, not with T².
//
// In the formulas a dot marks a tangent: Ṡ is that of S. A d before a capital letter marks a gradient: dS is that of
// ⟨G, O⟩ + ⟨g, L⟩ with respect to S. In code tangents and gradients are spelled out (`q_tangent`, `q_grad`); `d` and
// `dv` are sizes there: how many features q and k have, and how many v has. (The arguments dq, dk, dv, dmask, dout and
// dlse of torch.ops.onestep.attention_… are tangents.) ∘ is the product element by element, and rowsum is over the
// keys, or over the features of O.
//
// All sizes and strides count elements; shapes are written (batch…, heads, rows, columns). Query head h reads key and
// value head h / (heads / kv_heads). Outputs are contiguous and in the type T that the kernel computes in. L is always
// double: all probabilities of a row are computed from it, so that its rounding would be an error that they share.
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

// Inputs, of the type T that the kernel computes in, or of bfloat16 where T is float; lse and grad_lse are double. A
// cotangent or a tangent that is absent (null data) is zero.
struct AttentionInputs {
    HeadedOperand q;         // heads × queries × d
    HeadedOperand k;         // kv_heads × keys × d
    HeadedOperand v;         // kv_heads × keys × dv
    HeadedOperand mask;      // heads × queries × keys, added to the scores; or boolean: 0 hides the key
    HeadedOperand out;       // heads × queries × dv: O
    HeadedOperand lse;       // heads × queries, double: L
    HeadedOperand grad;      // heads × queries × dv: G, the cotangent of O
    HeadedOperand grad_lse;  // heads × queries, double: g, the cotangent of L
};

// Where the gradient of the mask goes, and its strides. Over dimensions of stride 0 the mask is shared, and its
// gradient is summed.
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

// The arguments of every entry. The inherited members say where the entry's results go: values, or tangents in
// attention_jvp and attention_backward_jvp. `tangents` is used by the two entries that compute both.
template <class T>
struct AttentionArgs : AttentionResults<T> {
    BatchShape batch;
    int64_t heads = 0, kv_heads = 0, queries = 0, keys = 0, d = 0, dv = 0;
    T scale = T(1);
    bool causal = false;  // key j is seen by the queries i >= j
    AttentionInputs primal;
    AttentionInputs tangent;
    AttentionResults<T> tangents;
};

// O and L from q, k, v, mask. A query that sees no key gives O = 0 and L = −∞.
template <class T>
Status attention_forward(const AttentionArgs<T>& args);

// Ṡ = s(Q̇Kᵀ + QK̇ᵀ) + ṁask, L̇ = rowsum(P∘Ṡ), Ȯ = (P∘Ṡ)V − L̇∘O + PV̇. Reads O, L and the tangents of q, k, v, mask.
template <class T>
Status attention_jvp(const AttentionArgs<T>& args);

// δ = rowsum(G∘O) − g, dP = GVᵀ, dS = P∘(dP − δ), dQ = s·dS K, dK = s·dSᵀQ, dV = PᵀG, dmask = dS. Reads O and L.
template <class T>
Status attention_backward(const AttentionArgs<T>& args);

// The tangents of these gradients: Ṗ = P∘(Ṡ − L̇), dṖ = ĠVᵀ + GV̇ᵀ, δ̇ = rowsum(Ġ∘O + G∘Ȯ) − ġ,
// dṠ = Ṗ∘(dP − δ) + P∘(dṖ − δ̇), dQ̇ = s(dṠK + dSK̇), dK̇ = s(dṠᵀQ + dSᵀQ̇), dV̇ = ṖᵀG + PᵀĠ, and dṠ for the mask.
// Reads O, L, Ȯ and L̇.
template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args);

// Values and tangents together. The scores are computed once for both, and dP likewise: attention_forward and
// attention_jvp take 6 matrix products for each tile instead of 2 + 5, attention_backward and attention_backward_jvp 15
// instead of 5 + 12.
template <class T>
Status attention_forward_and_jvp(const AttentionArgs<T>& args);
template <class T>
Status attention_backward_and_jvp(const AttentionArgs<T>& args);

// The first four functions as plain loops, which the tests compare the tuned kernels with. The two that compute values
// and tangents together are compared with two of these.
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
