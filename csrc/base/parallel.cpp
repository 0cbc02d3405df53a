#include "base/parallel.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/plan.hpp"
#include "base/pool.hpp"

namespace onestep {
namespace {

std::atomic<ThreadCountFunction> thread_count{nullptr};
std::atomic<bool> forked{false};

// Enough to even out threads that are slowed down by others' work, few enough for the shared counter to be cheap.
constexpr int64_t kMostClaims = 256;
// A claim is of so many nanoseconds of work at least.
constexpr int64_t kLeastClaim = 5'000;

// Loops of less work than this stay on the calling thread; half of it is the least share of a thread. Waking a thread
// of the pool takes 5 to 50 us, and a caller does not wait for one that comes too late.
std::atomic<int64_t> least_parallel{80'000};

// Loops in the body of a loop that is shared between threads are serial.
thread_local bool in_loop = false;

// What set_own_thread_count set; 0 if nothing.
thread_local uint32_t own_thread_count = 0;

struct Loop {
    int64_t count;
    int64_t step;
    Status (*fn)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<Status> failure{Status::ok};
};

// Claims and runs steps until none is left or one fails.
Status claim_steps(Loop& loop) {
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

void run_claims(Loop& loop) {
    const Status status = guarded([&] { return claim_steps(loop); });
    if (status != Status::ok) {
        loop.failure.store(status, std::memory_order_relaxed);
    }
}

// Each thread claims steps until none is left: a static half would wait for the slower of two threads.
void run_shared_claims(void* loop) {
    const bool outer = std::exchange(in_loop, true);
    run_claims(*static_cast<Loop*>(loop));
    in_loop = outer;
}

// Never destroyed: its threads sleep in it until the process ends.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

// How many threads a loop of `count` steps may use, each of which needs a share of `grain` steps at least.
Status count_threads(int64_t count, int64_t grain, int64_t& threads) {
    const ThreadCountFunction function = thread_count.load(std::memory_order_relaxed);
    uint32_t allowed = 1;
    if (function != nullptr && !in_loop && !forked.load(std::memory_order_relaxed)) {
        if (own_thread_count > 0) {
            allowed = own_thread_count;
        } else if (function(&allowed) != 0) {
            return Status::thread_pool_error;
        }
    }
    threads = std::min<int64_t>(allowed, ceil_div(count, grain));
    return Status::ok;
}

}  // namespace

void set_thread_count(ThreadCountFunction function) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
    (void)registered;
    thread_count.store(function);
}

void set_own_thread_count(uint32_t threads) { own_thread_count = threads; }

ThreadSource thread_source() {
    if (thread_count.load() == nullptr) {
        return ThreadSource::serial;
    }
    return forked.load() ? ThreadSource::serial_after_fork : ThreadSource::pool;
}

int64_t set_least_parallel_nanoseconds(int64_t nanoseconds) { return least_parallel.exchange(nanoseconds); }

Status parallel_for_indices(int64_t count, int64_t nanoseconds_each, Status (*fn)(void*, int64_t), void* context) {
    const int64_t each = std::max<int64_t>(nanoseconds_each, 1);
    const int64_t least = least_parallel.load(std::memory_order_relaxed);
    Loop loop{count, std::max(ceil_div(kLeastClaim, each), ceil_div(count, kMostClaims)), fn, context};
    int64_t threads = 1;
    if (count > 1 && count >= ceil_div(least, each)) {
        const Status status = count_threads(count, std::max<int64_t>(1, least / 2 / each), threads);
        if (status != Status::ok) {
            return status;
        }
    }
    if (threads > 1) {
        pool().run(threads - 1, run_shared_claims, &loop);
    } else {
        run_claims(loop);
    }
    return loop.failure.load();
}

}  // namespace onestep
