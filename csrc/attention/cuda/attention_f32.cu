#include "attention/cuda/launch.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_f32() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<PlainSizes<float, 64>>::instance(),
                                                       AttentionLaunches<PlainSizes<float, 128>>::instance(),
                                                       AttentionLaunches<PlainSizes<float, 256>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
