// Block sizes for Hopper: 227 KiB of shared memory, 65,536 registers for the 256 threads of a block.
#pragma once

#include "attention/cuda/hopper.cuh"
#include "attention/cuda/launch.cuh"

namespace onestep::cuda {

// Two blocks of one warp group on a multiprocessor: while one waits for tensor cores or memory, the other computes.
template <class T, int D>
struct HopperSizes {
    using Forward = BlockSizes<HopperProducts<T, D>, 1, 4, 64, D == 64 ? 2 : 1>;
    using Queries = BlockSizes<HopperProducts<T, D>, 1, 4, D == 64 ? 64 : 32, D == 64 ? 2 : 1>;
    using Keys = Queries;
    static constexpr bool kApart = false;
};

// One block of two warp groups, with copies under way while it computes.
template <class T, int D>
struct WideHopperSizes {
    using Forward = BlockSizes<HopperProducts<T, D>, 1, 8, 64, 2>;
    using Queries = BlockSizes<HopperProducts<T, D>, 1, 8, 64, 1>;
    using Keys = BlockSizes<HopperProducts<T, D>, 1, 8, 32, 2>;
    static constexpr bool kApart = false;
};

}  // namespace onestep::cuda
