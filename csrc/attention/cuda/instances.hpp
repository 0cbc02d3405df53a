// The table of kernel instances of one element type, one entry for each class of feature counts.
#pragma once

#include "attention/cuda/attention.hpp"

namespace onestep::attention::cuda {

struct AttentionInstance {
    int most_features;  // of q, k and v
    int64_t shared_bytes;
    Status (*forward)(const AttentionProblem&, const AttentionOutputs&, cudaStream_t);
    Status (*jvp)(const AttentionProblem&, const AttentionOutputs&, cudaStream_t);
    Status (*gradients)(const AttentionProblem&, bool tangents, const AttentionOutputs&, void* workspace, cudaStream_t);
};

struct AttentionInstances {
    const AttentionInstance* first;
    int count;
};

AttentionInstances attention_instances_f32();
AttentionInstances attention_instances_f64();
AttentionInstances attention_instances_bf16();
AttentionInstances attention_instances_f16();
// With the matrix instructions of compute capability 9.0.
AttentionInstances attention_instances_hopper_bf16();
AttentionInstances attention_instances_hopper_f16();

}  // namespace onestep::attention::cuda
