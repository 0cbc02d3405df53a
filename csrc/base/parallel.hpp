// parallel_for: the only way in which kernels use more than one thread.
//
// The threads are a small pool of our own (pool.cpp). Python hands over torch_get_num_threads of libtorch's C shim,
// which every loop asks, so that torch.set_num_threads holds here, too. Until then, and in a forked child (whose copy
// of the parent's pool has no threads behind it), loops run serially on the calling thread.
#pragma once

#include <cstdint>
#include <type_traits>

#include "base/guarded.hpp"

namespace onestep {

// Signature of `torch_get_num_threads` in torch/csrc/stable/c/shim.h: 0 means success, anything else fails the loop.
using ThreadCountFunction = int32_t (*)(uint32_t* threads);

// How many threads a loop may use; nullptr goes back to serial loops.
void set_thread_count(ThreadCountFunction function);

// How many threads loops of the calling thread may use, whatever that function says; 0 asks it again.
void set_own_thread_count(uint32_t threads);

enum class ThreadSource : int { serial = 0, pool = 1, serial_after_fork = 2 };
ThreadSource thread_source();

// For tests: loops of less work than this stay on the calling thread. Returns what it was before.
int64_t set_least_parallel_nanoseconds(int64_t nanoseconds);

// Calls fn(context, i) for every i in [0, count); see parallel_for.
Status parallel_for_indices(int64_t count, int64_t nanoseconds_each, Status (*fn)(void* context, int64_t index),
                            void* context);

// Calls body(i) for every i in [0, count); the body returns nothing or a Status. The body must not depend on which
// thread runs it or in which order: every result is then the same for any number of threads. After the first failure
// no further index is begun and that failure is returned; an exception of the body is one, see guarded. A loop within a
// body runs serially, unless the outer one stays on the calling thread (as a loop of one index does).
//
// `nanoseconds_each` is about what one thread takes for an index (see plan.hpp). A small loop stays on the calling
// thread: waking another one takes about as long.
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
