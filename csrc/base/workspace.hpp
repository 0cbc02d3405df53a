// Work memory of kernels. A Layout names the parts and adds up their bytes. The caller of a kernel owns the memory. A
// Workspace hands out the parts.
//
// Each part is aligned. It is always checked that a part lies within the memory. Under AddressSanitizer, bytes between
// parts and parts that have not been handed out are poisoned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "base/guarded.hpp"
#include "base/work_memory.hpp"

namespace onestep {

// Alignment of the memory and of each part: a cache line, which is also the widest vector.
inline constexpr int64_t kAlignment = 64;

// `count` elements at `offset` bytes of a workspace.
template <class T>
struct Part {
    const char* name = "";
    int64_t offset = 0;
    int64_t count = 0;
};

// The parts of a workspace, one after the other.
class Layout {
 public:
    template <class T>
    Part<T> add(const char* name, int64_t count) {
        static_assert(alignof(T) <= kAlignment);
        const Part<T> part{name, bytes_, count};
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
        bytes_ += (bytes + kAlignment - 1) / kAlignment * kAlignment + kPoisonedGap;
        return part;
    }

    int64_t bytes() const { return bytes_; }

 private:
    int64_t bytes_ = 0;
};

// A view of `bytes` of memory that somebody else owns, aligned to kAlignment.
class Workspace {
 public:
    Workspace(void* memory, int64_t bytes);

    // The part's memory, uninitialised. Throws std::length_error if the part is not within the memory.
    template <class T>
    T* get(const Part<T>& part) const {
        return reinterpret_cast<T*>(checked(part.name, part.offset, part.count * static_cast<int64_t>(sizeof(T))));
    }

    template <class T>
    WorkMemory<T> work(const Part<T>& part) const {
        return {get(part), part.count};
    }

    template <class T>
    T* zeroed(const Part<T>& part) const {
        T* result = get(part);
        std::memset(static_cast<void*>(result), 0, static_cast<size_t>(part.count) * sizeof(T));
        return result;
    }

 private:
    char* checked(const char* name, int64_t offset, int64_t bytes) const;

    char* memory_;
    int64_t bytes_;
};

// A workspace from the calling thread's cache, which saves the page faults of new memory. Workspaces of a thread nest
// like a stack. Throws std::bad_alloc.
class CachedWorkspace {
 public:
    explicit CachedWorkspace(int64_t bytes);
    explicit CachedWorkspace(const Layout& layout) : CachedWorkspace(layout.bytes()) {}
    ~CachedWorkspace();
    CachedWorkspace(const CachedWorkspace&) = delete;
    CachedWorkspace& operator=(const CachedWorkspace&) = delete;

    operator Workspace() const { return view_; }
    template <class T>
    T* get(const Part<T>& part) const {
        return view_.get(part);
    }
    template <class T>
    WorkMemory<T> work(const Part<T>& part) const {
        return view_.work(part);
    }
    template <class T>
    T* zeroed(const Part<T>& part) const {
        return view_.zeroed(part);
    }

 private:
    int64_t bytes_;  // of the block
    char* block_;
    Workspace view_;
};

// Plans and runs one call with a workspace of the calling thread's cache. A family overloads plan(args), whose result
// has a `layout`, and run(plan, args, workspace) beside its arguments; `options` go to plan. Throws nothing.
template <class Args, class... Options>
Status run_cached(const Args& args, Options... options) noexcept {
    return guarded([&] {
        const auto planned = plan(args, options...);
        const CachedWorkspace workspace(planned.layout);
        return run(planned, args, workspace);
    });
}

// Returns cached blocks to the system: those of the calling thread and the large one that all threads share.
void release_workspaces();

// For tests: the n-th request for a block from the system fails, counted from now; 0: none fails.
void refuse_workspace(int64_t n);

}  // namespace onestep
