// CUDA's execution model on the CPU, for kernels compiled as host C++ (ONESTEP_SIMT): one fiber per thread, blocks and
// threads in shuffled order, barriers and warp collectives that check who takes part, shared memory of exact size that
// starts as NaN. A violation ends the launch with an error that says what happened and where.
//
// Blocks of a launch run one after the other, so kernels must not wait for one another's blocks.
//
// Built with ThreadSanitizer (ONESTEP_SIMT_TSAN) it is a race detector: each thread of a block is a thread to the
// sanitizer, and what they do is ordered by barriers and __syncwarp alone. Shuffles, votes and products of tensor cores
// order nothing, as CUDA has it. A race is reported in whatever order the threads happened to run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>
#include <utility>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct uint3 {
    unsigned x, y, z;
};

namespace simt {

inline constexpr int kWarp = 32;

// Where a barrier or collective stands in the source.
struct Site {
    const char* file;
    int line;
    const char* operation;
};

// The coordinates of the running thread.
struct Place {
    uint3 thread;
    uint3 block;
    dim3 block_size;
    dim3 grid_size;
};
const Place& place();

// Ends the launch with this error; the calling thread never continues.
[[noreturn]] void fail(const std::string& message);

// Waits for all threads of the block. Returns how many passed a nonzero `value`.
int barrier(Site site, int value);

// Waits for the `count` threads that share barrier `id`, as bar.sync does.
void named_barrier(Site site, int id, int count);

// Waits for the lanes in `mask`, each of which hands in `bytes` bytes; returns the 32 lanes' slots, kSlotBytes apart,
// good until this lane's next collective. `orders`: what a lane stored before it is seen by the others after it.
inline constexpr size_t kSlotBytes = 64;
const unsigned char* exchange(Site site, unsigned mask, const void* value, size_t bytes, bool orders = false);

int lane();

// The block's shared array of that tag, poisoned with 0xFF (NaN) when the block starts.
void* static_shared(const void* tag, size_t bytes);
void* dynamic_shared();
// Fails unless [address, address + bytes) is shared memory of this block.
void check_shared(Site site, const void* address, size_t bytes);

// Asynchronous copies: the destination is poisoned now and written when the group has been waited for.
void copy_async(Site site, void* shared, const void* global, size_t bytes, size_t source_bytes);
void commit_copies();
void wait_copies(int groups_left);

// Lets another thread of the block run.
void yield();

struct Launch {
    dim3 grid;
    dim3 block;
    size_t shared_bytes;
    std::function<void()> kernel;
};
// Runs a grid; false if it failed, with the reason in last_error().
bool run(const Launch& launch);
const std::string& last_error();

// Seeds the order of blocks and threads.
void set_seed(uint64_t seed);

// While it lives, the race detector sees nothing that this thread reads or writes.
class Unseen {
 public:
    Unseen();
    ~Unseen();
    Unseen(const Unseen&) = delete;
    Unseen& operator=(const Unseen&) = delete;
};

// *address becomes change(*address), in one piece; returns what it was.
template <class T, class Change>
T atomically(T* address, const Change& change) {
    const Unseen unseen;
    return std::exchange(*address, change(*address));
}

// ---------------------------------------------------------------- typed collectives

// What `source` handed in, its first `bytes` bytes. The race detector does not see it: it is not memory.
#if defined(ONESTEP_SIMT_TSAN)
void read_slot(const unsigned char* slots, int source, void* to, size_t bytes);
#else
inline void read_slot(const unsigned char* slots, int source, void* to, size_t bytes) {
    std::memcpy(to, slots + static_cast<size_t>(source) * kSlotBytes, bytes);
}
#endif

template <class T>
T slot(const unsigned char* slots, int source) {
    T value;
    read_slot(slots, source, &value, sizeof(T));
    return value;
}

// `source` of a lane that is not in the mask has no value: the shuffle then returns this lane's own, as for a source
// outside the segment.
template <class T>
T shuffle(Site site, unsigned mask, T value, int source) {
    static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
    const unsigned char* slots = exchange(site, mask, &value, sizeof(T));
    if ((mask >> source & 1u) == 0) {
        fail(std::string(site.operation) + " reads lane " + std::to_string(source) + ", which does not take part");
    }
    return slot<T>(slots, source);
}

template <class T>
T shuffle_index(Site site, unsigned mask, T value, int index, int width = kWarp) {
    return shuffle(site, mask, value, (lane() & ~(width - 1)) + (index & (width - 1)));
}

template <class T>
T shuffle_up(Site site, unsigned mask, T value, unsigned delta, int width = kWarp) {
    const int from = lane() - static_cast<int>(delta);
    return shuffle(site, mask, value, from < (lane() & ~(width - 1)) ? lane() : from);
}

template <class T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width = kWarp) {
    const int from = lane() + static_cast<int>(delta);
    return shuffle(site, mask, value, from > (lane() | (width - 1)) ? lane() : from);
}

template <class T>
T shuffle_xor(Site site, unsigned mask, T value, int bits, int width = kWarp) {
    const int from = lane() ^ bits;
    return shuffle(site, mask, value, from > (lane() | (width - 1)) ? lane() : from);
}

// Folds the values of the lanes in the mask, in lane order.
template <class T, class Fold>
T reduce(Site site, unsigned mask, T value, const Fold& fold) {
    const unsigned char* slots = exchange(site, mask, &value, sizeof(T));
    bool first = true;
    T result{};
    for (int source = 0; source < kWarp; ++source) {
        if ((mask >> source & 1u) != 0) {
            const T other = slot<T>(slots, source);
            result = first ? other : fold(result, other);
            first = false;
        }
    }
    return result;
}

inline unsigned ballot(Site site, unsigned mask, int predicate) {
    const unsigned bit = predicate != 0 ? 1u << lane() : 0u;
    return reduce(site, mask, bit, [](unsigned a, unsigned b) { return a | b; });
}

}  // namespace simt
