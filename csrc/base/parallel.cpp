#include "base/parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>

#include "base/plan.hpp"

namespace onestep {
namespace {

std::atomic<ParallelForFunction> pool{nullptr};
std::atomic<bool> forked{false};

// Enough to even out threads that are slowed down by others' work, few enough for the shared counter to be cheap.
constexpr int64_t kMostClaims = 256;
// A claim is of so many nanoseconds of work at least.
constexpr int64_t kLeastClaim = 5'000;

// Loops of less work than this stay on the calling thread; half of it is the least share of a thread.
std::atomic<int64_t> least_parallel{1'000'000};

struct Loop {
    int64_t count;
    int64_t step;
    Status (*fn)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<Status> failure{Status::ok};
};

// Claims and runs steps until none is left or one fails.
Status run_steps(Loop& loop) {
    while (loop.failure.load(std::memory_order_relaxed) == Status::ok) {
        const int64_t begin = loop.next.fetch_add(loop.step, std::memory_order_relaxed);
        if (begin >= loop.count) {
            break;
        }
        const int64_t end = std::min(begin + loop.step, loop.count);
        for (int64_t index = begin; index < end; ++index) {
            const Status status = loop.fn(loop.context, index);
            if (status != Status::ok) {
                return status;
            }
        }
    }
    return Status::ok;
}

// Whatever range the pool hands to a thread, it claims steps until none is left: a static half would wait for the
// slower of two threads. Exceptions must not travel through the C shim, so they end here as a status.
void run_claims(int64_t, int64_t, void* context) {
    auto* loop = static_cast<Loop*>(context);
    const Status status = guarded([&] { return run_steps(*loop); });
    if (status != Status::ok) {
        loop->failure.store(status, std::memory_order_relaxed);
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

int64_t set_least_parallel_nanoseconds(int64_t nanoseconds) { return least_parallel.exchange(nanoseconds); }

Status parallel_for_indices(int64_t count, int64_t nanoseconds_each, Status (*fn)(void*, int64_t), void* context) {
    const int64_t each = std::max<int64_t>(nanoseconds_each, 1);
    const int64_t least = least_parallel.load(std::memory_order_relaxed);
    Loop loop{count, std::max(ceil_div(kLeastClaim, each), ceil_div(count, kMostClaims)), fn, context};
    const ParallelForFunction function = pool.load(std::memory_order_relaxed);
    if (function == nullptr || count <= 1 || count < ceil_div(least, each) || forked.load(std::memory_order_relaxed)) {
        run_claims(0, count, &loop);
    } else if (function(0, count, std::max<int64_t>(1, least / 2 / each), run_claims, &loop) != 0) {
        return Status::thread_pool_error;
    }
    return loop.failure.load();
}

}  // namespace onestep
