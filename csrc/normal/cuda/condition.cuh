// 1 / (‖A‖₁ ‖A⁻¹‖₁) from the factor, d ≤ 32: a warp per problem, whose lanes solve for a column of A⁻¹ each. The column
// is in registers, the factor in shared memory, from where all lanes read the same element at a time.
#pragma once

#include "base/cuda/device.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"

namespace onestep::normal::cuda {

inline constexpr int kConditionWarps = 4;  // in a block

template <class T, int kOrder>
__global__ void __launch_bounds__(kConditionWarps* kWarpSize)
    condition_kernel(const ConditionArgs<T> args, int64_t count) {
    constexpr int V = kVector<T>;
    ONESTEP_SHARED(T, shared, [kConditionWarps * kOrder * (kOrder + 1)]);
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * kConditionWarps + warp;
    const bool real = at < count;
    const int64_t problem = real ? at : count - 1;
    const int d = static_cast<int>(args.d);
    T* const u = shared + warp * kOrder * (kOrder + 1);
    T* const inverse = u + kOrder * kOrder;
    // U, padded with the identity.
    const T* const from = args.factor + problem * d * d;
    for (int e = lane; e < kOrder * kOrder; e += kWarpSize) {
        const int row = e / kOrder;
        const int col = e % kOrder;
        u[e] = row < d && col < d ? (col < row ? T(0) : from[row * d + col]) : T(row == col ? 1 : 0);
    }
    __syncwarp();
    for (int row = lane; row < kOrder; row += kWarpSize) {
        inverse[row] = T(1) / u[row * kOrder + row];
    }
    __syncwarp();
    T z[kOrder];
#pragma unroll
    for (int i = 0; i < kOrder; ++i) {
        z[i] = i == lane ? T(1) : T(0);
    }
    // Uᵀz = e.
    unrolled<kOrder>([&](auto index) {
        constexpr int j = index;
        __syncwarp();  // or the compiler loads all of U ahead, and spills it
        z[j] *= inverse[j];
#pragma unroll
        for (int c = (j + 1) / V * V; c < kOrder; c += V) {
            T row[V];
            load_vector(u + j * kOrder + c, row);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                z[c + e] -= c + e > j ? row[e] * z[j] : T(0);
            }
        }
    });
    // Uw = z.
    T sum = T(0);
    unrolled<kOrder>([&](auto index) {
        constexpr int j = kOrder - 1 - index;
        __syncwarp();
#pragma unroll
        for (int c = (j + 1) / V * V; c < kOrder; c += V) {
            T row[V];
            load_vector(u + j * kOrder + c, row);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                z[j] -= c + e > j ? row[e] * z[c + e] : T(0);
            }
        }
        z[j] *= inverse[j];
        sum += fabs(z[j]);
    });
    sum = lane < d ? sum : T(0);
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(kFullWarp, sum, step);
        sum = other > sum ? other : sum;
    }
    if (real && lane == 0) {
        const int info = args.info[problem];
        args.rcond[problem] = info > 0 && info <= d ? T(0) : T(1) / (args.norm[problem] * sum);
    }
}

template <class T>
Status small_condition(const ConditionArgs<T>& args, cudaStream_t stream) {
    const int64_t blocks = ceil_div<int64_t>(args.count, kConditionWarps);
    if (blocks > kMostBlocks) {
        return device_error("batch of " + std::to_string(args.count) +
                            " problems; expected fewer than 2^31 blocks of them");
    }
    const dim3 grid(static_cast<unsigned>(blocks));
    constexpr unsigned kThreads = kConditionWarps * kWarpSize;
    if (args.d <= 8) {
        return launch(condition_kernel<T, 8>, grid, kThreads, 0, stream, args, args.count);
    }
    return args.d <= 16 ? launch(condition_kernel<T, 16>, grid, kThreads, 0, stream, args, args.count)
                        : launch(condition_kernel<T, 32>, grid, kThreads, 0, stream, args, args.count);
}

}  // namespace onestep::normal::cuda
