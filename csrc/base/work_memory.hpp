// The work memory of one call of a kernel, as its caller hands it over. base/work-inl.hpp hands out its parts.
#pragma once

#include <cstdint>

namespace onestep {

// `count` elements, aligned to kAlignment; whoever calls the kernel owns them.
template <class T>
struct WorkMemory {
    T* data = nullptr;
    int64_t count = 0;
};

// What kernel bodies call, which are compiled without exceptions and without the headers of sanitizers. They live in
// workspace.cpp, so that no target has a copy of its own.
//
// Throws std::length_error: a kernel asks for `wanted` elements and `left` are left. The entry answers with
// Status::unexpected_exception.
[[noreturn]] void refuse_work(int64_t wanted, int64_t left);
// Under AddressSanitizer, makes reading and writing the bytes an error, or allows it again; else nothing.
void poison(const void* memory, int64_t bytes);
void unpoison(const void* memory, int64_t bytes);

#if defined(__SANITIZE_ADDRESS__)
#define ONESTEP_POISONS 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ONESTEP_POISONS 1
#endif
#endif

// Bytes between parts of work memory that nobody may touch.
#ifdef ONESTEP_POISONS
inline constexpr int64_t kPoisonedGap = 64;
#else
inline constexpr int64_t kPoisonedGap = 0;
#endif

}  // namespace onestep
