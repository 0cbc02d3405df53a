// Systems of fp32 with a block of one to five warps for each: from rows of X and Y, or from A and B.
#pragma once

#include "normal/cuda/panel_gram.cuh"
#include "normal/cuda/panels.cuh"

namespace onestep::normal::cuda {

// Shared memory of a block, in bytes. Rows of X lie where the matrix will be.
template <class Shape>
constexpr int64_t panel_bytes(bool from_rows) {
    constexpr int kStages = kGramStages * GramStage<Shape>::floats;
    const int floats =
        from_rows && kStages > Shape::matrix_floats ? Shape::floats + kStages - Shape::matrix_floats : Shape::floats;
    return static_cast<int64_t>(floats) * static_cast<int64_t>(sizeof(float));
}

// Writes A, each element of its lower triangle to both places, and R from shared memory.
template <class Shape>
__device__ __forceinline__ void write_gram(const SystemArgs<float>& args, int64_t problem, const float* shared) {
    const int d = static_cast<int>(args.d);
    const int k = static_cast<int>(args.k);
    const int thread = static_cast<int>(threadIdx.x);
    float* const to = args.gram + problem * d * d;
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int row = thread + i * Shape::threads;
        float* mirrored = to + row;
#pragma unroll 1
        for (int p = 0; row < d && kPanel * p <= row; ++p) {
            float a[kPanel];
            load_panel_row(shared + Shape::panel(p) + row * kPanelPitch, a);
#pragma unroll
            for (int c = 0; c < kPanel; ++c) {
                if (kPanel * p + c <= row) {
                    *mirrored = a[c];
                    to[row * d + kPanel * p + c] = a[c];
                }
                mirrored += d;
            }
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

// Begins to bring the lower triangle of A to shared memory. Rows and columns from d to a multiple of eight are zeros.
template <class Shape>
__device__ __forceinline__ void load_matrix(const Matrix<const float>& a, int d, float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % kWarpSize;
    const int warp = thread / kWarpSize;
    const int rows = ceil_div(d, kPanel) * kPanel;
    if (a.row == 1 && a.col != 1) {
        // A column at a time.
        for (int col = warp; col < rows; col += Shape::warps) {
            float* const to = shared + Shape::panel(col / kPanel) + col % kPanel;
            for (int row = col + lane; row < rows; row += kWarpSize) {
                cp_async<4>(to + row * kPanelPitch, row < d ? a.data + row + col * a.col : a.data, row < d ? 4 : 0);
            }
        }
        return;
    }
    // A row at a time, to the end of its diagonal block; what is above the diagonal is not used. A lane keeps its
    // columns, so that addresses are sums.
    const auto copy = [&](auto vector) {
        constexpr int kCount = vector;
        for (int col = lane * kCount; col < rows; col += kWarpSize * kCount) {
            const int first = warp + ceil_div(col / kPanel * kPanel - warp, Shape::warps) * Shape::warps;
            const int begin = col < kPanel ? warp : first;
            float* to = shared + Shape::panel(col / kPanel) + begin * kPanelPitch + col % kPanel;
            const float* from = a.data + begin * a.row + col * a.col;
#pragma unroll 4
            for (int row = begin; row < rows; row += Shape::warps) {
                const bool inside = row < d && col <= row;
                cp_async<kCount * 4>(to, inside ? from : a.data, inside ? kCount * 4 : 0);
                to += Shape::warps * kPanelPitch;
                from += Shape::warps * a.row;
            }
        }
    };
    if (a.col == 1 && d % kVector<float> == 0 && a.row % kVector<float> == 0 &&
        reinterpret_cast<uintptr_t>(a.data) % 16 == 0) {
        copy(std::integral_constant<int, kVector<float>>{});
    } else {
        copy(std::integral_constant<int, 1>{});
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

// kBlocks: that are to share a multiprocessor, for which registers are kept free.
template <int kOrder, int kWarps, int kColumns, int kBlocks>
Status launch_matrices(const SystemArgs<float>& args, cudaStream_t stream) {
    using Shape = PanelShape<kOrder, kWarps, kColumns>;
    static_assert(panel_bytes<Shape>(false) <= kLeastSharedBytes);
    const int64_t count = args.batch.count();
    return launch(panel_matrix_kernel<Shape, kBlocks>, middle_grid(count), Shape::threads, panel_bytes<Shape>(false),
                  stream, args, count);
}

template <int kOrder, int kWarps, int kColumns, int kRowBlocks, int kMatrixBlocks>
Status launch_panels(const SystemArgs<float>& args, cudaStream_t stream) {
    if (args.a) {
        return launch_matrices<kOrder, kWarps, kColumns, kMatrixBlocks>(args, stream);
    }
    using Shape = PanelShape<kOrder, kWarps, kColumns>;
    static_assert(panel_bytes<Shape>(true) <= kLeastSharedBytes);
    const int64_t count = args.batch.count();
    return launch(panel_rows_kernel<Shape, kRowBlocks>, middle_grid(count), Shape::threads, panel_bytes<Shape>(true),
                  stream, args, count);
}

}  // namespace onestep::normal::cuda
