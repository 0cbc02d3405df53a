// Block sizes for Hopper: 227 KiB of shared memory, 65,536 registers for the 256 threads of a block.
#pragma once

#include "attention/cuda/hopper.cuh"
#include "attention/cuda/launch.cuh"

namespace onestep::attention::cuda {

// Two blocks of one warp group on a multiprocessor: while one waits for tensor cores or memory, the other computes.
// With 128 features the gradient of queries, which has one accumulator alone, is faster in one block of two warp groups
// on twice as many keys at a time (H200, T 8192, H 16: 2.8 against 3.4 ms; of keys and values 4.7 against 4.4).
template <class T, int D>
struct HopperSizes {
    using Forward = BlockSizes<HopperProducts<T, D>, 1, 4, 64, D == 64 ? 2 : 1>;
    using Queries = BlockSizes<HopperProducts<T, D>, 1, D == 64 ? 4 : 8, 64, D == 64 ? 2 : 1>;
    using Keys = BlockSizes<HopperProducts<T, D>, 1, 4, D == 64 ? 64 : 32, D == 64 ? 2 : 1>;
    static constexpr bool kApart = false;
};

}  // namespace onestep::attention::cuda
