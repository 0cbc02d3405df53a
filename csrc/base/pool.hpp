// Threads that help a caller through a loop. The caller waits only for those that have begun to help.
#pragma once

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace onestep {

// The caller announces a task, works on it itself, and at the end waits for the threads that are inside the task: a
// thread that has not begun by then (beside a busy process it may take a time slice of several milliseconds to be
// scheduled) finds the task gone. A fork join barrier, such as OpenMP's, waits for every thread instead.
//
// Any number of callers share the threads. They are never ended: they sleep when there is nothing to do.
class Pool {
 public:
    // Runs task(context) on the calling thread and on up to `helpers` others at a time. The task must be one that is
    // complete when it has returned once on each thread that began it. Throws nothing, and allocates only to start
    // threads; where none can be started, there are fewer helpers.
    void run(int64_t helpers, void (*task)(void* context), void* context);

 private:
    class Crowded;
    struct Job;
    struct Worker;

    void start_threads(int64_t wanted);
    void help();
    void wait_for_helpers(Job& job, std::unique_lock<std::mutex>& lock);
    Job* first_open() const;
    int64_t sleepers_for(const Job& job) const;
    void awaken(int64_t threads);

    std::mutex mutex_;
    std::condition_variable opened_;  // a job takes helpers
    std::condition_variable left_;    // a helper has left a job
    Job* jobs_ = nullptr;             // those that callers work on, a list
    std::atomic<int64_t> open_{0};    // how many of them take helpers
    int64_t threads_ = 0;
    int64_t sleeping_ = 0;
};

}  // namespace onestep
