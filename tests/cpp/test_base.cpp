// How work is cut, the ordered sum of pieces, work memory, and threads.
#include <array>
#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>

#include "base/plan.hpp"
#include "base/reduce.hpp"
#include "base/scheduling.hpp"
#include "testing.hpp"

#ifdef ONESTEP_POISONS
#include <sanitizer/asan_interface.h>
#endif

namespace {

using namespace onestep;
using namespace onestep::testing;

// Pieces follow each other without a gap, cover everything, and have the sizes that they say.
void test_cuts() {
    for (const int64_t count : {0, 1, 5, 64, 65, 1000}) {
        for (const int64_t pieces : {1, 2, 7, 64}) {
            const EvenCut cut{count, pieces};
            int64_t at = 0;
            int64_t spread_at = 0;
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const Range range = cut.longer_first(piece);
                const Range spread = cut.spread(piece);
                check(range.begin == at && spread.begin == spread_at, "even cuts leave a gap");
                const bool longer = piece < count % pieces;
                check(range.size() == count / pieces + (longer ? 1 : 0), "longer pieces come first");
                check(spread.size() == count / pieces || spread.size() == count / pieces + 1, "spread pieces");
                at = range.end;
                spread_at = spread.end;
            }
            check(at == count && spread_at == count, "even cuts do not cover everything");
        }
        for (const int64_t size : {1, 3, 64, 2000}) {
            const FixedCut cut{count, size};
            int64_t at = 0;
            for (int64_t piece = 0; piece < cut.pieces(); ++piece) {
                check(cut[piece].begin == at && cut[piece].size() <= size && cut[piece].size() > 0, "fixed cut");
                at = cut[piece].end;
            }
            check(at == count, "fixed cuts do not cover everything");
        }
    }
}

// Sums in the order of the pieces: these numbers have another sum in any other order.
void test_sums() {
    constexpr int64_t kCount = 1300;
    std::vector<float> pieces;
    for (const float piece : {1e8F, 3.0F, -1e8F, 1.0F}) {
        pieces.insert(pieces.end(), kCount, piece);
    }
    std::vector<float> in_float(kCount, -1.0F), in_double(kCount, -1.0F);
    sum_pieces<float>(pieces.data(), 4, kCount, 1, kCount - 1, [&](int64_t at, float sum) { in_float[at] = sum; });
    sum_pieces<double>(pieces.data(), 4, kCount, 1, kCount - 1,
                       [&](int64_t at, double sum) { in_double[at] = static_cast<float>(sum); });
    for (int64_t at = 0; at < kCount; ++at) {
        const bool inside = at > 0 && at < kCount - 1;
        check(in_float[at] == (inside ? 1.0F : -1.0F) && in_double[at] == (inside ? 4.0F : -1.0F), "sum of pieces");
    }
    std::vector<float> direct(kCount, -1.0F);
    sum_pieces_to(direct.data() + 1, pieces.data() + 1, 4, kCount, kCount - 2);
    check(direct == in_float, "sums that are written directly");
    double high = 1e16, low = 0.0;
    add_compensated(1.0, 0.5, high, low);
    add_compensated(-1e16, 0.0, high, low);
    check(high + low == 1.5, "compensated sum");
}

void test_workspace() {
    Layout layout;
    const auto bytes = layout.add<char>("bytes", 3);
    const auto numbers = layout.add<double>("numbers", 8);
    const auto nothing = layout.add<double>("nothing", 0);
    {
        const CachedWorkspace workspace(layout);
        char* first = workspace.get(bytes);
        double* second = workspace.zeroed(numbers);
        check(reinterpret_cast<uintptr_t>(first) % kAlignment == 0 &&
                  reinterpret_cast<uintptr_t>(second) % kAlignment == 0,
              "alignment");
        check(std::all_of(second, second + 8, [](double value) { return value == 0.0; }), "zeroed part");
        check(workspace.get(nothing) != nullptr, "empty part");
#ifdef ONESTEP_POISONS
        check(__asan_address_is_poisoned(first + 3) != 0 && __asan_address_is_poisoned(second + 8) != 0 &&
                  __asan_address_is_poisoned(second - 1) != 0 && __asan_address_is_poisoned(second + 7) == 0,
              "gaps are poisoned");
#endif
        // A workspace that is too small is noticed, and so is a part beyond it.
        alignas(kAlignment) std::array<char, 128> memory{};
        const Workspace small(memory.data(), kAlignment);
        bool thrown = false;
        try {
            (void)small.get(numbers);
        } catch (const std::length_error& error) {
            thrown = std::string(error.what()).find("numbers") != std::string::npos;
        }
        check(thrown, "a part that does not fit names itself");
        (void)small.get(bytes);
#ifdef ONESTEP_POISONS
        ASAN_UNPOISON_MEMORY_REGION(memory.data(), memory.size());
#endif
    }
    // A large block comes back without being asked of the system again.
    Layout large;
    const auto part = large.add<char>("large", int64_t{20} << 20);
    release_workspaces();
    fail_allocation(2);
    for (int round = 0; round < 3; ++round) {
        const CachedWorkspace workspace(large);
        workspace.get(part)[0] = 1;
    }
    fail_allocation(0);
    release_workspaces();
    refuse_workspace(1);
    bool refused = false;
    try {
        const CachedWorkspace workspace(layout);
    } catch (const std::bad_alloc&) {
        refused = true;
    }
    check(refused, "refuse_workspace");
}

// Whatever a body throws or returns ends as the loop's status, on any thread.
void test_status() {
    for (const ThreadCountFunction threads : {ThreadCountFunction{nullptr}, ThreadCountFunction{three_threads}}) {
        set_thread_count(threads);
        const auto status_of = [](auto body) { return parallel_for(1000, 1, body); };
        check(status_of([](int64_t) {}) == Status::ok, "ok");
        check(status_of([](int64_t index) { return index == 900 ? Status::negative_ridge : Status::ok; }) ==
                  Status::negative_ridge,
              "a body's status");
        check(status_of([](int64_t index) {
                  if (index == 3) {
                      throw std::bad_alloc();
                  }
              }) == Status::out_of_memory,
              "bad_alloc");
        check(status_of([](int64_t index) {
                  if (index == 700) {
                      throw std::runtime_error("unexpected");
                  }
              }) == Status::unexpected_exception,
              "any exception");
        check(status_of([](int64_t) { throw 1; }) == Status::unexpected_exception, "what is no std::exception");
    }
    set_thread_count(nullptr);
}

using Thread = std::thread::id;

std::set<Thread> threads_of(int64_t count, int64_t nanoseconds_each) {
    std::vector<Thread> ids(static_cast<size_t>(count));
    auto body = [&](int64_t index) { ids[static_cast<size_t>(index)] = std::this_thread::get_id(); };
    if (parallel_for(count, nanoseconds_each, body) != Status::ok) {
        return {};
    }
    return {ids.begin(), ids.end()};
}

// Small loops stay on the calling thread, and so do all where one thread is allowed.
void test_threads_of_a_loop() {
    const std::set<Thread> own = {std::this_thread::get_id()};
    (void)set_least_parallel_nanoseconds(1'000'000);
    loop_to_fail = 1;
    set_thread_count(failing_count);
    check(threads_of(1000, 900) == own && loop_to_fail == 1, "a small loop does not ask for threads");
    auto nothing = [](int64_t) {};
    check(parallel_for(1000, 1100, nothing) == Status::thread_pool_error, "a larger loop does");
    check(threads_of(1000, 1'000'000) == own, "one thread is allowed");
    (void)set_least_parallel_nanoseconds(0);
    set_thread_count(nullptr);
    check(threads_of(1000, 1'000'000) == own, "nobody said how many");
}

// Waits until so many have called it, for a minute at most.
class Meeting {
 public:
    bool wait_for(int count) {
        std::unique_lock lock(mutex_);
        ++arrived_;
        changed_.notify_all();
        return changed_.wait_for(lock, std::chrono::minutes(1), [&] { return arrived_ >= count; });
    }

 private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int arrived_ = 0;
};

// Three threads, each of which has the rounding mode of the caller, and in which another loop is serial.
void test_helpers() {
    set_thread_count(three_threads);
    std::fesetround(FE_UPWARD);
    Meeting meeting;
    std::array<Thread, 3> ids;
    std::array<int, 3> rounding{};
    auto body = [&](int64_t index) {
        const bool met = meeting.wait_for(3);
        ids[static_cast<size_t>(index)] = std::this_thread::get_id();
        rounding[static_cast<size_t>(index)] = std::fegetround();
        const bool serial = threads_of(100, 1'000'000) == std::set<Thread>{std::this_thread::get_id()};
        return met && serial ? Status::ok : Status::device_error;
    };
    check(parallel_for(3, 1'000'000, body) == Status::ok, "three threads meet, inner loops are serial");
    check(std::set<Thread>(ids.begin(), ids.end()).size() == 3, "three threads");
    check(rounding == std::array{FE_UPWARD, FE_UPWARD, FE_UPWARD}, "the caller's rounding");
    std::fesetround(FE_TONEAREST);
    // A loop of one index stays on its thread, so that a loop within it has the others.
    Meeting within;
    auto meet = [&](int64_t) { return within.wait_for(3) ? Status::ok : Status::device_error; };
    auto single = [&](int64_t) { return parallel_for(3, 1'000'000, meet); };
    check(parallel_for(1, 1'000'000, single) == Status::ok, "a loop within a loop of one index has three threads");
    set_thread_count(nullptr);
}

// A caller whose helpers are busy elsewhere does the work itself; callers at the same time share the helpers.
void test_callers() {
    set_thread_count(three_threads);
    Meeting inside, over;
    Status lasting = Status::device_error;
    std::thread other([&] {
        auto wait = [&](int64_t) { return inside.wait_for(4) && over.wait_for(4) ? Status::ok : Status::device_error; };
        lasting = parallel_for(3, 1'000'000, wait);
    });
    check(inside.wait_for(4), "both helpers are taken");
    check(threads_of(1000, 1'000'000) == std::set<Thread>{std::this_thread::get_id()}, "nobody is waited for");
    check(over.wait_for(4), "the end");
    other.join();
    check(lasting == Status::ok, "a loop that lasts");
    std::vector<std::thread> callers;
    std::array<int64_t, 4> sums{};
    for (int64_t& sum : sums) {
        callers.emplace_back([&sum] {
            for (int round = 0; round < 200; ++round) {
                std::array<int64_t, 50> values{};
                auto body = [&](int64_t index) { values[static_cast<size_t>(index)] = index; };
                if (parallel_for(50, 100'000, body) != Status::ok) {
                    return;
                }
                sum = std::accumulate(values.begin(), values.end(), sum);
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    check(sums == std::array<int64_t, 4>{245000, 245000, 245000, 245000}, "every index of every loop, once");
    set_thread_count(nullptr);
}

#if defined(__linux__)
// A thread is seen to run or not, is moved to another's core and off its own, and may run everywhere afterwards.
void test_movable_threads() {
    cpu_set_t before;
    check(sched_getaffinity(0, sizeof before, &before) == 0, "the cores that this thread may use");
    const auto may_run_everywhere = [&] {
        cpu_set_t allowed;
        return sched_getaffinity(0, sizeof allowed, &allowed) == 0 && CPU_EQUAL(&allowed, &before);
    };
    std::atomic<MovableThread*> self{nullptr};
    std::atomic<int> core{-1};
    std::atomic<bool> ends{false};
    std::thread other([&] {
        MovableThread own;
        self = &own;
        while (!ends) {
            core = this_core();
        }
        check(may_run_everywhere(), "a thread that was moved may run everywhere");
        const int64_t run = own.nanoseconds_run();
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        check(own.nanoseconds_run() - run < 10'000'000, "a thread that sleeps does not run");
        // The scheduler may move a thread back at any time, so that one of many trials must show it.
        bool left = CPU_COUNT(&before) == 1;
        for (int trial = 0; trial < 1000 && !left; ++trial) {
            const int at = this_core();
            own.leave(at);
            left = this_core() != at;
        }
        check(left && may_run_everywhere(), "it leaves a core, and may run everywhere");
    });
    while (self == nullptr) {
        std::this_thread::yield();
    }
    const int64_t run = self.load()->nanoseconds_run();
    while (self.load()->nanoseconds_run() - run < 1'000'000) {
        std::this_thread::yield();
    }
    bool came = false;
    for (int trial = 0; trial < 1000 && !came; ++trial) {
        const int here = this_core();
        self.load()->bring_here();
        std::this_thread::sleep_for(std::chrono::microseconds(200));
        came = core == here;
    }
    check(came, "it is brought here");
    ends = true;
    other.join();
}
#else
void test_movable_threads() {}
#endif

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"cuts", test_cuts},
                        {"sums", test_sums},
                        {"workspace", test_workspace},
                        {"status", test_status},
                        {"threads_of_a_loop", test_threads_of_a_loop},
                        {"helpers", test_helpers},
                        {"callers", test_callers},
                        {"movable_threads", test_movable_threads}},
                       Target::generic);
}
