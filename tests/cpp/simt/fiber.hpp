// Fibers: a call stack of their own each, switched by hand on x86-64 and by ucontext elsewhere. AddressSanitizer and
// ThreadSanitizer are told of every switch; to the latter each fiber is a thread of its own.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

inline constexpr size_t kStackBytes = size_t{256} << 10;

class Fiber {
 public:
    Fiber();
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Prepares the fiber to call entry(argument) on its next resume. Whatever it did before is dropped.
    void start(void (*entry)(void*), void* argument);
    // Runs the fiber until it suspends; called from outside of fibers.
    void resume();
    // Returns to whoever resumed this fiber; called on it. `forever`: it will not be resumed.
    void suspend(bool forever = false);

    // Calls it here; ThreadSanitizer takes it for something that the fiber does.
    template <class Call>
    void on_its_behalf(const Call& call) {
        void* const self = this_thread();
        to_thread(thread_);
        call();
        to_thread(self);
    }

    // The first function on the fiber's stack.
    static void trampoline(Fiber* self);

 private:
    // What ThreadSanitizer takes for the running thread.
    static void* this_thread();
    static void to_thread(void* thread);

    char* stack_;
    bool ended_ = true;
    void (*entry_)(void*) = nullptr;
    void* argument_ = nullptr;
#if defined(__x86_64__)
    void* own_ = nullptr;
    void* outside_ = nullptr;
#else
    ucontext_t own_;
    ucontext_t outside_;
#endif
    // ThreadSanitizer's view of the fiber, and of who resumed it.
    void* thread_ = nullptr;
    void* outside_thread_ = nullptr;
    // AddressSanitizer's view of the two stacks.
    void* own_fake_ = nullptr;
    void* outside_fake_ = nullptr;
    const void* outside_bottom_ = nullptr;
    size_t outside_size_ = 0;
};

}  // namespace simt
