#include "base/pool.hpp"

#include <pthread.h>
#include <signal.h>
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <chrono>
#include <thread>

namespace onestep {
namespace {

// How long a thread looks for work before it sleeps. Waking it takes 5 to 50 us; loops that follow each other within a
// kernel are a few microseconds apart.
constexpr std::chrono::microseconds kIdle{20};
// How long a caller looks for the end of claims before it sleeps. It sleeps soon: a helper that lost its core to
// another process comes onto the caller's then.
constexpr std::chrono::microseconds kPatience{10};
// How many threads a thread wakes for a job: each of these wakes as many, while the first ones work already.
constexpr int64_t kAwakened = 2;

// The time slice that a helper asks of the scheduler. A thread that asks for a shorter one than the thread that has the
// core gets it at once when it is woken (EEVDF, Linux 6.12 and later); its share of the core stays the same.
constexpr std::chrono::nanoseconds kSlice{100'000};

#if defined(__linux__) && defined(SYS_sched_setattr)
// The kernel's struct sched_attr as of its first version; the C library declares it from glibc 2.41 on alone.
struct SchedulingAttributes {
    uint32_t size = sizeof(SchedulingAttributes);
    uint32_t policy = 0;
    uint64_t flags = 0;
    int32_t nice = 0;
    uint32_t priority = 0;
    uint64_t runtime = 0;
    uint64_t deadline = 0;
    uint64_t period = 0;
};

// Older kernels ignore the slice; where the calls are forbidden, the thread keeps what it has.
void ask_for_short_slices() {
    SchedulingAttributes attributes;
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy != SCHED_OTHER) {
        return;
    }
    attributes.runtime = kSlice.count();
    syscall(SYS_sched_setattr, 0, &attributes, 0);
}
#else
void ask_for_short_slices() {}
#endif

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

template <class Condition>
void spin(std::chrono::microseconds most, const Condition& condition) {
    const auto end = std::chrono::steady_clock::now() + most;
    do {
        for (int turn = 0; turn < 16; ++turn) {
            if (condition()) {
                return;
            }
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
}

}  // namespace

struct Pool::Job {
    void (*task)(void*);
    void* context;
    int64_t wanted;  // more helpers
    std::atomic<int64_t> inside{0};
    // Denormals and rounding are the caller's in every thread: results do not depend on who computes them.
    std::fenv_t environment{};
    Job* next = nullptr;
};

Pool::Job* Pool::first_open() const {
    Job* job = jobs_;
    while (job != nullptr && job->wanted == 0) {
        job = job->next;
    }
    return job;
}

// How many sleeping threads to wake for a job. The lock is held.
int64_t Pool::sleepers_for(const Job& job) const { return std::min({job.wanted, sleeping_, kAwakened}); }

void Pool::awaken(int64_t threads) {
    for (; threads > 0; --threads) {
        opened_.notify_one();
    }
}

void Pool::run(int64_t helpers, void (*task)(void*), void* context) {
    Job job{task, context, helpers};
    std::fegetenv(&job.environment);
    int64_t sleepers = 0;
    {
        const std::lock_guard lock(mutex_);
        start_threads(helpers);
        job.wanted = std::min(helpers, threads_);
        job.next = jobs_;
        jobs_ = &job;
        open_ += job.wanted > 0 ? 1 : 0;
        sleepers = sleepers_for(job);
    }
    awaken(sleepers);
    task(context);
    std::unique_lock lock(mutex_);
    Job** place = &jobs_;
    while (*place != &job) {
        place = &(*place)->next;
    }
    *place = job.next;
    open_ -= job.wanted > 0 ? 1 : 0;
    if (job.inside > 0) {
        lock.unlock();
        spin(kPatience, [&] { return job.inside == 0; });
        lock.lock();
        left_.wait(lock, [&] { return job.inside == 0; });
    }
}

// A helper's life.
void Pool::help() {
    ask_for_short_slices();
    std::unique_lock lock(mutex_);
    bool looked = false;
    for (;;) {
        Job* job = first_open();
        if (job == nullptr) {
            if (!looked) {
                lock.unlock();
                spin(kIdle, [&] { return open_ > 0; });
                lock.lock();
                looked = true;
                continue;
            }
            ++sleeping_;
            opened_.wait(lock);
            --sleeping_;
            continue;
        }
        looked = false;
        if (--job->wanted == 0) {
            --open_;
        }
        ++job->inside;
        const int64_t sleepers = sleepers_for(*job);
        lock.unlock();
        awaken(sleepers);
        std::fesetenv(&job->environment);
        job->task(job->context);
        lock.lock();
        if (--job->inside == 0) {
            left_.notify_all();
        }
    }
}

// With all signals blocked: a program's handlers run on threads of its own.
void Pool::start_threads(int64_t wanted) {
    if (threads_ >= wanted) {
        return;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        for (; threads_ < wanted; ++threads_) {
            std::thread([this] { help(); }).detach();
        }
    } catch (...) {  // no memory, or too many threads: those that there are do
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

}  // namespace onestep
