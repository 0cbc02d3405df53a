// What happens to the outputs XV of a row between the two products with X, and to a block's loss.
#pragma once

#include "glm/cuda/family.cuh"

namespace onestep::glm::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;

// What both fused kernels are given.
template <class X, class T>
struct PassArgs {
    GlmData<X, T> data;
    // Right-hand sides: m of d (+ 1) × k each; W, with m = 1, for a point.
    int m = 1;
    Matrix<const T> right;
    int64_t right_stride = 0;  // from one right-hand side to the next
    // A point writes the curvature, unless it is null; a product reads it.
    T* curvature = nullptr;
    // Whether X can be read in 16-byte chunks.
    bool vector_loads = false;
    // Tiles of X in shared memory: with two, one is loaded while the other is computed with.
    int stages = 1;
    // Each block's part of the result, d (+ 1) × m·k, or null; a point's loss and status.
    T* partial = nullptr;
    double* losses = nullptr;
    int* statuses = nullptr;
};

// Shared memory of store_block_loss.
inline constexpr int64_t kLossBytes = kWarps * 16;

__host__ __device__ constexpr int64_t whole_chunks(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Sums over the lanes of a row.
template <int lanes, class T>
__device__ T sum_of_row(T value) {
#pragma unroll
    for (int mask = lanes / 2; mask >= 1; mask /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, mask);
    }
    return value;
}

template <int lanes, class T>
__device__ T max_of_row(T value) {
#pragma unroll
    for (int mask = lanes / 2; mask >= 1; mask /= 2) {
        const T other = __shfl_xor_sync(kFullWarp, value, mask);
        value = other > value ? other : value;
    }
    return value;
}

// One row of softmax outputs, shared by `lanes` lanes; lane `lane` has classes lane, lane + lanes, … Replaces z by
// the slope and adds to the loss. All lanes of the warp call it; those of rows past the end have `valid` false.
template <int lanes, class X, class T>
__device__ void softmax_row(const PassArgs<X, T>& args, int64_t row, bool valid, int lane, T* z, double& loss,
                            int& status) {
    const GlmData<X, T>& data = args.data;
    const int classes = static_cast<int>(data.k);
    T weight = T(0);
    int64_t label = 0;
    bool known = true;
    T total = T(0);
    if (valid) {
        weight = checked_weight(data, row, status);
        if (data.labels.data != nullptr) {
            label = data.labels.data[row * data.labels.row];
            known = label >= 0 && label < classes;
        } else {
            for (int c = lane; c < classes; c += lanes) {
                const T y = data.y.data[row * data.y.row + c * data.y.col];
                known = known && knows(GlmFamily::softmax, y);
                total += y;
            }
        }
    }
    total = sum_of_row<lanes>(total);
    if (valid && data.labels.data == nullptr) {
        known = known && std::fabs(total - T(1)) <= static_cast<T>(kSumTolerance);
    }
    T peak = static_cast<T>(-INFINITY);
    if (valid) {
        for (int c = lane; c < classes; c += lanes) {
            peak = z[c] > peak ? z[c] : peak;
        }
    }
    peak = max_of_row<lanes>(peak);
    T sum = T(0);
    if (valid) {
        for (int c = lane; c < classes; c += lanes) {
            sum += std::exp(z[c] - peak);
        }
    }
    sum = sum_of_row<lanes>(sum);
    // One lane's bad class is the whole row's.
    known = sum_of_row<lanes>(known ? 0 : 1) == 0;
    if (!valid) {
        return;
    }
    if (!known) {
        status = max(status, static_cast<int>(GlmInfo::bad_target));
        weight = not_a_number<T>();
    }
    const T lse = peak + std::log(sum);
    for (int c = lane; c < classes; c += lanes) {
        const T y =
            data.labels.data == nullptr ? data.y.data[row * data.y.row + c * data.y.col] : (label == c ? T(1) : T(0));
        const T p = std::exp(z[c] - lse);
        loss += static_cast<double>(weight * y * (lse - z[c]));
        if (args.curvature != nullptr) {
            args.curvature[row * classes + c] = known ? p : not_a_number<T>();
        }
        z[c] = weight * (p - y);
    }
}

// Replaces a row's outputs XV by C(XV): for each right-hand side w·P∘(z − rowsum(P∘z)).
template <int lanes, class X, class T>
__device__ void softmax_product_row(const PassArgs<X, T>& args, int64_t row, bool valid, int lane, T* z) {
    const int classes = static_cast<int>(args.data.k);
    int status = 0;
    const T weight = valid ? checked_weight(args.data, row, status) : T(1);
    const T* p = args.curvature + row * classes;
    for (int g = 0; g < args.m; ++g) {
        T* of_side = z + g * classes;
        T mean = T(0);
        if (valid) {
            for (int c = lane; c < classes; c += lanes) {
                mean += p[c] * of_side[c];
            }
        }
        mean = sum_of_row<lanes>(mean);
        if (valid) {
            for (int c = lane; c < classes; c += lanes) {
                of_side[c] = weight * p[c] * (of_side[c] - mean);
            }
        }
    }
}

// What happens to a row's outputs between the two products.
template <bool point, int lanes, class X, class T>
__device__ void middle_row(const PassArgs<X, T>& args, int64_t row, int lane, T* z, double& loss, int& status) {
    const GlmData<X, T>& data = args.data;
    const bool valid = row < data.n;
    const int columns = args.m * static_cast<int>(data.k);
    if (data.family == GlmFamily::softmax) {
        if constexpr (point) {
            softmax_row<lanes>(args, row, valid, lane, z, loss, status);
        } else {
            softmax_product_row<lanes>(args, row, valid, lane, z);
        }
    } else if (valid) {
        if constexpr (point) {
            const T weight = checked_weight(data, row, status);
            for (int c = lane; c < columns; c += lanes) {
                const Terms<T> of_output = terms(data.family, z[c], checked_target(data, row, c, status), weight);
                loss += static_cast<double>(of_output.loss);
                if (args.curvature != nullptr) {
                    args.curvature[row * columns + c] = of_output.curvature;
                }
                z[c] = of_output.slope;
            }
        } else {
            for (int q = lane; q < columns; q += lanes) {
                z[q] *= args.curvature[row * data.k + q % data.k];
            }
        }
    }
    if (!valid) {
        for (int q = lane; q < columns; q += lanes) {
            z[q] = T(0);
        }
    }
}

// Adds up a block's losses and statuses, in a fixed order, and leaves them for the second kernel. `scratch` is
// kLossBytes of shared memory that nobody else uses.
__device__ inline void store_block_loss(double loss, int status, double* scratch, double* losses, int* statuses) {
    int* codes = reinterpret_cast<int*>(scratch + kWarps);
    for (int mask = 16; mask >= 1; mask /= 2) {
        loss += __shfl_xor_sync(kFullWarp, loss, mask);
    }
    status = __reduce_max_sync(kFullWarp, status);
    if (threadIdx.x % 32 == 0) {
        scratch[threadIdx.x / 32] = loss;
        codes[threadIdx.x / 32] = status;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        double total = 0.0;
        int worst = 0;
        for (int warp = 0; warp < kWarps; ++warp) {
            total += scratch[warp];
            worst = max(worst, codes[warp]);
        }
        losses[blockIdx.x] = total;
        statuses[blockIdx.x] = worst;
    }
}

}  // namespace onestep::glm::cuda
