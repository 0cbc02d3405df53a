#include "simt.hpp"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "fiber.hpp"
#include "races.hpp"

namespace simt {
namespace {

constexpr unsigned char kPoison = 0xFF;
constexpr size_t kCanary = 256;
constexpr size_t kSharedAlignment = 128;

struct Random {
    uint64_t state = 0x9E3779B97F4A7C15u;
    uint64_t next() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return state;
    }
    template <class Vector>
    void shuffle(Vector& values) {
        for (size_t i = values.size(); i > 1; --i) {
            std::swap(values[i - 1], values[next() % i]);
        }
    }
};

// Memory of exactly the size asked for, so that AddressSanitizer sees the first byte too many; a canary behind it
// catches stores past the end in builds without it.
class SharedArray {
 public:
    explicit SharedArray(size_t bytes) : bytes_(bytes), data_(allocate(bytes + canary())) { poison(); }
    unsigned char* data() const { return data_.get(); }
    size_t bytes() const { return bytes_; }
    void poison() { std::memset(data_.get(), kPoison, bytes_ + canary()); }
    bool intact() const {
        const unsigned char* end = data_.get() + bytes_;
        return std::all_of(end, end + canary(), [](unsigned char byte) { return byte == kPoison; });
    }

 private:
    struct Free {
        void operator()(unsigned char* data) const { ::operator delete(data, std::align_val_t{kSharedAlignment}); }
    };
    static constexpr size_t canary() {
#if defined(__SANITIZE_ADDRESS__)
        return 0;
#else
        return kCanary;
#endif
    }
    static unsigned char* allocate(size_t bytes) {
        return static_cast<unsigned char*>(
            ::operator new(std::max<size_t>(bytes, 1), std::align_val_t{kSharedAlignment}));
    }
    size_t bytes_;
    std::unique_ptr<unsigned char, Free> data_;
};

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    size_t source_bytes;
};

struct Thread {
    Place place;
    int linear = 0;
    bool exited = false;
    bool waiting = false;
    Site site{};
    Fiber fiber;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

// Lanes that named the same mask meet here. Two sets of slots: a lane can be one collective ahead of another at most.
// So it is with `order`: what a lane does on its way to the next collective is not before what a late one does after
// this.
struct Meeting {
    unsigned mask = 0;
    unsigned arrived = 0;
    unsigned phase = 0;
    Site site{};
    size_t bytes = 0;
    char order[2] = {};
    alignas(16) unsigned char slots[2][kWarp * kSlotBytes];
};

struct Gate {
    Site site{};
    int arrived = 0;
    int value = 0;
    int result = 0;
    unsigned phase = 0;
    char order[2] = {};
    std::vector<Thread*> waiting;
};

struct Machine {
    Random random;
    std::vector<std::unique_ptr<Thread>> threads;  // kept for later launches
    std::vector<Thread*> ready;
    std::vector<Thread*> next;
    std::map<const void*, std::unique_ptr<SharedArray>> static_arrays;
    std::unique_ptr<SharedArray> dynamic;
    std::vector<std::vector<std::unique_ptr<Meeting>>> warps;
    std::map<int, Gate> gates;  // 0: __syncthreads
    const std::function<void()>* kernel = nullptr;
    Thread* current = nullptr;
    int live = 0;
    int count = 0;
    char begin = 0;  // of a block: who launched it, then its threads
    char end = 0;    // its threads, then who launched it
    bool failed = false;
    std::string error;
};

Machine& machine() {
    thread_local Machine instance;
    return instance;
}

std::string describe(const Site& site) {
    return std::string(site.operation) + " at " + site.file + ":" + std::to_string(site.line);
}

std::string describe(const Thread& thread) {
    const Place& place = thread.place;
    return "thread (" + std::to_string(place.thread.x) + ", " + std::to_string(place.thread.y) + ", " +
           std::to_string(place.thread.z) + ") of block (" + std::to_string(place.block.x) + ", " +
           std::to_string(place.block.y) + ", " + std::to_string(place.block.z) + ")";
}

bool same(const Site& a, const Site& b) {
    return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.operation, b.operation) == 0;
}

void set_error(const std::string& message) {
    Machine& m = machine();
    if (!m.failed) {
        m.failed = true;
        m.error = message;
    }
}

void wait(Site site) {
    Thread* self = machine().current;
    self->waiting = true;
    self->site = site;
    self->fiber.suspend();
}

void wake(Thread* thread) {
    thread->waiting = false;
    machine().next.push_back(thread);
}

// Waits at the gate for `expected` threads.
int pass(Gate& gate, Site site, int value, int expected) {
    Machine& m = machine();
    if (gate.arrived == 0) {
        gate.site = site;
        gate.value = 0;
    } else if (!same(gate.site, site)) {
        fail("divergent barrier: some threads wait at " + describe(gate.site) + ", others at " + describe(site));
    }
    char* const order = &gate.order[gate.phase % 2];
    release(order);
    {
        const Unseen unseen;
        ++gate.arrived;
        gate.value += value;
        gate.waiting.push_back(m.current);
        if (gate.arrived == expected) {
            gate.arrived = 0;
            gate.result = gate.value;
            ++gate.phase;
            for (Thread* thread : gate.waiting) {
                wake(thread);
            }
            gate.waiting.clear();
        }
    }
    wait(site);
    acquire(order);
    return gate.result;
}

// Where the lanes of a warp that name this mask meet.
Meeting& meeting_of(int warp, unsigned mask) {
    const Unseen unseen;
    auto& meetings = machine().warps[static_cast<size_t>(warp)];
    const auto found = std::find_if(meetings.begin(), meetings.end(), [&](const auto& at) { return at->mask == mask; });
    if (found != meetings.end()) {
        return **found;
    }
    Meeting& meeting = *meetings.emplace_back(std::make_unique<Meeting>());
    meeting.mask = mask;
    return meeting;
}

// Unwinds the stack of a thread that failed.
struct Failure {};

void thread_main(void*) {
    Machine& m = machine();
    Thread* self = m.current;
    acquire(&m.begin);
    try {
        (*m.kernel)();
        if (!self->open.empty() || !self->groups.empty()) {
            fail("a thread ended with asynchronous copies that nobody waited for");
        }
    } catch (const Failure&) {
        return;
    }
    release(&m.end);
    self->exited = true;
    --m.live;
}

// Runs the threads that can run, in shuffled order, until all have ended or the block fails.
void schedule() {
    Machine& m = machine();
    while (m.live > 0 && !m.failed) {
        if (m.ready.empty()) {
            m.ready.swap(m.next);
            m.random.shuffle(m.ready);
        }
        if (m.ready.empty()) {
            std::string who;
            for (int i = 0; i < m.count && who.empty(); ++i) {
                const Thread& thread = *m.threads[static_cast<size_t>(i)];
                if (thread.waiting) {
                    who = describe(thread) + " waits at " + describe(thread.site);
                }
            }
            set_error("deadlock: " + who + " for threads that ended or wait elsewhere");
            return;
        }
        m.current = m.ready.back();
        m.ready.pop_back();
        m.current->fiber.resume();
    }
}

void run_block(const Launch& launch, uint3 block) {
    Machine& m = machine();
    for (auto& [tag, array] : m.static_arrays) {
        array->poison();
    }
    m.dynamic->poison();
    m.gates.clear();
    for (auto& warp : m.warps) {
        warp.clear();
    }
    m.ready.clear();
    m.next.clear();
    m.live = m.count;
    for (int i = 0; i < m.count; ++i) {
        Thread& thread = *m.threads[static_cast<size_t>(i)];
        const unsigned linear = static_cast<unsigned>(i);
        thread.linear = i;
        thread.place = {{linear % launch.block.x, linear / launch.block.x % launch.block.y,
                         linear / (launch.block.x * launch.block.y)},
                        block,
                        launch.block,
                        launch.grid};
        thread.exited = thread.waiting = false;
        thread.open.clear();
        thread.groups.clear();
        thread.fiber.start(thread_main, nullptr);
        m.next.push_back(&thread);
    }
    release(&m.begin);
    schedule();
    if (m.failed) {
        // Those that are still waiting are dropped.
        for (int i = 0; i < m.count; ++i) {
            m.threads[static_cast<size_t>(i)]->fiber.on_its_behalf([&m] { release(&m.end); });
        }
    }
    acquire(&m.end);
    if (m.failed) {
        return;
    }
    bool intact = m.dynamic->intact();
    for (const auto& [tag, array] : m.static_arrays) {
        intact = intact && array->intact();
    }
    if (!intact) {
        set_error("a block stored past the end of its shared memory");
    }
}

}  // namespace

const Place& place() { return machine().current->place; }

int lane() { return machine().current->linear % kWarp; }

void fail(const std::string& message) {
    Machine& m = machine();
    set_error(message + " (" + describe(*m.current) + ")");
    throw Failure{};
}

int barrier(Site site, int value) {
    Machine& m = machine();
    if (m.live != m.count) {
        fail("divergent barrier: a thread ended before " + describe(site));
    }
    return pass(m.gates[0], site, value, m.count);
}

void named_barrier(Site site, int id, int count) {
    if (id < 1 || id > 15 || count % kWarp != 0) {
        fail(describe(site) + ": ids are 1 to 15 and counts whole warps");
    }
    pass(machine().gates[id], site, 0, count);
}

const unsigned char* exchange(Site site, unsigned mask, const void* value, size_t bytes, bool orders) {
    Machine& m = machine();
    const int own = lane();
    if ((mask >> own & 1u) == 0) {
        fail(describe(site) + ": lane " + std::to_string(own) + " is not in its own mask");
    }
    const int first = m.current->linear - own;
    for (int other = 0; other < kWarp; ++other) {
        const int thread = first + other;
        if ((mask >> other & 1u) != 0 && (thread >= m.count || m.threads[static_cast<size_t>(thread)]->exited)) {
            fail(describe(site) + ": lane " + std::to_string(other) + " is in the mask and has ended");
        }
    }
    Meeting& meeting = meeting_of(first / kWarp, mask);
    if (meeting.arrived == 0) {
        meeting.site = site;
        meeting.bytes = bytes;
    } else if (!same(meeting.site, site) || meeting.bytes != bytes) {
        fail("divergent warp: some lanes are at " + describe(meeting.site) + ", others at " + describe(site));
    }
    unsigned char* slots = meeting.slots[meeting.phase % 2];
    char* const order = orders ? &meeting.order[meeting.phase % 2] : nullptr;
    if (orders) {
        release(order);
    }
    {
        const Unseen unseen;
        std::memcpy(slots + static_cast<size_t>(own) * kSlotBytes, value, bytes);
        meeting.arrived |= 1u << own;
        if (meeting.arrived == mask) {
            meeting.arrived = 0;
            ++meeting.phase;
            for (int other = 0; other < kWarp; ++other) {
                if ((mask >> other & 1u) != 0) {
                    wake(m.threads[static_cast<size_t>(first + other)].get());
                }
            }
        }
    }
    wait(site);
    if (orders) {
        acquire(order);
    }
    return slots;
}

void* static_shared(const void* tag, size_t bytes) {
    const Unseen unseen;
    auto& array = machine().static_arrays[tag];
    if (array == nullptr) {
        array = std::make_unique<SharedArray>(bytes);
    }
    return array->data();
}

void* dynamic_shared() { return machine().dynamic->data(); }

void check_shared(Site site, const void* address, size_t bytes) {
    const auto* begin = static_cast<const unsigned char*>(address);
    const auto inside = [&](const SharedArray& array) {
        return begin >= array.data() && begin + bytes <= array.data() + array.bytes();
    };
    Machine& m = machine();
    bool good = inside(*m.dynamic);
    for (const auto& [tag, array] : m.static_arrays) {
        good = good || inside(*array);
    }
    if (!good) {
        fail(describe(site) + " reaches outside of the block's shared memory");
    }
}

void copy_async(Site site, void* shared, const void* global, size_t bytes, size_t source_bytes) {
    check_shared(site, shared, bytes);
    if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0) {
        fail(describe(site) + ": addresses are not multiples of " + std::to_string(bytes) + " bytes");
    }
    if (source_bytes > bytes) {
        fail(describe(site) + ": more bytes at the source than are copied");
    }
    std::memset(shared, kPoison, bytes);
    machine().current->open.push_back({shared, global, bytes, source_bytes});
}

void commit_copies() {
    Thread* self = machine().current;
    self->groups.push_back(std::move(self->open));
    self->open.clear();
}

void wait_copies(int groups_left) {
    auto& groups = machine().current->groups;
    while (groups.size() > static_cast<size_t>(groups_left)) {
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, copy.bytes);
            if (copy.source_bytes > 0) {
                std::memcpy(copy.to, copy.from, copy.source_bytes);
            }
        }
        groups.erase(groups.begin());
    }
}

void yield() {
    Machine& m = machine();
    {
        const Unseen unseen;
        m.next.push_back(m.current);
    }
    m.current->fiber.suspend();
}

bool run(const Launch& launch) {
    const Unseen unseen;
    Machine& m = machine();
    m.failed = false;
    m.error.clear();
    const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
    if (threads == 0 || threads > 1024 || launch.grid.x == 0 || launch.grid.x > 0x7fffffffu || launch.grid.y == 0 ||
        launch.grid.y > 65535 || launch.grid.z == 0 || launch.grid.z > 65535) {
        set_error("invalid configuration: a block of " + std::to_string(threads) + " threads, a grid of " +
                  std::to_string(launch.grid.x) + " x " + std::to_string(launch.grid.y) + " x " +
                  std::to_string(launch.grid.z));
        return false;
    }
    m.count = static_cast<int>(threads);
    while (m.threads.size() < threads) {
        m.threads.push_back(std::make_unique<Thread>());
    }
    m.warps.resize((threads + kWarp - 1) / kWarp);
    m.static_arrays.clear();
    m.dynamic = std::make_unique<SharedArray>(launch.shared_bytes);
    m.kernel = &launch.kernel;
    std::vector<uint64_t> order(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z);
    std::iota(order.begin(), order.end(), uint64_t{0});
    m.random.shuffle(order);
    for (const uint64_t index : order) {
        run_block(launch, {static_cast<unsigned>(index % launch.grid.x),
                           static_cast<unsigned>(index / launch.grid.x % launch.grid.y),
                           static_cast<unsigned>(index / launch.grid.x / launch.grid.y)});
        if (m.failed) {
            return false;
        }
    }
    return true;
}

const std::string& last_error() { return machine().error; }

void set_seed(uint64_t seed) { machine().random.state = seed * 2 + 0x9E3779B97F4A7C15u; }

}  // namespace simt
