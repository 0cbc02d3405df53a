#include <cmath>

#include "base/cuda/device.cuh"
#include "polar/cuda/polar.hpp"

namespace onestep::polar::cuda {
namespace {

// A block has a matrix in registers, padded to order N with the identity: thread (tx, ty) of S × S holds the R × R
// entries (ii·S + ty, jj·S + tx). Step k subtracts the outer product of column k, divided by its pivot, and sweeps row
// and column k; after n steps −A⁻¹ is left.
template <class T, int N, int R>
__global__ void __launch_bounds__((N / R) * (N / R), 1) inverse_kernel(SpdInverseArgs<T> args) {
    constexpr int S = N / R;
    // A step's column is read while the next one is written.
    ONESTEP_SHARED(T, columns, [2][N]);
    const int tx = threadIdx.x % S;
    const int ty = threadIdx.x / S;
    const int n = static_cast<int>(args.n);
    for (int64_t matrix = blockIdx.x; matrix < args.batch; matrix += gridDim.x) {
        const T* from = args.a + matrix * args.a_matrix;
        T a[R][R];
#pragma unroll
        for (int ii = 0; ii < R; ++ii) {
#pragma unroll
            for (int jj = 0; jj < R; ++jj) {
                const int i = ii * S + ty;
                const int j = jj * S + tx;
                a[ii][jj] = i < n && j < n ? from[i * args.a_row + j] : (i == j ? T(1) : T(0));
            }
        }
        int failed = 0;
        if (tx == 0) {
#pragma unroll
            for (int ii = 0; ii < R; ++ii) {
                columns[0][ii * S + ty] = a[ii][0];
            }
        }
#pragma unroll
        for (int kk = 0; kk < R; ++kk) {
#pragma unroll 1
            for (int t = 0; t < S; ++t) {
                const int k = kk * S + t;
                if (k >= n) {
                    break;
                }
                __syncthreads();
                const T* column = columns[k % 2];
                const T pivot = column[k];
                if (failed == 0 && !(pivot > T(0) && pivot - pivot == T(0))) {
                    failed = k + 1;
                }
                const T reciprocal = T(1) / pivot;
                T of_row[R];
                T of_column[R];
#pragma unroll
                for (int ii = 0; ii < R; ++ii) {
                    of_row[ii] = column[ii * S + ty];
                    of_column[ii] = column[ii * S + tx] * reciprocal;
                }
#pragma unroll
                for (int ii = 0; ii < R; ++ii) {
#pragma unroll
                    for (int jj = 0; jj < R; ++jj) {
                        a[ii][jj] -= of_row[ii] * of_column[jj];
                    }
                }
                if (tx == t) {
#pragma unroll
                    for (int ii = 0; ii < R; ++ii) {
                        a[ii][kk] = of_row[ii] * reciprocal;
                    }
                }
                if (ty == t) {
#pragma unroll
                    for (int jj = 0; jj < R; ++jj) {
                        a[kk][jj] = of_column[jj];
                    }
                    if (tx == t) {
                        a[kk][kk] = -reciprocal;
                    }
                }
                // The last column of the block of columns is followed by the first of the next.
                T* next = columns[(k + 1) % 2];
                if (t + 1 < S) {
                    if (tx == t + 1) {
#pragma unroll
                        for (int ii = 0; ii < R; ++ii) {
                            next[ii * S + ty] = a[ii][kk];
                        }
                    }
                } else if (kk + 1 < R && tx == 0) {
#pragma unroll
                    for (int ii = 0; ii < R; ++ii) {
                        next[ii * S + ty] = a[ii][kk + 1 < R ? kk + 1 : kk];
                    }
                }
            }
        }
        T* to = args.inverse + matrix * args.inverse_matrix;
#pragma unroll
        for (int ii = 0; ii < R; ++ii) {
#pragma unroll
            for (int jj = 0; jj < R; ++jj) {
                const int i = ii * S + ty;
                const int j = jj * S + tx;
                if (i < n && j < n) {
                    to[i * args.inverse_row + j] = failed != 0 ? static_cast<T>(NAN) : -a[ii][jj];
                }
            }
        }
        if (threadIdx.x == 0 && failed != 0 && args.info[matrix] == 0) {
            args.info[matrix] = args.offset + failed;
        }
        // The next matrix writes where this one's last step reads.
        __syncthreads();
    }
}

template <class T, int N, int R>
Status run(const SpdInverseArgs<T>& args, cudaStream_t stream) {
    const int64_t blocks = args.batch < kMostBlocks ? args.batch : kMostBlocks;
    return launch(inverse_kernel<T, N, R>, dim3(static_cast<unsigned>(blocks)), dim3((N / R) * (N / R)), 0, stream,
                  args);
}

}  // namespace

template <class T>
Status spd_inverse(const SpdInverseArgs<T>& args, cudaStream_t stream) {
    if (args.n == 0) {
        return Status::ok;
    }
    if (args.n <= 32) {
        return run<T, 32, 4>(args, stream);
    }
    if (args.n <= 64) {
        return run<T, 64, 8>(args, stream);
    }
    if (args.n <= kMostInverseOrder) {
        return run<T, 128, 8>(args, stream);
    }
    return device_error("the inverse's order is larger than one block takes");
}

template Status spd_inverse(const SpdInverseArgs<float>&, cudaStream_t);
template Status spd_inverse(const SpdInverseArgs<double>&, cudaStream_t);

}  // namespace onestep::polar::cuda
