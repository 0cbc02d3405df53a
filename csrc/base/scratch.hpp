// Scratch memory of the calling thread, kept between calls so that a kernel does not pay for page faults each time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace onestep {

inline constexpr int64_t kAlignment = 64;

// A bump allocator over one block of the calling thread's cached memory. Scratches of a thread nest like a stack.
class Scratch {
 public:
    // Throws std::bad_alloc.
    explicit Scratch(int64_t bytes);
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    // `count` elements, aligned to 64 bytes, uninitialised.
    template <class T>
    T* take(int64_t count) {
        T* result = reinterpret_cast<T*>(next_);
        next_ += bytes_for<T>(count);
        return result;
    }

    template <class T>
    T* take_zeroed(int64_t count) {
        T* result = take<T>(count);
        std::memset(static_cast<void*>(result), 0, static_cast<size_t>(count) * sizeof(T));
        return result;
    }

    // What `take<T>(count)` uses up; add these up for the constructor.
    template <class T>
    static constexpr int64_t bytes_for(int64_t count) {
        const auto bytes = count * static_cast<int64_t>(sizeof(T));
        return (bytes + kAlignment - 1) / kAlignment * kAlignment;
    }

 private:
    char* block_;
    char* next_;
    int64_t bytes_;
};

// Gives the calling thread's cached blocks back to the system.
void release_scratch();

}  // namespace onestep
