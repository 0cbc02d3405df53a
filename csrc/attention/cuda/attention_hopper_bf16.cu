#include "attention/cuda/hopper_sizes.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_hopper_bf16() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<HopperSizes<bfloat16, 64>>::instance(),
                                                       AttentionLaunches<HopperSizes<bfloat16, 128>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
