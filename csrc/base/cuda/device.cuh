// What a kernel includes. Kernels are plain CUDA C++ of a few conventions, so that the same source compiles with nvcc
// and, under ONESTEP_SIMT, as host C++ for the emulator in tests/cpp/simt:
//
//   * shared memory by ONESTEP_SHARED and ONESTEP_DYNAMIC_SHARED, never by a bare __shared__;
//   * launches by onestep::cuda::launch;
//   * inline PTX only in base/cuda/*.cuh, beside its emulation;
//   * blocks of whole warps; no thread returns before a barrier that others reach; no block waits for another.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "base/cuda/runtime.hpp"
#include "base/status.hpp"

#if defined(ONESTEP_SIMT)
#include "cuda_names.hpp"
#else
#include <cuda_runtime.h>
#endif

// ONESTEP_SHARED(float, tile, [32][33]): a shared array `tile`, 16-byte aligned for vector loads; several are apart.
// ONESTEP_DYNAMIC_SHARED(float, name): a pointer to the block's dynamic shared memory, 128-byte aligned.
#if defined(ONESTEP_SIMT)
#define ONESTEP_SHARED(T, name, extent)                       \
    T(&name)                                                  \
    extent = *static_cast<T(*) extent>(::simt::static_shared( \
        [] {                                                  \
            static const char tag = 0;                        \
            return static_cast<const void*>(&tag);            \
        }(),                                                  \
        sizeof(T extent)))
#define ONESTEP_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::simt::dynamic_shared())
#else
#define ONESTEP_SHARED(T, name, extent) __shared__ __align__(16) T name extent
#define ONESTEP_DYNAMIC_SHARED(T, name)                                      \
    extern __shared__ __align__(128) unsigned char onestep_dynamic_shared[]; \
    T* name = reinterpret_cast<T*>(onestep_dynamic_shared)
#endif

namespace onestep::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

// Blocks of a one-dimensional grid that a launch may have; kernels stride over more work than that.
inline constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

template <class T>
constexpr T ceil_div(T value, T divisor) {
    return (value + divisor - 1) / divisor;
}

// f(0), f(1), …, with the index as a constant: a loop that is unrolled whatever its body, so that arrays which it
// indexes stay in registers.
template <int kCount, class Body>
__device__ __forceinline__ void unrolled(const Body& body) {
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        (body(std::integral_constant<int, kIndex>{}), ...);
    }(std::make_integer_sequence<int, kCount>{});
}

// Launches kernel(args...) on the stream without waiting. An empty grid is no work. Dynamic shared memory over 48 KiB
// is asked for.
template <class... Parameters, class... Args>
Status launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
              [[maybe_unused]] cudaStream_t stream, Args&&... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) {
        return Status::ok;
    }
    if (shared_bytes > device_limits().shared_bytes) {
        return device_error("a kernel needs " + std::to_string(shared_bytes) +
                            " bytes of shared memory; this device has " + std::to_string(device_limits().shared_bytes));
    }
#if defined(ONESTEP_SIMT)
    simt::Launch request;
    request.grid = grid;
    request.block = block;
    request.shared_bytes = static_cast<size_t>(shared_bytes);
    request.kernel = [&] { kernel(args...); };
    return simt::run(request) ? Status::ok : device_error("emulated kernel: " + simt::last_error());
#else
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024) {
        error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     static_cast<int>(shared_bytes));
    }
    if (error == cudaSuccess) {
        // clang-format off
        kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(std::forward<Args>(args)...);
        // clang-format on
        error = cudaGetLastError();
    } else {
        cudaGetLastError();
    }
    return error == cudaSuccess ? Status::ok : device_error(cudaGetErrorString(error));
#endif
}

}  // namespace onestep::cuda
