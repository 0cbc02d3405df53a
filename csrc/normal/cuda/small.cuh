// Problems to d = 32: a problem takes 8, 16 or 32 lanes of a warp. Lane i holds row i of A in registers; what all lanes
// of a problem need at once (a row of X, a column of L) goes through shared memory, from where they read it as
// broadcasts. Gram sums of fp32 beyond d = 8 are the whole warp's, problem after problem (tensor_gram.cuh).
//
// A is padded to kOrder with the identity. Lanes beyond the last problem repeat it and write nothing.
#pragma once

#include "base/cuda/device.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"
#include "normal/cuda/tensor_gram.cuh"

namespace onestep::normal::cuda {

inline constexpr int kSmallWarps = 4;  // in a block

// Rows of X that a problem has under way: loaded while the rows before them are summed.
inline constexpr int kSmallRows = 8;

template <class T, int kOrder>
struct SmallShape {
    static constexpr int lanes = kOrder <= 8 ? 8 : kOrder <= 16 ? 16 : 32;
    static constexpr int problems = kWarpSize / lanes;  // in a warp
    // A row more than a vector apart: lanes that read a row each, 16 bytes at a time, meet in no bank.
    static constexpr int pitch = kOrder + kVector<T>;
    // The problems of a warp start in different banks.
    static constexpr int banks = 128 / static_cast<int>(sizeof(T));
    static constexpr int region = (kOrder * pitch + banks - 1) / banks * banks + (problems > 1 ? banks / problems : 0);
};

// What a lane knows of its problem, beside row i of A (then of L), `a`, and of R (then of the solution), `z`.
template <class T, int kOrder>
struct SmallLane {
    using Shape = SmallShape<T, kOrder>;

    int row;           // of A
    int d;             // real rows
    T* matrix;         // shared: rows of X, then column j of L at matrix + j * pitch
    T* side;           // shared: kSmallRows × (columns + 1): rows of Y and square roots of weights
    T inverse = T(1);  // of L's diagonal element
    int failed = 0;

    __device__ __forceinline__ T from_lane(T value, int source) const {
        return __shfl_sync(kFullWarp, value, source, Shape::lanes);
    }
};

// Sums a += XᵀDX and z += XᵀDY over all rows. `diagonal` gets the same sum as a[row], which no register index can name.
template <class T, int kOrder, int kColumns>
__device__ __forceinline__ void small_gram(const SmallLane<T, kOrder>& lane, const Matrix<const T>& x,
                                           const Matrix<const T>& y, const Matrix<const T>& weight, int64_t n, int k,
                                           T (&a)[kOrder], T (&z)[kColumns], T& diagonal) {
    using Shape = SmallShape<T, kOrder>;
    constexpr int kSide = kColumns + 1;
    const bool real = lane.row < lane.d;
    const bool weighted = weight.data != nullptr;
    const T* from = x.data + (real ? lane.row : 0) * x.col;
    const T* from_y = y.data;
    const T* from_weight = weight.data;
    T next[kSmallRows];
    const auto load = [&](int left) {
#pragma unroll
        for (int r = 0; r < kSmallRows; ++r) {
            next[r] = real && r < left ? *from : T(0);
            from += r < left ? x.row : 0;
        }
    };
    load(static_cast<int>(n < kSmallRows ? n : kSmallRows));
    for (int64_t left = n; left > 0; left -= kSmallRows) {
        const int rows = static_cast<int>(left < kSmallRows ? left : kSmallRows);
        // Y and the weights of these rows, dealt to the lanes.
        for (int at = lane.row; at < kSmallRows * kSide; at += Shape::lanes) {
            const int r = at / kSide;
            const int c = at - r * kSide;
            T value = T(0);
            if (r < rows && c == kColumns) {
                value = weighted ? square_root(from_weight[r * weight.row]) : T(1);
            } else if (r < rows && c < k) {
                value = from_y[r * y.row + c * y.col];
            }
            lane.side[at] = value;
        }
        from_y += k > 0 ? rows * y.row : 0;
        from_weight += weighted ? rows * weight.row : 0;
        __syncwarp();
        T own[kSmallRows];
#pragma unroll
        for (int r = 0; r < kSmallRows; ++r) {
            own[r] = weighted ? next[r] * lane.side[r * kSide + kColumns] : next[r];
            if (lane.row < kOrder) {
                lane.matrix[r * kOrder + lane.row] = own[r];
            }
        }
        __syncwarp();
        const int64_t rest = left - kSmallRows;
        load(static_cast<int>(rest < 0 ? 0 : rest < kSmallRows ? rest : kSmallRows));
#pragma unroll
        for (int r = 0; r < kSmallRows; ++r) {
#pragma unroll
            for (int c = 0; c < kOrder; c += kVector<T>) {
                T row[kVector<T>];
                load_vector(lane.matrix + r * kOrder + c, row);
#pragma unroll
                for (int e = 0; e < kVector<T>; ++e) {
                    a[c + e] += own[r] * row[e];
                }
            }
            diagonal += own[r] * own[r];
            const T scale = weighted ? lane.side[r * kSide + kColumns] : T(1);
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                z[c] += own[r] * (scale * lane.side[r * kSide + c]);
            }
        }
        __syncwarp();
    }
}

// Whether warp_gram sums A and R.
template <class T, int kOrder>
inline constexpr bool kByTensorCores = std::is_same_v<T, float> && (kOrder > 8);

// The same as small_gram, of all problems of a warp, the first of which is `first` and whose matrix is at `matrices`.
// `symmetric`: to the bit, also above the diagonal.
template <int kOrder, int kColumns>
__device__ __forceinline__ void small_gram(const SmallLane<float, kOrder>& lane, const SystemArgs<float>& args,
                                           int64_t first, int64_t count, float* matrices, bool symmetric,
                                           float (&a)[kOrder], float (&z)[kColumns], float& diagonal) {
    using Shape = SmallShape<float, kOrder>;
    constexpr int kBehind = Shape::pitch - kOrder;
    static_assert(kColumns <= kBehind);
#pragma unroll 1
    for (int i = 0; i < Shape::problems; ++i) {
        const int64_t problem = first + i < count ? first + i : count - 1;
        warp_gram<kOrder, kColumns>(args.x.at(args.batch, problem), args.y.at(args.batch, problem),
                                    args.weight.at(args.batch, problem), args.n, lane.d, static_cast<int>(args.k),
                                    matrices + i * Shape::region, Shape::pitch);
    }
    __syncwarp();
    const int row = lane.row < kOrder ? lane.row : kOrder - 1;
    const float* const from = lane.matrix + row * Shape::pitch;
#pragma unroll
    for (int c = 0; c < kOrder; c += kVector<float>) {
        float part[kVector<float>];
        load_vector(from + c, part);
#pragma unroll
        for (int e = 0; e < kVector<float>; ++e) {
            a[c + e] = part[e];
        }
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        z[c] = from[kOrder + c];
    }
    diagonal = from[row];
    if (symmetric) {
#pragma unroll
        for (int c = 0; c < kOrder; ++c) {
            a[c] = c > row ? lane.matrix[c * Shape::pitch + row] : a[c];
        }
    }
    __syncwarp();
}

// L from A, column after column; z becomes L⁻¹z on the way.
template <class T, int kOrder, int kColumns>
__device__ __forceinline__ void small_factor(SmallLane<T, kOrder>& lane, T floor, T (&a)[kOrder], T (&z)[kColumns]) {
    using Shape = SmallShape<T, kOrder>;
    unrolled<kOrder>([&](auto index) {
        constexpr int j = index;
        const T inverse = lane.from_lane(inverse_root(a[j], floor), j);
        if (inverse == T(0) && lane.failed == 0) {
            lane.failed = j + 1;
        }
        if (lane.row == j) {
            lane.inverse = inverse;
        }
        const T l = lane.row >= j ? a[j] * inverse : T(0);
        if (lane.row < kOrder) {
            lane.matrix[j * Shape::pitch + lane.row] = l;
        }
        __syncwarp();
#pragma unroll
        for (int c = (j + 1) / kVector<T> * kVector<T>; c < kOrder; c += kVector<T>) {
            T column[kVector<T>];
            load_vector(lane.matrix + j * Shape::pitch + c, column);
#pragma unroll
            for (int e = 0; e < kVector<T>; ++e) {
                if (c + e > j) {
                    a[c + e] -= l * column[e];
                }
            }
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const T zj = lane.from_lane(z[c], j) * inverse;
            z[c] = lane.row == j ? zj : z[c] - l * zj;
        }
    });
}

// z = L⁻¹z, where small_factor did not do it.
template <class T, int kOrder, int kColumns>
__device__ __forceinline__ void small_forward(const SmallLane<T, kOrder>& lane, T (&z)[kColumns]) {
    using Shape = SmallShape<T, kOrder>;
    const int row = lane.row < kOrder ? lane.row : kOrder - 1;
#pragma unroll 4
    for (int j = 0; j < kOrder; ++j) {
        const T l = lane.matrix[j * Shape::pitch + row];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const T zj = lane.from_lane(z[c] * lane.inverse, j);
            z[c] = lane.row == j ? zj : lane.row > j ? z[c] - l * zj : z[c];
        }
    }
}

// z = L⁻ᵀz. The lane reads its column of L once for all.
template <class T, int kOrder, int kColumns>
__device__ __forceinline__ void small_backward(const SmallLane<T, kOrder>& lane, T (&z)[kColumns]) {
    using Shape = SmallShape<T, kOrder>;
    const int row = lane.row < kOrder ? lane.row : kOrder - 1;
#pragma unroll
    for (int r = kOrder - kVector<T>; r >= 0; r -= kVector<T>) {
        T column[kVector<T>];
        load_vector(lane.matrix + row * Shape::pitch + r, column);
#pragma unroll
        for (int e = kVector<T> - 1; e >= 0; --e) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const T w = lane.from_lane(z[c] * lane.inverse, r + e);
                z[c] = lane.row == r + e ? w : lane.row < r + e ? z[c] - column[e] * w : z[c];
            }
        }
    }
}

// Writes columns [first, first + kColumns) of the solution; returns whether this lane's part is finite.
template <class T, int kOrder, int kColumns>
__device__ __forceinline__ bool small_write(const SmallLane<T, kOrder>& lane, const T (&z)[kColumns], T* to,
                                            int64_t first, int64_t k, bool real) {
    bool good = true;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        if (real && lane.row < lane.d && first + c < k) {
            to[lane.row * k + first + c] = z[c];
            good = good && finite(z[c]);
        }
    }
    return good;
}

// Blocks that are to share a multiprocessor, 0: as many as the registers leave. With one right-hand side five of them
// win over what is spilled for them, on an H200; with more, three are as many as there were before (not measured).
template <class T, int kOrder, int kColumns>
inline constexpr int kSmallBlocks = 0;
template <>
inline constexpr int kSmallBlocks<float, 24, 1> = 5;
template <>
inline constexpr int kSmallBlocks<float, 32, 1> = 5;
template <>
inline constexpr int kSmallBlocks<float, 32, 4> = 3;

template <class T, int kOrder, int kColumns>
__global__ void __launch_bounds__(kSmallWarps* kWarpSize, (kSmallBlocks<T, kOrder, kColumns>))
    small_system_kernel(const SystemArgs<T> args, int64_t count) {
    using Shape = SmallShape<T, kOrder>;
    ONESTEP_SHARED(T, matrix, [kSmallWarps * Shape::problems * Shape::region]);
    ONESTEP_SHARED(T, side, [kSmallWarps * Shape::problems * kSmallRows * (kColumns + 1)]);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int in_warp = static_cast<int>(threadIdx.x) % kWarpSize;
    const int slot = warp * Shape::problems + in_warp / Shape::lanes;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (kSmallWarps * Shape::problems) + slot;
    const bool real = at < count;
    const int64_t problem = real ? at : count - 1;

    SmallLane<T, kOrder> lane;
    lane.row = in_warp % Shape::lanes;
    lane.d = static_cast<int>(args.d);
    lane.matrix = matrix + slot * Shape::region;
    lane.side = side + slot * (kSmallRows * (kColumns + 1));
    const int row = lane.row;
    const int d = lane.d;
    const int k = static_cast<int>(args.k);
    T a[kOrder];
    T z[kColumns];
    T diagonal = T(0);
#pragma unroll
    for (int c = 0; c < kOrder; ++c) {
        a[c] = T(0);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        z[c] = T(0);
    }

    const Matrix<const T> b = args.b.at(args.batch, problem);
    if (args.a.data == nullptr) {
        if constexpr (kByTensorCores<T, kOrder>) {
            const int64_t first = at - in_warp / Shape::lanes;
            small_gram(lane, args, first, count, matrix + warp * Shape::problems * Shape::region, args.gram != nullptr,
                       a, z, diagonal);
        } else {
            small_gram(lane, args.x.at(args.batch, problem), args.y.at(args.batch, problem),
                       args.weight.at(args.batch, problem), args.n, k, a, z, diagonal);
        }
    } else {
        const Matrix<const T> given = args.a.at(args.batch, problem);
        diagonal = row < d ? given.data[row * (given.row + given.col)] : T(0);
        // Up to the diagonal along row i, then down column i: addresses by addition, or 32 of them fill the registers.
        const T* left = given.data + row * given.row;
        const T* below = given.data + row * given.col;
#pragma unroll
        for (int c = 0; c < kOrder; ++c) {
            if (row < d && c < d) {
                a[c] = *(c <= row ? left : below);
            }
            left += given.col;
            below += given.row;
        }
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            if (row < d && c < k) {
                z[c] = b.data[row * b.row + c * b.col];
            }
        }
    }

    if (args.gram != nullptr) {
        // A is symmetric to the bit: lane i writes column i, next to its neighbours'.
        if (real && row < d) {
            T* to = args.gram + problem * d * d + row;
#pragma unroll
            for (int c = 0; c < kOrder; ++c) {
                if (c < d) {
                    *to = a[c];
                }
                to += d;
            }
        }
        small_write(lane, z, args.cross + problem * d * k, 0, k, real);
        return;
    }

    if (args.a.data == nullptr) {
        T ridge = static_cast<T>(args.uniform_ridge);
        if (args.ridge && row < d) {
            const Matrix<const T> penalty = args.ridge.at(args.batch, problem);
            ridge = penalty.data[row * penalty.row];
        }
        ridge = row < d ? checked_ridge(ridge) : T(0);
        diagonal += ridge;
#pragma unroll
        for (int c = 0; c < kOrder; ++c) {
            a[c] += c == row ? ridge : T(0);
        }
    }
    T row_sum = T(0);
#pragma unroll
    for (int c = 0; c < kOrder; ++c) {
        row_sum += fabs(a[c]);
        a[c] = c == row && row >= d ? T(1) : a[c];
    }
    if (args.norm != nullptr) {
#pragma unroll
        for (int step = Shape::lanes / 2; step > 0; step /= 2) {
            const T other = __shfl_xor_sync(kFullWarp, row_sum, step, Shape::lanes);
            row_sum = other > row_sum ? other : row_sum;
        }
        if (real && row == 0) {
            args.norm[problem] = row_sum;
        }
    }
    small_factor(lane, pivot_floor(diagonal, args.singular_epsilons), a, z);

    if (args.factor != nullptr && real && row < d) {
        for (int j = 0; j < d; ++j) {
            const T l = lane.matrix[j * Shape::pitch + row];
            args.factor[(problem * d + j) * d + row] = lane.failed != 0 ? quiet_nan<T>() : l;
        }
    }
    bool good = true;
    if (args.solution != nullptr) {
        T* const solution = args.solution + problem * d * k;
        small_backward(lane, z);
        good = small_write(lane, z, solution, 0, k, real);
        const unsigned own = (Shape::lanes == 32 ? kFullWarp : (1u << (Shape::lanes % 32)) - 1u)
                             << (in_warp / Shape::lanes * Shape::lanes);
        good = (__ballot_sync(kFullWarp, good) & own) == own && lane.failed == 0;
        if (!good && real && row < d) {
            for (int c = 0; c < k; ++c) {
                solution[row * k + c] = quiet_nan<T>();
            }
        }
    }
    if (real && row == 0) {
        args.info[problem] = lane.failed != 0 ? lane.failed : good ? 0 : d + 1;
    }
}

// A⁻¹B from U.
template <class T, int kOrder, int kColumns>
__global__ void __launch_bounds__(kSmallWarps* kWarpSize)
    small_factor_solve_kernel(const FactorSolveArgs<T> args, int64_t count) {
    using Shape = SmallShape<T, kOrder>;
    ONESTEP_SHARED(T, matrix, [kSmallWarps * Shape::problems * Shape::region]);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int in_warp = static_cast<int>(threadIdx.x) % kWarpSize;
    const int slot = warp * Shape::problems + in_warp / Shape::lanes;
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (kSmallWarps * Shape::problems) + slot;
    const bool real = at < count;
    const int64_t problem = real ? at : count - 1;

    SmallLane<T, kOrder> lane;
    lane.row = in_warp % Shape::lanes;
    lane.d = static_cast<int>(args.d);
    lane.matrix = matrix + slot * Shape::region;
    const Matrix<const T> u = args.factor.at(args.batch, problem);
    const Matrix<const T> b = args.b.at(args.batch, problem);
    if (lane.row < kOrder) {
        for (int j = 0; j < kOrder; ++j) {
            const bool inside = j <= lane.row && lane.row < lane.d;
            const T value = inside ? u.data[j * u.row + lane.row * u.col] : j == lane.row ? T(1) : T(0);
            lane.matrix[j * Shape::pitch + lane.row] = value;
            lane.inverse = j == lane.row ? T(1) / value : lane.inverse;
        }
    }
    __syncwarp();
    for (int64_t first = 0; first < args.k; first += kColumns) {
        T z[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            const bool inside = lane.row < lane.d && first + c < args.k;
            z[c] = inside ? b.data[lane.row * b.row + (first + c) * b.col] : T(0);
        }
        small_forward(lane, z);
        small_backward(lane, z);
        small_write(lane, z, args.solution + problem * args.d * args.k, first, args.k, real);
    }
}

// Calls launch_size.template operator()<kOrder>() with the padded order for d.
template <class LaunchSize>
Status with_small_order(int64_t d, const LaunchSize& launch_size) {
    if (d <= 8) {
        return launch_size.template operator()<8>();
    }
    if (d <= 16) {
        return launch_size.template operator()<16>();
    }
    if (d <= 24) {
        return launch_size.template operator()<24>();
    }
    return launch_size.template operator()<32>();
}

template <class T, int kOrder>
int64_t small_blocks(int64_t count) {
    return ceil_div<int64_t>(count, kSmallWarps * SmallShape<T, kOrder>::problems);
}

template <class T>
Status small_system(const SystemArgs<T>& args, cudaStream_t stream) {
    const int64_t count = args.batch.count();
    return with_small_order(args.d, [&]<int kOrder>() {
        const int64_t blocks = small_blocks<T, kOrder>(count);
        if (blocks > kMostBlocks) {
            return device_error("batch of " + std::to_string(count) +
                                " problems; expected fewer than 2^31 blocks of them");
        }
        const dim3 grid(static_cast<unsigned>(blocks));
        constexpr unsigned kThreads = kSmallWarps * kWarpSize;
        return args.k <= 1 ? launch(small_system_kernel<T, kOrder, 1>, grid, kThreads, 0, stream, args, count)
                           : launch(small_system_kernel<T, kOrder, 4>, grid, kThreads, 0, stream, args, count);
    });
}

template <class T>
Status small_factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream) {
    const int64_t count = args.batch.count();
    return with_small_order(args.d, [&]<int kOrder>() {
        const int64_t blocks = small_blocks<T, kOrder>(count);
        if (blocks > kMostBlocks) {
            return device_error("batch of " + std::to_string(count) +
                                " problems; expected fewer than 2^31 blocks of them");
        }
        return launch(small_factor_solve_kernel<T, kOrder, 2>, dim3(static_cast<unsigned>(blocks)),
                      kSmallWarps * kWarpSize, 0, stream, args, count);
    });
}

}  // namespace onestep::normal::cuda
