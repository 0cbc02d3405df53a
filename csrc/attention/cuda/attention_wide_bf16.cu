#include "attention/cuda/hopper_sizes.cuh"

namespace onestep::cuda {

AttentionInstances attention_instances_wide_bf16() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<WideHopperSizes<bfloat16, 128>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::cuda
