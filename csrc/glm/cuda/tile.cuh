// A few right-hand sides or outputs: a block holds a tile of rows of X in shared memory, multiplies it by the columns,
// applies the curvature and multiplies back. X is read from device memory once.
#pragma once

#include "base/cuda/async.cuh"
#include "glm/cuda/middle.cuh"
#include "glm/cuda/rows.cuh"

namespace onestep::glm::cuda {

inline constexpr int kTileRows = 32;
// Lanes that share a row between the two products, and columns of X that a thread may own on the way back.
inline constexpr int kRowLanes = kThreads / kTileRows;
inline constexpr int kOwnedSums = 16;

// Rows of a tile in shared memory: d columns, a column of ones with an intercept, and zeros to a whole chunk.
template <class X>
__host__ __device__ int64_t tile_stride(int64_t height) {
    return (height + Chunk<X>::size - 1) / Chunk<X>::size * Chunk<X>::size;
}

// Rows of V are padded so that lanes which read them in turn, 16 bytes each, meet no bank twice.
template <class T, int columns>
inline constexpr int kRightStride = columns + (columns * sizeof(T) > 16 ? 16 / static_cast<int>(sizeof(T)) : 0);

// Where what lies in shared memory: `stages` tiles of X, V, the outputs, the loss.
template <class X, class T, int columns>
struct TileLayout {
    int64_t right, outputs, loss, bytes;

    __host__ __device__ TileLayout(int64_t height, int stages) {
        right = stages * kTileRows * tile_stride<X>(height) * static_cast<int64_t>(sizeof(X));
        outputs = right + whole_chunks(height * kRightStride<T, columns> * static_cast<int64_t>(sizeof(T)));
        loss = outputs + kTileRows * columns * static_cast<int64_t>(sizeof(T));
        bytes = loss + kLossBytes;
    }
};

// The most rows of W for which the kernel of this many columns has sums.
template <int columns>
inline constexpr int64_t kMostHeight = int64_t{kThreads} * kOwnedSums / columns;

// Begins to copy rows [first, first + kTileRows) into a tile, zeros from the last row on. The copies of whole chunks
// are asynchronous: all of a tile are under way at once, and those of the next tile while this one is computed with.
template <class X, class T>
__device__ void load_tile(const PassArgs<X, T>& args, int64_t first, X* tile, int64_t stride) {
    const GlmData<X, T>& data = args.data;
    if (args.vector_loads) {
        const int chunks = static_cast<int>(data.d / Chunk<X>::size);
        for (int at = threadIdx.x; at < kTileRows * chunks; at += kThreads) {
            const int row = at / chunks;
            const int column = at % chunks * Chunk<X>::size;
            const bool valid = first + row < data.n;
            const X* from = data.x.data + (valid ? (first + row) * data.x.row + column : 0);
            cp_async<16>(tile + row * stride + column, from, valid ? 16 : 0);
        }
    } else {
        const int d = static_cast<int>(data.d);
        for (int at = threadIdx.x; at < kTileRows * d; at += kThreads) {
            const int row = at / d;
            const int column = at % d;
            const int64_t from = first + row;
            X value{};
            if (from < data.n) {
                value = data.x.data[from * data.x.row + column * data.x.col];
            }
            tile[row * stride + column] = value;
        }
    }
    cp_async_commit();
}

// Blocks of a multiprocessor: sums in double take more than 128 registers of a thread.
template <class T>
inline constexpr int kTileResident = sizeof(T) == 8 ? 1 : 2;

// `columns` is at least m·k.
template <class X, class T, int columns, bool point>
__global__ void __launch_bounds__(kThreads, kTileResident<T>) tile_kernel(PassArgs<X, T> args) {
    constexpr int kOwned = kOwnedSums / columns;  // columns of X that a thread sums on the way back
    constexpr int kPacked = 16 / static_cast<int>(sizeof(T));
    constexpr int kWarpRows = kTileRows / kWarps;
    // Rows that a warp multiplies at a time: 64 registers of sums at most.
    constexpr int kRows = columns == 16 || sizeof(T) == 8 ? 2 : kWarpRows;
    constexpr int kRightRow = kRightStride<T, columns>;
    struct alignas(16) Packed {
        T values[kPacked];
    };
    const GlmData<X, T>& data = args.data;
    const int height = static_cast<int>(height_of(data));
    const int used = args.m * static_cast<int>(data.k);
    const int64_t stride = tile_stride<X>(height);
    const TileLayout<X, T, columns> layout(height, args.stages);
    ONESTEP_DYNAMIC_SHARED(unsigned char, shared);
    X* tile = reinterpret_cast<X*>(shared);
    const int64_t tile_size = kTileRows * stride;
    T* right = reinterpret_cast<T*>(shared + layout.right);
    T* outputs = reinterpret_cast<T*>(shared + layout.outputs);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;

    for (int at = threadIdx.x; at < height * kRightRow; at += kThreads) {
        const int row = at / kRightRow;
        const int q = at % kRightRow;
        const int side = q / static_cast<int>(data.k);
        right[at] = q < used
                        ? args.right.data[side * args.right_stride + row * args.right.row + q % data.k * args.right.col]
                        : T(0);
    }
    // What stands behind the features stays as it is from tile to tile.
    for (int at = threadIdx.x; at < args.stages * kTileRows * static_cast<int>(stride - data.d); at += kThreads) {
        const int extra = static_cast<int>(stride - data.d);
        tile[at / extra * stride + data.d + at % extra] = data.intercept && at % extra == 0 ? one<X>() : X{};
    }

    // On the way back a thread owns columns slot, slot + slots, … of X, and every part-th row of the tile.
    const int slots = min(kThreads, (height + 31) / 32 * 32);
    const int parts = kThreads / slots;
    const int slot = threadIdx.x % slots;
    const int part = threadIdx.x / slots;
    T sum[kOwned][columns];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
#pragma unroll
        for (int q = 0; q < columns; ++q) {
            sum[i][q] = T(0);
        }
    }
    double loss = 0.0;
    int status = 0;

    const int64_t tiles = (data.n + kTileRows - 1) / kTileRows;
    const bool ahead = args.stages == 2;
    if (ahead && blockIdx.x < tiles) {
        load_tile(args, int64_t{blockIdx.x} * kTileRows, tile, stride);
    }
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const int64_t first = index * kTileRows;
        if (ahead) {
            // Rows behind the last are none of X: the copies of the last turn bring zeros, or nothing.
            X* next = tile == reinterpret_cast<X*>(shared) ? tile + tile_size : tile - tile_size;
            load_tile(args, (index + gridDim.x) * kTileRows, next, stride);
            cp_async_wait<1>();
        } else {
            load_tile(args, first, tile, stride);
            cp_async_wait<0>();
        }
        __syncthreads();
#pragma unroll 1
        for (int from = warp * kWarpRows; from < (warp + 1) * kWarpRows; from += kRows) {
            T z[kRows * columns];
#pragma unroll
            for (int i = 0; i < kRows * columns; ++i) {
                z[i] = T(0);
            }
            for (int j = lane; j < height; j += 32) {
                T v[columns];
#pragma unroll
                for (int q = 0; q < columns; q += kPacked) {
                    const Packed packed = *reinterpret_cast<const Packed*>(right + j * kRightRow + q);
#pragma unroll
                    for (int e = 0; e < kPacked; ++e) {
                        v[q + e] = packed.values[e];
                    }
                }
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    const T x = to_float(tile[(from + r) * stride + j]);
#pragma unroll
                    for (int q = 0; q < columns; ++q) {
                        z[r * columns + q] += x * v[q];
                    }
                }
            }
            constexpr int kCount = kRows * columns;
            sum_over_lanes<kCount, 32>(z, lane);
            if constexpr (kCount >= 32) {
#pragma unroll
                for (int i = 0; i < kCount / 32; ++i) {
                    outputs[from * columns + lane * (kCount / 32) + i] = z[i];
                }
            } else if (lane % (32 / kCount) == 0) {
                outputs[from * columns + lane / (32 / kCount)] = z[0];
            }
        }
        __syncthreads();
        const int row = threadIdx.x / kRowLanes;
        middle_row<point, kRowLanes>(args, first + row, static_cast<int>(threadIdx.x % kRowLanes),
                                     outputs + row * columns, loss, status);
        __syncthreads();
        if (part < parts && args.partial != nullptr) {
            for (int r = part; r < kTileRows; r += parts) {
                T scaled[columns];
#pragma unroll
                for (int q = 0; q < columns; q += kPacked) {
                    const Packed packed = *reinterpret_cast<const Packed*>(outputs + r * columns + q);
#pragma unroll
                    for (int e = 0; e < kPacked; ++e) {
                        scaled[q + e] = packed.values[e];
                    }
                }
#pragma unroll
                for (int i = 0; i < kOwned; ++i) {
                    if (i * slots >= height) {
                        break;
                    }
                    const int j = slot + i * slots;
                    const T x = j < height ? to_float(tile[r * stride + j]) : T(0);
#pragma unroll
                    for (int q = 0; q < columns; ++q) {
                        sum[i][q] += x * scaled[q];
                    }
                }
            }
        }
        // The tile, and the outputs, are written again in the next turn.
        __syncthreads();
        if (ahead) {
            tile = tile == reinterpret_cast<X*>(shared) ? tile + tile_size : tile - tile_size;
        }
    }
    cp_async_wait<0>();

    if (args.partial != nullptr) {
        T* partial = args.partial + int64_t{blockIdx.x} * height * used;
        // The parts in turn; the tile's memory holds d (+ 1) × columns sums.
        T* block_sum = reinterpret_cast<T*>(shared);
        for (int turn = 0; turn < parts; ++turn) {
            __syncthreads();
            if (part == turn) {
#pragma unroll
                for (int i = 0; i < kOwned; ++i) {
                    const int j = slot + i * slots;
#pragma unroll
                    for (int q = 0; q < columns; ++q) {
                        if (j < height && q < used) {
                            T& total = block_sum[j * used + q];
                            total = turn == 0 ? sum[i][q] : total + sum[i][q];
                        }
                    }
                }
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < height * used; at += kThreads) {
            partial[at] = block_sum[at];
        }
    }
    if constexpr (point) {
        store_block_loss(loss, status, reinterpret_cast<double*>(shared + layout.loss), args.losses, args.statuses);
    }
}

}  // namespace onestep::glm::cuda
