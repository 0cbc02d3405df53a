#include <string>

#include "attention/cuda/attention.hpp"
#include "attention/cuda/instances.hpp"

namespace onestep::attention::cuda {
namespace {

AttentionInstances instances(Element element) {
    switch (element) {
        case Element::float32:
            return attention_instances_f32();
        case Element::float64:
            return attention_instances_f64();
        case Element::bfloat16:
            return attention_instances_bf16();
        case Element::float16:
            return attention_instances_f16();
        case Element::boolean:
            break;
    }
    return {};  // no kernel
}

// The first instance with room for so many features, if the device has its shared memory.
const AttentionInstance* first_of(const AttentionInstances& all, int d, int dv) {
    for (int i = 0; i < all.count; ++i) {
        if (d <= all.first[i].most_features && dv <= all.first[i].most_features) {
            return all.first[i].shared_bytes <= device_limits().shared_bytes ? &all.first[i] : nullptr;
        }
    }
    return nullptr;
}

const AttentionInstance* instance(Element element, int d, int dv, bool warp_groups) {
    const bool half = element == Element::bfloat16 || element == Element::float16;
    if (half && warp_groups && device_limits().capability == 90) {
        const AttentionInstances all =
            element == Element::float16 ? attention_instances_hopper_f16() : attention_instances_hopper_bf16();
        const AttentionInstance* const chosen = first_of(all, d, dv);
        if (chosen != nullptr) {
            return chosen;
        }
    }
    return first_of(instances(element), d, dv);
}

const AttentionInstance* instance(const AttentionProblem& problem) {
    return instance(problem.element, problem.d, problem.dv, problem.warp_groups);
}

Status unsupported(const AttentionProblem& problem) {
    return device_error("attention: no kernel for " + std::to_string(problem.d) + " and " + std::to_string(problem.dv) +
                        " features");
}

}  // namespace

bool attention_supported(Element element, int d, int dv) { return instance(element, d, dv, true) != nullptr; }

int64_t attention_gradients_workspace(const AttentionProblem& problem) {
    const int64_t number = problem.element == Element::float64 ? 8 : 4;
    return 4 * number * problem.batch.count() * problem.heads * problem.queries;
}

Status attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem);
    return chosen != nullptr ? chosen->forward(problem, outputs, stream) : unsupported(problem);
}

Status attention_jvp(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem);
    return chosen != nullptr ? chosen->jvp(problem, outputs, stream) : unsupported(problem);
}

Status attention_gradients(const AttentionProblem& problem, bool tangents, const AttentionOutputs& outputs,
                           void* workspace, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem);
    return chosen != nullptr ? chosen->gradients(problem, tangents, outputs, workspace, stream) : unsupported(problem);
}

}  // namespace onestep::attention::cuda
