#include "fiber.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define ONESTEP_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ONESTEP_ASAN 1
#endif
#endif

#if defined(ONESTEP_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(ONESTEP_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the present stack, its address in *from, and continues on the stack `to`.
extern "C" void onestep_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type onestep_simt_switch, @function
.hidden onestep_simt_switch
.globl onestep_simt_switch
onestep_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size onestep_simt_switch, . - onestep_simt_switch
.p2align 4
.type onestep_simt_enter, @function
onestep_simt_enter:
    movq %rbx, %rdi
    call onestep_simt_begin
    ud2
.size onestep_simt_enter, . - onestep_simt_enter
)");
extern "C" void onestep_simt_enter() asm("onestep_simt_enter");
extern "C" __attribute__((visibility("hidden"), used)) void onestep_simt_begin(simt::Fiber* fiber) {
    simt::Fiber::trampoline(fiber);
}
#endif

namespace simt {
namespace {

void before_switch([[maybe_unused]] void** keep, [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(ONESTEP_ASAN)
    __sanitizer_start_switch_fiber(keep, bottom, size);
#endif
}

void after_switch([[maybe_unused]] void* kept, [[maybe_unused]] const void** bottom, [[maybe_unused]] size_t* size) {
#if defined(ONESTEP_ASAN)
    __sanitizer_finish_switch_fiber(kept, bottom, size);
#endif
}

// Makes or ends what ThreadSanitizer takes for a thread.
void* new_thread() {
#if defined(ONESTEP_SIMT_TSAN)
    return __tsan_create_fiber(0);
#else
    return nullptr;
#endif
}

void end_thread([[maybe_unused]] void* thread) {
#if defined(ONESTEP_SIMT_TSAN)
    __tsan_destroy_fiber(thread);
#endif
}

}  // namespace

void* Fiber::this_thread() {
#if defined(ONESTEP_SIMT_TSAN)
    return __tsan_get_current_fiber();
#else
    return nullptr;
#endif
}

// A switch orders nothing: what one fiber does is before what another does only where a barrier says so.
void Fiber::to_thread([[maybe_unused]] void* thread) {
#if defined(ONESTEP_SIMT_TSAN)
    __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync);
#endif
}

Fiber::Fiber() {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    stack_ = static_cast<char*>(memory);
    // The lowest page faults, so that an overflow does not reach the neighbour.
    mprotect(stack_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
    thread_ = new_thread();
}

Fiber::~Fiber() {
#if defined(ONESTEP_ASAN)
    __asan_unpoison_memory_region(stack_, kStackBytes);
#endif
    end_thread(thread_);
    munmap(stack_, kStackBytes);
}

void Fiber::trampoline(Fiber* self) {
    after_switch(nullptr, &self->outside_bottom_, &self->outside_size_);
    self->entry_(self->argument_);
    self->ended_ = true;
    self->suspend(true);
    std::abort();
}

void Fiber::start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    own_fake_ = nullptr;
#if defined(ONESTEP_ASAN)
    // Frames of an earlier use that were never left: the two lowest, or all if it was dropped.
    const size_t bytes = ended_ ? std::min(kStackBytes, size_t{16} << 10) : kStackBytes;
    __asan_unpoison_memory_region(stack_ + kStackBytes - bytes, bytes);
#endif
    if (!ended_) {
        // Its calls were never left.
        end_thread(thread_);
        thread_ = new_thread();
    }
    ended_ = false;
#if defined(__x86_64__)
    // As onestep_simt_switch leaves a stack: six registers, then where to return to. rbx carries the fiber.
    auto** top = reinterpret_cast<void**>(stack_ + kStackBytes - 64);
    *--top = reinterpret_cast<void*>(&onestep_simt_enter);
    *--top = nullptr;  // rbp
    *--top = this;     // rbx
    for (int reg = 12; reg < 16; ++reg) {
        *--top = nullptr;
    }
    own_ = top;
#else
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    const auto address = reinterpret_cast<uintptr_t>(this);
    auto* enter = +[](unsigned low, unsigned high) {
        trampoline(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low));
    };
    makecontext(&own_, reinterpret_cast<void (*)()>(enter), 2, static_cast<unsigned>(address),
                static_cast<unsigned>(address >> 32));
#endif
}

void Fiber::resume() {
    before_switch(&outside_fake_, stack_, kStackBytes);
    outside_thread_ = this_thread();
    to_thread(thread_);
#if defined(__x86_64__)
    onestep_simt_switch(&outside_, own_);
#else
    swapcontext(&outside_, &own_);
#endif
    after_switch(outside_fake_, nullptr, nullptr);
}

void Fiber::suspend(bool forever) {
    before_switch(forever ? nullptr : &own_fake_, outside_bottom_, outside_size_);
    to_thread(outside_thread_);
#if defined(__x86_64__)
    onestep_simt_switch(&own_, outside_);
#else
    swapcontext(&own_, &outside_);
#endif
    after_switch(own_fake_, &outside_bottom_, &outside_size_);
}

}  // namespace simt
