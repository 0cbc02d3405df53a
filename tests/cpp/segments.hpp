// Ragged problems for tests/cpp/test_normal.cpp.
#pragma once

#include "normal_results.hpp"

namespace onestep::testing {

// Ragged problems of n = 0, 1, 2, ... rows, around the number of features too; every third row of X is named twice.
template <class T>
struct Segments {
    SolveSegmentsArgs<T> args;
    std::vector<int64_t> offsets{0}, indices;
    std::vector<T> base;
    Table<T> x, y, weight, ridge;

    Segments(std::mt19937& random, const std::vector<int64_t>& lengths, int64_t d, int64_t k, bool gathers,
             typename Table<T>::Layout layout)
        : x(random, 1, 0, d, layout), y(x), weight(x), ridge(x) {
        for (const int64_t length : lengths) {
            offsets.push_back(offsets.back() + length);
        }
        args.segments = static_cast<int64_t>(lengths.size());
        args.entries = offsets.back();
        args.rows = gathers ? args.entries * 2 / 3 + 1 : args.entries;
        args.d = d;
        args.k = k;
        for (int64_t e = 0; e < args.entries; ++e) {
            indices.push_back(e * 7 % args.rows);
        }
        x = Table<T>(random, 1, args.rows, d, layout);
        y = Table<T>(random, 1, args.entries, k, layout);
        weight = Table<T>(random, 1, args.entries, 1, layout, T(0.1));
        ridge = Table<T>(random, 1, args.segments, d, layout, T(0.5));
        base.resize(static_cast<size_t>(d * d));
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j < d; ++j) {  // not symmetric: the mean of both triangles counts
                base[i * d + j] = i == j ? T(3) : T(0.5) / static_cast<T>(d) * static_cast<T>(i < j ? 1 : -0.5);
            }
        }
        const BatchShape single;
        args.offsets = offsets.data();
        args.indices = gathers ? indices.data() : nullptr;
        args.x = x.view.at(single, 0);
        args.y = y.view.at(single, 0);
        args.weight = weight.view.at(single, 0);
        args.base = {base.data(), d, 1};
        args.ridge = ridge.view.at(single, 0);
    }

    Results<T> run(bool tuned, bool factors) {
        Results<T> out;
        out.solution.resize(static_cast<size_t>(args.segments * args.d * args.k));
        out.factor.resize(static_cast<size_t>(factors ? args.segments * args.d * args.d : 0));
        out.info.resize(static_cast<size_t>(args.segments));
        args.solution = out.solution.data();
        args.factor = factors ? out.factor.data() : nullptr;
        args.info = out.info.data();
        if (tuned) {
            attempt("solve_segments", [&] { return solve_segments(args); });
        } else {
            check(reference::solve_segments(args) == Status::ok, "reference");
        }
        return out;
    }

    void compare(const std::string& name) {
        for (const bool factors : {false, true}) {
            const Results<T> expected = run(false, factors);
            const Results<T> got = run(true, factors);
            check(difference(got.solution, expected.solution) <= tolerance<T>(50.0), name + " solution");
            check(difference(got.factor, expected.factor) <= tolerance<T>(50.0), name + " factor");
            check(identical(got.info, expected.info), name + " info");
            const Results<T> threaded = with_threads([&] { return run(true, factors); });
            check(identical(threaded.solution, got.solution) && identical(threaded.factor, got.factor),
                  name + " with threads: not bitwise the same");
        }
    }
};

// The lengths of problems around d, many short ones among them so that the dual form pays.
inline std::vector<int64_t> lengths_around(int64_t d) {
    std::vector<int64_t> lengths = {0, 3 * d, d, std::max<int64_t>(d - 1, 0), d + 1, 0};
    for (int64_t problem = 0; problem < 12; ++problem) {
        lengths.push_back(problem * d / 12);
    }
    return lengths;
}

}  // namespace onestep::testing
