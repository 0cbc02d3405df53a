// parallel_for: the only way in which kernels use more than one thread.
//
// The thread pool is not ours: Python hands over `torch_parallel_for` from libtorch's C shim, so that onestep shares
// torch's pool and obeys torch.set_num_threads. Until then, and in a forked child (whose copy of the parent's pool has
// no threads behind it), loops run serially on the calling thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/guarded.hpp"

namespace onestep {

// Signature of `torch_parallel_for` in torch/csrc/stable/c/shim.h; 0 means success.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelForFunction = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction fn, void* context);

// Installs the pool; nullptr goes back to serial loops.
void set_parallel_for(ParallelForFunction function);

enum class ThreadSource : int { serial = 0, torch = 1, serial_after_fork = 2 };
ThreadSource thread_source();

// For tests: loops of less work than this stay on the calling thread. Returns what it was before.
int64_t set_least_parallel_nanoseconds(int64_t nanoseconds);

// Calls fn(context, i) for every i in [0, count); see parallel_for.
Status parallel_for_indices(int64_t count, int64_t nanoseconds_each, Status (*fn)(void* context, int64_t index),
                            void* context);

// Calls body(i) for every i in [0, count); the body returns nothing or a Status. The body must not depend on which
// thread runs it or in which order: every result is then the same for any number of threads. After the first failure
// no further index is begun and that failure is returned; an exception of the body is one, see guarded.
//
// `nanoseconds_each` is about what one thread takes for an index (see plan.hpp). A loop of less than a millisecond in
// all stays on the calling thread: its end waits for every thread of the pool to be scheduled once, which takes a time
// slice of several milliseconds where another process has the core.
template <class Body>
Status parallel_for(int64_t count, int64_t nanoseconds_each, Body& body) {
    return parallel_for_indices(
        count, nanoseconds_each,
        [](void* context, int64_t index) {
            auto& call = *static_cast<Body*>(context);
            if constexpr (std::is_void_v<decltype(call(index))>) {
                call(index);
                return Status::ok;
            } else {
                return call(index);
            }
        },
        &body);
}

}  // namespace onestep
