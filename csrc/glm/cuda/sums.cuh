// The second kernel of a pass: adds up what the blocks left, in order and in double. And what lies between the two
// GEMMs where there are many columns.
#pragma once

#include "glm/cuda/middle.cuh"

namespace onestep::glm::cuda {

// Elements of a result that a block adds up, and how many threads share the blocks' parts of one.
inline constexpr int kSumElements = 32;
inline constexpr int kSumSlices = kThreads / kSumElements;

template <class T>
struct SumArgs {
    int64_t blocks = 0;
    // Parts of d (+ 1) × m·k; the result is m × d (+ 1) × k. Null result: none is wanted.
    int64_t height = 0, k = 0;
    int m = 1;
    const T* partial = nullptr;
    T* result = nullptr;
    // A point's loss and status, or null.
    const double* losses = nullptr;
    const int* statuses = nullptr;
    double* loss = nullptr;
    T* info = nullptr;
};

// The last block adds up the losses, those before it kSumElements of the result each.
template <class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(SumArgs<T> args) {
    ONESTEP_SHARED(double, shares, [kSumSlices][kSumElements]);
    ONESTEP_SHARED(int, worst, [kWarps]);
    const int column = threadIdx.x % kSumElements;
    const int slice = threadIdx.x / kSumElements;
    const int64_t size = args.height * args.m * args.k;
    double sum = 0.0;
    if (args.loss != nullptr && blockIdx.x == gridDim.x - 1) {
        int status = 0;
        for (int64_t block = threadIdx.x; block < args.blocks; block += kThreads) {
            sum += args.losses[block];
            status = max(status, args.statuses[block]);
        }
        shares[slice][column] = sum;
        status = __reduce_max_sync(kFullWarp, status);
        if (column == 0) {
            worst[slice] = status;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            double total = 0.0;
            for (int s = 0; s < kSumSlices; ++s) {
                for (int c = 0; c < kSumElements; ++c) {
                    total += shares[s][c];
                }
                status = max(status, worst[s]);
            }
            *args.loss = total;
            *args.info = static_cast<T>(status);
        }
        return;
    }
    const int64_t at = int64_t{blockIdx.x} * kSumElements + column;
    if (at < size) {
#pragma unroll 4
        for (int64_t block = slice; block < args.blocks; block += kSumSlices) {
            sum += static_cast<double>(args.partial[block * size + at]);
        }
    }
    shares[slice][column] = sum;
    __syncthreads();
    if (slice == 0 && at < size) {
        double total = 0.0;
        for (int s = 0; s < kSumSlices; ++s) {
            total += shares[s][column];
        }
        const int64_t row = at / (args.m * args.k);
        const int64_t q = at % (args.m * args.k);
        args.result[(q / args.k * args.height + row) * args.k + q % args.k] = static_cast<T>(total);
    }
}

// Rows of outputs that a block takes; a row is a warp's.
inline constexpr int kChunkRows = 64;

// Replaces the outputs (rows × m·k) of a chunk of rows by what is multiplied back by Xᵀ. A point's loss and status go
// to this block's place in args.losses and args.statuses.
template <class X, class T, bool point>
__global__ void __launch_bounds__(kThreads) chunk_kernel(PassArgs<X, T> args, T* outputs) {
    ONESTEP_SHARED(double, scratch, [kLossBytes / 8]);
    const int64_t columns = args.m * args.data.k;
    double loss = 0.0;
    int status = 0;
    for (int turn = threadIdx.x / 32; turn < kChunkRows; turn += kWarps) {
        const int64_t row = int64_t{blockIdx.x} * kChunkRows + turn;
        if (row < args.data.n) {
            middle_row<point, 32>(args, row, static_cast<int>(threadIdx.x % 32), outputs + row * columns, loss, status);
        }
    }
    if constexpr (point) {
        store_block_loss(loss, status, scratch, args.losses, args.statuses);
    }
}

}  // namespace onestep::glm::cuda
