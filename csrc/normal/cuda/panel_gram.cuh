// Gram sums of fp32 for a block of warps, by tensor cores (base/cuda/split.cuh), from rows that wait in shared memory.
//
// A is cut into tiles of 16 × 16 features, the lower triangle of them. One warp has them all; of several, warp w has
// rows w and 2 kWarps − 1 − w of tiles, as many tiles as any other if A is square. Eight rows of X are a k-step; lane
// (g, t) = (lane / 4, lane % 4) reads features g and g + 8 of a tile in rows t and t + 4: operand A of that row of
// tiles, and operand B of that column.
#pragma once

#include "base/cuda/async.cuh"
#include "base/cuda/split.cuh"
#include "normal/cuda/panels.cuh"

namespace onestep::normal::cuda {

inline constexpr int kGramRows = 16;   // of X, in a stage: two k-steps
inline constexpr int kGramStages = 3;  // in shared memory: two are under way while one is summed
inline constexpr int kGramStep = 8;
inline constexpr int kGramTile = 16;

// The tiles of a warp, numbered.
template <class Shape>
struct GramTiles {
    static constexpr bool alone = Shape::warps == 1;
    static constexpr int rows = Shape::order / kGramTile;   // of tiles
    static constexpr int width = Shape::width / kGramTile;  // of a row of tiles, at most
    static constexpr int own = rows / Shape::warps;         // rows of this warp
    static constexpr int count = alone ? rows * (rows + 1) / 2 : Shape::square ? rows + 1 : 2 * width;
    static_assert(alone ? Shape::square : own == 2 && (Shape::square || 2 * width == rows));

    // Own row of tiles i of warp w.
    __device__ __forceinline__ static constexpr int row(int i, int warp) {
        return alone ? i : i == 0 ? warp : rows - 1 - warp;
    }
    // Of several warps, each has the tiles of its long row first. Tiles before `always_long` are in the long row of
    // every warp; tiles from `ever_long` on, of none.
    static constexpr int always_long = Shape::square ? Shape::warps + 1 : width;
    static constexpr int ever_long = Shape::square ? rows : width;

    // Which own row tile s is in, and its column.
    __device__ __forceinline__ static constexpr int own_row(int s, int warp) {
        if (!alone) {
            return s < (Shape::square ? rows - warp : width) ? 1 : 0;
        }
        int row_ = 0;
        while (s >= (row_ + 1) * (row_ + 2) / 2) {
            ++row_;
        }
        return row_;
    }
    __device__ __forceinline__ static constexpr int column(int s, int warp) {
        const int row_ = own_row(s, warp);
        return alone ? s - row_ * (row_ + 1) / 2 : row_ == 1 ? s : s - (Shape::square ? rows - warp : width);
    }
};

// Rows of X in shared memory, then those of Y, then weights.
template <class Shape>
struct GramStage {
    // Lanes (g, t) of a warp read from 32 banks.
    static constexpr int pitch = Shape::order + 8;
    static constexpr int targets_at = kGramRows * pitch;
    static constexpr int weights_at = targets_at + kGramRows * Shape::columns;
    static constexpr int floats = weights_at + kGramRows;
};

// Begins to bring rows [begin, begin + kGramRows) of X, Y and the weights to `stage`; zeros where there is no row or
// column. `vectors`: whole vectors of X can be copied.
template <class Shape>
__device__ __forceinline__ void load_stage(const SystemArgs<float>& args, const Matrix<const float>& x,
                                           const Matrix<const float>& y, const Matrix<const float>& weight,
                                           int64_t begin, bool vectors, float* stage) {
    using Stage = GramStage<Shape>;
    const int thread = static_cast<int>(threadIdx.x);
    const int d = static_cast<int>(args.d);
    const int k = static_cast<int>(args.k);
    const int left = static_cast<int>(args.n - begin < kGramRows ? args.n - begin : kGramRows);
    if (vectors) {
        // A thread keeps its columns, so that addresses are sums.
        constexpr int kAcross = Shape::order / kVector<float>;
        constexpr int kDown = Shape::threads / kAcross;
        static_assert(kDown * kAcross == Shape::threads && kGramRows % kDown == 0);
        const int first = thread / kAcross;
        const int c = thread % kAcross * kVector<float>;
        const float* from = x.data + (begin + first) * x.row + c;
        float* to = stage + first * Stage::pitch + c;
        const int rows = c < d ? left - first : 0;
#pragma unroll
        for (int r = 0; r < kGramRows; r += kDown) {
            cp_async<16>(to + r * Stage::pitch, r < rows ? from : x.data, r < rows ? 16 : 0);
            from += kDown * x.row;
        }
    } else {
#pragma unroll 1
        for (int at = thread; at < kGramRows * Shape::order; at += Shape::threads) {
            const int r = at / Shape::order;
            const int c = at % Shape::order;
            const bool inside = r < left && c < d;
            cp_async<4>(stage + r * Stage::pitch + c, inside ? x.data + (begin + r) * x.row + c * x.col : x.data,
                        inside ? 4 : 0);
        }
    }
#pragma unroll 1
    for (int at = thread; at < kGramRows * Shape::columns; at += Shape::threads) {
        const int r = at / Shape::columns;
        const int c = at % Shape::columns;
        const bool inside = r < left && c < k;
        cp_async<4>(stage + Stage::targets_at + at, inside ? y.data + (begin + r) * y.row + c * y.col : x.data,
                    inside ? 4 : 0);
    }
    if (weight.data != nullptr && thread < kGramRows) {
        const bool inside = thread < left;
        cp_async<4>(stage + Stage::weights_at + thread, weight.data + (inside ? (begin + thread) * weight.row : 0),
                    inside ? 4 : 0);
    }
}

// Features g, g + 8 of a tile in rows t, t + 4, in the order of operand A, and their low parts.
struct GramFragment {
    unsigned high[4];
    unsigned low[4];
};

template <bool kWeighted>
__device__ __forceinline__ void load_fragment(const float* from, int pitch, const float (&scale)[2], float (&value)[4],
                                              GramFragment& fragment) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        value[e] = from[e / 2 * 4 * pitch + e % 2 * 8];
        if constexpr (kWeighted) {
            value[e] *= scale[e / 2];
        }
        fragment.high[e] = __float_as_uint(value[e]);
        fragment.low[e] = low_part(value[e]);
    }
}

// What a warp sums: tiles of 16 × 8, two for each of 16 × 16; and of its features' R the rows t and t + 4 of each
// k-step.
template <class Shape>
struct GramSums {
    using Tiles = GramTiles<Shape>;
    float tiles[2 * Tiles::count][4];
    float targets[Tiles::own][2][Shape::columns];
};

// sums += left × right for kCount tiles of 16 × 16, all products of which are under way at once.
template <int kCount>
__device__ __forceinline__ void add_tiles(const GramFragment (&left)[2], const GramFragment (&right)[2],
                                          float (*sums)[4]) {
    multiply_add<2 * kCount, 2 * kCount>(sums, [&](auto index) {
        constexpr int kTile = index / 2;
        constexpr int kHalf = index % 2;
        SplitTile tile;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            tile.a_high[e] = left[kTile].high[e];
            tile.a_low[e] = left[kTile].low[e];
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            tile.b_high[e] = right[kTile].high[2 * e + kHalf];
            tile.b_low[e] = right[kTile].low[2 * e + kHalf];
        }
        return tile;
    });
}

__device__ __forceinline__ GramFragment choose(bool first, const GramFragment& a, const GramFragment& b) {
    GramFragment chosen;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        chosen.high[e] = first ? a.high[e] : b.high[e];
        chosen.low[e] = first ? a.low[e] : b.low[e];
    }
    return chosen;
}

// sums += k-step number `step` of `stage`.
template <bool kWeighted, class Shape>
__device__ __forceinline__ void add_step(const float* stage, int step, int warp, int d, GramSums<Shape>& sums) {
    using Tiles = GramTiles<Shape>;
    using Stage = GramStage<Shape>;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int g = lane / 4;
    const int t = step * kGramStep + lane % 4;
    float scale[2] = {1.0f, 1.0f};
    float y[2][Shape::columns];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        if constexpr (kWeighted) {
            scale[h] = square_root(stage[Stage::weights_at + t + 4 * h]);
        }
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
            y[h][c] = Shape::square ? stage[Stage::targets_at + (t + 4 * h) * Shape::columns + c] * scale[h] : 0.0f;
        }
    }
    const float* const from = stage + t * Stage::pitch + g;
    GramFragment own[Tiles::own];
#pragma unroll
    for (int i = 0; i < Tiles::own; ++i) {
        float value[4];
        load_fragment<kWeighted>(from + kGramTile * Tiles::row(i, warp), Stage::pitch, scale, value, own[i]);
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                sums.targets[i][e % 2][c] += value[e] * y[e / 2][c];
            }
        }
    }
    // Two tiles at a time.
    unrolled<ceil_div(Tiles::count, 2)>([&](auto pair) {
        constexpr int kFirst = 2 * pair;
        constexpr int kCount = Tiles::count - kFirst < 2 ? 1 : 2;
        GramFragment left[2];
        GramFragment right[2];
        if constexpr (Tiles::alone) {
            if (kGramTile * Tiles::own_row(kFirst, 0) >= d) {
                return;
            }
            unrolled<kCount>([&](auto i) {
                left[i] = own[Tiles::own_row(kFirst + i, 0)];
                right[i] = own[Tiles::column(kFirst + i, 0)];
            });
        } else {
            // The short row lies above the long one: if it is beyond d, both are. Of a matrix that is not square the
            // short row has tiles above the diagonal, which nobody needs.
            const int lowest = Tiles::row(Tiles::own_row(kFirst + kCount - 1, warp), warp);
            if (kGramTile * lowest >= d || (!Shape::square && Tiles::column(kFirst, warp) > lowest)) {
                return;
            }
            unrolled<kCount>([&](auto i) {
                constexpr int kTile = kFirst + i;
                float value[4];
                load_fragment<kWeighted>(from + kGramTile * Tiles::column(kTile, warp), Stage::pitch, scale, value,
                                         right[i]);
                if constexpr (kTile < Tiles::always_long) {
                    left[i] = own[1];
                } else if constexpr (kTile >= Tiles::ever_long) {
                    left[i] = own[0];
                } else {
                    left[i] = choose(Tiles::own_row(kTile, warp) == 1, own[1], own[0]);
                }
            });
        }
        add_tiles<kCount>(left, right, &sums.tiles[2 * kFirst]);
    });
}

// The sums over `stages` stages at `shared`, of `d` features; load(stage, to) begins to bring one.
template <bool kWeighted, class Shape, class Load>
__device__ __forceinline__ void sum_stages(int64_t stages, int warp, int d, float* shared, const Load& load,
                                           GramSums<Shape>& sums) {
    using Stage = GramStage<Shape>;
    for (int64_t stage = 0; stage < kGramStages - 1; ++stage) {
        if (stage < stages) {
            load(stage, shared + stage * Stage::floats);
        }
        cp_async_commit();
    }
    int slot = 0;
#pragma unroll 1
    for (int64_t stage = 0; stage < stages; ++stage) {
        cp_async_wait<kGramStages - 2>();
        panel_barrier<Shape::warps>();
        // To where the stage before this one was.
        const int64_t ahead = stage + kGramStages - 1;
        if (ahead < stages) {
            load(ahead, shared + (slot == 0 ? kGramStages - 1 : slot - 1) * Stage::floats);
        }
        cp_async_commit();
#pragma unroll 1
        for (int step = 0; step < kGramRows / kGramStep; ++step) {
            add_step<kWeighted>(shared + slot * Stage::floats, step, warp, d, sums);
        }
        slot = slot + 1 == kGramStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    panel_barrier<Shape::warps>();
}

// to_element(address, two neighbours of a tile) for each pair of elements on and below A's diagonal blocks.
template <class Shape, class ToElements>
__device__ __forceinline__ void each_pair(const GramSums<Shape>& sums, int warp, float* shared,
                                          const ToElements& to_elements) {
    using Tiles = GramTiles<Shape>;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    unrolled<Tiles::count>([&](auto tile) {
        constexpr int s = tile;
        const int row = kGramTile * Tiles::row(Tiles::own_row(s, warp), warp);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int panel = 2 * Tiles::column(s, warp) + half;
            float* const to = shared + Shape::panel(panel) + (row + lane / 4) * kPanelPitch + lane % 4 * 2;
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                // The upper half of a tile on the diagonal has no rows of its second panel.
                if (row + 8 * e >= kPanel * panel) {
                    to_elements(to + e * 8 * kPanelPitch,
                                make_float2(sums.tiles[2 * s + half][2 * e], sums.tiles[2 * s + half][2 * e + 1]));
                }
            }
        }
    });
}

// A = XᵀDX to shared memory, and R = XᵀDY to the shared targets. The caller waits before it reads them.
template <class Shape>
__device__ __forceinline__ void panel_gram(const SystemArgs<float>& args, int64_t problem, float* shared) {
    using Tiles = GramTiles<Shape>;
    const Matrix<const float> x = args.x.at(args.batch, problem);
    const Matrix<const float> y = args.y.at(args.batch, problem);
    const Matrix<const float> weight = args.weight.at(args.batch, problem);
    const int warp = Shape::warps == 1 ? 0 : static_cast<int>(threadIdx.x) / kWarpSize;
    const int d = static_cast<int>(args.d);
    const bool vectors = x.col == 1 && d % kVector<float> == 0 && x.row % kVector<float> == 0 &&
                         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
    const int64_t stages = ceil_div<int64_t>(args.n, kGramRows);
    const auto load = [&](int64_t stage, float* to) {
        load_stage<Shape>(args, x, y, weight, stage * kGramRows, vectors, to);
    };
    GramSums<Shape> sums = {};
    if (weight.data == nullptr) {
        sum_stages<false>(stages, warp, d, shared, load, sums);
    } else {
        sum_stages<true>(stages, warp, d, shared, load, sums);
    }
    each_pair(sums, warp, shared, [](float* to, float2 pair) { *reinterpret_cast<float2*>(to) = pair; });
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
    for (int i = 0; i < Tiles::own; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
#pragma unroll
            for (int c = 0; c < Shape::columns; ++c) {
                float sum = sums.targets[i][e][c];
                sum += __shfl_xor_sync(kFullWarp, sum, 1);
                sum += __shfl_xor_sync(kFullWarp, sum, 2);
                if (lane % 4 == 0) {
                    shared[Shape::targets_at + c * Shape::order + kGramTile * Tiles::row(i, warp) + 8 * e + lane / 4] =
                        sum;
                }
            }
        }
    }
}

}  // namespace onestep::normal::cuda
