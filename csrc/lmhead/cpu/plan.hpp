// How a call of the LM head runs on the CPU: chunks of rows, blocks of classes, and the work memory of one chunk.
#pragma once

#include "base/plan.hpp"
#include "base/workspace.hpp"
#include "lmhead/cpu/kernels.hpp"

namespace onestep {

template <class T, class Input>
struct LinearCrossEntropyPlan {
    const HeadKernels<T, Input>* kernels = nullptr;
    FixedCut chunks;  // rows
    FixedCut blocks;  // classes
    EvenCut pieces;   // blocks whose shares of grad_input are added up before those of pieces are, in order
    int64_t padded_classes = 0;
    int64_t padded_features = 0;
    bool wants_gradient = false;

    // Of the whole call; null where a part has no elements. See HeadChunk for those of its names.
    Layout layout;
    Part<const Input*> input, input_tangent;
    Part<char> input_panels, tangent_panels, input_columns, tangent_columns;
    Part<T> logits, logits_tangent;
    Part<T> peak, sum, moment, expected, expected_tangent;
    Part<int64_t> target;
    Part<T> row_weight, row_weight_tangent, mean_tangent;
    Part<double> values;  // of each row of a chunk
    Part<T> partial;      // one grad_input of a chunk for each piece

    // Of the thread that works on a block.
    Layout own_layout;
    Part<char> work;

    int64_t partial_size() const { return chunks.size * padded_features; }
};

template <class T, class Input>
LinearCrossEntropyPlan<T, Input> plan(const LinearCrossEntropyArgs<T, Input>& args);

// `workspace` holds plan.layout.bytes().
template <class T, class Input>
Status run(const LinearCrossEntropyPlan<T, Input>& plan, const LinearCrossEntropyArgs<T, Input>& args,
           const Workspace& workspace);

}  // namespace onestep
