// Products of fp32 numbers by tensor cores: a number is the sum of two of tf32, high and low, of whose four products
// the three larger ones are taken (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
// surpassing the FP32 theoretical peak performance", 2022). `high` is the number itself, whose last 13 bits tensor
// cores do not read (so it was on an H200; PTX leaves it open); `low`, what those bits are worth. What is left out is
// at most 2^-21 of a product.
//
// The additions of tensor cores truncate. So they sum eight rows alone, from zero, and the sum so far is fp32's.
#pragma once

#include "base/cuda/mma.cuh"

namespace onestep::cuda {

// NaN where the value is not finite.
__device__ __forceinline__ unsigned low_part(float value) {
    return __float_as_uint(value - __uint_as_float(__float_as_uint(value) & 0xffffe000u));
}

// The operands of one tile of 16 × 8 over eight rows, as mma_16x8x8_tf32 takes them.
struct SplitTile {
    unsigned a_high[4], a_low[4];
    unsigned b_high[2], b_low[2];
};

// sums[i] += a b over eight rows, for kCount tiles; operands_of(i), with the index as a constant, is its SplitTile.
// Products of one tile wait for each other, so kAtOnce tiles take turns.
template <int kAtOnce, int kCount, class OperandsOf>
__device__ __forceinline__ void multiply_add(float (*sums)[4], const OperandsOf& operands_of) {
    unrolled<ceil_div(kCount, kAtOnce)>([&](auto group) {
        constexpr int kFirst = group * kAtOnce;
        constexpr int kTiles = kCount - kFirst < kAtOnce ? kCount - kFirst : kAtOnce;
        float tiles[kTiles][4];
        unrolled<kTiles>([&](auto i) {
            const SplitTile tile = operands_of(std::integral_constant<int, kFirst + i>{});
            mma_16x8x8_tf32<true>(tiles[i], tile.a_low, tile.b_high);
        });
        unrolled<kTiles>([&](auto i) {
            const SplitTile tile = operands_of(std::integral_constant<int, kFirst + i>{});
            mma_16x8x8_tf32(tiles[i], tile.a_high, tile.b_low);
        });
        unrolled<kTiles>([&](auto i) {
            const SplitTile tile = operands_of(std::integral_constant<int, kFirst + i>{});
            mma_16x8x8_tf32(tiles[i], tile.a_high, tile.b_high);
        });
        unrolled<kTiles>([&](auto i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums[kFirst + i][e] += tiles[i][e];
            }
        });
    });
}

}  // namespace onestep::cuda
