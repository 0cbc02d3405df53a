// Gram sums of fp32 by tensor cores (base/cuda/split.cuh).
//
// A k-step takes eight rows of X. Lane (g, t) = (lane / 4, lane % 4) holds, of rows t and t + 4, the kWidth features
// kWidth g … kWidth g + kWidth − 1, which it loads at once. Number j of them is its element in "feature tile" j, whose
// row g of a tile of A, or column g of a tile of B, is feature kWidth g + j. So the same registers are operand A of the
// tiles of two feature tiles (2m, 2m + 1) and operand B of one, and nothing is exchanged between lanes.
#pragma once

#include "base/cuda/async.cuh"
#include "base/cuda/split.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"

namespace onestep::normal::cuda {

// What a lane has of eight rows: of rows t and t + 4 its kWidth features, and their low parts.
template <int kWidth>
struct RowPair {
    float value[2][kWidth];
    unsigned low[2][kWidth];

    __device__ __forceinline__ unsigned high(int h, int j) const { return __float_as_uint(value[h][j]); }
    __device__ __forceinline__ void split() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
                low[h][j] = low_part(value[h][j]);
            }
        }
    }
};

// Operand A of feature tiles 2m and 2m + 1. A feature tile kWidth, where kWidth is odd, is zeros.
template <int kWidth>
__device__ __forceinline__ void left_of(const RowPair<kWidth>& rows, int m, SplitTile& tile) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int j = 2 * m + e % 2;
        tile.a_high[e] = j < kWidth ? rows.high(e / 2, j) : 0u;
        tile.a_low[e] = j < kWidth ? rows.low[e / 2][j] : 0u;
    }
}

// Operand B of feature tile j.
template <int kWidth>
__device__ __forceinline__ void right_of(const RowPair<kWidth>& rows, int j, SplitTile& tile) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        tile.b_high[e] = rows.high(e, j);
        tile.b_low[e] = rows.low[e][j];
    }
}

// Loads kCount neighbours, 4 or 2 of which are aligned to as many numbers.
template <int kCount>
__device__ __forceinline__ void load_aligned(const float* from, float (&to)[kCount]) {
    if constexpr (kCount == 4) {
        load_vector(from, to);
    } else if constexpr (kCount == 2) {
        const float2 v = *reinterpret_cast<const float2*>(from);
        to[0] = v.x;
        to[1] = v.y;
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            to[i] = from[i];
        }
    }
}
template <int kCount>
__device__ __forceinline__ void store_aligned(float* to, const float (&from)[kCount]) {
    if constexpr (kCount == 4) {
        store_vector(to, from);
    } else if constexpr (kCount == 2) {
        *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
    } else {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            to[i] = from[i];
        }
    }
}

// The tiles (m, j) of a triangle: left operand of feature tiles 2m and 2m + 1, right operand of feature tile j ≥ 2m.
// The others are mirror images.
template <int kWidth>
struct Triangle {
    static constexpr int lefts = ceil_div(kWidth, 2);
    static constexpr int count = lefts * kWidth - lefts * (lefts - 1);

    static constexpr int index(int m, int j) { return m * kWidth - m * (m - 1) + j - 2 * m; }
    static constexpr int left(int index_) {
        int m = 0;
        while (m + 1 < lefts && index_ >= index(m + 1, 2 * (m + 1))) {
            ++m;
        }
        return m;
    }
    static constexpr int right(int index_) { return index_ - index(left(index_), 0); }
};

// Reads a problem for a warp, eight rows at a time: d ≤ 8 kWidth features and k ≤ kColumns targets, zeros beyond.
template <int kWidth, int kColumns>
class WarpReader {
 public:
    struct Rows {
        RowPair<kWidth> x;
        float y[2][kColumns];
    };

    __device__ __forceinline__ WarpReader(const Matrix<const float>& x, const Matrix<const float>& y,
                                          const Matrix<const float>& weight, int d, int k)
        : x_(x), y_(y), weight_(weight), d_(d), k_(k) {
        const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
        first_ = kWidth * (lane / 4);
        row_ = lane % 4;
        x_.data += row_ * x.row + first_ * x.col;
        y_.data += k > 0 ? row_ * y.row : 0;
        weight_.data += weight.data != nullptr ? row_ * weight.row : 0;
    }

    // Whether whole vectors of rows can be loaded, unweighted.
    __device__ __forceinline__ bool plain() const {
        return kWidth != 3 && weight_.data == nullptr && x_.col == 1 && d_ == 8 * kWidth && x_.row % kWidth == 0 &&
               reinterpret_cast<uintptr_t>(x_.data) % (kWidth * sizeof(float)) == 0;
    }

    // The next rows, of which `left` are there. kPlain: all eight, and plain().
    template <bool kPlain>
    __device__ __forceinline__ void next(Rows& rows, int64_t left) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const bool inside = kPlain || row_ + 4 * h < left;
            if constexpr (kPlain) {
                load_aligned(x_.data, rows.x.value[h]);
            } else {
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    rows.x.value[h][j] = inside && first_ + j < d_ ? x_.data[j * x_.col] : 0.0f;
                }
            }
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                rows.y[h][c] = inside && c < k_ ? y_.data[c * y_.col] : 0.0f;
            }
            if (!kPlain && weight_.data != nullptr) {
                const float scale = inside ? square_root(*weight_.data) : 0.0f;
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
                    rows.x.value[h][j] *= scale;
                }
#pragma unroll
                for (int c = 0; c < kColumns; ++c) {
                    rows.y[h][c] *= scale;
                }
                weight_.data += 4 * weight_.row;
            }
            x_.data += 4 * x_.row;
            y_.data += k_ > 0 ? 4 * y_.row : 0;
        }
    }

 private:
    Matrix<const float> x_, y_, weight_;  // at this lane's row and features
    int d_, k_;
    int first_, row_;
};

// The sums of a warp: of A in tiles, and of R by plain arithmetic, of which a lane has rows t and t + 4 of each eight.
template <int kWidth, int kColumns>
struct WarpSums {
    using Tiles = Triangle<kWidth>;
    using Reader = WarpReader<kWidth, kColumns>;
    float tiles[Tiles::count][4] = {};
    float targets[kWidth][kColumns] = {};

    // Over the next n rows, n > 0.
    template <bool kPlain>
    __device__ __forceinline__ void add(Reader& reader, int64_t n) {
        // Two k-steps are under way while one is summed.
        constexpr int kAhead = 2;
        typename Reader::Rows next[kAhead];
#pragma unroll
        for (int slot = 0; slot < kAhead; ++slot) {
            if (!kPlain || n > 8 * slot) {
                reader.template next<kPlain>(next[slot], n - 8 * slot);
            }
        }
#pragma unroll 1
        for (int64_t left = n; left > 0; left -= 8 * kAhead) {
#pragma unroll
            for (int slot = 0; slot < kAhead; ++slot) {
                const int64_t behind = left - 8 * (slot + kAhead);
                if (slot > 0 && left <= 8 * slot) {
                    break;
                }
                typename Reader::Rows rows = next[slot];
                if (behind > 0) {
                    reader.template next<kPlain>(next[slot], behind);
                }
#pragma unroll
                for (int j = 0; j < kWidth; ++j) {
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) {
                        targets[j][c] += rows.x.value[0][j] * rows.y[0][c];
                        targets[j][c] += rows.x.value[1][j] * rows.y[1][c];
                    }
                }
                rows.x.split();
                multiply_add<3, Tiles::count>(tiles, [&](auto i) {
                    SplitTile tile;
                    left_of<kWidth>(rows.x, Tiles::left(i), tile);
                    right_of<kWidth>(rows.x, Tiles::right(i), tile);
                    return tile;
                });
            }
        }
    }
};

// A = XᵀDX for kOrder = 8 kWidth features, of which d are real, and R = XᵀDY for kColumns targets, of which k are, to
// `matrix` in shared memory: rows of `pitch` numbers, R behind A. A is symmetric up to rounding; its lower triangle is
// what counts.
template <int kOrder, int kColumns>
__device__ __forceinline__ void warp_gram(const Matrix<const float>& x, const Matrix<const float>& y,
                                          const Matrix<const float>& weight, int64_t n, int d, int k, float* matrix,
                                          int pitch) {
    constexpr int kWidth = kOrder / 8;
    using Tiles = Triangle<kWidth>;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int g = lane / 4;
    const int t = lane % 4;
    WarpReader<kWidth, kColumns> reader(x, y, weight, d, k);
    WarpSums<kWidth, kColumns> sums;
    int64_t rest = n;
    if (__all_sync(kFullWarp, reader.plain())) {
        const int64_t whole = n / 8 * 8;
        if (whole > 0) {
            sums.template add<true>(reader, whole);
        }
        rest -= whole;
    }
    if (rest > 0) {
        sums.template add<false>(reader, rest);
    }

    // Register e of tile (m, j): features kWidth g + 2m + e / 2 and kWidth (2t + e % 2) + j.
    unrolled<Tiles::lefts>([&](auto m) {
        constexpr int kFrom = 2 * m;
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int left = kFrom + e / 2;
            if (left >= kWidth) {
                continue;
            }
            const int row = kWidth * g + left;
            const int col = kWidth * (2 * t + e % 2);
            float neighbours[kWidth - kFrom];
#pragma unroll
            for (int j = kFrom; j < kWidth; ++j) {
                neighbours[j - kFrom] = sums.tiles[Tiles::index(m, j)][e];
            }
            store_aligned(matrix + row * pitch + col + kFrom, neighbours);
#pragma unroll
            for (int j = kFrom + 2; j < kWidth; ++j) {
                matrix[(col + j) * pitch + row] = sums.tiles[Tiles::index(m, j)][e];
            }
        }
    });
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
            float sum = sums.targets[j][c];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (t == 0) {
                matrix[(kWidth * g + j) * pitch + kOrder + c] = sum;
            }
        }
    }
}

}  // namespace onestep::normal::cuda
