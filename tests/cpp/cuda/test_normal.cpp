// The CUDA kernels of the normal-equations family, on the emulator, against the plain loops.
#include <array>
#include <tuple>

#include "base/singular.hpp"
#include "normal/cpu/kernels.hpp"
#include "normal/cuda/normal.hpp"
#include "normal/normal.hpp"
#include "simt.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using testing::check;
using testing::difference;
using testing::identical;
using testing::Table;

template <class T>
double tolerance() {
    return sizeof(T) == 4 ? 2e-4 : 1e-11;
}

// Of Gram sums: products in pieces of fewer bits than T has would miss it.
template <class T>
double gram_tolerance() {
    return sizeof(T) == 4 ? 2e-6 : 1e-13;
}

template <class T>
struct Results {
    std::vector<T> gram, cross, solution, factor, norm;
    std::vector<int32_t> info;

    Results(int64_t problems, int64_t d, int64_t k)
        : gram(static_cast<size_t>(problems * d * d), T(-7)),
          cross(static_cast<size_t>(problems * d * k), T(-7)),
          solution(cross),
          factor(gram),
          norm(static_cast<size_t>(problems), T(-7)),
          info(static_cast<size_t>(problems), -7) {}
};

template <class T>
bool same(const Results<T>& a, const Results<T>& b) {
    return identical(a.solution, b.solution) && identical(a.factor, b.factor) && identical(a.norm, b.norm) &&
           a.info == b.info;
}

struct Size {
    int64_t problems, n, d, k;
    bool weighted;
};

template <class T>
std::string name(const char* what, const Size& size) {
    return std::string(what) + (sizeof(T) == 4 ? " f32" : " f64") + " B=" + std::to_string(size.problems) +
           " n=" + std::to_string(size.n) + " d=" + std::to_string(size.d) + " k=" + std::to_string(size.k) +
           (size.weighted ? " weighted" : "");
}

template <class T>
void test_rows(const Size& size, typename Table<T>::Layout layout) {
    std::mt19937 random(static_cast<unsigned>(size.d * 31 + size.n));
    const auto [problems, n, d, k, weighted] = size;
    const Table<T> x(random, problems, n, d, layout);
    const Table<T> y(random, problems, n, k, layout);
    const Table<T> weight(random, problems, n, 1, layout, T(0.25));
    const Table<T> ridge(random, problems, d, 1, Table<T>::Layout::rows, T(0.25));
    BatchShape batch;
    batch.dims = 1;
    batch.size[0] = problems;

    Results<T> want(problems, d, k);
    SolveNormalArgs<T> reference_args;
    reference_args.batch = batch;
    reference_args.n = n;
    reference_args.d = d;
    reference_args.k = k;
    reference_args.x = x.view;
    reference_args.y = y.view;
    if (weighted) {
        reference_args.weight = weight.view;
    }
    reference_args.ridge = ridge.view;
    reference_args.solution = want.solution.data();
    reference_args.factor = want.factor.data();
    reference_args.info = want.info.data();
    check(reference::solve_normal(reference_args) == Status::ok, "reference");
    GramArgs<T> gram_args;
    gram_args.batch = batch;
    gram_args.n = n;
    gram_args.d = d;
    gram_args.k = k;
    gram_args.x = x.view;
    gram_args.y = y.view;
    gram_args.weight = reference_args.weight;
    gram_args.gram = want.gram.data();
    gram_args.cross = want.cross.data();
    check(reference::gram(gram_args) == Status::ok, "reference");

    Results<T> got(problems, d, k);
    normal::cuda::SystemArgs<T> args;
    args.batch = batch;
    args.n = n;
    args.d = d;
    args.k = k;
    args.x = x.view;
    args.y = y.view;
    args.weight = reference_args.weight;
    args.ridge = ridge.view;
    args.singular_epsilons = kSingularEpsilons;
    args.gram = got.gram.data();
    args.cross = got.cross.data();
    check(normal::cuda::system(args, nullptr) == Status::ok, name<T>("gram", size) + cuda::last_device_error());
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
    args.solution = got.solution.data();
    args.factor = got.factor.data();
    args.info = got.info.data();
    args.norm = got.norm.data();
    check(normal::cuda::system(args, nullptr) == Status::ok, name<T>("solve", size) + cuda::last_device_error());
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
    args.solution = again.solution.data();
    args.factor = again.factor.data();
    args.info = again.info.data();
    args.norm = again.norm.data();
    simt::set_seed(99);
    check(normal::cuda::system(args, nullptr) == Status::ok && same(again, got), name<T>("repeats to the bit", size));
}

template <class T>
void test_matrix(const Size& size, bool break_one) {
    std::mt19937 random(static_cast<unsigned>(size.d));
    const auto [problems, n, d, k, weighted] = size;
    const auto layout = Table<T>::Layout::rows;
    const Table<T> x(random, problems, d + 3, d, layout);
    Table<T> b(random, problems, d, k, layout);
    BatchShape batch;
    batch.dims = 1;
    batch.size[0] = problems;
    Results<T> want(problems, d, k);
    GramArgs<T> gram_args;
    gram_args.batch = batch;
    gram_args.n = d + 3;
    gram_args.d = d;
    gram_args.x = x.view;
    gram_args.gram = want.gram.data();
    gram_args.cross = want.cross.data();
    check(reference::gram(gram_args) == Status::ok, "reference");
    for (int64_t i = 0; i < problems * d; ++i) {
        want.gram[static_cast<size_t>(i * d + i % d)] += T(1);
    }
    Batched<const T> a{want.gram.data(), d, 1, {d * d}};
    // The upper triangle is not read.
    std::vector<T> lower = want.gram;
    for (int64_t at = 0; at < problems * d * d; ++at) {
        if (at % d > at / d % d) {
            lower[static_cast<size_t>(at)] = std::numeric_limits<T>::quiet_NaN();
        }
    }
    a.data = lower.data();

    const auto run = [&](Results<T>& to) {
        normal::cuda::SystemArgs<T> args;
        args.batch = batch;
        args.d = d;
        args.k = k;
        args.a = a;
        args.b = b.view;
        args.solution = k > 0 ? to.solution.data() : nullptr;
        args.factor = to.factor.data();
        args.info = to.info.data();
        return normal::cuda::system(args, nullptr);
    };
    const auto run_reference = [&](Results<T>& to) {
        SolveSpdArgs<T> args;
        args.batch = batch;
        args.d = d;
        args.k = k;
        args.a = a;
        args.b = b.view;
        args.solution = k > 0 ? to.solution.data() : nullptr;
        args.factor = to.factor.data();
        args.info = to.info.data();
        return reference::solve_spd(args);
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
        args.batch = batch;
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
    const std::vector<T> good = lower;
    for (const auto& [row, col, value] : std::vector<std::tuple<int64_t, int64_t, T>>{{d - 1, d - 1, T(-1)},
                                                                                      {d / 2, d / 2, T(0)},
                                                                                      {d - 1, d / 2, nan},
                                                                                      {d / 2, 0, infinity},
                                                                                      {0, 0, infinity},
                                                                                      {-1, 0, nan}}) {
        lower = good;
        const int64_t broken = problems / 2;
        const T kept = k > 0 ? b.data[static_cast<size_t>(broken * d * k)] : T(0);
        if (row >= 0) {
            lower[static_cast<size_t>((broken * d + row) * d + col)] = value;
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
void test_blocked(int64_t problems, int64_t d, bool by_columns, bool break_one) {
    std::mt19937 random(static_cast<unsigned>(d));
    const Size size{problems, 0, d, 0, false};
    const Table<float> x(random, problems, d + 3, d, Table<float>::Layout::rows);
    BatchShape batch;
    batch.dims = 1;
    batch.size[0] = problems;
    Results<float> want(problems, d, 0);
    GramArgs<float> gram_args;
    gram_args.batch = batch;
    gram_args.n = d + 3;
    gram_args.d = d;
    gram_args.x = x.view;
    gram_args.gram = want.gram.data();
    gram_args.cross = want.cross.data();
    check(reference::gram(gram_args) == Status::ok, "reference");
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const auto at = [&](int64_t problem, int64_t row, int64_t col) {
        return static_cast<size_t>(problem * d * d + (by_columns ? col * d + row : row * d + col));
    };
    std::vector<float> lower(want.gram.size(), nan);
    for (int64_t problem = 0; problem < problems; ++problem) {
        for (int64_t row = 0; row < d; ++row) {
            for (int64_t col = 0; col <= row; ++col) {
                lower[at(problem, row, col)] =
                    want.gram[static_cast<size_t>((problem * d + row) * d + col)] + (row == col ? 1.0f : 0.0f);
            }
        }
    }
    const Batched<const float> a{lower.data(), by_columns ? 1 : d, by_columns ? d : 1, {d * d}};
    const auto run = [&](Results<float>& to) {
        normal::cuda::CholeskyArgs args;
        args.batch = batch;
        args.d = d;
        args.a = a;
        args.factor = to.factor.data();
        args.info = to.info.data();
        check(normal::cuda::blocked_cholesky(args, nullptr) == Status::ok, cuda::last_device_error());
    };
    const auto run_reference = [&](Results<float>& to) {
        SolveSpdArgs<float> args;
        args.batch = batch;
        args.d = d;
        args.a = a;
        args.factor = to.factor.data();
        args.info = to.info.data();
        check(reference::solve_spd(args) == Status::ok, "reference");
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
    const std::vector<float> good = lower;
    for (const auto& [row, col, value] : std::vector<std::tuple<int64_t, int64_t, float>>{
             {d - 1, d - 1, -1.0f}, {d / 2, d / 2, 0.0f}, {d - 1, d / 2, nan}, {65, 3, -nan}, {0, 0, -1.0f}}) {
        lower = good;
        lower[at(problems - 1, row, col)] = value;
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

}  // namespace

int main() {
    test_all<float>();
    test_blocked(2, 136, true, true);
    test_blocked(2, 190, false, true);
    test_blocked(1, 257, false, false);
    if (std::getenv("ONESTEP_FLOAT_ONLY") == nullptr) test_all<double>();
    std::printf("%d checks, %d failed\n", testing::checks, testing::failures);
    return testing::failures == 0 ? 0 : 1;
}
