// Attention on a CUDA device: the products of attention.hpp by the same formulas, as plain host functions.
//
// Operands are of one element type; columns are next to each other, and rows, heads and batch dimensions start at
// multiples of 16 bytes (the caller copies what is not so). bfloat16 and float16 are multiplied on tensor cores and
// accumulated in float. L and its tangent are double; O, gradients and tangents have the operands' type. Outputs are
// contiguous. All sums have a fixed order: the same call gives the same bits.
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep::attention::cuda {

using namespace onestep::cuda;

struct AttentionTensors {
    HeadedOperand q;  // heads × queries × d
    HeadedOperand k;  // kv_heads × keys × d
    HeadedOperand v;  // kv_heads × keys × dv
    // heads × queries × keys: boolean (0 hides the key), or of the operands' type or float and added to the scores. Its
    // columns may have any stride. The tangents' is not boolean.
    HeadedOperand mask;
    HeadedOperand out;                 // heads × queries × dv: O
    HeadedOperand grad;                // heads × queries × dv: the cotangent of O
    const double* lse = nullptr;       // contiguous, batch × heads × queries: L
    const double* grad_lse = nullptr;  // likewise: the cotangent of L
};

struct AttentionProblem {
    Element element = Element::float32;
    BatchShape batch;
    int64_t heads = 0, kv_heads = 0, queries = 0, keys = 0;
    int d = 0, dv = 0;
    double scale = 1.0;
    bool causal = false;  // key j is seen by the queries i >= j
    // 0: without Hopper's own matrix instructions; 1: with them, where an instance has them; 2: the same in wide
    // blocks.
    int warp_groups = 1;
    AttentionTensors primal;
    AttentionTensors tangent;
};

// Where results go; null: not wanted.
struct AttentionOutputs {
    void* out = nullptr;
    double* lse = nullptr;
    void* q_grad = nullptr;
    void* k_grad = nullptr;
    void* v_grad = nullptr;
    // The gradient of the scores, batch × heads × queries × keys, in float (double for double). Only elements whose
    // block of the scores is seen are written: zeros before.
    void* score_grad = nullptr;
};

// Whether an instance takes these sizes on the current device.
bool attention_supported(Element element, int d, int dv);

// Bytes of device memory that attention_gradients needs, aligned to 32.
int64_t attention_gradients_workspace(const AttentionProblem& problem);

// O and L.
Status attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream);

// Their tangents. Reads O and L.
Status attention_jvp(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream);

// dQ, dK, dV and the gradient of the scores; with `tangents` the tangents of these. Reads O and L, and their tangents.
Status attention_gradients(const AttentionProblem& problem, bool tangents, const AttentionOutputs& outputs,
                           void* workspace, cudaStream_t stream);

}  // namespace onestep::attention::cuda
