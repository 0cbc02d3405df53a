// The CUDA kernels of the normal-equations family, on the emulator, against the plain loops.
#include "normal_cases.hpp"
#include "normal_failures.hpp"

namespace {

// `shift`: X is a part of a wider table, from this column on.
template <class T>
void test_rows(const Size& size, typename Table<T>::Layout layout, int64_t shift = 0) {
    std::mt19937 random(static_cast<unsigned>(size.d * 31 + size.n));
    const auto [problems, n, d, k, weighted] = size;
    Table<T> x(random, problems, n, d + 4 * shift, layout);
    x.view.data += shift;
    const Table<T> y(random, problems, n, k, layout);
    const Table<T> weight(random, problems, n, 1, layout, T(0.25));
    const Table<T> ridge(random, problems, d, 1, Table<T>::Layout::rows, T(0.25));

    Results<T> want(problems, d, k);
    auto reference_args = row_args<SolveNormalArgs<T>>(size, x.view, y.view, weight.view);
    reference_args.ridge = ridge.view;
    check(reference::solve_normal(into(reference_args, want)) == Status::ok, "reference");
    auto gram_args = row_args<GramArgs<T>>(size, x.view, y.view, weight.view);
    check(reference::gram(into_gram(gram_args, want)) == Status::ok, "reference");

    Results<T> got(problems, d, k);
    auto args = row_args<normal::cuda::SystemArgs<T>>(size, x.view, y.view, weight.view);
    args.ridge = ridge.view;
    args.singular_epsilons = kSingularEpsilons;
    check(normal::cuda::system(into_gram(args, got), nullptr) == Status::ok,
          name<T>("gram", size) + cuda::last_device_error());
    check(difference(got.gram, want.gram) < gram_tolerance<T>(), name<T>("gram", size));
    check(difference(got.cross, want.cross) < gram_tolerance<T>(), name<T>("cross", size));
    for (int64_t at = 0; at < problems * d * d; ++at) {
        const int64_t mirror = at / (d * d) * d * d + at % d * d + at / d % d;
        if (got.gram[static_cast<size_t>(at)] != got.gram[static_cast<size_t>(mirror)]) {
            check(false, name<T>("gram is symmetric to the bit", size));
            break;
        }
    }

    args.gram = args.cross = nullptr;
    args.norm = got.norm.data();
    check(normal::cuda::system(into(args, got), nullptr) == Status::ok,
          name<T>("solve", size) + cuda::last_device_error());
    check(got.info == want.info, name<T>("info", size));
    check(difference(got.factor, want.factor) < tolerance<T>(), name<T>("factor", size));
    check(difference(got.solution, want.solution) < tolerance<T>(), name<T>("solution", size));
    std::vector<T> norms(static_cast<size_t>(problems), T(0));
    for (int64_t row = 0; row < problems * d; ++row) {
        T sum = ridge.data[static_cast<size_t>(row)];
        for (int64_t c = 0; c < d; ++c) {
            sum += std::abs(want.gram[static_cast<size_t>(row * d + c)]);
        }
        norms[static_cast<size_t>(row / d)] = std::max(norms[static_cast<size_t>(row / d)], sum);
    }
    check(difference(got.norm, norms) < tolerance<T>(), name<T>("norm", size));

    if (d <= normal::cuda::kSmallFeatures) {
        std::vector<T> conditions(static_cast<size_t>(problems), T(-7));
        std::vector<T> rcond = conditions;
        reference_args.rcond = conditions.data();
        check(reference::solve_normal(reference_args) == Status::ok, "reference");
        normal::cuda::ConditionArgs<T> condition_args{problems,         d,           want.factor.data(), norms.data(),
                                                      want.info.data(), rcond.data()};
        check(normal::cuda::condition(condition_args, nullptr) == Status::ok, cuda::last_device_error());
        check(difference(rcond, conditions) < tolerance<T>(), name<T>("rcond", size));
    }

    Results<T> again(problems, d, k);
    args.norm = again.norm.data();
    simt::set_seed(99);
    check(normal::cuda::system(into(args, again), nullptr) == Status::ok && same(again, got),
          name<T>("repeats to the bit", size));
}

template <class T>
void test_matrix(const Size& size, bool break_one, Lies lies = Lies::rows) {
    std::mt19937 random(static_cast<unsigned>(size.d));
    const auto [problems, n, d, k, weighted] = size;
    using Layout = typename Table<T>::Layout;
    Results<T> want(problems, d, k);
    positive_matrices(random, size, want);
    Table<T> b(random, problems, d, k, lies == Lies::columns ? Layout::columns : Layout::rows);
    LowerTriangles<T> lower(want.gram, problems, d, lies);
    const auto run = [&](Results<T>& to) {
        auto args = matrix_args<normal::cuda::SystemArgs<T>, T>(size, lower.view, b.view);
        return normal::cuda::system(into(args, to), nullptr);
    };
    const auto run_reference = [&](Results<T>& to) {
        auto args = matrix_args<SolveSpdArgs<T>, T>(size, lower.view, b.view);
        return reference::solve_spd(into(args, to));
    };
    Results<T> got(problems, d, k);
    check(run(got) == Status::ok, name<T>("solve_spd", size) + cuda::last_device_error());
    check(run_reference(want) == Status::ok, "reference");
    check(got.info == want.info, name<T>("solve_spd: info", size));
    check(difference(got.factor, want.factor) < tolerance<T>(), name<T>("solve_spd: factor", size));
    check(difference(got.solution, want.solution) < tolerance<T>(), name<T>("solve_spd: solution", size));
    if (k > 0) {
        Results<T> solved(problems, d, k);
        normal::cuda::FactorSolveArgs<T> args;
        args.batch = batch_of(problems);
        args.d = d;
        args.k = k;
        args.factor = {want.factor.data(), d, 1, {d * d}};
        args.b = b.view;
        args.solution = solved.solution.data();
        check(normal::cuda::factor_solve(args, nullptr) == Status::ok,
              name<T>("factor_solve", size) + cuda::last_device_error());
        check(difference(solved.solution, want.solution) < tolerance<T>(), name<T>("factor_solve", size));
    }
    if (!break_one) {
        return;
    }
    // Each way to fail, in one problem: the same info as the CPU's, and no bit of any other problem changes.
    const T infinity = std::numeric_limits<T>::infinity();
    const T nan = std::numeric_limits<T>::quiet_NaN();
    const std::vector<T> good = lower.data;
    for (const auto& [row, col, value] : std::vector<std::tuple<int64_t, int64_t, T>>{{d - 1, d - 1, T(-1)},
                                                                                      {d / 2, d / 2, T(0)},
                                                                                      {d - 1, d / 2, nan},
                                                                                      {d / 2, 0, infinity},
                                                                                      {0, 0, infinity},
                                                                                      {-1, 0, nan}}) {
        std::copy(good.begin(), good.end(), lower.data.begin());
        const int64_t broken = problems / 2;
        const T kept = k > 0 ? b.data[static_cast<size_t>(broken * d * k)] : T(0);
        if (row >= 0) {
            lower.element(broken, row, col) = value;
        } else if (k > 0) {
            b.data[static_cast<size_t>(broken * d * k)] = value;
        }
        Results<T> failed(problems, d, k);
        Results<T> expected(problems, d, k);
        check(run(failed) == Status::ok && run_reference(expected) == Status::ok, "failures run");
        check(failed.info == expected.info, name<T>("info of a failure", size) + " " + std::to_string(row) + "," +
                                                std::to_string(col) + ": " +
                                                std::to_string(failed.info[static_cast<size_t>(broken)]));
        bool apart = true;
        for (size_t at = 0; at < failed.factor.size(); ++at) {
            const bool inside = static_cast<int64_t>(at) / (d * d) == broken;
            apart = apart && (inside ? std::isnan(failed.factor[at]) == std::isnan(expected.factor[at])
                                     : failed.factor[at] == got.factor[at]);
        }
        for (size_t at = 0; at < failed.solution.size(); ++at) {
            const bool inside = static_cast<int64_t>(at) / (d * k) == broken;
            apart = apart && (inside ? std::isnan(failed.solution[at]) == std::isnan(expected.solution[at])
                                     : failed.solution[at] == got.solution[at]);
        }
        check(apart, name<T>("a failed problem leaves its neighbours alone", size));
        if (k > 0) {
            b.data[static_cast<size_t>(broken * d * k)] = kept;
        }
    }
}

// Blocks of columns: factors against the plain loops, every way to fail, and the upper triangle left alone.
void test_blocked(int64_t problems, int64_t d, Lies lies, bool break_one) {
    std::mt19937 random(static_cast<unsigned>(d));
    const Size size{problems, 0, d, 0, false};
    Results<float> want(problems, d, 0);
    positive_matrices(random, size, want);
    LowerTriangles<float> lower(want.gram, problems, d, lies);
    const auto run = [&](Results<float>& to) {
        normal::cuda::CholeskyArgs args;
        args.batch = batch_of(problems);
        args.d = d;
        args.a = lower.view;
        args.factor = to.factor.data();
        args.info = to.info.data();
        check(normal::cuda::blocked_cholesky(args, nullptr) == Status::ok, cuda::last_device_error());
    };
    const auto run_reference = [&](Results<float>& to) {
        auto args = matrix_args<SolveSpdArgs<float>, float>(size, lower.view, {});
        check(reference::solve_spd(into(args, to)) == Status::ok, "reference");
    };
    Results<float> got(problems, d, 0);
    run(got);
    run_reference(want);
    check(got.info == want.info, name<float>("blocked: info", size));
    check(difference(got.factor, want.factor) < tolerance<float>(), name<float>("blocked: factor", size));
    Results<float> again(problems, d, 0);
    simt::set_seed(7);
    run(again);
    check(identical(again.factor, got.factor), name<float>("blocked: repeats to the bit", size));
    if (!break_one) {
        return;
    }
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<float> good = lower.data;
    for (const auto& [row, col, value] : std::vector<std::tuple<int64_t, int64_t, float>>{
             {d - 1, d - 1, -1.0f}, {d / 2, d / 2, 0.0f}, {d - 1, d / 2, nan}, {65, 3, -nan}, {0, 0, -1.0f}}) {
        std::copy(good.begin(), good.end(), lower.data.begin());
        lower.element(problems - 1, row, col) = value;
        Results<float> failed(problems, d, 0);
        Results<float> expected(problems, d, 0);
        run(failed);
        run_reference(expected);
        check(failed.info == expected.info, name<float>("blocked: info of a failure", size));
        bool apart = true;
        for (size_t i = 0; i < failed.factor.size(); ++i) {
            const bool inside = static_cast<int64_t>(i) / (d * d) == problems - 1;
            apart = apart && (inside ? std::isnan(failed.factor[i]) : failed.factor[i] == got.factor[i]);
        }
        check(apart, name<float>("blocked: a failed problem leaves its neighbours alone", size));
    }
}

template <class T>
void test_all() {
    using Layout = typename Table<T>::Layout;
    for (const Size& size :
         {Size{1, 3, 1, 1, false}, Size{9, 20, 5, 1, true}, Size{17, 16, 8, 1, false}, Size{5, 9, 9, 3, false},
          Size{3, 33, 16, 4, true}, Size{3, 40, 17, 1, false}, Size{2, 24, 24, 2, true}, Size{5, 64, 32, 1, false},
          Size{2, 61, 31, 4, false}, Size{2, 0, 4, 1, false}, Size{3, 31, 32, 4, true}, Size{5, 3, 16, 1, false},
          Size{2, 7, 24, 1, true}, Size{1, 130, 32, 4, false}}) {
        test_rows<T>(size, Layout::rows);
    }
    test_rows<T>({2, 40, 16, 1, false}, Layout::columns);
    test_rows<T>({2, 40, 32, 1, true}, Layout::strided);
    test_rows<T>({3, 21, 7, 2, true}, Layout::columns);
    test_rows<T>({3, 21, 30, 2, false}, Layout::strided);
    // A size of each instance for a block, with and without whole vectors, and at its end.
    for (const Size& size : {Size{2, 70, 33, 1, false}, Size{1, 65, 64, 4, false}, Size{1, 100, 83, 2, true},
                             Size{2, 33, 72, 1, false}, Size{1, 97, 112, 1, true}, Size{1, 20, 136, 7, false}}) {
        test_rows<T>(size, Layout::rows);
    }
    test_rows<T>({1, 45, 40, 3, false}, Layout::strided);
    test_rows<T>({1, 130, 128, 8, false}, Layout::rows);
    test_rows<T>({1, 180, 168, 1, false}, Layout::rows);
    for (const Size& size : {Size{5, 0, 1, 1, false}, Size{9, 0, 7, 3, false}, Size{6, 0, 16, 1, false},
                             Size{3, 0, 23, 4, false}, Size{4, 0, 32, 2, false}, Size{3, 0, 50, 1, false}}) {
        test_matrix<T>(size, true);
    }
    test_matrix<T>({1, 0, 32, 0, false}, false);
    test_matrix<T>({1, 0, 100, 5, false}, false);
    test_matrix<T>({1, 0, 160, 0, false}, false);
    test_matrix<T>({2, 0, 75, 2, false}, true);
    test_matrix<T>({2, 0, 120, 1, false}, true);
    test_matrix<T>({1, 0, 168, 1, false}, false);
}

// What panels of eight columns (normal/cuda/panels.cuh) have beside test_all: the other instances, and the ends of
// stages, panels and vectors.
void test_panels() {
    using Layout = Table<float>::Layout;
    for (const Size& size :
         {Size{2, 15, 52, 3, true}, Size{1, 16, 61, 1, true}, Size{2, 17, 48, 0, false}, Size{1, 31, 95, 1, true},
          Size{1, 32, 96, 8, false}, Size{1, 47, 65, 5, true}, Size{1, 48, 97, 1, false}, Size{1, 49, 125, 6, true},
          Size{1, 64, 129, 1, false}, Size{1, 81, 157, 1, true}, Size{1, 18, 160, 8, false}, Size{2, 0, 56, 2, false},
          Size{2, 0, 121, 0, true}, Size{1, 1, 34, 4, true}, Size{1, 33, 159, 3, true}}) {
        test_rows<float>(size, Layout::rows);
    }
    test_rows<float>({2, 20, 44, 1, true}, Layout::columns);
    test_rows<float>({2, 17, 68, 2, false}, Layout::strided);
    test_rows<float>({1, 18, 132, 1, true}, Layout::columns);
    test_rows<float>({2, 19, 40, 1, false}, Layout::rows, 1);
    test_rows<float>({2, 19, 100, 2, true}, Layout::rows, 3);
    test_rows<float>({2, 19, 40, 4, true}, Layout::rows, 4);

    for (const int64_t d : {33, 44, 59, 64}) {
        test_matrix<float>({2, 0, d, d % 4, false}, false, Lies::columns);
    }
    // So many that each has one warp.
    test_matrix<float>({48, 0, 44, 2, false}, false, Lies::rows);
    test_matrix<float>({48, 0, 39, 4, false}, false, Lies::shifted);
    for (const auto& [d, k, lies] : std::vector<std::tuple<int64_t, int64_t, Lies>>{{65, 1, Lies::columns},
                                                                                    {66, 8, Lies::columns},
                                                                                    {91, 0, Lies::columns},
                                                                                    {96, 1, Lies::shifted},
                                                                                    {68, 2, Lies::strided},
                                                                                    {92, 1, Lies::reversed},
                                                                                    {97, 1, Lies::columns},
                                                                                    {130, 8, Lies::columns},
                                                                                    {127, 5, Lies::reversed},
                                                                                    {128, 1, Lies::shifted},
                                                                                    {129, 1, Lies::rows},
                                                                                    {132, 1, Lies::columns},
                                                                                    {156, 3, Lies::rows},
                                                                                    {158, 1, Lies::strided},
                                                                                    {160, 8, Lies::columns},
                                                                                    {161, 2, Lies::columns}}) {
        test_matrix<float>({1, 0, d, k, false}, false, lies);
    }
    test_matrix<float>({2, 0, 33, 1, false}, true, Lies::columns);
    test_matrix<float>({48, 0, 34, 1, false}, false, Lies::columns);
    test_matrix<float>({2, 0, 145, 3, false}, true, Lies::columns);
}

// Devices of capability 8.6 and 8.9 have 99 KiB for a block, the H100 227.
void test_most_features() {
    using normal::cuda::most_features;
    check(most_features<float>(99 << 10) == 168 && most_features<double>(227 << 10) == 168, "the most features");
    const int64_t most = most_features<double>(99 << 10);
    check(most == 144, "the most features in 99 KiB: " + std::to_string(most));
    for (int64_t d = normal::cuda::kSmallFeatures + 1; d <= most; ++d) {
        const int64_t bytes = d <= 84 ? normal::cuda::MiddleShape<double, 4>(d, 1).shared_bytes()
                                      : normal::cuda::MiddleShape<double, 8>(d, 1).shared_bytes();
        check(bytes <= 99 << 10, "shared memory of d = " + std::to_string(d));
    }
    check(normal::cuda::MiddleShape<float, 8>(168, 1).shared_bytes() <= 99 << 10, "shared memory in fp32");
}

}  // namespace

int main() {
    test_all<float>();
    test_panels();
    test_most_features();
    test_row_failures(60, 40, 2);
    test_row_failures(117, 100, 1);
    test_row_failures(170, 155, 3);
    test_batch_sizes(37, 2);
    test_batch_sizes(64, 1);
    test_singular(50, 49);
    test_singular(130, 66);
    test_blocked(2, 136, Lies::columns, true);
    test_blocked(2, 190, Lies::rows, true);
    test_blocked(1, 257, Lies::rows, false);
    test_blocked(2, 130, Lies::columns, true);
    test_blocked(1, 193, Lies::strided, false);
    test_blocked(1, 256, Lies::shifted, false);
    test_blocked(2, 67, Lies::reversed, true);
    test_blocked(3, 64, Lies::columns, false);
    test_blocked(3, 1, Lies::rows, false);
    if (std::getenv("ONESTEP_FLOAT_ONLY") == nullptr) test_all<double>();
    std::printf("%d checks, %d failed\n", testing::checks, testing::failures);
    return testing::failures == 0 ? 0 : 1;
}
