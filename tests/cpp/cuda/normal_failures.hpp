// Rows that make a problem fail, batches of all sizes, and singular matrices.
#pragma once

#include "normal_cases.hpp"

namespace {

// Each way in which rows fail a problem: the same info as the CPU's, and a good problem has the bits that it has alone.
void test_row_failures(int64_t n, int64_t d, int64_t k) {
    std::mt19937 random(static_cast<unsigned>(d));
    constexpr int64_t kProblems = 6;
    const Size size{kProblems, n, d, k, true};
    using Layout = Table<float>::Layout;
    Table<float> x(random, kProblems, n, d, Layout::rows);
    Table<float> y(random, kProblems, n, k, Layout::rows);
    Table<float> weight(random, kProblems, n, 1, Layout::rows, 0.25f);
    const auto row = [&](Table<float>& table, int64_t problem, int64_t at) {
        return table.data.data() + problem * table.view.batch[0] + at * table.view.row;
    };
    row(x, 1, 3)[d / 2] = std::numeric_limits<float>::infinity();
    row(y, 2, n - 1)[k - 1] = std::numeric_limits<float>::quiet_NaN();
    for (int64_t at = 0; at < n; ++at) {
        row(x, 3, at)[d / 3] = 0.0f;
        row(weight, 4, at)[0] = 0.0f;
    }
    row(weight, 5, n / 2)[0] = std::numeric_limits<float>::quiet_NaN();

    Results<float> want(kProblems, d, k);
    auto reference_args = row_args<SolveNormalArgs<float>>(size, x.view, y.view, weight.view);
    check(reference::solve_normal(into(reference_args, want)) == Status::ok, "reference");

    const auto run = [&](int64_t problems) {
        Results<float> got(problems, d, k);
        auto args = row_args<normal::cuda::SystemArgs<float>>({problems, n, d, k, true}, x.view, y.view, weight.view);
        args.singular_epsilons = kSingularEpsilons;
        args.norm = got.norm.data();
        check(normal::cuda::system(into(args, got), nullptr) == Status::ok, cuda::last_device_error());
        return got;
    };
    const Results<float> got = run(kProblems);
    check(got.info == want.info, name<float>("info of rows that fail", size));
    check(got.info[0] == 0 && got.info[2] == d + 1 && got.info[3] == d / 3 + 1, name<float>("rows that fail", size));
    check(difference(got.factor, want.factor) < tolerance<float>(), name<float>("factors of rows that fail", size));
    check(difference(got.solution, want.solution) < tolerance<float>(), name<float>("rows that fail", size));
    const Results<float> alone = run(1);
    check(std::equal(alone.solution.begin(), alone.solution.end(), got.solution.begin()) &&
              std::equal(alone.factor.begin(), alone.factor.end(), got.factor.begin()) && alone.norm[0] == got.norm[0],
          name<float>("the bits of a problem alone", size));
}

// A matrix has the same bits in a batch for which another kernel is chosen.
void test_batch_sizes(int64_t d, int64_t k) {
    std::mt19937 random(static_cast<unsigned>(d));
    const Size size{48, 0, d, k, false};
    const Table<float> a(random, size.problems, d, d, Table<float>::Layout::rows);
    const Table<float> b(random, size.problems, d, k, Table<float>::Layout::rows);
    std::vector<float> matrices = a.data;
    for (int64_t at = 0; at < size.problems * d; ++at) {
        matrices[static_cast<size_t>(at * d + at % d)] += static_cast<float>(d);
    }
    const auto run = [&](int64_t problems) {
        Results<float> got(problems, d, k);
        auto args = matrix_args<normal::cuda::SystemArgs<float>, float>({problems, 0, d, k, false},
                                                                        {matrices.data(), d, 1, {d * d}}, b.view);
        args.norm = got.norm.data();
        check(normal::cuda::system(into(args, got), nullptr) == Status::ok, cuda::last_device_error());
        return got;
    };
    const Results<float> all = run(size.problems);
    const Results<float> few = run(2);
    check(std::equal(few.solution.begin(), few.solution.end(), all.solution.begin()) &&
              std::equal(few.factor.begin(), few.factor.end(), all.factor.begin()) &&
              std::equal(few.norm.begin(), few.norm.end(), all.norm.begin()) && few.info[1] == 0,
          name<float>("the bits of a small batch", size));
}

// Pivots of two epsilons are good for cholesky, and singular for normal equations.
void test_singular(int64_t d, int64_t row) {
    std::vector<float> a(static_cast<size_t>(d * d), 0.0f);
    for (int64_t i = 0; i < d; ++i) {
        a[static_cast<size_t>(i * d + i)] = i == row ? 1.0f + 0x1p-22f : 1.0f;
    }
    a[static_cast<size_t>(row * d + row - 1)] = 1.0f;
    for (const bool blocked : {false, true}) {
        for (const int singular_epsilons : {0, kSingularEpsilons}) {
            Results<float> got(1, d, 0);
            BatchShape batch;
            const Batched<const float> matrix{a.data(), d, 1, {}};
            if (blocked) {
                const normal::cuda::CholeskyArgs args{batch,          d, matrix, singular_epsilons, got.factor.data(),
                                                      got.info.data()};
                check(normal::cuda::blocked_cholesky(args, nullptr) == Status::ok, cuda::last_device_error());
            } else {
                normal::cuda::SystemArgs<float> args;
                args.d = d;
                args.a = matrix;
                args.singular_epsilons = singular_epsilons;
                args.factor = got.factor.data();
                args.info = got.info.data();
                check(normal::cuda::system(args, nullptr) == Status::ok, cuda::last_device_error());
            }
            const int64_t info = singular_epsilons == 0 ? 0 : row + 1;
            check(got.info[0] == info && std::isnan(got.factor[0]) == (info != 0),
                  std::string(blocked ? "blocked" : "system") + " of a singular matrix: info " +
                      std::to_string(got.info[0]) + ", expected " + std::to_string(info));
        }
    }
}

}  // namespace
