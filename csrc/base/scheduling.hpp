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

// A thread whose running time others can read, and which they can move to their own core.
class MovableThread {
 public:
    // The calling thread.
    MovableThread();

    // The nanoseconds that it has run so far. They do not grow while it waits for a core.
    int64_t nanoseconds_run() const;

    // Moves it to the core that the calling thread has, and keeps it there. A thread that waits for its core behind
    // another process runs as soon as the caller sleeps: Linux by itself moves no thread that ran less than 0.5 ms ago.
    void bring_here();

    // Moves it off a core, if it may run on another one. For the thread itself.
    void leave(int core);

    // Undoes bring_here and leave: the thread may run where it could before. For the thread itself.
    void let_go();

    bool is_held() const { return held_; }

 private:
    bool held_ = false;
#if defined(__linux__)
    bool remember_allowed();

    pid_t id_;
    clockid_t clock_;
    cpu_set_t allowed_;
#endif
};

}  // namespace onestep
