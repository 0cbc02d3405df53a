// What the C++ tests of all kernel families share: counted checks, inputs in every layout, threads, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <initializer_list>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "base/operand.hpp"
#include "base/parallel.hpp"
#include "base/target.hpp"
#include "base/workspace.hpp"
#include "faults.hpp"

namespace onestep::testing {

inline int checks = 0;
inline int failures = 0;

inline void check(bool good, const std::string& what) {
    ++checks;
    if (!good) {
        ++failures;
        std::printf("FAILED %s: %s\n", target_name(active_target()), what.c_str());
    }
}

// Three threads, whatever the machine has.
inline int32_t three_threads(uint32_t* threads) {
    *threads = 3;
    return 0;
}

// One thread, and an error at the `loop_to_fail`-th loop from now on.
inline int64_t loop_to_fail = 0;
inline int32_t failing_count(uint32_t* threads) {
    *threads = 1;
    return loop_to_fail > 0 && --loop_to_fail == 0 ? 1 : 0;
}

// How attempt calls a kernel.
enum class Trial { plain, faults };
inline Trial trial = Trial::plain;

// Which allocation or parallel loop fails after the n-th: the first ones differ, those of a long call repeat.
inline int64_t next_fault(int64_t n) { return n < 4 ? n + 1 : 2 * n; }

// Calls a kernel entry, which must succeed. Under Trial::faults it is called before with the n-th allocation failing,
// for n = 1, 2, 3, 4, 8, 16 … until there is no n-th one: it must say so then; afterwards with the n-th parallel loop
// failing. The last call has no fault, so that the caller goes on to compare right results.
template <class Kernel>
void attempt(const std::string& what, const Kernel& kernel) {
    if (trial == Trial::faults) {
        for (int64_t n = 1;; n = next_fault(n)) {
            release_workspaces();
            fail_allocation(n);
            const Status status = kernel();
            fail_allocation(0);
            if (!allocation_failed()) {
                check(status == Status::ok, what + ": not ok though nothing failed");
                break;
            }
            check(status == Status::out_of_memory, what + ": allocation " + std::to_string(n) + " fails, status " +
                                                       std::to_string(static_cast<int>(status)));
        }
        for (int64_t n = 1;; n = next_fault(n)) {
            set_thread_count(failing_count);
            loop_to_fail = n;
            const Status status = kernel();
            set_thread_count(nullptr);
            if (loop_to_fail > 0) {
                break;
            }
            check(status == Status::thread_pool_error, what + ": parallel loop " + std::to_string(n) +
                                                           " fails, status " +
                                                           std::to_string(static_cast<int>(status)));
        }
        loop_to_fail = 0;
        // Threads that meet the fault.
        set_thread_count(three_threads);
        for (const int64_t n : {1, 2, 3}) {
            release_workspaces();
            fail_allocation(n);
            const Status status = kernel();
            fail_allocation(0);
            check(status == (allocation_failed() ? Status::out_of_memory : Status::ok),
                  what + ": allocation " + std::to_string(n) + " fails with threads");
        }
        set_thread_count(nullptr);
    }
    check(kernel() == Status::ok, what + ": status");
}

// run() with three threads, for a comparison with what one thread computed; no faults, which run() has met before.
template <class Run>
auto with_threads(const Run& run) {
    const Trial before = std::exchange(trial, Trial::plain);
    set_thread_count(three_threads);
    auto results = run();
    set_thread_count(nullptr);
    trial = before;
    return results;
}

// Memory of exactly the size that the strides reach, so that AddressSanitizer sees the first element too many.
template <class T>
struct Table {
    std::vector<T> data;
    Batched<const T> view;

    enum class Layout { rows, columns, strided };

    Table(std::mt19937& random, int64_t problems, int64_t rows, int64_t cols, Layout layout, T low = T(-1)) {
        const int64_t step = layout == Layout::strided ? 3 : 1;
        const int64_t each = rows * cols * step;
        const int64_t used = std::max<int64_t>(problems * each - (step - 1), 0);
        data.resize(static_cast<size_t>(used));
        std::uniform_real_distribution<double> uniform(static_cast<double>(low), 1.0);
        std::generate(data.begin(), data.end(), [&] { return static_cast<T>(uniform(random)); });
        view.data = data.data();
        view.row = layout == Layout::columns ? 1 : cols * step;
        view.col = layout == Layout::columns ? rows : step;
        view.batch[0] = each;
    }
};

// max |a − b| / max |b|, NaN equal to NaN.
template <class T>
double difference(const std::vector<T>& a, const std::vector<T>& b) {
    double most = 0.0;
    double scale = 1e-30;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) && std::isnan(b[i])) {
            continue;
        }
        if (std::isnan(a[i]) != std::isnan(b[i])) {
            return std::numeric_limits<double>::infinity();
        }
        most = std::max(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
        scale = std::max(scale, std::abs(static_cast<double>(b[i])));
    }
    return most / scale;
}

template <class T>
bool identical(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Where a test runs: under every target, or under the first one alone, since what it tests is compiled once.
// Calls a kernel with the `wanted` elements of work memory that its family says, and with ever fewer: it refuses, or
// what lies behind them is as it was.
template <class T, class Kernel>
void check_work_memory(const std::string& what, int64_t wanted, const Kernel& kernel) {
    Layout layout;
    const auto part = layout.add<T>("work", wanted);
    const CachedWorkspace own(layout);
    int refused = 0;
    for (int64_t count = wanted; count >= 0; count -= wanted / 12) {
        T* memory = own.get(part);
        std::fill(memory, memory + wanted, T(7));
        bool refuses = false;
        try {
            kernel(WorkMemory<T>{memory, count});
        } catch (const std::length_error&) {
            refuses = true;
        }
        memory = own.get(part);
        check(std::all_of(memory + count, memory + wanted, [](T value) { return value == T(7); }),
              what + ": writes beyond its work memory");
        check(!refuses || count < wanted, what + ": its work memory is too small");
        refused += refuses ? 1 : 0;
    }
    check(refused > 0, what + ": takes no work memory");
}

enum class Where { every_target, first_target };

struct Test {
    const char* name;
    void (*run)();
    Where where = Where::every_target;
};

// ThreadSanitizer looks at how threads share work, which is compiled once and not for each target.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kOneTarget = true;
#else
inline constexpr bool kOneTarget = false;
#endif

// Runs the tests under every target that this machine supports, up to the last that has kernels of its own: those whose
// "target/name" holds the first argument of the command line, if there is one. The exit status of main.
inline int run_targets(int argc, char** argv, std::initializer_list<Test> tests, Target last = Target::amx) {
    const std::string filter = argc > 1 ? argv[1] : "";
    // Loops of any size are shared among threads, which a first loop starts: later ones allocate nothing.
    (void)set_least_parallel_nanoseconds(0);
    set_thread_count(three_threads);
    auto nothing = [](int64_t) {};
    check(parallel_for(3, 1, nothing) == Status::ok, "a first loop");
    set_thread_count(nullptr);
    for (int index = 0; index <= (kOneTarget ? 0 : static_cast<int>(last)); ++index) {
        const auto target = static_cast<Target>(index);
        if (!target_supported(target)) {
            std::printf("%s: not supported by this machine\n", target_name(target));
            continue;
        }
        check(select_target(target_name(target)) == SelectResult::ok, "select_target");
        for (const Test& test : tests) {
            const std::string name = std::string(target_name(target)) + "/" + test.name;
            if (name.find(filter) != std::string::npos && (index == 0 || test.where == Where::every_target)) {
                const std::clock_t start = std::clock();
                test.run();
                std::printf("%s: %.1f s of CPU time\n", name.c_str(),
                            static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC);
                std::fflush(stdout);
            }
        }
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace onestep::testing
