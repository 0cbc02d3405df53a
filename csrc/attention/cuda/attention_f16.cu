#include "attention/cuda/launch.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_f16() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<PlainSizes<float16, 64>>::instance(),
                                                       AttentionLaunches<PlainSizes<float16, 128>>::instance(),
                                                       AttentionLaunches<PlainSizes<float16, 256>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
