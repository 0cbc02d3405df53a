// One right-hand side, one output: a group of lanes holds rows of X in registers, multiplies them by v, applies the
// curvature and multiplies back. Each 16-byte chunk of X is loaded once.
#pragma once

#include "glm/cuda/chunk.cuh"
#include "glm/cuda/middle.cuh"

namespace onestep::glm::cuda {

// Sums each of `count` values over `lanes` neighbouring lanes, with one shuffle a value instead of log2(lanes): at each
// step a lane hands half of its values on. Afterwards lane l has value l / (lanes / count), or, of more values than
// lanes, the count / lanes values from l · count / lanes on.
template <int count, int lanes, class T>
__device__ void sum_over_lanes(T (&values)[count], int lane) {
    int left = count;
#pragma unroll
    for (int mask = lanes / 2; mask >= 1; mask /= 2) {
        if (left > 1) {
            left /= 2;
            const bool upper = (lane & mask) != 0;
#pragma unroll
            for (int i = 0; i < count / 2; ++i) {
                if (i < left) {
                    const T keep = upper ? values[i + left] : values[i];
                    const T give = upper ? values[i] : values[i + left];
                    values[i] = keep + __shfl_xor_sync(kFullWarp, give, mask);
                }
            }
        } else {
            values[0] += __shfl_xor_sync(kFullWarp, values[0], mask);
        }
    }
}

// Rows that a group of lanes has in registers at a time: 64 registers of X, or 32 of narrow rows. Half as many of
// 16-bit numbers, which the compiler keeps as floats.
template <class X, int chunks>
inline constexpr int kRowsInFlight = (chunks >= 8   ? 2
                                      : chunks == 4 ? 4
                                                    : 8) /
                                     (sizeof(X) == 2 && chunks > 1 ? 2 : 1);

// Blocks of a multiprocessor: one where v, its sums and X take more than 128 registers of a thread.
template <class X, int chunks>
inline constexpr int kRowsResident = chunks >= 8 || (sizeof(X) != 4 && chunks >= 4) ? 1 : 2;

// Bytes of shared memory: a block's part of the result, and its loss.
template <class T>
int64_t rows_shared_bytes(int64_t height) {
    return whole_chunks(height * static_cast<int64_t>(sizeof(T))) + kLossBytes;
}

// `lanes` share a row, of which each holds `chunks` chunks of 16 bytes: d is at most lanes · chunks · 16 / sizeof(X).
template <class X, class T, int lanes, int chunks, bool point>
__global__ void __launch_bounds__(kThreads, (point && sizeof(X) == 2 ? 1 : kRowsResident<X, chunks>))
    rows_kernel(PassArgs<X, T> args) {
    constexpr int kElements = Chunk<X>::size;
    constexpr int kRows = kRowsInFlight<X, chunks>;
    constexpr int kGroups = 32 / lanes;  // of lanes, in a warp
    constexpr int kTile = kRows * kGroups;
    static_assert(kRows <= lanes);
    const GlmData<X, T>& data = args.data;
    const int lane = threadIdx.x % lanes;
    const int group = threadIdx.x % 32 / lanes;
    const int warp = threadIdx.x / 32;

    T v[chunks][kElements];
    T sum[chunks][kElements];
#pragma unroll
    for (int c = 0; c < chunks; ++c) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            const int64_t column = (c * lanes + lane) * kElements + e;
            v[c][e] = column < data.d ? args.right.data[column * args.right.row] : T(0);
            sum[c][e] = T(0);
        }
    }
    const T v_intercept = data.intercept ? args.right.data[data.d * args.right.row] : T(0);
    T sum_intercept = T(0);
    double loss = 0.0;
    int status = 0;

    const int64_t tiles = (data.n + kTile - 1) / kTile;
    for (int64_t tile = int64_t{blockIdx.x} * kWarps + warp; tile < tiles; tile += int64_t{gridDim.x} * kWarps) {
        const int64_t first = tile * kTile + group;
        Chunk<X> x[kRows][chunks];
        if (args.vector_loads) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int c = 0; c < chunks; ++c) {
                    x[r][c] = load_chunk(data, first + r * kGroups, (c * lanes + lane) * kElements);
                }
            }
        } else {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int c = 0; c < chunks; ++c) {
                    x[r][c] = gather_chunk(data, first + r * kGroups, (c * lanes + lane) * kElements);
                }
            }
        }
        T z[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            z[r] = T(0);
#pragma unroll
            for (int c = 0; c < chunks; ++c) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    z[r] += x[r][c].template at<T>(e) * v[c][e];
                }
            }
        }
        sum_over_lanes<kRows, lanes>(z, lane);

        // From here to the shuffles below each lane has one row of the group's.
        constexpr int kShare = lanes / kRows;
        const int64_t row = first + lane / kShare * kGroups;
        T scaled = T(0);
        if (row < data.n) {
            const T eta = z[0] + v_intercept;
            if constexpr (point) {
                const T weight = checked_weight(data, row, status);
                const T y = checked_target(data, row, 0, status);
                const Terms<T> of_row = terms(data.family, eta, y, weight);
                scaled = of_row.slope;
                if (lane % kShare == 0) {
                    loss += static_cast<double>(of_row.loss);
                    if (args.curvature != nullptr) {
                        args.curvature[row] = of_row.curvature;
                    }
                }
            } else {
                scaled = args.curvature[row] * eta;
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const T factor = __shfl_sync(kFullWarp, scaled, r * kShare, lanes);
            sum_intercept += factor;
#pragma unroll
            for (int c = 0; c < chunks; ++c) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    sum[c][e] += factor * x[r][c].template at<T>(e);
                }
            }
        }
    }

    // The groups of a warp, then the warps of the block in turn.
    ONESTEP_DYNAMIC_SHARED(unsigned char, shared);
    T* block_sum = reinterpret_cast<T*>(shared);
    const int64_t height = height_of(data);
    if (args.partial != nullptr) {
#pragma unroll
        for (int mask = lanes; mask < 32; mask *= 2) {
            sum_intercept += __shfl_xor_sync(kFullWarp, sum_intercept, mask);
#pragma unroll
            for (int c = 0; c < chunks; ++c) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    sum[c][e] += __shfl_xor_sync(kFullWarp, sum[c][e], mask);
                }
            }
        }
        for (int turn = 0; turn < kWarps; ++turn) {
            if (turn == warp && group == 0) {
#pragma unroll
                for (int c = 0; c < chunks; ++c) {
#pragma unroll
                    for (int e = 0; e < kElements; ++e) {
                        const int64_t column = (c * lanes + lane) * kElements + e;
                        if (column < data.d) {
                            block_sum[column] = turn == 0 ? sum[c][e] : block_sum[column] + sum[c][e];
                        }
                    }
                }
                if (lane == 0 && data.intercept) {
                    block_sum[data.d] = turn == 0 ? sum_intercept : block_sum[data.d] + sum_intercept;
                }
            }
            __syncthreads();
        }
        for (int64_t j = threadIdx.x; j < height; j += kThreads) {
            args.partial[blockIdx.x * height + j] = block_sum[j];
        }
    }
    if constexpr (point) {
        auto* scratch = reinterpret_cast<double*>(shared + whole_chunks(height * static_cast<int64_t>(sizeof(T))));
        store_block_loss(loss, status, scratch, args.losses, args.statuses);
    }
}

}  // namespace onestep::glm::cuda
