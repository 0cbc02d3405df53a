// Systems of fp32 that a block of one to five warps holds: A's lower triangle lies in shared memory in panels of eight
// columns and becomes L there, panel after panel. A thread has a row of A, or two.
//
// Panel p holds rows 8p and on, kPanelPitch numbers apart, so that threads which read a row each, 16 bytes at a time,
// meet in no bank; nor do the panels of neighbouring columns, which begin 8 numbers further. For panel p
//   * each thread subtracts from its rows of the panel the products with the panels to the left (left-looking);
//   * the eight rows of the diagonal block are shared, and every thread factors that block for itself: none waits for
//     another's square roots;
//   * each thread solves for its own rows of L, and carries the right-hand sides along.
// Rows from d to a multiple of eight are those of the identity.
#pragma once

#include "base/cuda/async.cuh"
#include "base/cuda/device.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"

namespace onestep::normal::cuda {

inline constexpr int kPanel = 8;        // columns
inline constexpr int kPanelPitch = 12;  // from row to row
inline constexpr int kPanelVectors = kPanel / kVector<float>;

// Shared memory that a block can have on every device: that of capabilities 8.6 and 8.9 is the least.
inline constexpr int64_t kLeastSharedBytes = 99 * 1024;

template <int kOrder_, int kWarps_, int kColumns_, int kWidth_ = kOrder_>
struct PanelShape {
    static constexpr int order = kOrder_;  // rows
    static constexpr int width = kWidth_;  // columns: fewer, where rows below a diagonal block are factored with it
    static constexpr int warps = kWarps_;
    static constexpr int columns = kColumns_;  // right-hand sides
    static constexpr bool square = width == order;
    static constexpr int threads = warps * kWarpSize;
    static constexpr int rows = order / threads;  // of a thread: thread, thread + threads
    static constexpr int panels = width / kPanel;
    static_assert(order % threads == 0 && rows <= 2);

    // Where row 0 of panel p would be.
    __host__ __device__ static constexpr int panel(int p) {
        return p * (kPanelPitch * order + kPanel) - kPanelPitch * kPanel * (p * (p - 1) / 2) -
               p * (kPanelPitch * kPanel);
    }
    static constexpr int matrix_floats = panel(panels) + panels * (kPanelPitch * kPanel);

    // After the matrix: the diagonal block and its right-hand sides, twice; the diagonal's inverse square roots; what
    // pivots must exceed; right-hand sides, then solutions; the status.
    static constexpr int block_floats = kPanel * (kPanelPitch + columns);
    static constexpr int block_at = matrix_floats;
    static constexpr int inverse_at = block_at + 2 * block_floats;
    static constexpr int floors_at = inverse_at + width;
    static constexpr int targets_at = floors_at + order;
    static constexpr int status_at = targets_at + columns * order;
    static constexpr int floats = status_at + kVector<float>;
};

// Waits for all threads of the block.
template <int kWarps>
__device__ __forceinline__ void panel_barrier() {
    if constexpr (kWarps == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// The same, and whether any of them says true.
template <int kWarps>
__device__ __forceinline__ bool panel_any(bool value) {
    if constexpr (kWarps == 1) {
        return __any_sync(kFullWarp, value);
    } else {
        return __syncthreads_or(value);
    }
}

// A diagonal block of L below its diagonal, the inverses of the diagonal, and the block's right-hand sides.
template <int kColumns>
struct DiagonalBlock {
    float l[kPanel][kPanel];
    float inverse[kPanel];
    float z[kPanel][kColumns];
};

__device__ __forceinline__ void load_panel_row(const float* from, float (&to)[kPanel]) {
#pragma unroll
    for (int v = 0; v < kPanelVectors; ++v) {
        float part[kVector<float>];
        load_vector(from + v * kVector<float>, part);
#pragma unroll
        for (int e = 0; e < kVector<float>; ++e) {
            to[v * kVector<float> + e] = part[e];
        }
    }
}

__device__ __forceinline__ void store_panel_row(float* to, const float (&from)[kPanel]) {
#pragma unroll
    for (int v = 0; v < kPanelVectors; ++v) {
        float part[kVector<float>];
#pragma unroll
        for (int e = 0; e < kVector<float>; ++e) {
            part[e] = from[v * kVector<float> + e];
        }
        store_vector(to + v * kVector<float>, part);
    }
}

// a[i] = panel `p` of row i of this thread, less the products with the panels before it. A thread whose row lies above
// the panel or beyond row `last` computes that of a row which is there, and does not use it.
template <class Shape>
__device__ __forceinline__ void update_panel(const float* shared, int p, int row, int last,
                                             float (&a)[Shape::rows][kPanel]) {
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int own = row + i * Shape::threads;
        load_panel_row(shared + Shape::panel(p) +
                           (own < kPanel * p ? kPanel * p
                            : own > last     ? last
                                             : own) *
                               kPanelPitch,
                       a[i]);
    }
#pragma unroll 1
    for (int q = 0; q < p; ++q) {
        const float* const left = shared + Shape::panel(q);
        const float* const block = left + p * (kPanel * kPanelPitch);
#pragma unroll
        for (int v = 0; v < kPanelVectors; ++v) {
            float own[Shape::rows][kVector<float>];
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) {
                const int at = row + i * Shape::threads;
                load_vector(left +
                                (at < kPanel * p ? kPanel * p
                                 : at > last     ? last
                                                 : at) *
                                    kPanelPitch +
                                v * kVector<float>,
                            own[i]);
            }
#pragma unroll
            for (int c = 0; c < kPanel; ++c) {
                float other[kVector<float>];
                load_vector(block + c * kPanelPitch + v * kVector<float>, other);
#pragma unroll
                for (int i = 0; i < Shape::rows; ++i) {
#pragma unroll
                    for (int e = 0; e < kVector<float>; ++e) {
                        a[i][c] -= own[i][e] * other[e];
                    }
                }
            }
        }
    }
}

// Factors the shared block; returns the column, from 1, of the first pivot that is not good, or 0.
template <int kColumns>
__device__ __forceinline__ int factor_block(const float* shared, const float* floors, DiagonalBlock<kColumns>& block) {
#pragma unroll
    for (int r = 0; r < kPanel; ++r) {
        load_panel_row(shared + r * kPanelPitch, block.l[r]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            block.z[r][c] = shared[kPanel * kPanelPitch + c * kPanel + r];
        }
    }
    int failed = 0;
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
        block.inverse[c] = inverse_root(block.l[c][c], floors[c]);
        failed = failed == 0 && block.inverse[c] == 0.0f ? c + 1 : failed;
#pragma unroll
        for (int r = c + 1; r < kPanel; ++r) {
            block.l[r][c] *= block.inverse[c];
#pragma unroll
            for (int e = c + 1; e <= r; ++e) {
                block.l[r][e] -= block.l[r][c] * block.l[e][c];
            }
        }
#pragma unroll
        for (int t = 0; t < kColumns; ++t) {
            block.z[c][t] *= block.inverse[c];
#pragma unroll
            for (int r = c + 1; r < kPanel; ++r) {
                block.z[r][t] -= block.l[r][c] * block.z[c][t];
            }
        }
    }
    return failed;
}

// L from the matrix in shared memory, in `panels` panels down to row `last`, and z = L⁻¹z for this thread's rows, which
// end in the shared targets. Returns to the thread with row `last` the first column, from 1, whose pivot is not good,
// or 0; other threads may not have seen it.
template <class Shape>
__device__ __forceinline__ int factor_panels(float* shared, int panels, int last,
                                             float (&z)[Shape::rows][Shape::columns]) {
    const int thread = static_cast<int>(threadIdx.x);
    const int warp_begin = thread / kWarpSize * kWarpSize;
    const float* const floors = shared + Shape::floors_at;
    float* const targets = shared + Shape::targets_at;
    float* const inverse = shared + Shape::inverse_at;
    float* const diagonal = shared + Shape::block_at;
    int failed = 0;
#pragma unroll 1
    for (int p = 0; p < panels; ++p) {
        // Whether this warp has rows of the panel.
        const bool active =
            warp_begin <= last && warp_begin + kWarpSize + (Shape::rows - 1) * Shape::threads > kPanel * p;
        float a[Shape::rows][kPanel];
        if (active) {
            update_panel<Shape>(shared, p, thread, last, a);
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) {
                const int in_block = thread + i * Shape::threads - kPanel * p;
                if (in_block >= 0 && in_block < kPanel) {
                    store_panel_row(diagonal + in_block * kPanelPitch, a[i]);
#pragma unroll
                    for (int c = 0; c < Shape::columns; ++c) {
                        diagonal[kPanel * kPanelPitch + c * kPanel + in_block] = z[i][c];
                    }
                }
            }
        }
        panel_barrier<Shape::warps>();
        if (active) {
            DiagonalBlock<Shape::columns> block;
            const int at = factor_block<Shape::columns>(diagonal, floors + kPanel * p, block);
            failed = failed == 0 && at != 0 ? kPanel * p + at : failed;
#pragma unroll
            for (int i = 0; i < Shape::rows; ++i) {
                const int row = thread + i * Shape::threads;
                if (row < kPanel * p || row > last) {
                    continue;
                }
#pragma unroll
                for (int c = 0; c < kPanel; ++c) {
#pragma unroll
                    for (int e = 0; e < c; ++e) {
                        a[i][c] -= a[i][e] * block.l[c][e];
                    }
                    a[i][c] *= block.inverse[c];
                }
                store_panel_row(shared + Shape::panel(p) + row * kPanelPitch, a[i]);
#pragma unroll
                for (int c = 0; c < Shape::columns; ++c) {
#pragma unroll
                    for (int e = 0; e < kPanel; ++e) {
                        z[i][c] -= a[i][e] * block.z[e][c];
                    }
                }
                if (row == kPanel * p) {
#pragma unroll
                    for (int e = 0; e < kPanel; ++e) {
                        inverse[row + e] = block.inverse[e];
#pragma unroll
                        for (int c = 0; c < Shape::columns; ++c) {
                            targets[c * Shape::order + row + e] = block.z[e][c];
                        }
                    }
                }
            }
        }
        panel_barrier<Shape::warps>();
    }
    return failed;
}

// w = L⁻ᵀz, from and to the shared targets.
template <class Shape>
__device__ __forceinline__ void solve_panels(float* shared, int d) {
    const int thread = static_cast<int>(threadIdx.x);
    const float* const inverse = shared + Shape::inverse_at;
    float* const targets = shared + Shape::targets_at;
    float z[Shape::rows][Shape::columns];
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
            z[i][c] = targets[c * Shape::order + thread + i * Shape::threads];
        }
    }
#pragma unroll 1
    for (int p = ceil_div(d, kPanel) - 1; p >= 0; --p) {
        // The block's right-hand sides. Two places take turns: a thread that is ahead writes where no other reads.
        float* const shared_z = shared + Shape::block_at + p % 2 * Shape::block_floats;
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i) {
            const int in_block = thread + i * Shape::threads - kPanel * p;
            if (in_block >= 0 && in_block < kPanel) {
#pragma unroll
                for (int c = 0; c < Shape::columns; ++c) {
                    shared_z[c * kPanel + in_block] = z[i][c];
                }
            }
        }
        panel_barrier<Shape::warps>();
        const float* const block = shared + Shape::panel(p) + p * (kPanel * kPanelPitch);
        float l[kPanel][kPanel];
#pragma unroll
        for (int r = 1; r < kPanel; ++r) {
            load_panel_row(block + r * kPanelPitch, l[r]);
        }
        float w[kPanel][Shape::columns];
#pragma unroll
        for (int c = 0; c < Shape::columns; ++c) {
#pragma unroll
            for (int e = kPanel - 1; e >= 0; --e) {
                float sum = shared_z[c * kPanel + e];
#pragma unroll
                for (int r = e + 1; r < kPanel; ++r) {
                    sum -= l[r][e] * w[r][c];
                }
                w[e][c] = sum * inverse[kPanel * p + e];
            }
        }
#pragma unroll
        for (int i = 0; i < Shape::rows; ++i) {
            const int row = thread + i * Shape::threads;
            if (row < kPanel * p) {
                const float* const column =
                    shared + Shape::panel(row / kPanel) + p * (kPanel * kPanelPitch) + row % kPanel;
#pragma unroll
                for (int e = 0; e < kPanel; ++e) {
                    const float factor = column[e * kPanelPitch];
#pragma unroll
                    for (int c = 0; c < Shape::columns; ++c) {
                        z[i][c] -= factor * w[e][c];
                    }
                }
            } else if (row == kPanel * p) {
#pragma unroll
                for (int e = 0; e < kPanel; ++e) {
#pragma unroll
                    for (int c = 0; c < Shape::columns; ++c) {
                        targets[c * Shape::order + row + e] = w[e][c];
                    }
                }
            }
        }
    }
    panel_barrier<Shape::warps>();
}

// A[row][col] of the shared matrix, before it is factored; of either triangle.
template <class Shape>
__device__ __forceinline__ float panel_element(const float* shared, int row, int col) {
    const int low = row < col ? col : row;
    const int left = row < col ? row : col;
    return shared[Shape::panel(left / kPanel) + low * kPanelPitch + left % kPanel];
}

// ‖A‖₁ to args.norm. Uses the shared block.
template <class Shape>
__device__ __forceinline__ void write_norm(float* shared, int d, float* to) {
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int row = static_cast<int>(threadIdx.x) + i * Shape::threads;
        float sum = 0.0f;
        for (int col = 0; row < d && col < d; ++col) {
            sum += fabsf(panel_element<Shape>(shared, row, col));
        }
        most = sum > most ? sum : most;
    }
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const float other = __shfl_xor_sync(kFullWarp, most, step);
        most = other > most ? other : most;
    }
    float* const shared_most = shared + Shape::block_at;
    if (static_cast<int>(threadIdx.x) % kWarpSize == 0) {
        shared_most[static_cast<int>(threadIdx.x) / kWarpSize] = most;
    }
    panel_barrier<Shape::warps>();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < Shape::warps; ++warp) {
            most = shared_most[warp] > most ? shared_most[warp] : most;
        }
        *to = most;
    }
    panel_barrier<Shape::warps>();
}

// Tells all threads what factor_panels returned to the thread that has row `last`.
template <class Shape>
__device__ __forceinline__ int first_failure(float* shared, int last, int failed) {
    int* const status = reinterpret_cast<int*>(shared + Shape::status_at);
    if (static_cast<int>(threadIdx.x) == last % Shape::threads) {
        *status = failed;
    }
    panel_barrier<Shape::warps>();
    return *status;
}

// Rows [begin, end) of L, with zeros above the diagonal, to U: column `row` of U begins at to[row - begin]. NaN if the
// factorisation failed.
template <class Shape>
__device__ __forceinline__ void write_factor(const float* shared, int panels, int begin, int end, bool failed,
                                             float* to, int64_t pitch) {
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int row = static_cast<int>(threadIdx.x) + i * Shape::threads;
        if (row < begin || row >= end) {
            continue;
        }
        float* column = to + (row - begin);
#pragma unroll 1
        for (int p = 0; p < panels; ++p) {
            float l[kPanel];
            load_panel_row(shared + Shape::panel(p) + (row < kPanel * p ? kPanel * p : row) * kPanelPitch, l);
#pragma unroll
            for (int c = 0; c < kPanel; ++c) {
                // Columns from `end` on fill up the last panel. Rows below the diagonal block have none of these.
                if (kPanel * p + c < end) {
                    *column = failed ? quiet_nan<float>() : kPanel * p + c > row ? 0.0f : l[c];
                }
                column += pitch;
            }
        }
    }
}

// From A in shared memory, which all threads see, and this thread's rows of R: penalties, factor, solution, status.
template <class Shape>
__device__ __forceinline__ void finish_system(const SystemArgs<float>& args, int64_t problem, float* shared,
                                              float (&z)[Shape::rows][Shape::columns]) {
    const int thread = static_cast<int>(threadIdx.x);
    const int d = static_cast<int>(args.d);
    const int k = static_cast<int>(args.k);
    const Matrix<const float> penalty = args.ridge.at(args.batch, problem);
#pragma unroll
    for (int i = 0; i < Shape::rows; ++i) {
        const int row = thread + i * Shape::threads;
        float* const element = shared + Shape::panel(row / kPanel) + row * kPanelPitch + row % kPanel;
        if (row >= d) {
            *element = 1.0f;
        } else if (args.a.data == nullptr) {
            *element += checked_ridge(penalty.data != nullptr ? penalty.data[row * penalty.row]
                                                              : static_cast<float>(args.uniform_ridge));
        }
        shared[Shape::floors_at + row] = pivot_floor(*element, args.singular_epsilons);
    }
    panel_barrier<Shape::warps>();
    if (args.norm != nullptr) {
        write_norm<Shape>(shared, d, args.norm + problem);
    }
    const int panels = ceil_div(d, kPanel);
    const int last = panels * kPanel - 1;
    const int failed = first_failure<Shape>(shared, last, factor_panels<Shape>(shared, panels, last, z));
    if (args.factor != nullptr) {
        write_factor<Shape>(shared, panels, 0, d, failed != 0, args.factor + problem * d * d, d);
    }
    bool good = failed == 0;
    if (args.solution != nullptr) {
        solve_panels<Shape>(shared, d);
        bool wrong = false;
        for (int at = thread; at < d * k; at += Shape::threads) {
            wrong = wrong || !finite(shared[Shape::targets_at + at % k * Shape::order + at / k]);
        }
        good = !panel_any<Shape::warps>(wrong) && good;
        float* const to = args.solution + problem * d * k;
        for (int at = thread; at < d * k; at += Shape::threads) {
            to[at] = good ? shared[Shape::targets_at + at % k * Shape::order + at / k] : quiet_nan<float>();
        }
    }
    if (thread == 0) {
        args.info[problem] = failed != 0 ? failed : good ? 0 : d + 1;
    }
}

}  // namespace onestep::normal::cuda
