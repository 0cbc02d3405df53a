#include "base/workspace.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#ifdef ONESTEP_POISONS
#include <sanitizer/asan_interface.h>
#endif

namespace onestep {
namespace {

// Blocks up to this size stay in the cache of the thread that used them.
constexpr int64_t kMostOfThread = int64_t{8} << 20;
// One block up to this size is kept for the whole process. The largest calls use it.
constexpr int64_t kMostShared = int64_t{128} << 20;
// Blocks in a thread's cache. Workspaces nest a few levels deep, and each level finds its own block again.
constexpr int kBlocks = 4;

std::atomic<int64_t> until_refusal{0};

char* allocate(int64_t bytes) {
    if (until_refusal.load(std::memory_order_relaxed) > 0 && until_refusal.fetch_sub(1) == 1) {
        throw std::bad_alloc();
    }
    return static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}));
}

void release(char* block) { ::operator delete(block, std::align_val_t{kAlignment}); }

struct Block {
    char* memory = nullptr;
    int64_t bytes = 0;
};

struct Cache {
    Block blocks[kBlocks];
    ~Cache() { clear(); }

    void clear() {
        for (Block& block : blocks) {
            release(std::exchange(block, {}).memory);
        }
    }
};

thread_local Cache cache;

// The block that threads share, or null while one of them uses it. Its first bytes hold its size.
std::atomic<char*> shared{nullptr};

int64_t& size_of_shared(char* block) { return *reinterpret_cast<int64_t*>(block); }

Block take_shared(int64_t bytes) {
    char* memory = shared.exchange(nullptr);
    if (memory == nullptr || size_of_shared(memory) >= bytes) {
        return {memory, memory == nullptr ? 0 : size_of_shared(memory)};
    }
    release(memory);
    return {};
}

void keep_shared(Block block) {
    size_of_shared(block.memory) = block.bytes;
    release(shared.exchange(block.memory));
}

Block take_block(int64_t bytes) {
    Block* best = nullptr;
    for (Block& block : cache.blocks) {
        if (block.bytes >= bytes && (best == nullptr || block.bytes < best->bytes)) {
            best = &block;
        }
    }
    if (best != nullptr) {
        return std::exchange(*best, {});
    }
    if (bytes > kMostOfThread && bytes <= kMostShared) {
        const Block block = take_shared(bytes);
        if (block.memory != nullptr) {
            return block;
        }
    }
    return {allocate(bytes), bytes};
}

void give_back(Block block) {
    if (block.bytes > kMostOfThread && block.bytes <= kMostShared) {
        keep_shared(block);
        return;
    }
    Block* smallest = std::min_element(cache.blocks, cache.blocks + kBlocks,
                                       [](const Block& a, const Block& b) { return a.bytes < b.bytes; });
    if (block.bytes <= kMostOfThread && smallest->bytes < block.bytes) {
        std::swap(*smallest, block);
    }
    release(block.memory);
}

}  // namespace

void poison([[maybe_unused]] const void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef ONESTEP_POISONS
    ASAN_POISON_MEMORY_REGION(memory, static_cast<size_t>(bytes));
#endif
}

void unpoison([[maybe_unused]] const void* memory, [[maybe_unused]] int64_t bytes) {
#ifdef ONESTEP_POISONS
    ASAN_UNPOISON_MEMORY_REGION(memory, static_cast<size_t>(bytes));
#endif
}

void refuse_work(int64_t wanted, int64_t left) {
    throw std::length_error("a kernel takes " + std::to_string(wanted) + " elements of work memory, of which " +
                            std::to_string(left) + " are left");
}

Workspace::Workspace(void* memory, int64_t bytes) : memory_(static_cast<char*>(memory)), bytes_(bytes) {
    poison(memory_, bytes_);
}

char* Workspace::checked(const char* name, int64_t offset, int64_t bytes) const {
    if (offset < 0 || bytes < 0 || bytes > bytes_ - offset) {
        throw std::length_error("workspace of " + std::to_string(bytes_) + " bytes does not hold " + name + ", " +
                                std::to_string(bytes) + " bytes from " + std::to_string(offset));
    }
    unpoison(memory_ + offset, bytes);
    return memory_ + offset;
}

CachedWorkspace::CachedWorkspace(int64_t bytes) : bytes_(0), block_(nullptr), view_(nullptr, 0) {
    const Block block = take_block(std::max(bytes, kAlignment));
    block_ = block.memory;
    bytes_ = block.bytes;
    poison(block_, bytes_);  // a cached block may be larger than what is asked for
    view_ = Workspace(block_, std::max(bytes, int64_t{0}));
}

CachedWorkspace::~CachedWorkspace() {
    unpoison(block_, bytes_);
    give_back({block_, bytes_});
}

void release_workspaces() {
    cache.clear();
    release(shared.exchange(nullptr));
}

void refuse_workspace(int64_t n) { until_refusal.store(n); }

}  // namespace onestep
