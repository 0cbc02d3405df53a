#include "base/scheduling.hpp"

#if defined(__linux__)
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace onestep {

#if defined(__linux__)
namespace {

// The time slice that a helper asks for, in nanoseconds: the least that Linux grants.
constexpr uint64_t kSlice = 100'000;

#if defined(SYS_sched_setattr)
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
#endif

int64_t nanoseconds_of(clockid_t clock) {
    timespec time{};
    clock_gettime(clock, &time);
    return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

}  // namespace

// Older kernels ignore the slice; where the calls are forbidden, the thread keeps what it has.
void ask_for_short_slices() {
#if defined(SYS_sched_setattr)
    SchedulingAttributes attributes;
    if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 || attributes.policy != SCHED_OTHER) {
        return;
    }
    attributes.runtime = kSlice;
    syscall(SYS_sched_setattr, 0, &attributes, 0);
#endif
}

int this_core() { return sched_getcpu(); }

int64_t nanoseconds_run_by_all() { return nanoseconds_of(CLOCK_PROCESS_CPUTIME_ID); }

MovableThread::MovableThread() : id_(static_cast<pid_t>(syscall(SYS_gettid))), clock_(CLOCK_THREAD_CPUTIME_ID) {
    pthread_getcpuclockid(pthread_self(), &clock_);
}

int64_t MovableThread::nanoseconds_run() const { return nanoseconds_of(clock_); }

// Where a call is forbidden, or the machine has more cores than a cpu_set_t holds, the thread stays where it is.
bool MovableThread::remember_allowed() { return held_ || sched_getaffinity(id_, sizeof allowed_, &allowed_) == 0; }

void MovableThread::bring_here() {
    const int core = this_core();
    if (core >= 0 && core < CPU_SETSIZE && remember_allowed() && CPU_ISSET(core, &allowed_)) {
        cpu_set_t here;
        CPU_ZERO(&here);
        CPU_SET(core, &here);
        held_ = sched_setaffinity(id_, sizeof here, &here) == 0 || held_;
    }
}

void MovableThread::leave(int core) {
    if (core >= 0 && core < CPU_SETSIZE && remember_allowed()) {
        cpu_set_t others = allowed_;
        CPU_CLR(core, &others);
        held_ = (CPU_COUNT(&others) > 0 && sched_setaffinity(id_, sizeof others, &others) == 0) || held_;
    }
}

void MovableThread::let_go() {
    sched_setaffinity(id_, sizeof allowed_, &allowed_);
    held_ = false;
}
#else
void ask_for_short_slices() {}
int this_core() { return -1; }
int64_t nanoseconds_run_by_all() { return 0; }
MovableThread::MovableThread() = default;
int64_t MovableThread::nanoseconds_run() const { return 0; }
void MovableThread::bring_here() {}
void MovableThread::leave(int) {}
void MovableThread::let_go() {}
#endif

}  // namespace onestep
