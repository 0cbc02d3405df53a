// Block sizes for Hopper: 227 KiB of shared memory, 65,536 registers for the 256 threads of a block.
#pragma once

#include "attention/cuda/hopper.cuh"
#include "attention/cuda/launch.cuh"

namespace onestep::cuda {

template <class T, int D>
struct HopperSizes {
    using Forward = BlockSizes<HopperProducts<T, D>, 1, 8, 64, 2>;
    using Queries = BlockSizes<HopperProducts<T, D>, 1, 8, D == 64 ? 64 : 32, 2>;
    using Keys = BlockSizes<HopperProducts<T, D>, 1, 8, D == 64 ? 64 : 32, 2>;
    static constexpr bool kApart = false;
};

}  // namespace onestep::cuda
