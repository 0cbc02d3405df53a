// Problems of 33 to 168 features in fp64, of 161 to 168 in fp32: a block per problem. The lower triangle of A is cut
// into square tiles of kTile, each of which a thread holds in registers from the Gram sum to the last step of the
// factorisation. Right-hand sides are one more row of tiles below A: what the factorisation leaves there is L⁻¹R.
//
// What all threads need of a matrix column (or of a row of X) lies in shared memory as a line: vectors of 16 bytes,
// first those with the tiles' first elements, then those with the next, so that threads of consecutive tiles read
// consecutive vectors. Column block j of L has lines of the tiles from j on.
#pragma once

#include "base/cuda/async.cuh"
#include "base/cuda/device.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/cuda/numerics.cuh"

namespace onestep::normal::cuda {

// Rows of X in shared memory at a time, twice: one part is loaded while the other is summed.
inline constexpr int kMiddleRows = 16;

template <class T, int kTile>
struct MiddleShape {
    static constexpr int V = kVector<T>;

    int d = 0;
    int tiles = 0;  // that A's rows are cut into
    int lines = 0;  // tiles of a line: those of A and that of the right-hand sides

    MiddleShape() = default;
    __host__ __device__ MiddleShape(int64_t d_, int64_t k)
        : d(static_cast<int>(d_)), tiles(ceil_div(static_cast<int>(d_), kTile)), lines(tiles + (k > 0 ? 1 : 0)) {}

    // Elements from one line of column block `first` to the next: one vector more than it holds.
    __host__ __device__ int pitch(int first) const { return (lines - first) * kTile + V; }
    // Where column block j of L begins.
    __host__ __device__ int block(int j) const { return kTile * (kTile * (j * lines - j * (j - 1) / 2) + j * V); }
    // Of element e of a tile in a line that begins with tile `first`.
    __host__ __device__ int position(int first, int tile, int e) const {
        return e / V * ((lines - first) * V) + (tile - first) * V + e % V;
    }
    // L[row][col]
    __host__ __device__ int at(int row, int col) const {
        const int j = col / kTile;
        return block(j) + col % kTile * pitch(j) + position(j, row / kTile, row % kTile);
    }
    // Threads with a tile: all of A's lower triangle, and the right-hand sides.
    __host__ __device__ int pairs() const { return tiles * (tiles + 1) / 2 + (lines - tiles) * tiles; }
    __host__ __device__ int rows_elements() const { return 2 * kMiddleRows * pitch(0); }
    // L or the rows of X; then the inverse diagonal, and what pivots must exceed.
    __host__ __device__ int64_t shared_bytes() const {
        const int factor = block(tiles);
        const int sums = lines * lines * kTile;  // for the norm
        const int most = factor > rows_elements() ? factor : rows_elements();
        return static_cast<int64_t>((most > sums ? most : sums) + 2 * tiles * kTile) * static_cast<int64_t>(sizeof(T));
    }
};

// acc ±= (row tile)ᵀ(column tile), over `count` lines that begin with tile `first`.
template <bool kSubtract, class T, int kTile>
__device__ __forceinline__ void middle_accumulate(T (&acc)[kTile][kTile], const T* lines, int count, int pitch,
                                                  int piece, int row_offset, int col_offset) {
    constexpr int V = kVector<T>;
#pragma unroll(kTile <= 4 ? 4 : 1)
    for (int r = 0; r < count; ++r) {
        T left[kTile];
        T right[kTile];
#pragma unroll
        for (int v = 0; v < kTile / V; ++v) {
            T part[V];
            load_vector(lines + r * pitch + v * piece + row_offset, part);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                left[v * V + e] = kSubtract ? -part[e] : part[e];
            }
            load_vector(lines + r * pitch + v * piece + col_offset, part);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                right[v * V + e] = part[e];
            }
        }
#pragma unroll
        for (int a = 0; a < kTile; ++a) {
#pragma unroll
            for (int b = 0; b < kTile; ++b) {
                acc[a][b] += left[a] * right[b];
            }
        }
    }
}

// Begins to bring rows [begin, begin + kMiddleRows) of [X | Y] to `lines`; zeros where there is no row or column.
template <class T, int kTile>
__device__ __forceinline__ void middle_load_rows(const MiddleShape<T, kTile>& shape, const Matrix<const T>& x,
                                                 const Matrix<const T>& y, const Matrix<const T>& weight, int64_t begin,
                                                 int64_t n, int64_t k, bool vectors, T* lines) {
    constexpr int V = kVector<T>;
    constexpr int kBytes = static_cast<int>(sizeof(T));
    const int pitch = shape.pitch(0);
    const int threads = static_cast<int>(blockDim.x);
    const int width = shape.lines * kTile;
    if (vectors) {
        // Whole vectors of X; d is a multiple of V.
        const int across = shape.tiles * (kTile / V);
#pragma unroll 1
        for (int at = static_cast<int>(threadIdx.x); at < kMiddleRows * across; at += threads) {
            const int r = at / across;
            const int q = at - r * across;
            const bool inside = begin + r < n && q * V < shape.d;
            const T* from = x.data + (inside ? (begin + r) * x.row + q * V : 0);
            cp_async<16>(lines + r * pitch + shape.position(0, q * V / kTile, q * V % kTile), from, inside ? 16 : 0);
        }
#pragma unroll 1
        for (int at = static_cast<int>(threadIdx.x); at < kMiddleRows * (width - shape.tiles * kTile); at += threads) {
            const int r = at / kTile;
            const int c = at - r * kTile;
            const bool inside = begin + r < n && c < k;
            const T* from = inside ? y.data + (begin + r) * y.row + c * y.col : x.data;
            cp_async<kBytes>(lines + r * pitch + shape.position(0, shape.tiles, c), from, inside ? kBytes : 0);
        }
        return;
    }
#pragma unroll 1
    for (int at = static_cast<int>(threadIdx.x); at < kMiddleRows * width; at += threads) {
        const int r = at / width;
        const int c = at - r * width;
        const int target = c - shape.tiles * kTile;
        T value = T(0);
        if (begin + r < n) {
            if (c < shape.d) {
                value = x.data[(begin + r) * x.row + c * x.col];
            } else if (target >= 0 && target < k) {
                value = y.data[(begin + r) * y.row + target * y.col];
            }
            if (weight.data != nullptr && (c < shape.d || target >= 0)) {
                value *= square_root(weight.data[(begin + r) * weight.row]);
            }
        }
        lines[r * pitch + shape.position(0, c / kTile, c % kTile)] = value;
    }
}

// The most threads of a block: registers are dealt to groups of four warps.
inline constexpr int kMiddleThreads = 256;

// To d = kOrder. kBlocks: of a multiprocessor, for which registers are kept free.
template <class T, int kTile, int kOrder, int kBlocks>
__global__ void __launch_bounds__(kMiddleThreads, kBlocks)
    middle_system_kernel(const SystemArgs<T> args, int64_t count) {
    using Shape = MiddleShape<T, kTile>;
    constexpr int V = kVector<T>;
    // Right-hand sides are solved for by a warp each, whose lanes hold this many elements of it.
    constexpr int kHeld = ceil_div(kOrder, kWarpSize);
    ONESTEP_DYNAMIC_SHARED(T, shared);
    ONESTEP_SHARED(int, state, [1]);  // info of the factorisation
    const Shape shape(args.d, args.k);
    const int d = shape.d;
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    T* const inverse = shared + shape.shared_bytes() / static_cast<int64_t>(sizeof(T)) - 2 * shape.tiles * kTile;
    T* const floors = inverse + shape.tiles * kTile;

    // Tiles are dealt column by column.
    int tj = 0;
    int ti = thread;
    while (tj < shape.tiles && ti >= shape.lines - tj) {
        ti -= shape.lines - tj;
        ++tj;
    }
    ti += tj;
    const bool owner = tj < shape.tiles;
    const bool of_matrix = owner && ti < shape.tiles;

    for (int64_t problem = static_cast<int64_t>(blockIdx.x); problem < count;
         problem += static_cast<int64_t>(gridDim.x)) {
        T acc[kTile][kTile];
#pragma unroll
        for (int a = 0; a < kTile; ++a) {
#pragma unroll
            for (int b = 0; b < kTile; ++b) {
                acc[a][b] = T(0);
            }
        }
        const Matrix<const T> x = args.x.at(args.batch, problem);
        if (args.a.data == nullptr) {
            const Matrix<const T> y = args.y.at(args.batch, problem);
            const Matrix<const T> weight = args.weight.at(args.batch, problem);
            const bool vectors = weight.data == nullptr && x.col == 1 && d % V == 0 && x.row % V == 0 &&
                                 reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
            const int half = kMiddleRows * shape.pitch(0);
            middle_load_rows(shape, x, y, weight, 0, args.n, args.k, vectors, shared);
            cp_async_commit();
            int turn = 0;
            for (int64_t begin = 0; begin < args.n; begin += kMiddleRows) {
                if (begin + kMiddleRows < args.n) {
                    middle_load_rows(shape, x, y, weight, begin + kMiddleRows, args.n, args.k, vectors,
                                     shared + (1 - turn) * half);
                }
                cp_async_commit();
                cp_async_wait<1>();
                __syncthreads();
                if (owner) {
                    middle_accumulate<false>(acc, shared + turn * half, kMiddleRows, shape.pitch(0), shape.lines * V,
                                             ti * V, tj * V);
                }
                __syncthreads();
                turn = 1 - turn;
            }
            cp_async_wait<0>();
        } else if (owner) {
            // Element (a, b) of the tile is `step_a`, `step_b` apart; of the diagonal tile the lower triangle is read.
            const Matrix<const T> given = of_matrix ? args.a.at(args.batch, problem) : args.b.at(args.batch, problem);
            const int64_t step_a = of_matrix ? given.row : given.col;
            const int64_t step_b = of_matrix ? given.col : given.row;
            const int limit_a = of_matrix ? d - ti * kTile : static_cast<int>(args.k);
            const int limit_b = d - tj * kTile;
            const T* row = given.data + (of_matrix ? ti * kTile * step_a : 0) + tj * kTile * step_b;
#pragma unroll
            for (int a = 0; a < kTile; ++a) {
                const T* element = row;
#pragma unroll
                for (int b = 0; b < kTile; ++b) {
                    if (a < limit_a && b < limit_b && (b <= a || ti != tj)) {
                        acc[a][b] = *element;
                    }
                    element += step_b;
                }
                row += step_a;
            }
#pragma unroll
            for (int a = 0; a < kTile; ++a) {
#pragma unroll
                for (int b = a + 1; b < kTile; ++b) {
                    acc[a][b] = ti == tj ? acc[b][a] : acc[a][b];
                }
            }
        }
        if (args.gram != nullptr) {
            if (owner) {
                // Each tile and its mirror image, or its columns of the right-hand sides; addresses by addition.
                const int64_t pitch = of_matrix ? d : args.k;
                T* const to = of_matrix ? args.gram + problem * d * d : args.cross + problem * d * args.k;
                const int limit_a = of_matrix ? d - ti * kTile : static_cast<int>(args.k);
                const int limit_b = d - tj * kTile;
                T* down = to + tj * kTile * pitch + (of_matrix ? ti * kTile : 0);
                T* along = to + ti * kTile * pitch + tj * kTile;
#pragma unroll
                for (int a = 0; a < kTile; ++a) {
                    T* mirrored = down + a;
#pragma unroll
                    for (int b = 0; b < kTile; ++b) {
                        if (a < limit_a && b < limit_b) {
                            *mirrored = acc[a][b];
                            if (of_matrix) {
                                along[b] = acc[a][b];
                            }
                        }
                        mirrored += pitch;
                    }
                    along += pitch;
                }
            }
            continue;
        }

        if (of_matrix && ti == tj) {
            const Matrix<const T> penalty = args.ridge.at(args.batch, problem);
#pragma unroll
            for (int a = 0; a < kTile; ++a) {
                const int row = ti * kTile + a;
                if (row >= d) {
                    acc[a][a] = T(1);
                } else if (args.a.data == nullptr) {
                    acc[a][a] += checked_ridge(penalty.data != nullptr ? penalty.data[row * penalty.row]
                                                                       : static_cast<T>(args.uniform_ridge));
                }
                floors[row] = pivot_floor(acc[a][a], args.singular_epsilons);
            }
        }
        if (args.norm != nullptr) {
            // Sums of |A| along the rows of each tile, and of its mirror image; then of each row of A.
            if (of_matrix) {
#pragma unroll
                for (int a = 0; a < kTile; ++a) {
                    T along = T(0);
                    T across = T(0);
#pragma unroll
                    for (int b = 0; b < kTile; ++b) {
                        along += fabs(acc[a][b]);
                        across += fabs(acc[b][a]);
                    }
                    shared[(ti * shape.lines + tj) * kTile + a] = along;
                    shared[(tj * shape.lines + ti) * kTile + a] = ti == tj ? along : across;
                }
            }
            __syncthreads();
            if (thread < kWarpSize) {
                T most = T(0);
                for (int row = thread; row < d; row += kWarpSize) {
                    T sum = T(0);
                    for (int t = 0; t < shape.tiles; ++t) {
                        sum += shared[(row / kTile * shape.lines + t) * kTile + row % kTile];
                    }
                    most = sum > most ? sum : most;
                }
                for (int step = kWarpSize / 2; step > 0; step /= 2) {
                    const T other = __shfl_xor_sync(kFullWarp, most, step);
                    most = other > most ? other : most;
                }
                if (thread == 0) {
                    args.norm[problem] = most;
                }
            }
        }
        if (thread == 0) {
            state[0] = 0;
        }
        __syncthreads();

        for (int j = 0; j < shape.tiles; ++j) {
            T* const block = shared + shape.block(j);
            const int pitch = shape.pitch(j);
            const int piece = (shape.lines - j) * V;
            if (owner && ti == j && tj == j) {
#pragma unroll
                for (int c = 0; c < kTile; ++c) {
                    const T root = inverse_root(acc[c][c], floors[j * kTile + c]);
                    if (root == T(0) && state[0] == 0) {
                        state[0] = j * kTile + c + 1;
                    }
                    inverse[j * kTile + c] = root;
#pragma unroll
                    for (int a = 0; a < kTile; ++a) {
                        acc[a][c] = a < c ? T(0) : acc[a][c] * root;
                    }
#pragma unroll
                    for (int b = c + 1; b < kTile; ++b) {
#pragma unroll
                        for (int a = b; a < kTile; ++a) {
                            acc[a][b] -= acc[a][c] * acc[b][c];
                        }
                    }
#pragma unroll
                    for (int v = 0; v < kTile / V; ++v) {
                        T part[V];
#pragma unroll
                        for (int e = 0; e < V; ++e) {
                            part[e] = acc[v * V + e][c];
                        }
                        store_vector(block + c * pitch + v * piece, part);
                    }
                }
            }
            __syncthreads();
            if (owner && tj == j && ti > j) {
                // L of this tile: from the right by the diagonal tile's inverse transpose.
#pragma unroll
                for (int c = 0; c < kTile; ++c) {
                    T diagonal[kTile];
#pragma unroll
                    for (int v = 0; v < kTile / V; ++v) {
                        T part[V];
                        load_vector(block + c * pitch + v * piece, part);
#pragma unroll
                        for (int e = 0; e < V; ++e) {
                            diagonal[v * V + e] = part[e];
                        }
                    }
                    const T root = inverse[j * kTile + c];
#pragma unroll
                    for (int a = 0; a < kTile; ++a) {
                        acc[a][c] *= root;
#pragma unroll
                        for (int b = c + 1; b < kTile; ++b) {
                            acc[a][b] -= acc[a][c] * diagonal[b];
                        }
                    }
#pragma unroll
                    for (int v = 0; v < kTile / V; ++v) {
                        T part[V];
#pragma unroll
                        for (int e = 0; e < V; ++e) {
                            part[e] = acc[v * V + e][c];
                        }
                        store_vector(block + c * pitch + v * piece + (ti - j) * V, part);
                    }
                }
            }
            __syncthreads();
            if (owner && tj > j) {
                middle_accumulate<true>(acc, block, kTile, pitch, piece, (ti - j) * V, (tj - j) * V);
            }
        }

        const int failed = state[0];
        if (args.factor != nullptr) {
            T* const to = args.factor + problem * d * d;
            for (int at = thread; at < d * d; at += threads) {
                const int col = at / d;  // of L: U's row
                const int row = at - col * d;
                to[at] = failed != 0 ? quiet_nan<T>() : row < col ? T(0) : shared[shape.at(row, col)];
            }
        }
        bool good = failed == 0;
        if (args.solution != nullptr) {
            T* const to = args.solution + problem * d * args.k;
            bool wrong = false;
            const int lane = thread % kWarpSize;
            for (int64_t c = thread / kWarpSize; c < args.k; c += threads / kWarpSize) {
                T z[kHeld];
                T own_inverse[kHeld];
                int column[kHeld];  // L's column of that element, less the offset of its first tile
                int piece[kHeld];
#pragma unroll
                for (int q = 0; q < kHeld; ++q) {
                    const int own = q * kWarpSize + lane < d ? q * kWarpSize + lane : d - 1;
                    const int j = own / kTile;
                    column[q] = shape.block(j) + own % kTile * shape.pitch(j) - j * V;
                    piece[q] = (shape.lines - j) * V;
                    own_inverse[q] = inverse[own];
                    z[q] = shared[shape.at(shape.tiles * kTile + static_cast<int>(c), own)];
                }
#pragma unroll
                for (int q = kHeld - 1; q >= 0; --q) {
#pragma unroll 4
                    for (int s = kWarpSize - 1; s >= 0; --s) {
                        const int row = q * kWarpSize + s;
                        if (row >= d) {
                            continue;
                        }
                        const T w = __shfl_sync(kFullWarp, z[q] * own_inverse[q], s);
                        const int e = row % kTile;
                        const int position = row / kTile * V + e % V;
                        z[q] = lane == s ? w : z[q];
#pragma unroll
                        for (int p = 0; p <= q; ++p) {
                            if (p < q || lane < s) {
                                z[p] -= shared[column[p] + position + e / V * piece[p]] * w;
                            }
                        }
                    }
                }
#pragma unroll
                for (int q = 0; q < kHeld; ++q) {
                    const int own = q * kWarpSize + lane;
                    if (own < d) {
                        to[own * args.k + c] = z[q];
                        wrong = wrong || !finite(z[q]);
                    }
                }
            }
            good = !__syncthreads_or(wrong) && good;
            if (!good) {
                for (int at = thread; at < d * static_cast<int>(args.k); at += threads) {
                    to[at] = quiet_nan<T>();
                }
            }
        }
        if (thread == 0) {
            args.info[problem] = failed != 0 ? failed : good ? 0 : d + 1;
        }
        __syncthreads();
    }
}

template <class T, int kTile, int kOrder, int kBlocks>
Status launch_middle(const SystemArgs<T>& args, cudaStream_t stream) {
    const MiddleShape<T, kTile> shape(args.d, args.k);
    const int64_t count = args.batch.count();
    // As many threads as there are tiles; one problem with few rows has no use for more.
    const int threads = ceil_div(shape.pairs(), kWarpSize) * kWarpSize;
    return launch(middle_system_kernel<T, kTile, kOrder, kBlocks>, middle_grid(count),
                  dim3(static_cast<unsigned>(threads)), shape.shared_bytes(), stream, args, count);
}

}  // namespace onestep::normal::cuda
