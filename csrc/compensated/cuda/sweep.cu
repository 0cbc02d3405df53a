#include <cmath>

#include "base/cuda/device.cuh"
#include "compensated/cuda/compensated.hpp"

namespace onestep::compensated::cuda {
namespace {

constexpr int kColumns = static_cast<int>(kMostBlockColumns);
// Lanes that share a row of W. They are of one warp, so that a row needs no barrier but the warp's.
constexpr int kLanes = 8;
// Columns whose changes are gathered before they go to the rest of the block.
constexpr int kStep = 16;
// Rows of W of a block: as many as fit into 48 KiB with the factor's.
template <class T>
constexpr int kRows = sizeof(T) == 4 ? 16 : 8;
// Rows of a shared array are apart by this much more, so that those of a warp lie in different banks.
constexpr int kPadded = kColumns + kLanes;

__device__ __forceinline__ float nearest(float value) { return rintf(value); }
__device__ __forceinline__ double nearest(double value) { return rint(value); }

// value within [low, high]; low for NaN.
template <class T>
__device__ __forceinline__ T clamped(T value, T low, T high) {
    value = value > low ? value : low;
    return value < high ? value : high;
}

// The end of the step that starts at a column: columns that are judged together have had the same errors, so that a
// step ends where some begin that it would not hold. `of` and `group` are 0 where there are none.
__device__ __forceinline__ int step_end(int step, int width, int of, int group) {
    int last = step + kStep < width ? step + kStep : width;
    const int end = last;
    for (const int unit : {of, group}) {
        const int begins = unit > 0 ? (end - 1) / unit * unit : 0;
        if (begins > step && begins + unit > end && begins < last) {
            last = begins;
        }
    }
    return last;
}

// The rows of W that a block of threads works on, in shared memory. All of a row's lanes know its grid.
template <class T>
struct Rows {
    T (*w)[kPadded];
    T (*gone)[kPadded];  // 1 where the element is removed; scores before
    const T* pivot;      // of each column
    int row;             // of this thread, among the block's
    int lane;
    bool active;  // not behind the last row of W
};

// Of the `of` columns from c on, all but the `keep` with the largest scores go; of equal ones the first.
template <class T>
__device__ void choose_of(const Rows<T>& rows, int c, int of, int keep) {
    const T* w = rows.w[rows.row];
    T* scores = rows.gone[rows.row];
    for (int k = c + rows.lane; k < c + of; k += kLanes) {
        const T ratio = w[k] / rows.pivot[k];
        scores[k] = ratio * ratio;
    }
    __syncwarp();
    unsigned goes = 0;  // a bit for each of the lane's columns
    for (int k = c + rows.lane, bit = 0; k < c + of; k += kLanes, ++bit) {
        int smaller = 0;
        for (int l = c; l < c + of; ++l) {
            smaller += scores[l] < scores[k] || (scores[l] == scores[k] && l < k) ? 1 : 0;
        }
        goes |= (smaller < of - keep ? 1u : 0u) << bit;
    }
    __syncwarp();
    for (int k = c + rows.lane, bit = 0; k < c + of; k += kLanes, ++bit) {
        scores[k] = (goes >> bit & 1u) != 0 ? T(1) : T(0);
    }
    __syncwarp();
}

// The grid of the group that begins at column c, from the weights as they are now: behind the block those of `swept`.
template <class T>
__device__ void find_grid(const SweepBlockArgs<T>& args, const Rows<T>& rows, int64_t at, int c, T& scale, T& zero) {
    const SweepArgs<T>& sweep = args.sweep;
    const int64_t left = sweep.columns - args.start - c;
    const int64_t end = c + (sweep.group_size < left ? sweep.group_size : left);
    const int here = static_cast<int>(end < args.width ? end : args.width);
    T low = T(0);
    T high = T(0);
    const auto widen = [&](T value) {
        low = value < low ? value : low;
        high = value > high ? value : high;
    };
    for (int k = c + rows.lane; k < here; k += kLanes) {
        widen(rows.w[rows.row][k]);
    }
    if (rows.active) {
        const T* from = sweep.swept + at * sweep.columns + args.start;
        for (int64_t k = here + rows.lane; k < end; k += kLanes) {
            widen(from[k]);
        }
    }
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        widen(__shfl_xor_sync(kFullWarp, low, distance));
        widen(__shfl_xor_sync(kFullWarp, high, distance));
    }
    // All lanes have read the columns before one changes them: shuffles do not order memory.
    __syncwarp();
    if (sweep.symmetric) {
        high = high > -low ? high : -low;
        low = -high;
    }
    if (low == T(0) && high == T(0)) {
        low = T(-1);
        high = T(1);
    }
    const T most = static_cast<T>((1 << sweep.bits) - 1);
    scale = (high - low) / most;
    zero = sweep.symmetric ? (most + T(1)) / T(2) : nearest(-low / scale);
}

// Four blocks of threads on a multiprocessor: with as many as shared memory has room for, registers would not do.
//
// A block of threads takes kRows rows of W through the columns, kLanes threads a row. Within a step a column's change
// goes to the step's columns at once, and to those behind it when the step is done: each element takes the changes one
// by one, in the order of the columns, as if there were no steps.
template <class T>
__global__ void __launch_bounds__(kRows<T>* kLanes, 4) sweep_block_kernel(SweepBlockArgs<T> args) {
    ONESTEP_SHARED(T, w, [kRows<T>][kPadded]);
    ONESTEP_SHARED(T, gone, [kRows<T>][kPadded]);
    ONESTEP_SHARED(T, factor, [kStep][kColumns]);
    ONESTEP_SHARED(T, pivot, [kColumns]);
    ONESTEP_SHARED(T, change, [kRows<T>][kStep + 1]);
    // Of the step's columns, where grids are given.
    ONESTEP_SHARED(T, scales, [kRows<T>][kStep + 1]);
    ONESTEP_SHARED(T, zeros, [kRows<T>][kStep + 1]);
    ONESTEP_SHARED(uint8_t, codes, [kRows<T>][kColumns]);
    constexpr int kThreads = kRows<T> * kLanes;
    const SweepArgs<T>& sweep = args.sweep;
    const int width = static_cast<int>(args.width);
    const int64_t n = sweep.columns;
    const bool given = sweep.group != nullptr;
    const bool grids = sweep.bits > 0 && !given;
    const int of = args.removed == nullptr ? static_cast<int>(sweep.of) : 0;
    const int keep = static_cast<int>(sweep.keep);
    const bool removes = of > 0 || args.removed != nullptr;
    // Longer groups begin with a block.
    const bool long_groups = grids && sweep.group_size > kMostBlockColumns;
    const int group_size = grids && !long_groups ? static_cast<int>(sweep.group_size) : 0;
    const bool begins_group = long_groups && args.start % sweep.group_size == 0;
    const T most = static_cast<T>((1 << sweep.bits) - 1);
    const T* const diagonal_block = sweep.factor + args.start * (n + 1);
    const int thread = static_cast<int>(threadIdx.x);
    for (int c = thread; c < width; c += kThreads) {
        pivot[c] = diagonal_block[c * (n + 1)];
    }
    const int64_t pieces = ceil_div<int64_t>(sweep.rows, kRows<T>);
    for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
        Rows<T> rows{w, gone, pivot, thread / kLanes, thread % kLanes, false};
        const int row = rows.row;
        const int lane = rows.lane;
        const int64_t at = piece * kRows<T> + row;
        rows.active = at < sweep.rows;
        T* const home = sweep.swept + at * n + args.start;
        for (int c = lane; c < width; c += kLanes) {
            w[row][c] = rows.active ? home[c] : T(0);
            if (args.removed != nullptr) {
                gone[row][c] = rows.active && args.removed[at * args.removed_row + c] != 0 ? T(1) : T(0);
            }
        }
        T scale = T(1);
        T zero = T(0);
        if (long_groups && !begins_group && rows.active) {
            scale = sweep.scale[at * sweep.groups + args.start / sweep.group_size];
            zero = sweep.zero[at * sweep.groups + args.start / sweep.group_size];
        }
        double error = rows.active ? sweep.error[at] : 0.0;
        for (int step = 0; step < width;) {
            const int after = step_end(step, width, of, group_size);
            // The last step has been read.
            __syncthreads();
            for (int i = thread; i < (after - step) * width; i += kThreads) {
                const int j = i / width;
                const int c = i % width;
                if (c > step + j) {
                    factor[j][c] = diagonal_block[(step + j) * n + c];
                }
            }
            for (int j = step + lane; j < after; j += kLanes) {
                if (sweep.unit) {
                    change[row][j - step] = rows.active ? sweep.w[at * n + args.start + j] : T(0);
                }
                if (sweep.bits > 0 && given) {
                    const int64_t group = sweep.group[args.start + j];
                    // A group that there is none of cannot be told without waiting for the device.
                    const bool there = group >= 0 && group < sweep.groups;
                    const int64_t place = at * sweep.groups + group;
                    scales[row][j - step] = !rows.active ? T(1) : there ? sweep.scale[place] : static_cast<T>(NAN);
                    zeros[row][j - step] = !rows.active || !there ? T(0) : sweep.zero[place];
                }
            }
            __syncthreads();
            for (int j = step; j < after; ++j) {
                if (of > 0 && j % of == 0) {
                    choose_of(rows, j, of, keep);
                }
                if (j == 0 ? begins_group || group_size > 0 : group_size > 0 && j % group_size == 0) {
                    find_grid(args, rows, at, j, scale, zero);
                    if (rows.active && lane == 0) {
                        const int64_t group = (args.start + j) / sweep.group_size;
                        sweep.scale[at * sweep.groups + group] = scale;
                        sweep.zero[at * sweep.groups + group] = zero;
                    }
                }
                const T before = w[row][j];
                T q = removes && gone[row][j] > T(0) ? T(0) : before;
                T code = T(0);
                if (sweep.bits > 0) {
                    const T step_of_grid = given ? scales[row][j - step] : scale;
                    const T middle = given ? zeros[row][j - step] : zero;
                    // Beyond ±1000 every code is at its end.
                    const T steps = nearest(clamped(q / step_of_grid, T(-1000), T(1000)));
                    code = clamped(steps + middle, T(0), most);
                    q = step_of_grid * (code - middle);
                }
                const T e = sweep.unit ? (before - q) * pivot[j] : (before - q) / pivot[j];
                const T handed = sweep.unit ? change[row][j - step] - q : -e;
                error += static_cast<double>(e) * static_cast<double>(e);
                for (int l = j + 1 + lane; l < after; l += kLanes) {
                    w[row][l] += handed * factor[j - step][l];
                }
                // All lanes have read the column.
                __syncwarp();
                if (lane == 0) {
                    w[row][j] = q;
                    change[row][j - step] = handed;
                    codes[row][j] = static_cast<uint8_t>(static_cast<int>(code));
                }
                __syncwarp();
            }
            for (int l = after + lane; l < width; l += kLanes) {
                T sum = w[row][l];
                for (int j = 0; j < after - step; ++j) {
                    sum += change[row][j] * factor[j][l];
                }
                w[row][l] = sum;
            }
            if (rows.active && args.change != nullptr) {
                for (int j = step + lane; j < after; j += kLanes) {
                    args.change[at * kMostBlockColumns + j] = change[row][j - step];
                }
            }
            __syncwarp();
            step = after;
        }
        if (rows.active) {
            for (int c = lane; c < width; c += kLanes) {
                home[c] = w[row][c];
                if (sweep.bits > 0) {
                    sweep.codes[at * n + args.start + c] = codes[row][c];
                }
            }
            if (lane == 0) {
                sweep.error[at] = error;
            }
        }
    }
}

}  // namespace

template <class T>
Status sweep_block(const SweepBlockArgs<T>& args, cudaStream_t stream) {
    const SweepArgs<T>& sweep = args.sweep;
    if (args.width > kMostBlockColumns) {
        return device_error("a block of the sweep has more columns than one call takes");
    }
    // A run that is cut would be judged by columns of other blocks.
    if (args.removed == nullptr && sweep.of > 0 && (args.start % sweep.of != 0 || args.width % sweep.of != 0)) {
        return device_error("a block of the sweep cuts a run of columns of which some are kept");
    }
    if (args.width <= 0) {
        return Status::ok;
    }
    const int64_t pieces = ceil_div<int64_t>(sweep.rows, kRows<T>);
    const int64_t blocks = pieces < kMostBlocks ? pieces : kMostBlocks;
    return launch(sweep_block_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kRows<T> * kLanes), 0, stream, args);
}

template Status sweep_block(const SweepBlockArgs<float>&, cudaStream_t);
template Status sweep_block(const SweepBlockArgs<double>&, cudaStream_t);

}  // namespace onestep::compensated::cuda
