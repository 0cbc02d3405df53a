#include "base/pool.hpp"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/scheduling.hpp"

namespace onestep {
namespace {

// How long a thread looks for work before it sleeps. Waking it takes 5 to 50 us; calls that follow each other in Python
// are about as far apart, loops that follow each other within a kernel are a few microseconds apart.
constexpr std::chrono::microseconds kIdle{60};
// How long a caller looks for the end of claims, about as long as waking it would take, before it sleeps and leaves its
// core to a helper that lost its own.
constexpr std::chrono::microseconds kPatience{50};
// Then it looks whether its helpers run, after this time and twice as long each time.
constexpr std::chrono::microseconds kFirstLook{100};
// How many threads a thread wakes for a job: each of these wakes as many, while the first ones work already.
constexpr int64_t kAwakened = 2;

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

// Takes an item out of the list that begins with `first`.
template <class Item>
void remove(Item*& first, const Item& item) {
    Item** place = &first;
    while (*place != &item) {
        place = &(*place)->next;
    }
    *place = item.next;
}

}  // namespace

struct Pool::Worker {
    MovableThread thread;
    int64_t nanoseconds_run = 0;  // at the last look of the thread that waits for it
    int brought_to = -1;          // the core of a caller that it was moved to in this job
    Worker* next = nullptr;

    void look() { nanoseconds_run = thread.nanoseconds_run(); }

    // Whether it ran for less than a quarter of the time since the last look.
    bool is_off_core(std::chrono::nanoseconds since) const {
        return std::chrono::nanoseconds(thread.nanoseconds_run() - nanoseconds_run) < since / 4;
    }
};

struct Pool::Job {
    void (*task)(void*) = nullptr;
    void* context = nullptr;
    int64_t wanted = 0;  // more helpers
    std::atomic<int64_t> inside{0};
    Worker* helpers = nullptr;  // those that are inside, a list
    MovableThread caller;
    int core = this_core();  // the caller's
    // Denormals and rounding are the caller's in every thread: results do not depend on who computes them.
    std::fenv_t environment{};
    Job* next = nullptr;
};

// Whether a helper should move off its caller's core. Beside a process that spins on the other core, caller and helper
// can share one for seconds: the scheduler takes two threads here and one there for balanced. The helper stays where
// further threads of this process run, as OpenMP's do for milliseconds after each of torch's loops: it would only
// share the other core with them. (Other helpers count as such threads: this is for two threads on two cores.)
class Pool::Crowded {
 public:
    // Asked at the beginning of each job: whether the helper has begun all jobs of the last milliseconds on the
    // caller's core while hardly another thread of the process ran.
    bool lasts(const Job& job, const MovableThread& helper) {
        const bool together = job.core >= 0 && job.core == this_core();
        const bool first = together && !together_;
        together_ = together;
        if (!together) {
            return false;
        }
        const auto now = std::chrono::steady_clock::now();
        const int64_t others = nanoseconds_run_by_all() - helper.nanoseconds_run() - job.caller.nanoseconds_run();
        const std::chrono::nanoseconds lasted = now - since_;
        const std::chrono::nanoseconds others_ran(others - others_);
        if (first || lasted > kMost) {
            since_ = now;
            others_ = others;
        }
        // A fiftieth: clocks and short tasks of the interpreter.
        return !first && lasted > kLeast && others_ran < lasted / 50;
    }

 private:
    // Less may be chance.
    static constexpr std::chrono::milliseconds kLeast{2};
    // What other threads ran before says nothing of now.
    static constexpr std::chrono::milliseconds kMost{20};

    bool together_ = false;
    std::chrono::steady_clock::time_point since_;
    int64_t others_ = 0;  // nanoseconds that other threads had run
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
    Job job;
    job.task = task;
    job.context = context;
    job.wanted = helpers;
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
    remove(jobs_, job);
    open_ -= job.wanted > 0 ? 1 : 0;
    if (job.inside > 0) {
        lock.unlock();
        spin(kPatience, [&] { return job.inside == 0; });
        lock.lock();
        wait_for_helpers(job, lock);
    }
}

// Until the helpers that are inside the job have left it. One that lost its core to another process in the meantime
// gets the caller's, which is free now; one at a time, since others would queue behind it.
void Pool::wait_for_helpers(Job& job, std::unique_lock<std::mutex>& lock) {
    const Worker* brought = nullptr;
    for (std::chrono::microseconds pause = kFirstLook; job.inside > 0; pause *= 2) {
        for (Worker* helper = job.helpers; helper != nullptr; helper = helper->next) {
            helper->look();
        }
        if (left_.wait_for(lock, pause, [&] { return job.inside == 0; })) {
            return;
        }
        bool is_taken = false;
        Worker* lost = nullptr;
        for (Worker* helper = job.helpers; helper != nullptr; helper = helper->next) {
            is_taken |= helper == brought;
            if (lost == nullptr && helper->is_off_core(pause)) {
                lost = helper;
            }
        }
        if (!is_taken && lost != nullptr) {
            lost->thread.bring_here();
            lost->brought_to = this_core();
            brought = lost;
        }
    }
}

// A helper's life.
void Pool::help() {
    ask_for_short_slices();
    Worker self;
    std::unique_lock lock(mutex_);
    Crowded crowded;
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
        if (crowded.lasts(*job, self.thread)) {
            const int core = job->core;
            crowded = {};
            lock.unlock();
            self.thread.leave(core);
            lock.lock();
            continue;
        }
        if (--job->wanted == 0) {
            --open_;
        }
        ++job->inside;
        self.next = std::exchange(job->helpers, &self);
        const int64_t sleepers = sleepers_for(*job);
        lock.unlock();
        awaken(sleepers);
        std::fesetenv(&job->environment);
        job->task(job->context);
        lock.lock();
        remove(job->helpers, self);
        if (--job->inside == 0) {
            left_.notify_all();
        }
        // It must not be there when the caller begins its next job: both would share that core for all of it.
        if (const int core = std::exchange(self.brought_to, -1); core >= 0) {
            lock.unlock();
            self.thread.leave(core);
            lock.lock();
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
