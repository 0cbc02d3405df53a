// Kernels of the language-model head; see lmhead.hpp.
#pragma once

#include <cmath>

#include "base/cuda/device.cuh"
#include "base/cuda/numbers.cuh"
#include "lmhead/cuda/lmhead.hpp"

namespace onestep::lmhead::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarpSize;
// Logits that a thread reads at a time: two or four loads of 16 bytes.
inline constexpr int kSpan = 8;

template <class U>
__device__ U element(const Strided<U>& vector, int64_t index) {
    return vector.data[index * vector.stride];
}

// A bias, or 0 where there is none.
template <class T, class Input>
__device__ T bias_at(const Strided<Input>& bias, int64_t index) {
    return bias.data == nullptr ? T(0) : static_cast<T>(to_float(element(bias, index)));
}

template <class T>
struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T values[size];
};

// kSpan numbers from `from` on, of which those from `count` on are `fill`.
template <class T>
__device__ void load_span(const T* from, int64_t count, T fill, T (&values)[kSpan]) {
    if (count >= kSpan) {
#pragma unroll
        for (int i = 0; i < kSpan; i += Pack<T>::size) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
            for (int e = 0; e < Pack<T>::size; ++e) {
                values[i + e] = pack.values[e];
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
            values[i] = i < count ? from[i] : fill;
        }
    }
}

// The first `count` of kSpan numbers, rounded to Input.
template <class Input, class T>
__device__ void store_span(Input* to, int64_t count, const T (&values)[kSpan]) {
    if (count >= kSpan) {
#pragma unroll
        for (int i = 0; i < kSpan; i += Pack<Input>::size) {
            Pack<Input> pack;
            if constexpr (sizeof(Input) == 2) {
                unsigned words[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    words[e] = cuda::pack<Input>(values[2 * e], values[2 * e + 1]);
                }
                *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
            } else {
#pragma unroll
                for (int e = 0; e < Pack<Input>::size; ++e) {
                    pack.values[e] = values[i + e];
                }
                *reinterpret_cast<Pack<Input>*>(to + i) = pack;
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
            if (i < count) {
                if constexpr (sizeof(Input) == 2) {
                    to[i] = from_float<Input>(values[i]);
                } else {
                    to[i] = values[i];
                }
            }
        }
    }
}

// Sums over classes relative to their peak, so that no exponential overflows.
template <class T>
struct Online {
    T peak = static_cast<T>(-INFINITY);
    T sum = T(0);
    T moment = T(0);
    T total = T(0);
    T total_tangent = T(0);
};

// exp(a − b) for a ≤ b, 1 for equal infinities.
template <class T>
__device__ T ratio(T a, T b) {
    return a == b ? T(1) : std::exp(a - b);
}

template <class T>
__device__ Online<T> merged(const Online<T>& a, const Online<T>& b) {
    Online<T> both;
    both.peak = b.peak > a.peak ? b.peak : a.peak;
    const T of_a = ratio(a.peak, both.peak);
    const T of_b = ratio(b.peak, both.peak);
    both.sum = a.sum * of_a + b.sum * of_b;
    both.moment = a.moment * of_a + b.moment * of_b;
    both.total = a.total + b.total;
    both.total_tangent = a.total_tangent + b.total_tangent;
    return both;
}

// A block's, in the same order each time; thread 0 has the result. `shared` has a place for each warp.
template <class T>
__device__ Online<T> over_block(Online<T> own, Online<T>* shared) {
#pragma unroll
    for (int mask = kWarpSize / 2; mask >= 1; mask /= 2) {
        Online<T> other;
        other.peak = __shfl_down_sync(kFullWarp, own.peak, mask);
        other.sum = __shfl_down_sync(kFullWarp, own.sum, mask);
        other.moment = __shfl_down_sync(kFullWarp, own.moment, mask);
        other.total = __shfl_down_sync(kFullWarp, own.total, mask);
        other.total_tangent = __shfl_down_sync(kFullWarp, own.total_tangent, mask);
        own = merged(own, other);
    }
    if (threadIdx.x % kWarpSize == 0) {
        shared[threadIdx.x / kWarpSize] = own;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < kWarps; ++warp) {
            own = merged(own, shared[warp]);
        }
    }
    return own;
}

// The loss of a row whose classes have all been seen, and what the gradient needs of the row.
template <bool tangent, class T, class Input>
__device__ void finish_row(const HeadChunk<T, Input>& chunk, int64_t row, const Online<T>& online, T of_target,
                           T of_target_tangent, T* losses, double* values) {
    const int64_t target = element(chunk.target, row);
    const bool ignored = target == chunk.ignore_index;
    const T smoothing = static_cast<T>(chunk.label_smoothing);
    const T lse = online.peak + std::log(online.sum);
    const T mean = online.moment / online.sum;
    T loss = lse - (T(1) - smoothing) * of_target;
    T loss_tangent = mean - (T(1) - smoothing) * of_target_tangent;
    if (smoothing != T(0)) {
        loss -= smoothing / static_cast<T>(chunk.classes) * online.total;
        loss_tangent -= smoothing / static_cast<T>(chunk.classes) * online.total_tangent;
    }
    T weight = element(chunk.row_weight, row);
    T weight_tangent =
        tangent && chunk.row_weight_tangent.data != nullptr ? element(chunk.row_weight_tangent, row) : T(0);
    if (ignored) {
        weight = weight_tangent = loss = loss_tangent = T(0);
    } else if (target < 0 || target >= chunk.classes) {
        weight = loss = loss_tangent = static_cast<T>(NAN);
    }
    losses[row] = tangent ? loss_tangent : loss;
    values[row] = tangent ? static_cast<double>(weight) * static_cast<double>(loss_tangent) +
                                static_cast<double>(weight_tangent) * static_cast<double>(loss)
                          : static_cast<double>(weight) * static_cast<double>(loss);
    chunk.statistics[kLogSumExp * chunk.rows + row] = lse;
    chunk.statistics[kMean * chunk.rows + row] = mean;
    chunk.statistics[kWeight * chunk.rows + row] = weight;
    chunk.statistics[kWeightTangent * chunk.rows + row] = weight_tangent;
}

// A block of threads to a row.
template <bool tangent, class T, class Input>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(HeadChunk<T, Input> chunk, int64_t first, int64_t count, T* losses, double* values) {
    ONESTEP_SHARED(Online<T>, shared, [kWarps]);
    const int64_t row = blockIdx.x;
    const T* z = chunk.logits + row * chunk.leading + first;
    const T* dz = tangent ? chunk.logits_tangent + row * chunk.leading + first : nullptr;
    Online<T> own;
    for (int64_t at = int64_t{threadIdx.x} * kSpan; at < count; at += kThreads * kSpan) {
        T logits[kSpan];
        T tangents[kSpan];
        load_span(z + at, count - at, static_cast<T>(-INFINITY), logits);
        if constexpr (tangent) {
            load_span(dz + at, count - at, T(0), tangents);
        }
        T peak = own.peak;
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
            if (at + i < count) {
                if (chunk.bias.data != nullptr) {
                    logits[i] += bias_at<T>(chunk.bias, first + at + i);
                }
                own.total += logits[i];
                if constexpr (tangent) {
                    tangents[i] += bias_at<T>(chunk.bias_tangent, first + at + i);
                    own.total_tangent += tangents[i];
                }
            }
            peak = logits[i] > peak ? logits[i] : peak;
        }
        const T rescale = ratio(own.peak, peak);
        own.sum *= rescale;
        own.moment *= rescale;
        own.peak = peak;
        // A span of nothing but −∞ adds nothing.
        const T base = peak == static_cast<T>(-INFINITY) ? T(0) : peak;
#pragma unroll
        for (int i = 0; i < kSpan; ++i) {
            const T e = std::exp(logits[i] - base);
            own.sum += e;
            if constexpr (tangent) {
                own.moment += e * tangents[i];
            }
        }
    }
    Online<T> online = over_block(own, shared);
    if (threadIdx.x != 0) {
        return;
    }
    T* statistics = chunk.statistics + row;
    const int64_t n = chunk.rows;
    T of_target = T(0);
    T of_target_tangent = T(0);
    if (first > 0) {
        Online<T> before;
        before.peak = statistics[kPeak * n];
        before.sum = statistics[kSum * n];
        before.moment = statistics[kMoment * n];
        before.total = statistics[kTotal * n];
        before.total_tangent = statistics[kTotalTangent * n];
        online = merged(before, online);
        of_target = statistics[kOfTarget * n];
        of_target_tangent = statistics[kOfTargetTangent * n];
    }
    const int64_t target = element(chunk.target, row);
    if (target >= first && target < first + count) {
        of_target = z[target - first] + bias_at<T>(chunk.bias, target);
        if constexpr (tangent) {
            of_target_tangent = dz[target - first] + bias_at<T>(chunk.bias_tangent, target);
        }
    }
    if (first + count == chunk.classes) {
        finish_row<tangent>(chunk, row, online, of_target, of_target_tangent, losses, values);
        return;
    }
    statistics[kPeak * n] = online.peak;
    statistics[kSum * n] = online.sum;
    statistics[kMoment * n] = online.moment;
    statistics[kTotal * n] = online.total;
    statistics[kTotalTangent * n] = online.total_tangent;
    statistics[kOfTarget * n] = of_target;
    statistics[kOfTargetTangent * n] = of_target_tangent;
}

// What the gradient needs of a row.
template <class T>
struct Row {
    int64_t target;
    bool ignored;
    T lse, mean, weight, weight_tangent;
    T smoothed;   // q of a class that is not the target
    T at_target;  // what q has more there
};

template <class T, class Input>
__device__ Row<T> row_of(const HeadChunk<T, Input>& chunk, int64_t row) {
    const T* statistics = chunk.statistics + row;
    const int64_t target = element(chunk.target, row);
    return {target,
            target == chunk.ignore_index,
            statistics[kLogSumExp * chunk.rows],
            statistics[kMean * chunk.rows],
            statistics[kWeight * chunk.rows],
            statistics[kWeightTangent * chunk.rows],
            static_cast<T>(chunk.label_smoothing / static_cast<double>(chunk.classes)),
            static_cast<T>(1.0 - chunk.label_smoothing)};
}

// g and ġ of class v, from logits without the bias.
template <class T>
struct Slopes {
    T gradient, tangent;
};

template <bool tangent, class T, class Input>
__device__ Slopes<T> slopes(const HeadChunk<T, Input>& chunk, const Row<T>& row, int64_t v, T z, T dz) {
    // An ignored row counts for nothing, even with NaN in it.
    if (row.ignored) {
        return {T(0), T(0)};
    }
    const T p = std::exp(z + bias_at<T>(chunk.bias, v) - row.lse);
    const T error = p - row.smoothed - (v == row.target ? row.at_target : T(0));
    Slopes<T> result{row.weight * error, T(0)};
    if constexpr (tangent) {
        result.tangent =
            row.weight * p * (dz + bias_at<T>(chunk.bias_tangent, v) - row.mean) + row.weight_tangent * error;
    }
    return result;
}

// A block of threads to a row. What is written is no longer than what was read, so a row is replaced front to back.
template <bool tangent, class T, class Input>
__global__ void __launch_bounds__(kThreads) gradient_kernel(HeadChunk<T, Input> chunk, bool cross, const T* scale) {
    const int64_t index = blockIdx.x;
    const Row<T> row = row_of(chunk, index);
    T* z = chunk.logits + index * chunk.leading;
    T* dz = tangent ? chunk.logits_tangent + index * chunk.leading : nullptr;
    const T factor = scale == nullptr ? T(1) : *scale;
    // All threads go round as often, for the barrier.
    for (int64_t begin = 0; begin < chunk.classes; begin += kThreads * kSpan) {
        const int64_t at = begin + int64_t{threadIdx.x} * kSpan;
        const int64_t count = chunk.classes - at;
        T gradients[kSpan];
        T tangents[kSpan];
        if (count > 0) {
            load_span(z + at, count, T(0), gradients);
            if constexpr (tangent) {
                load_span(dz + at, count, T(0), tangents);
            }
#pragma unroll
            for (int i = 0; i < kSpan; ++i) {
                if (i < count) {
                    const Slopes<T> both =
                        slopes<tangent>(chunk, row, at + i, gradients[i], tangent ? tangents[i] : T(0));
                    gradients[i] = both.gradient * factor;
                    tangents[i] = both.tangent * factor;
                }
            }
        }
        // Narrow results lie where other threads have just read.
        if constexpr (sizeof(Input) < sizeof(T)) {
            __syncthreads();
        }
        if (count > 0) {
            if constexpr (tangent) {
                store_span(reinterpret_cast<Input*>(dz) + at, count, tangents);
                if (cross) {
                    store_span(reinterpret_cast<Input*>(z) + at, count, gradients);
                }
            } else {
                store_span(reinterpret_cast<Input*>(z) + at, count, gradients);
            }
        }
    }
}

// kWarpSize classes a block; its warps take every kWarps-th row.
template <bool tangent, class T, class Input>
__global__ void __launch_bounds__(kThreads) bias_kernel(HeadChunk<T, Input> chunk, T* grad_bias) {
    ONESTEP_SHARED(T, shares, [kWarps][kWarpSize]);
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t v = int64_t{blockIdx.x} * kWarpSize + lane;
    T sum = T(0);
    if (v < chunk.classes) {
        for (int64_t index = warp; index < chunk.rows; index += kWarps) {
            const Row<T> row = row_of(chunk, index);
            const T z = chunk.logits[index * chunk.leading + v];
            const T dz = tangent ? chunk.logits_tangent[index * chunk.leading + v] : T(0);
            const Slopes<T> both = slopes<tangent>(chunk, row, v, z, dz);
            sum += tangent ? both.tangent : both.gradient;
        }
    }
    shares[warp][lane] = sum;
    __syncthreads();
    if (warp == 0 && v < chunk.classes) {
        for (int other = 1; other < kWarps; ++other) {
            sum += shares[other][lane];
        }
        grad_bias[v] += sum;
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads) value_kernel(int64_t count, const double* values, T* value) {
    ONESTEP_SHARED(double, shares, [kThreads]);
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) {
        sum += values[i];
    }
    shares[threadIdx.x] = sum;
    for (int half = kThreads / 2; half >= 1; half /= 2) {
        __syncthreads();
        if (threadIdx.x < static_cast<unsigned>(half)) {
            shares[threadIdx.x] += shares[threadIdx.x + static_cast<unsigned>(half)];
        }
    }
    if (threadIdx.x == 0) {
        *value = static_cast<T>(shares[0]);
    }
}

}  // namespace onestep::lmhead::cuda
