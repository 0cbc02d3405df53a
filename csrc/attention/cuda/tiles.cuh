// Products of tiles by one warp, and how tiles come to shared memory.
//
// A warp owns 16 · M rows of a result. Accumulators are those of mma.m16n8: of each 16 × 8 tile, lane 4 g + t has
// columns 2t and 2t + 1 of rows g and g + 8, as elements 0, 1 and 2, 3. Two kinds of products have them:
//
// multiply_rows       acc += A Bᵀ: A and B in shared memory, the product runs over their columns (features)
// multiply_weights    acc += W B: W are accumulators of the former, B's rows belong to W's columns
//
// bfloat16 and float16 take tensor cores; W, which is float, enters as two of their numbers, high + low (exact to 2⁻¹⁶
// of each summand, where rounding to one would be lost in products that cancel). float and double take fused
// multiply-adds with the same distribution of the accumulators; hopper.cuh has the same on warp groups of Hopper.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/cuda/async.cuh"
#include "base/cuda/mma.cuh"
#include "base/cuda/numbers.cuh"

namespace onestep::attention::cuda {

using namespace onestep::cuda;

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarpSize; }

// The position of a lane's elements in an accumulator.
struct LanePlace {
    int row;  // of elements 0 and 1; 8 more for elements 2 and 3
    int col;  // of elements 0 and 2; 1 more for elements 1 and 3
    __device__ __forceinline__ LanePlace() : row(lane_index() / 4), col(lane_index() % 4 * 2) {}
};

// Tiles of D columns, row after row. 16 bytes more than the row lie between rows, so that 8 rows start in 8 different
// groups of banks.
template <class T_, int D_>
struct PaddedTiles {
    using T = T_;
    static constexpr int kD = D_;
    static constexpr int kPitch = D_ + 16 / static_cast<int>(sizeof(T_));
    static constexpr int kRowElements = kPitch;
    static constexpr int kWarps = 1;  // that act together
    static constexpr int kAlignment = 128;

    template <int Rows>
    static __device__ __forceinline__ T* at(T* tile, int row, int col) {
        return tile + row * kPitch + col;
    }
    // Before a barrier, so that copies are seen by products.
    static __device__ __forceinline__ void publish() {}
    // Around multiply_rows: accumulators are set before prepare, and complete after finish.
    template <class... Accs>
    static __device__ __forceinline__ void prepare(Accs&...) {}
    template <class... Accs>
    static __device__ __forceinline__ void finish(Accs&...) {}
};

// The dynamic shared memory from where tiles start; one kAlignment more than their size is asked for if that is not
// what it has anyway.
template <class Products>
__device__ __forceinline__ typename Products::T* align_tiles(typename Products::T* shared) {
    if constexpr (Products::kAlignment <= 128) {
        return shared;
    } else {
        constexpr uintptr_t kMask = Products::kAlignment - 1;
        const uintptr_t past = reinterpret_cast<uintptr_t>(shared) & kMask;
        return shared + (past == 0 ? 0 : Products::kAlignment - past) / sizeof(typename Products::T);
    }
}

// Copies to a tile of Rows × D, of which rows × cols are there; the rest becomes zeros.
template <class Products, int Rows, int Threads>
__device__ __forceinline__ void load_tile(typename Products::T* tile, const typename Products::T* from,
                                          int64_t row_stride, int rows, int cols) {
    constexpr int kEach = 16 / static_cast<int>(sizeof(typename Products::T));
    constexpr int kChunks = Products::kD / kEach;
    static_assert(Products::kD % kEach == 0);
    const int thread = static_cast<int>(threadIdx.x);
    const auto copy = [&](int row, int col, const typename Products::T* source) {
        const bool there = row < rows && col < cols;
        cp_async<16>(Products::template at<Rows>(tile, row, col), there ? source : from, there ? 16 : 0);
    };
    if constexpr (Threads % kChunks == 0 && Rows * kChunks % Threads == 0) {
        // A thread stays in its columns.
        constexpr int kStep = Threads / kChunks;
        const int col = thread % kChunks * kEach;
        const typename Products::T* source = from + thread / kChunks * row_stride + col;
#pragma unroll 4
        for (int row = thread / kChunks; row < Rows; row += kStep) {
            copy(row, col, source);
            source += kStep * row_stride;
        }
    } else {
#pragma unroll 4
        for (int index = thread; index < Rows * kChunks; index += Threads) {
            const int row = index / kChunks;
            const int col = index % kChunks * kEach;
            copy(row, col, from + row * row_stride + col);
        }
    }
}

// ------------------------------------------------------------------------------------------------------ tensor cores

// A pair as high + low.
template <class T>
__device__ __forceinline__ void split(float first, float second, unsigned& high, unsigned& low) {
    high = pack<T>(first, second);
    if constexpr (std::is_same_v<T, bfloat16>) {
        low = pack<T>(first - low_bfloat16(high), second - high_bfloat16(high));
    } else {
        low = pack<T>(first - low_float16(high), second - high_float16(high));
    }
}

// The left operand of 16 × 16 that two tiles of accumulators are.
template <class T>
__device__ __forceinline__ void split(const float (&first)[4], const float (&second)[4], unsigned (&high)[4],
                                      unsigned (&low)[4]) {
    split<T>(first[0], first[1], high[0], low[0]);
    split<T>(first[2], first[3], high[1], low[1]);
    split<T>(second[0], second[1], high[2], low[2]);
    split<T>(second[2], second[3], high[3], low[3]);
}

template <class T>
__device__ __forceinline__ void round_pairs(const float (&first)[4], const float (&second)[4], unsigned (&to)[4]) {
    to[0] = pack<T>(first[0], first[1]);
    to[1] = pack<T>(first[2], first[3]);
    to[2] = pack<T>(second[0], second[1]);
    to[3] = pack<T>(second[2], second[3]);
}

template <class T, int D>
struct TensorProducts : PaddedTiles<T, D> {
    using Acc = float;
    using PaddedTiles<T, D>::kPitch;
    static constexpr int kDepth = 16;

    struct Left {
        unsigned words[4];
    };
    // Two tiles of 8 columns.
    struct Right {
        unsigned first[2];
        unsigned second[2];
    };

    static __device__ __forceinline__ Left left(const T* tile, int row, int depth) {
        const int lane = lane_index();
        Left a;
        ldmatrix<4>(a.words, tile + (row + lane % 16) * kPitch + depth + lane / 16 * 8);
        return a;
    }

    template <bool Transposed>
    static __device__ __forceinline__ Right right(const T* lane_row) {
        unsigned words[4];
        ldmatrix<4, Transposed>(words, lane_row);
        return {{words[0], words[1]}, {words[2], words[3]}};
    }

    // Rows of the tile are columns of the product.
    static __device__ __forceinline__ Right right_of_rows(const T* tile, int row, int depth) {
        const int lane = lane_index();
        return right<false>(tile + (row + lane % 8 + lane / 16 * 8) * kPitch + depth + lane / 8 % 2 * 8);
    }

    // Rows of the tile are the depth of the product.
    static __device__ __forceinline__ Right right_of_columns(const T* tile, int row, int col) {
        const int lane = lane_index();
        return right<true>(tile + (row + lane % 16) * kPitch + col + lane / 16 * 8);
    }

    static __device__ __forceinline__ void multiply(float (&first)[4], float (&second)[4], const Left& a,
                                                    const Right& b) {
        mma_16x8x16<T>(first, a.words, b.first);
        mma_16x8x16<T>(second, a.words, b.second);
    }

    // acc += A Bᵀ and, where there are tangents, acc_tangent += Ȧ Bᵀ + A Ḃᵀ. Null tiles are zeros.
    template <int M, int N, int OwnRows, int Inner>
    static __device__ __forceinline__ void multiply_rows(float (&acc)[M][N][4], float (&acc_tangent)[M][N][4],
                                                         const T* a, const T* a_tangent, const T* b, const T* b_tangent,
                                                         int row) {
        static_assert(N % 2 == 0);
#pragma unroll 4
        for (int depth = 0; depth < D; depth += kDepth) {
            Left left_side[M];
            Left left_tangent[M];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                left_side[m] = left(a, row + 16 * m, depth);
                if (a_tangent != nullptr) {
                    left_tangent[m] = left(a_tangent, row + 16 * m, depth);
                }
            }
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                const Right right = right_of_rows(b, 8 * n, depth);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(acc[m][n], acc[m][n + 1], left_side[m], right);
                }
                if (a_tangent != nullptr) {
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(acc_tangent[m][n], acc_tangent[m][n + 1], left_tangent[m], right);
                    }
                }
                if (b_tangent != nullptr) {
                    const Right right_tangent = right_of_rows(b_tangent, 8 * n, depth);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(acc_tangent[m][n], acc_tangent[m][n + 1], left_side[m], right_tangent);
                    }
                }
            }
        }
    }

    // acc += W B, and W₂ B₂ where B₂ is not null. W enters as the sum of two 16-bit numbers, W₂ (which is P or dS,
    // where B₂ is a tangent) rounded to one, as in flash attention: decision 0036.
    template <int M, int N, int Inner>
    static __device__ __forceinline__ void multiply_weights(float (&acc)[M][D / 8][4], const float (&weights)[M][N][4],
                                                            const T* b, const float (&second_weights)[M][N][4],
                                                            const T* second_b) {
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            Left high[M];
            Left low[M];
            Left second[M];
#pragma unroll
            for (int m = 0; m < M; ++m) {
                split<T>(weights[m][n], weights[m][n + 1], high[m].words, low[m].words);
                round_pairs<T>(second_weights[m][n], second_weights[m][n + 1], second[m].words);
            }
#pragma unroll
            for (int j = 0; j < D / 8; j += 2) {
                const Right right = right_of_columns(b, 8 * n, 8 * j);
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(acc[m][j], acc[m][j + 1], high[m], right);
                    multiply(acc[m][j], acc[m][j + 1], low[m], right);
                }
                if (second_b != nullptr) {
                    const Right second_right = right_of_columns(second_b, 8 * n, 8 * j);
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(acc[m][j], acc[m][j + 1], second[m], second_right);
                    }
                }
            }
        }
    }
};

// ------------------------------------------------------------------------------------------------ float and double

// The same by fused multiply-adds.
template <class T, int D>
struct PlainProducts : PaddedTiles<T, D> {
    using Acc = T;
    using PaddedTiles<T, D>::kPitch;
    static constexpr int kDepth = 16 / static_cast<int>(sizeof(T));

    struct alignas(16) Chunk {
        T of[kDepth];
    };

    static __device__ __forceinline__ Chunk chunk(const T* from) { return *reinterpret_cast<const Chunk*>(from); }

    static __device__ __forceinline__ T dot(T sum, const Chunk& a, const Chunk& b) {
#pragma unroll
        for (int i = 0; i < kDepth; ++i) {
            sum += a.of[i] * b.of[i];
        }
        return sum;
    }

    static __device__ __forceinline__ void multiply(T (&acc)[4], const Chunk (&a)[2], const Chunk (&b)[2]) {
        acc[0] = dot(acc[0], a[0], b[0]);
        acc[1] = dot(acc[1], a[0], b[1]);
        acc[2] = dot(acc[2], a[1], b[0]);
        acc[3] = dot(acc[3], a[1], b[1]);
    }

    template <int M, int N, int OwnRows, int Inner>
    static __device__ __forceinline__ void multiply_rows(T (&acc)[M][N][4], T (&acc_tangent)[M][N][4], const T* a,
                                                         const T* a_tangent, const T* b, const T* b_tangent, int row) {
        const LanePlace place;
#pragma unroll 1
        for (int depth = 0; depth < D; depth += kDepth) {
            Chunk left[M][2];
            Chunk left_tangent[M][2];
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int at = (row + 16 * m + place.row + 8 * half) * kPitch + depth;
                    left[m][half] = chunk(a + at);
                    if (a_tangent != nullptr) {
                        left_tangent[m][half] = chunk(a_tangent + at);
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int at = (8 * n + place.col) * kPitch + depth;
                const Chunk right[2] = {chunk(b + at), chunk(b + at + kPitch)};
#pragma unroll
                for (int m = 0; m < M; ++m) {
                    multiply(acc[m][n], left[m], right);
                    if (a_tangent != nullptr) {
                        multiply(acc_tangent[m][n], left_tangent[m], right);
                    }
                }
                if (b_tangent != nullptr) {
                    const Chunk right_tangent[2] = {chunk(b_tangent + at), chunk(b_tangent + at + kPitch)};
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        multiply(acc_tangent[m][n], left[m], right_tangent);
                    }
                }
            }
        }
    }

    // acc += W B. A weight comes from the lane that has it.
    template <int M, int N>
    static __device__ __forceinline__ void add_weights(T (&acc)[M][D / 8][4], const T (&weights)[M][N][4], const T* b) {
        const LanePlace place;
        const int first_lane = lane_index() & ~3;
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll 1
            for (int source = 0; source < 4; ++source) {
#pragma unroll
                for (int odd = 0; odd < 2; ++odd) {
                    T upper[M];
                    T lower[M];
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        upper[m] = __shfl_sync(kFullWarp, weights[m][n][odd], first_lane + source);
                        lower[m] = __shfl_sync(kFullWarp, weights[m][n][2 + odd], first_lane + source);
                    }
                    const T* line = b + (8 * n + 2 * source + odd) * kPitch + place.col;
#pragma unroll
                    for (int j = 0; j < D / 8; ++j) {
                        const T first = line[8 * j];
                        const T second = line[8 * j + 1];
#pragma unroll
                        for (int m = 0; m < M; ++m) {
                            acc[m][j][0] += upper[m] * first;
                            acc[m][j][1] += upper[m] * second;
                            acc[m][j][2] += lower[m] * first;
                            acc[m][j][3] += lower[m] * second;
                        }
                    }
                }
            }
        }
    }

    template <int M, int N, int Inner>
    static __device__ __forceinline__ void multiply_weights(T (&acc)[M][D / 8][4], const T (&weights)[M][N][4],
                                                            const T* b, const T (&second_weights)[M][N][4],
                                                            const T* second_b) {
        add_weights<M, N>(acc, weights, b);
        if (second_b != nullptr) {
            add_weights<M, N>(acc, second_weights, second_b);
        }
    }
};

template <class T, int D>
using Products = std::conditional_t<sizeof(T) == 2, TensorProducts<T, D>, PlainProducts<T, D>>;

// ------------------------------------------------------------------------------------------------------- accumulators

template <class Acc, int M, int N>
__device__ __forceinline__ void clear(Acc (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int n = 0; n < N; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                acc[m][n][i] = Acc(0);
            }
        }
    }
}

// The sum of the four lanes that share a row, in each of them.
template <class Acc>
__device__ __forceinline__ Acc sum_of_row(Acc value) {
    value += __shfl_xor_sync(kFullWarp, value, 1);
    return value + __shfl_xor_sync(kFullWarp, value, 2);
}

template <class Acc>
__device__ __forceinline__ Acc max_of_row(Acc value) {
    value = max(value, __shfl_xor_sync(kFullWarp, value, 1));
    return max(value, __shfl_xor_sync(kFullWarp, value, 2));
}

// cols are a multiple of 16 bytes, so a pair is there or not.
template <class T, class Acc>
__device__ __forceinline__ void store_pair(T* to, Acc first, Acc second) {
    if constexpr (sizeof(T) == 2) {
        *reinterpret_cast<unsigned*>(to) = pack<T>(first, second);
    } else {
        to[0] = first;
        to[1] = second;
    }
}

// Writes factor · acc to rows first_row … of a contiguous rows × cols array.
template <class T, class Acc, int M, int N>
__device__ __forceinline__ void store_rows(const Acc (&acc)[M][N][4], Acc factor, T* to, int64_t first_row,
                                           int64_t rows, int cols) {
    const LanePlace place;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int64_t row = first_row + 16 * m + place.row + 8 * half;
            if (row < rows) {
                T* line = to + row * cols;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    const int col = 8 * n + place.col;
                    if (col < cols) {
                        store_pair(line + col, factor * acc[m][n][2 * half], factor * acc[m][n][2 * half + 1]);
                    }
                }
            }
        }
    }
}

}  // namespace onestep::attention::cuda
