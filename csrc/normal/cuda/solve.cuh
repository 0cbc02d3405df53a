// A⁻¹B from the factor of a problem of 33 to 168 features: a block per problem.
#pragma once

#include "base/cuda/device.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"

namespace onestep::normal::cuda {

// A⁻¹B from U: a warp per right-hand side, U in shared memory, column after column.
template <class T>
__global__ void __launch_bounds__(256) middle_factor_solve_kernel(const FactorSolveArgs<T> args, int64_t count) {
    constexpr int kHeld = static_cast<int>(ceil_div<int64_t>(kMostFeatures, kWarpSize));
    ONESTEP_DYNAMIC_SHARED(T, shared);
    const int d = static_cast<int>(args.d);
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    const int lane = thread % kWarpSize;
    // Packed rows of U: row i begins at offset(i) with its diagonal element.
    const auto offset = [d](int i) { return i * d - i * (i - 1) / 2; };
    T* const inverse = shared + offset(d);
    for (int64_t problem = static_cast<int64_t>(blockIdx.x); problem < count;
         problem += static_cast<int64_t>(gridDim.x)) {
        const Matrix<const T> u = args.factor.at(args.batch, problem);
        const Matrix<const T> b = args.b.at(args.batch, problem);
        for (int at = thread; at < d * d; at += threads) {
            const int i = at / d;
            const int j = at - i * d;
            if (j >= i) {
                const T value = u.data[i * u.row + j * u.col];
                shared[offset(i) + j - i] = value;
                if (i == j) {
                    inverse[i] = T(1) / value;
                }
            }
        }
        __syncthreads();
        T* const to = args.solution + problem * d * args.k;
        for (int64_t c = thread / kWarpSize; c < args.k; c += threads / kWarpSize) {
            T z[kHeld];
#pragma unroll
            for (int q = 0; q < kHeld; ++q) {
                const int own = q * kWarpSize + lane;
                z[q] = own < d ? b.data[own * b.row + c * b.col] : T(0);
            }
            // Uᵀz = b: row i of U, once z[i] is known.
#pragma unroll
            for (int q = 0; q < kHeld; ++q) {
#pragma unroll 1
                for (int s = 0; s < kWarpSize && q * kWarpSize + s < d; ++s) {
                    const int i = q * kWarpSize + s;
                    const T w = __shfl_sync(kFullWarp, z[q] * inverse[i], s);
                    const T* const row = shared + offset(i) - i;
                    z[q] = lane == s ? w : z[q];
#pragma unroll
                    for (int p = q; p < kHeld; ++p) {
                        const int own = p * kWarpSize + lane;
                        if (own > i && own < d) {
                            z[p] -= row[own] * w;
                        }
                    }
                }
            }
            // Uw = z: column i of U, once w[i] is known.
#pragma unroll
            for (int q = kHeld - 1; q >= 0; --q) {
#pragma unroll 1
                for (int s = d - 1 - q * kWarpSize < kWarpSize - 1 ? d - 1 - q * kWarpSize : kWarpSize - 1; s >= 0;
                     --s) {
                    const int i = q * kWarpSize + s;
                    const T w = __shfl_sync(kFullWarp, z[q] * inverse[i], s);
                    z[q] = lane == s ? w : z[q];
#pragma unroll
                    for (int p = 0; p <= q; ++p) {
                        const int own = p * kWarpSize + lane;
                        if (own < i) {
                            z[p] -= shared[offset(own) + i - own] * w;
                        }
                    }
                }
            }
#pragma unroll
            for (int q = 0; q < kHeld; ++q) {
                const int own = q * kWarpSize + lane;
                if (own < d) {
                    to[own * args.k + c] = z[q];
                }
            }
        }
        __syncthreads();
    }
}

template <class T>
Status middle_factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream) {
    const int64_t count = args.batch.count();
    const int64_t shared = (args.d * (args.d + 1) / 2 + args.d) * static_cast<int64_t>(sizeof(T));
    const int64_t warps = args.k < 8 ? args.k : 8;
    return launch(middle_factor_solve_kernel<T>, middle_grid(count), dim3(static_cast<unsigned>(warps * kWarpSize)),
                  shared, stream, args, count);
}

}  // namespace onestep::normal::cuda
