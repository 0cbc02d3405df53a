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

// Narrows the cores that a thread may use by narrow(core, cores), if that returns true, and widens them again. Where a
// call is forbidden, or the machine has more cores than a cpu_set_t holds, the thread stays where it is.
template <class Narrow>
void move(pid_t thread, int core, const Narrow& narrow) {
    cpu_set_t allowed;
    if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(thread, sizeof allowed, &allowed) != 0) {
        return;
    }
    cpu_set_t cores = allowed;
    if (narrow(core, cores) && sched_setaffinity(thread, sizeof cores, &cores) == 0) {
        sched_setaffinity(thread, sizeof allowed, &allowed);
    }
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

void MovableThread::bring_here() const {
    move(id_, this_core(), [](int core, cpu_set_t& to) {
        const bool is_allowed = CPU_ISSET(core, &to);
        CPU_ZERO(&to);
        CPU_SET(core, &to);
        return is_allowed;
    });
}

void MovableThread::leave(int core) const {
    move(id_, core, [](int left, cpu_set_t& to) {
        CPU_CLR(left, &to);
        return CPU_COUNT(&to) > 0;
    });
}
#else
void ask_for_short_slices() {}
int this_core() { return -1; }
int64_t nanoseconds_run_by_all() { return 0; }
MovableThread::MovableThread() = default;
int64_t MovableThread::nanoseconds_run() const { return 0; }
void MovableThread::bring_here() const {}
void MovableThread::leave(int) const {}
#endif

}  // namespace onestep
