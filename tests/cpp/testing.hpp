// What the C++ tests of all kernel families share: counted checks, inputs in every layout, threads, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/batch.hpp"
#include "base/parallel.hpp"
#include "base/target.hpp"

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

// Three threads with uneven shares, whatever the machine has.
inline int32_t three_threads(int64_t begin, int64_t end, int64_t, RangeFunction fn, void* context) {
    const int64_t count = end - begin;
    const int64_t first = begin + count / 2;
    const int64_t second = first + (end - first) / 3;
    std::thread one([&] { fn(begin, first, context); });
    std::thread two([&] { fn(first, second, context); });
    fn(second, end, context);
    one.join();
    two.join();
    return 0;
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

// Runs `test` under every target that this machine supports, up to the last that has kernels of its own; the exit
// status of main.
inline int run_targets(void (*test)(), Target last = Target::amx) {
    for (int index = 0; index <= static_cast<int>(last); ++index) {
        const auto target = static_cast<Target>(index);
        if (!target_supported(target)) {
            std::printf("%s: not supported by this machine\n", target_name(target));
            continue;
        }
        check(select_target(target_name(target)) == SelectResult::ok, "select_target");
        test();
    }
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace onestep::testing
