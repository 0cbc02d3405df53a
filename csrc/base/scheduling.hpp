// What the pool asks of the operating system's scheduler. Elsewhere than on Linux it asks for nothing.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sched.h>
#include <sys/types.h>

#include <ctime>
#endif

namespace onestep {

// A thread that asks for shorter time slices than the thread that has a core gets the core at once when it is woken
// (EEVDF, Linux 6.12 and later); its share of the core stays the same. For the calling thread.
void ask_for_short_slices();

// The core that the calling thread is on; -1 where that is not known.
int this_core();

// The nanoseconds that all threads of this process have run so far.
int64_t nanoseconds_run_by_all();

// A thread whose running time others can read, and which they can move to their own core. No thread is tied to a core:
// the cores that it may use are narrowed, which moves it at once, and are as before when the call returns.
class MovableThread {
 public:
    // The calling thread.
    MovableThread();

    // The nanoseconds that it has run so far. They do not grow while it waits for a core.
    int64_t nanoseconds_run() const;

    // Moves it to the core that the calling thread has. A thread that waits for its core behind another process runs as
    // soon as the caller sleeps: Linux by itself moves no thread that ran less than 0.5 ms ago.
    void bring_here() const;

    // Moves it off a core, if it may run on another one.
    void leave(int core) const;

#if defined(__linux__)
 private:
    pid_t id_;
    clockid_t clock_;
#endif
};

}  // namespace onestep
