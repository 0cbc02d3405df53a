// Systems of fp32 with a block of one to six warps for each: from rows of X and Y, or from A and B.
#pragma once

#include "normal/cuda/panel_gram.cuh"
#include "normal/cuda/panels.cuh"

namespace onestep::normal::cuda {

// Shared memory of a block, in bytes: the rows of X lie where the matrix comes.
template <class Shape>
constexpr int64_t panel_bytes(bool from_rows) {
    constexpr int kStages = kGramStages * GramStage<Shape>::floats;
    const int floats = from_rows && kStages > Shape::matrix_floats ? Shape::floats + kStages - Shape::matrix_floats
                                                                   : Shape::floats;
    return static_cast<int64_t>(floats) * static_cast<int64_t>(sizeof(float));
}

// Writes A and R from shared memory.
template <class Shape>
__device__ __forceinline__ void write_gram(const SystemArgs<float>& args, int64_t problem, const float* shared) {
    const int d = static_cast<int>(args.d);
    const int k = static_cast<int>(args.k);
    const int thread = static_cast<int>(threadIdx.x);
    float* const to = args.gram + problem * d * d;
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int col = thread + i * Shape::threads;
        for (int row = 0; col < d && row < d; ++row) {
            to[row * d + col] = panel_element<Shape>(shared, row, col);
        }
    }
    float* const cross = args.cross + problem * d * k;
    for (int at = thread; at < d * k; at += Shape::threads) {
        cross[at] = shared[Shape::targets_at + at % k * Shape::order + at / k];
    }
}

template <class Shape, int kBlocks>
__global__ void __launch_bounds__(Shape::threads, kBlocks)
    panel_rows_kernel(const SystemArgs<float> args, int64_t count) {
    ONESTEP_DYNAMIC_SHARED(float, shared);
    for (int64_t problem = static_cast<int64_t>(blockIdx.x); problem < count;
         problem += static_cast<int64_t>(gridDim.x)) {
        panel_gram<Shape>(args, problem, shared);
        panel_barrier<Shape::warps>();
        if (args.gram != nullptr) {
            write_gram<Shape>(args, problem, shared);
        } else {
            float z[Shape::rows][Shape::columns];
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) {
#pragma unroll
                for (int c = 0; c < Shape::columns; ++c) {
                    z[i][c] = shared[Shape::targets_at + c * Shape::order + static_cast<int>(threadIdx.x) +
                                     i * Shape::threads];
                }
            }
            finish_system<Shape>(args, problem, shared, z);
        }
        panel_barrier<Shape::warps>();
    }
}

// Begins to bring the lower triangle of A to shared memory; zeros in rows from d to a multiple of eight.
template <class Shape>
__device__ __forceinline__ void load_matrix(const Matrix<const float>& a, int d, float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpSize;
    const int warp = thread / kWarpSize;
    const bool vectors = a.col == 1 && d % kVector<float> == 0 && a.row % kVector<float> == 0 &&
                         reinterpret_cast<uintptr_t>(a.data) % 16 == 0;
    const int rows = ceil_div(d, kPanel) * kPanel;
    if (a.row == 1 && a.col != 1) {
        // A column at a time.
        for (int col = warp; col < d; col += Shape::warps) {
            float* const to = shared + Shape::panel(col / kPanel) + col % kPanel;
            for (int row = col + lane; row < rows; row += kWarpSize) {
                cp_async<4>(to + row * kPanelPitch, row < d ? a.data + row + col * a.col : a.data, row < d ? 4 : 0);
            }
        }
        return;
    }
    for (int row = warp; row < rows; row += Shape::warps) {
        // The elements to the end of the diagonal block; those above the diagonal are not read again.
        const int end = (row / kPanel + 1) * kPanel;
        if (vectors) {
            for (int col = lane * kVector<float>; col < end; col += kWarpSize * kVector<float>) {
                const bool inside = row < d && col <= row;
                cp_async<16>(shared + Shape::panel(col / kPanel) + row * kPanelPitch + col % kPanel,
                             inside ? a.data + row * a.row + col : a.data, inside ? 16 : 0);
            }
        } else {
            for (int col = lane; col < end; col += kWarpSize) {
                const bool inside = row < d && col <= row;
                cp_async<4>(shared + Shape::panel(col / kPanel) + row * kPanelPitch + col % kPanel,
                            inside ? a.data + row * a.row + col * a.col : a.data, inside ? 4 : 0);
            }
        }
    }
}

template <class Shape, int kBlocks>
__global__ void __launch_bounds__(Shape::threads, kBlocks)
    panel_matrix_kernel(const SystemArgs<float> args, int64_t count) {
    ONESTEP_DYNAMIC_SHARED(float, shared);
    const int d = static_cast<int>(args.d);
    for (int64_t problem = static_cast<int64_t>(blockIdx.x); problem < count;
         problem += static_cast<int64_t>(gridDim.x)) {
        load_matrix<Shape>(args.a.at(args.batch, problem), d, shared);
        cp_async_commit();
        const Matrix<const float> b = args.b.at(args.batch, problem);
        float z[Shape::rows][Shape::columns];
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i) {
            const int row = static_cast<int>(threadIdx.x) + i * Shape::threads;
#pragma unroll
            for (int c = 0; c < Shape::columns; ++c) {
                z[i][c] = row < d && c < args.k ? b.data[row * b.row + c * b.col] : 0.0f;
            }
        }
        cp_async_wait<0>();
        panel_barrier<Shape::warps>();
        finish_system<Shape>(args, problem, shared, z);
        panel_barrier<Shape::warps>();
    }
}

// kRowBlocks, kMatrixBlocks: that are to share a multiprocessor, for which registers are kept free.
template <int kOrder, int kWarps, int kColumns, int kRowBlocks, int kMatrixBlocks, int kAtOnce = 2>
Status launch_panels(const SystemArgs<float>& args, cudaStream_t stream) {
    using Shape = PanelShape<kOrder, kWarps, kColumns, kAtOnce>;
    const int64_t count = args.batch.count();
    constexpr unsigned kThreads = Shape::threads;
    return args.a ? launch(panel_matrix_kernel<Shape, kMatrixBlocks>, middle_grid(count), kThreads,
                           panel_bytes<Shape>(false), stream, args, count)
                  : launch(panel_rows_kernel<Shape, kRowBlocks>, middle_grid(count), kThreads, panel_bytes<Shape>(true),
                           stream, args, count);
}

}  // namespace onestep::normal::cuda
