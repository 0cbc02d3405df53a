// Hands out the parts of a kernel's work memory, one after the other.
#pragma once

#include "base/simd-inl.hpp"
#include "base/work_memory.hpp"

namespace onestep::ONESTEP_NS {

// Parts are whole cache lines, taken from the front. It is always checked that a part lies within the memory. Under
// AddressSanitizer what has not been handed out is poisoned, and so are the bytes between parts.
template <class T>
class Work {
 public:
    explicit Work(const WorkMemory<T>& memory) : next_(memory.data), end_(memory.data + memory.count) { close(); }

    // The elements that a part of `count` takes up.
    static constexpr int64_t rounded(int64_t count) {
        constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));
        return (count + line - 1) / line * line + kPoisonedGap / static_cast<int64_t>(sizeof(T));
    }

    // `count` elements, uninitialised.
    ONESTEP_INLINE T* take(int64_t count) {
        const int64_t size = rounded(count);
        if (size > end_ - next_) {
            refuse_work(size, end_ - next_);
        }
        T* const part = next_;
        next_ += size;
        if constexpr (kPoisonedGap > 0) {
            unpoison(part, count * static_cast<int64_t>(sizeof(T)));
        }
        return part;
    }

    // What is left, for a scope whose parts are given up at its end: the memory is handed out again by the next one.
    Work rest() const { return Work(WorkMemory<T>{next_, end_ - next_}); }

 private:
    void close() const {
        if constexpr (kPoisonedGap > 0) {
            poison(next_, (end_ - next_) * static_cast<int64_t>(sizeof(T)));
        }
    }

    T* next_;
    T* end_;
};

}  // namespace onestep::ONESTEP_NS
