// What one CPU target provides to lmhead.cpp: the steps on one block of classes of one chunk of rows.
#pragma once

#include <cstdint>

#include "base/target.hpp"
#include "lmhead/lmhead.hpp"

namespace onestep {

// One chunk of rows, in panels of `panel` rows. Matrices over the chunk lie as [row panel][class or feature][row].
template <class T, class Input>
struct HeadChunk {
    const LinearCrossEntropyArgs<T, Input>* args = nullptr;
    int64_t rows = 0;
    int64_t padded_rows = 0;  // whole panels
    int64_t block = 0;        // classes in a block, whole tiles
    int64_t padded_classes = 0;
    int64_t padded_features = 0;

    const Input* const* input = nullptr;          // a pointer per row
    const Input* const* input_tangent = nullptr;  // likewise, or null
    // The input packed for the target's products: for z as [row panel][feature][row], for grad_weight as [feature
    // panel][row][feature], in T or in tiles of bfloat16; and its tangent likewise.
    void* input_panels = nullptr;
    void* tangent_panels = nullptr;
    void* input_columns = nullptr;
    void* tangent_columns = nullptr;

    T* logits = nullptr;          // exp(z − peak), then g
    T* logits_tangent = nullptr;  // ż, then ġ

    // Per block of classes and row: max z, which becomes exp(max z − logsumexp); Σ exp(z − peak); the same times ż;
    // Σ q z and Σ q ż.
    T* peak = nullptr;
    T* sum = nullptr;
    T* moment = nullptr;
    T* expected = nullptr;
    T* expected_tangent = nullptr;

    // Per row.
    int64_t* target = nullptr;  // -1: ignored
    T* row_weight = nullptr;
    T* row_weight_tangent = nullptr;
    T* mean_tangent = nullptr;  // μ

    bool first = false;  // the first chunk overwrites grad_weight and grad_bias, the others add

    bool wants_gradient() const {
        return args->grad_input != nullptr || args->grad_weight != nullptr || args->grad_bias != nullptr;
    }
    // Whether g itself is multiplied by a tangent.
    bool wants_cross_terms() const {
        return args->tangent && !args->gauss_newton &&
               ((args->grad_input != nullptr && args->weight_tangent.data != nullptr) ||
                (args->grad_weight != nullptr && args->input_tangent));
    }
};

template <class T, class Input>
struct HeadKernels {
    int64_t tile_rows;
    int64_t panel;
    int64_t packed_bytes;  // of an element of the chunk's packed input

    // Packs one panel of the chunk's rows, both ways (the columns only of [first, last) features, whole panels).
    void (*pack_input)(const HeadChunk<T, Input>& chunk, int64_t row_panel);
    void (*pack_input_columns)(const HeadChunk<T, Input>& chunk, int64_t feature_panel);

    // Logits (and their tangent) of one block of classes, and what the row statistics need of them.
    void (*score_block)(const HeadChunk<T, Input>& chunk, int64_t block, void* work);
    // g and ġ of one block in place; adds to grad_weight and grad_bias, and writes or adds to the transposed grad_input
    // [row panel][feature][row].
    void (*gradient_block)(const HeadChunk<T, Input>& chunk, int64_t block, bool accumulate, T* grad_input, void* work);
    // Bytes that both need for `work`.
    int64_t (*work)(const HeadChunk<T, Input>& chunk);
};

ONESTEP_DECLARE_TABLE(lmhead, f32, HeadKernels<float, float>)
ONESTEP_DECLARE_TABLE(lmhead, f64, HeadKernels<double, double>)
ONESTEP_DECLARE_TABLE(lmhead, bf16, HeadKernels<float, BFloat16>)
ONESTEP_DECLARE_AMX_TABLE(lmhead, bf16, HeadKernels<float, BFloat16>)

}  // namespace onestep
