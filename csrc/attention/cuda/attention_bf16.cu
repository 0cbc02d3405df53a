#include "attention/cuda/launch.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_bf16() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<PlainSizes<bfloat16, 64>>::instance(),
                                                       AttentionLaunches<PlainSizes<bfloat16, 128>>::instance(),
                                                       AttentionLaunches<PlainSizes<bfloat16, 256>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
