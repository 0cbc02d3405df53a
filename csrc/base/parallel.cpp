#include "base/parallel.hpp"

#include <pthread.h>

#include <atomic>
#include <new>

namespace onestep {
namespace {

std::atomic<ParallelForFunction> pool{nullptr};
std::atomic<bool> forked{false};

struct Loop {
    void (*fn)(void*, int64_t);
    void* context;
    std::atomic<bool> out_of_memory{false};
};

// Exceptions must not travel through the C shim, so they end here as a flag.
void run_range(int64_t begin, int64_t end, void* context) {
    auto* loop = static_cast<Loop*>(context);
    try {
        for (int64_t index = begin; index < end; ++index) {
            loop->fn(loop->context, index);
        }
    } catch (const std::bad_alloc&) {
        loop->out_of_memory.store(true, std::memory_order_relaxed);
    }
}

}  // namespace

void set_parallel_for(ParallelForFunction function) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    (void)registered;
    pool.store(function);
}

ThreadSource thread_source() {
    if (pool.load() == nullptr) {
        return ThreadSource::serial;
    }
    return forked.load() ? ThreadSource::serial_after_fork : ThreadSource::torch;
}

Status parallel_for_indices(int64_t count, int64_t grain, void (*fn)(void*, int64_t), void* context) {
    Loop loop{fn, context};
    const ParallelForFunction function = pool.load(std::memory_order_relaxed);
    if (function == nullptr || count <= grain || forked.load(std::memory_order_relaxed)) {
        run_range(0, count, &loop);
    } else if (function(0, count, grain, run_range, &loop) != 0) {
        return Status::thread_pool_error;
    }
    return loop.out_of_memory.load() ? Status::out_of_memory : Status::ok;
}

}  // namespace onestep
