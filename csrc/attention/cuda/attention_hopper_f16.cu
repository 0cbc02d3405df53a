#include "attention/cuda/hopper_sizes.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_hopper_f16() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<HopperSizes<float16, 64>>::instance(),
                                                       AttentionLaunches<HopperSizes<float16, 128>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
