#include "base/parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <new>

namespace onestep {
namespace {

std::atomic<ParallelForFunction> pool{nullptr};
std::atomic<bool> forked{false};

// Enough to even out threads that are slowed down by others' work, few enough for the shared counter to be cheap.
constexpr int64_t kMostClaims = 256;

struct Loop {
    int64_t count;
    int64_t step;
    void (*fn)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

// Whatever range the pool hands to a thread, it claims steps until none is left: a static half would wait for the
// slower of two threads. Exceptions must not travel through the C shim, so they end here as a flag.
void run_claims(int64_t, int64_t, void* context) {
    auto* loop = static_cast<Loop*>(context);
    try {
        while (!loop->out_of_memory.load(std::memory_order_relaxed)) {
            const int64_t begin = loop->next.fetch_add(loop->step, std::memory_order_relaxed);
            if (begin >= loop->count) {
                return;
            }
            const int64_t end = std::min(begin + loop->step, loop->count);
            for (int64_t index = begin; index < end; ++index) {
                loop->fn(loop->context, index);
            }
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
    Loop loop{count, std::max({grain, (count + kMostClaims - 1) / kMostClaims, int64_t{1}}), fn, context};
    const ParallelForFunction function = pool.load(std::memory_order_relaxed);
    if (function == nullptr || count <= grain || forked.load(std::memory_order_relaxed)) {
        run_claims(0, count, &loop);
    } else if (function(0, count, grain, run_claims, &loop) != 0) {
        return Status::thread_pool_error;
    }
    return loop.out_of_memory.load() ? Status::out_of_memory : Status::ok;
}

}  // namespace onestep
