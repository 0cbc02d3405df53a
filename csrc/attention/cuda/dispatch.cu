#include "attention/cuda/attention_cuda.hpp"

#include <string>

#include "attention/cuda/instances.hpp"

namespace onestep::cuda {
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
            break;
    }
    return attention_instances_f16();
}

const AttentionInstance* instance(Element element, int d, int dv) {
    const AttentionInstances all = instances(element);
    for (int i = 0; i < all.count; ++i) {
        if (d <= all.first[i].most_features && dv <= all.first[i].most_features) {
            return all.first[i].shared_bytes <= device_limits().shared_bytes ? &all.first[i] : nullptr;
        }
    }
    return nullptr;
}

Status unsupported(const AttentionProblem& problem) {
    return device_error("attention: no kernel for " + std::to_string(problem.d) + " and " + std::to_string(problem.dv) +
                        " features");
}

}  // namespace

bool attention_supported(Element element, int d, int dv) { return instance(element, d, dv) != nullptr; }

int64_t attention_gradients_workspace(const AttentionProblem& problem) {
    const int64_t number = problem.element == Element::float64 ? 8 : 4;
    return 4 * number * problem.batch.count() * problem.heads * problem.queries;
}

Status attention_forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem.element, problem.d, problem.dv);
    return chosen != nullptr ? chosen->forward(problem, outputs, stream) : unsupported(problem);
}

Status attention_jvp(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem.element, problem.d, problem.dv);
    return chosen != nullptr ? chosen->jvp(problem, outputs, stream) : unsupported(problem);
}

Status attention_gradients(const AttentionProblem& problem, bool tangents, const AttentionOutputs& outputs,
                           void* workspace, cudaStream_t stream) {
    const AttentionInstance* chosen = instance(problem.element, problem.d, problem.dv);
    return chosen != nullptr ? chosen->gradients(problem, tangents, outputs, workspace, stream) : unsupported(problem);
}

}  // namespace onestep::cuda
