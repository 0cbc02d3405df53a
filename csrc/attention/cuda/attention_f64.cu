#include "attention/cuda/launch.cuh"

namespace onestep::attention::cuda {

AttentionInstances attention_instances_f64() {
    static constexpr AttentionInstance kInstances[] = {AttentionLaunches<PlainSizes<double, 64>>::instance(),
                                                       AttentionLaunches<PlainSizes<double, 128>>::instance()};
    return {kInstances, static_cast<int>(std::size(kInstances))};
}

}  // namespace onestep::attention::cuda
