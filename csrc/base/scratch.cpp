#include "base/scratch.hpp"

#include <algorithm>
#include <new>
#include <utility>

namespace onestep {
namespace {

// Larger blocks go straight back to the system, so that an idle thread holds little.
constexpr int64_t kMostCached = int64_t{8} << 20;

char* allocate(int64_t bytes) {
    return static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}));
}

void release(char* block) { ::operator delete(block, std::align_val_t{kAlignment}); }

// Scratches nest a few levels deep; each level finds its own block again.
constexpr int kBlocks = 4;

struct Cache {
    char* block[kBlocks] = {};
    int64_t bytes[kBlocks] = {};
    ~Cache() { clear(); }

    void clear() {
        std::for_each_n(block, kBlocks, release);
        std::fill_n(block, kBlocks, nullptr);
        std::fill_n(bytes, kBlocks, 0);
    }
};

thread_local Cache cache;

}  // namespace

Scratch::Scratch(int64_t bytes) : block_(nullptr), bytes_(std::max(bytes, kAlignment)) {
    int best = -1;
    for (int slot = 0; slot < kBlocks; ++slot) {
        if (cache.bytes[slot] >= bytes_ && (best < 0 || cache.bytes[slot] < cache.bytes[best])) {
            best = slot;
        }
    }
    if (best >= 0) {
        block_ = std::exchange(cache.block[best], nullptr);
        bytes_ = std::exchange(cache.bytes[best], 0);
    } else {
        block_ = allocate(bytes_);
    }
    next_ = block_;
}

Scratch::~Scratch() {
    int64_t* smallest = std::min_element(cache.bytes, cache.bytes + kBlocks);
    if (bytes_ <= kMostCached && *smallest < bytes_) {
        std::swap(cache.block[smallest - cache.bytes], block_);
        *smallest = bytes_;
    }
    release(block_);
}

void release_scratch() { cache.clear(); }

}  // namespace onestep
