// Gram matrices of many small problems for tests/cpp/test_normal.cpp.
#pragma once

#include "normal_results.hpp"

namespace onestep::testing {

// Two dimensions of problems; X is one for the first of them in `broadcast`, and Y for the second.
template <class T>
struct GramPacks {
    static constexpr int64_t kBatch[2] = {2, 10};
    static constexpr int64_t kProblems = kBatch[0] * kBatch[1] - 1;  // not whole packs of 2, 4, 8 or 16

    GramArgs<T> args;
    Table<T> x, y, weight;

    GramPacks(std::mt19937& random, int64_t n, int64_t d, int64_t k, typename Table<T>::Layout layout, bool weighted,
              bool broadcast)
        : x(random, kProblems + 1, n, d, layout),
          y(random, kProblems + 1, n, k, layout),
          weight(random, kProblems + 1, n, 1, layout, T(0.1)) {
        args.n = n;
        args.d = d;
        args.k = k;
        args.x = x.view;
        args.y = y.view;
        if (weighted) {
            args.weight = weight.view;
        }
        if (broadcast) {
            args.batch = {2, {kBatch[0], kBatch[1]}};
            args.x.batch[1] = args.x.batch[0];
            args.x.batch[0] = 0;
            args.y.batch[1] = 0;
            args.weight.batch[1] = args.weight.batch[0];
            args.weight.batch[0] *= kBatch[1];
        } else {
            args.batch = {1, {kProblems}};
        }
    }

    static Results<T> run(GramArgs<T> of, bool tuned) {
        Results<T> out;
        out.gram.resize(static_cast<size_t>(of.batch.count() * of.d * of.d), T(7));
        out.cross.resize(static_cast<size_t>(of.batch.count() * of.d * of.k), T(7));
        of.gram = out.gram.data();
        of.cross = out.cross.data();
        if (tuned) {
            attempt("gram", [&] { return onestep::gram(of); });
        } else {
            check(reference::gram(of) == Status::ok, "reference");
        }
        return out;
    }

    // The results of one problem of `all` are bitwise those of that problem alone, which is not packed.
    bool same_alone(const Results<T>& all, int64_t problem) const {
        GramArgs<T> one = args;
        one.batch = {};
        one.x.data = args.x.at(args.batch, problem).data;
        one.y.data = args.y.at(args.batch, problem).data;
        one.weight.data = args.weight.at(args.batch, problem).data;
        const Results<T> alone = run(one, true);
        const auto same = [&](const std::vector<T>& from, const std::vector<T>& single) {
            const auto size = static_cast<std::ptrdiff_t>(single.size());
            const auto begin = from.begin() + static_cast<std::ptrdiff_t>(problem) * size;
            return identical(std::vector<T>(begin, begin + size), single);
        };
        return same(all.gram, alone.gram) && same(all.cross, alone.cross);
    }

    void compare(const std::string& name) const {
        const Results<T> expected = run(args, false);
        const Results<T> got = run(args, true);
        const double bound = tolerance<T>(1.0 + static_cast<double>(args.n));
        check(difference(got.gram, expected.gram) <= bound, name + " gram");
        check(difference(got.cross, expected.cross) <= bound, name + " cross");
        for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
            check(same_alone(got, problem),
                  name + ": not bitwise that of problem " + std::to_string(problem) + " alone");
        }
        const Results<T> threaded = with_threads([&] { return run(args, true); });
        check(identical(threaded.gram, got.gram) && identical(threaded.cross, got.cross),
              name + " with threads: not bitwise the same");
    }
};

// Features and targets around the tiles and the limits of a pack, rows around its blocks of 16 and its sums of 128.
template <class T>
void test_gram_packs(const char* type) {
    std::mt19937 random(7);
    using Layout = typename Table<T>::Layout;
    const std::vector<int64_t> targets = {0, 1, 2, 3, 5, 16, 17};
    size_t turn = 0;
    const auto compare = [&](int64_t n, int64_t d, int64_t k, Layout layout, bool weighted, bool broadcast) {
        GramPacks<T>(random, n, d, k, layout, weighted, broadcast)
            .compare(std::string(type) + " gram n" + std::to_string(n) + " d" + std::to_string(d) + " k" +
                     std::to_string(k) + " layout " + std::to_string(static_cast<int>(layout)) +
                     (weighted ? " weighted" : "") + (broadcast ? " broadcast" : ""));
    };
    for (const int64_t d : {1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33}) {
        for (const int64_t n : {d - 1, d, d + 1, 3 * d}) {
            compare(n, d, targets[turn % targets.size()], Layout::rows, turn % 3 == 0, false);
            ++turn;
        }
        compare(d + 2, d, 2, Layout::columns, true, false);
        compare(d + 2, d, 3, Layout::strided, true, true);
    }
    for (const int64_t n : {15, 16, 17, 31, 32, 33, 127, 128, 129, 143, 144, 145, 256, 257, 4096, 4097}) {
        compare(n, 3, 1, Layout::rows, n % 2 == 1, n < 300);
    }
    compare(300, 31, 4, Layout::strided, true, false);

    // A bad row reaches the matrices of its problem alone.
    GramPacks<T> in(random, 20, 6, 2, Layout::rows, false, false);
    const Results<T> clean = in.run(in.args, true);
    in.x.data[static_cast<size_t>(5 * 20 * 6 + 13)] = std::numeric_limits<T>::quiet_NaN();
    const Results<T> got = in.run(in.args, true);
    for (int64_t e = 0; e < GramPacks<T>::kProblems * 36; ++e) {
        const auto at = static_cast<size_t>(e);
        const bool bad = e / 36 == 5 && (e % 6 == 1 || e % 36 / 6 == 1);
        check(std::isnan(got.gram[at]) == bad && (e / 36 == 5 || got.gram[at] == clean.gram[at]),
              std::string(type) + " gram: isolation " + std::to_string(e));
    }
}

}  // namespace onestep::testing
