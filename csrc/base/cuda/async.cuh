// Asynchronous copies from global to shared memory (cp.async). The data is there after cp_async_wait and a barrier.
#pragma once

#include "base/cuda/device.cuh"

namespace onestep::cuda {

#if !defined(ONESTEP_SIMT)
__device__ __forceinline__ unsigned shared_address(const void* address) {
    return static_cast<unsigned>(__cvta_generic_to_shared(address));
}
#endif

// Copies kBytes (4, 8 or 16), of which those from `source_bytes` on become zeros and are not read. Both addresses are
// multiples of kBytes. 16-byte copies pass the L1 cache by.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to_shared, const void* from_global, int source_bytes = kBytes) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
#if defined(ONESTEP_SIMT)
    simt::copy_async(ONESTEP_SIMT_SITE("cp_async"), to_shared, from_global, kBytes, static_cast<size_t>(source_bytes));
#else
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from_global),
                     "r"(source_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to_shared)), "l"(from_global),
                     "n"(kBytes), "r"(source_bytes)
                     : "memory");
    }
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() {
#if defined(ONESTEP_SIMT)
    simt::commit_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kGroups of this thread's groups are under way. 0 waits for all.
template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#if defined(ONESTEP_SIMT)
    simt::wait_copies(kGroups);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Waits for the `count` threads (whole warps) that share barrier `id`, 1 to 15.
__device__ __forceinline__ void named_barrier(int id, int count) {
#if defined(ONESTEP_SIMT)
    simt::named_barrier(ONESTEP_SIMT_SITE("named_barrier"), id, count);
#else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

}  // namespace onestep::cuda
