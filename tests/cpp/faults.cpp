#include "faults.hpp"

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace onestep::testing {
namespace {

std::atomic<int64_t> left{0};
std::atomic<bool> failed{false};
thread_local int exempt = 0;

bool fails_now() {
    if (exempt == 0 && left.load(std::memory_order_relaxed) > 0 && left.fetch_sub(1) == 1) {
        failed.store(true);
        return true;
    }
    return false;
}

void* allocate(std::size_t bytes, std::size_t alignment) {
    if (fails_now()) {
        throw std::bad_alloc();
    }
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    void* block = alignment <= alignof(std::max_align_t)
                      ? std::malloc(bytes > 0 ? bytes : 1)
                      : std::aligned_alloc(alignment, rounded > 0 ? rounded : alignment);
    if (block == nullptr) {
        throw std::bad_alloc();
    }
    return block;
}

}  // namespace

void fail_allocation(int64_t n) {
    if (n > 0) {
        failed.store(false);
    }
    left.store(n);
}

bool allocation_failed() { return failed.load(); }

WithoutFaults::WithoutFaults() { ++exempt; }
WithoutFaults::~WithoutFaults() { --exempt; }

}  // namespace onestep::testing

void* operator new(std::size_t bytes) { return onestep::testing::allocate(bytes, 1); }
void* operator new[](std::size_t bytes) { return onestep::testing::allocate(bytes, 1); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
    return onestep::testing::allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
    return onestep::testing::allocate(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete[](void* block) noexcept { std::free(block); }
void operator delete(void* block, std::size_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t) noexcept { std::free(block); }
void operator delete(void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::align_val_t) noexcept { std::free(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
void operator delete[](void* block, std::size_t, std::align_val_t) noexcept { std::free(block); }
