// The products of tiles.cuh by the warp groups of Hopper (wgmma): operands are read from shared memory by the tensor
// cores, which spares the loads of fragments that limit mma.sync.
#pragma once

#include "attention/cuda/tiles.cuh"
#include "attention/cuda/wgmma.cuh"

namespace onestep::attention::cuda {

template <class T_, int D_>
struct HopperProducts {
    using T = T_;
    using Acc = float;
    static constexpr int kD = D_;
    static constexpr int kRowElements = D_;
    static constexpr int kWarps = 4;
    static constexpr int kPanel = 64;  // columns
    static constexpr int kDepth = 16;
    static constexpr int kAlignment = 1024;
    static_assert(D_ % kPanel == 0);

    template <int Rows>
    static __device__ __forceinline__ T* at(T* tile, int row, int col) {
        static_assert(Rows % 8 == 0);
        return tile + (col / kPanel * Rows + row) * kPanel + ((col % kPanel / 8) ^ (row % 8)) * 8 + col % 8;
    }

    static __device__ __forceinline__ void publish() { publish_to_wgmma(); }

    // All accumulators of products that are under way together are named, or the compiler serializes the products.
    template <class... Accs>
    static __device__ __forceinline__ void prepare(Accs&... accs) {
        (wgmma_hold(accs[0]), ...);
        wgmma_fence();
    }
    template <class... Accs>
    static __device__ __forceinline__ void finish(Accs&... accs) {
        wgmma_commit();
        wgmma_wait();
        (wgmma_hold(accs[0]), ...);
    }

    // A step of depth of `rows` rows from `row` on.
    template <int Rows>
    static __device__ __forceinline__ SharedMatrix step(const T* tile, int row, int depth) {
        return shared_matrix(tile + (depth / kPanel * Rows + row) * kPanel + depth % kPanel, 16);
    }

    template <int M, int N, int OwnRows, int Inner>
    static __device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], float (&acc_tangent)[M][N][4],
                                                         const T* a, const T* a_tangent, const T* b, const T* b_tangent,
                                                         int row) {
        static_assert(M == 1 && 8 * N == Inner);
        const int group_row = row / kPanel * kPanel;
        const auto add = [&](float (&to)[N][4], const T* left, const T* right) {
#pragma unroll
            for (int depth = 0; depth < D_; depth += kDepth) {
                wgmma<T, 8 * N, false>(to, step<OwnRows>(left, group_row, depth), step<Inner>(right, 0, depth));
            }
        };
        add(acc[0], a, b);
        if (a_tangent != nullptr) {
            add(acc_tangent[0], a_tangent, b);
        }
        if (b_tangent != nullptr) {
            add(acc_tangent[0], a, b_tangent);
        }
    }

    template <int M, int N, int Inner>
    static __device__ __forceinline__ void multiply_weights(float (&acc)[M][D_ / 8][4], const float (&weights)[M][N][4],
                                                            const T* b, const float (&second_weights)[M][N][4],
                                                            const T* second_b) {
        static_assert(M == 1 && N % 2 == 0);
        unsigned high[N / 2][4];
        unsigned low[N / 2][4];
        unsigned second[N / 2][4];
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            split<T>(weights[0][n], weights[0][n + 1], high[n / 2], low[n / 2]);
            round_pairs<T>(second_weights[0][n], second_weights[0][n + 1], second[n / 2]);
        }
        const auto rows = [](const T* tile, int n) {
            return shared_matrix(tile + 8 * n * kPanel, Inner * kPanel * static_cast<int>(sizeof(T)));
        };
        wgmma_hold(acc[0]);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            wgmma<T, D_, true>(acc[0], high[n / 2], rows(b, n));
            wgmma<T, D_, true>(acc[0], low[n / 2], rows(b, n));
        }
        if (second_b != nullptr) {
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                wgmma<T, D_, true>(acc[0], second[n / 2], rows(second_b, n));
            }
        }
        wgmma_commit();
        wgmma_wait();
        wgmma_hold(acc[0]);
        // The weights' registers are read until here.
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
            wgmma_hold_left(high[n]);
            wgmma_hold_left(low[n]);
            wgmma_hold_left(second[n]);
        }
    }
};

}  // namespace onestep::attention::cuda
