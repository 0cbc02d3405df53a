// The tuned normal-equations kernels against the plain loops, for every CPU target of this machine, in both types, at
// every tile edge, serially and with threads. Built with AddressSanitizer and UndefinedBehaviorSanitizer by make
// test-cpp.
#include <numeric>

#include "gram_packs.hpp"
#include "normal/normal.hpp"
#include "normal_results.hpp"
#include "segments.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

template <class T>
struct Inputs {
    BatchShape batch;
    Size<T> size;
    Table<T> x, y, weight, ridge, grad;
    int64_t refine;
    std::vector<uint16_t> bits;
    HalfRows x_half;

    // x becomes multiples of 2⁻⁷ or 2⁻¹⁰ below 1, which 16 bits hold.
    void narrow(Element element) {
        const int fraction = element == Element::bfloat16 ? 7 : 10;
        const int bias = element == Element::bfloat16 ? 127 : 15;
        bits.resize(x.data.size());
        for (size_t e = 0; e < bits.size(); ++e) {
            const int digits = static_cast<int>(std::ldexp(x.data[e], fraction));
            x.data[e] = std::ldexp(static_cast<T>(digits), -fraction);
            const int exponent = digits == 0 ? -bias : std::ilogb(digits) - fraction;
            const int below = digits == 0 ? 0 : (std::abs(digits) << -exponent) & ((1 << fraction) - 1);
            bits[e] = static_cast<uint16_t>((digits < 0 ? 0x8000 : 0) | (exponent + bias) << fraction | below);
        }
        x_half.element = element;
        x_half.rows = {bits.data(), x.view.row, x.view.col, {x.view.batch[0]}};
    }

    Inputs(std::mt19937& random, Size<T> size_, typename Table<T>::Layout layout, int64_t refine_)
        : size(size_),
          x(random, size_.problems, size_.n, size_.d, layout),
          y(random, size_.problems, size_.n, size_.k, layout),
          weight(random, size_.problems, size_.n, 1, layout, T(0.1)),
          ridge(random, size_.problems, size_.d, 1, layout, T(0.5)),
          grad(random, size_.problems, size_.d, size_.k, layout),
          refine(refine_) {
        batch.dims = 1;
        batch.size[0] = size.problems;
    }
};

// Runs the whole family; `Tuned` chooses between the kernels and the reference.
template <bool Tuned, class T>
Results<T> run(const Inputs<T>& in) {
    const auto [problems, n, d, k] = in.size;
    Results<T> out;
    const auto resize = [](auto& to, int64_t count) { to.resize(static_cast<size_t>(count)); };

    GramArgs<T> gram_args;
    gram_args.batch = in.batch;
    gram_args.n = n;
    gram_args.d = d;
    gram_args.k = k;
    gram_args.x = in.x.view;
    gram_args.x_half = in.x_half;
    gram_args.y = in.y.view;
    gram_args.weight = in.weight.view;
    resize(out.gram, problems * d * d);
    resize(out.cross, problems * d * k);
    gram_args.gram = out.gram.data();
    gram_args.cross = out.cross.data();

    MomentsArgs<T> moments_args;
    moments_args.n = n;
    moments_args.d = d;
    moments_args.k = k;
    moments_args.x = in.x.view.at(in.batch, 0);
    moments_args.x_half = in.x_half;
    moments_args.y = in.y.view.at(in.batch, 0);
    moments_args.weight = in.weight.view.at(in.batch, 0);
    moments_args.center = true;
    resize(out.moments, d * (d + k) + 1);
    resize(out.means, d + k);
    moments_args.gram = out.moments.data();
    moments_args.cross = out.moments.data() + d * d;
    moments_args.weight_sum = out.moments.data() + d * (d + k);
    moments_args.mean = out.means.data();

    SolveNormalArgs<T> solve_args;
    solve_args.batch = in.batch;
    solve_args.n = n;
    solve_args.d = d;
    solve_args.k = k;
    solve_args.x = in.x.view;
    solve_args.x_half = in.x_half;
    solve_args.y = in.y.view;
    solve_args.weight = in.weight.view;
    solve_args.ridge = in.ridge.view;
    solve_args.refine = in.refine;
    resize(out.solution, problems * d * k);
    resize(out.factor, problems * d * d);
    resize(out.info, problems);
    resize(out.rcond, problems);
    resize(out.jittered, problems);
    solve_args.solution = out.solution.data();
    solve_args.factor = out.factor.data();
    solve_args.info = out.info.data();
    solve_args.rcond = out.rcond.data();
    solve_args.jittered = out.jittered.data();

    if constexpr (Tuned) {
        attempt("gram", [&] { return gram(gram_args); });
        attempt("moments", [&] { return moments(moments_args); });
        attempt("solve_normal", [&] { return solve_normal(solve_args); });
    } else {
        check(reference::gram(gram_args) == Status::ok && reference::moments(moments_args) == Status::ok &&
                  reference::solve_normal(solve_args) == Status::ok,
              "reference");
    }

    SolveNormalBackwardArgs<T> backward_args;
    backward_args.batch = in.batch;
    backward_args.n = n;
    backward_args.d = d;
    backward_args.k = k;
    backward_args.grad = in.grad.view;
    backward_args.x = in.x.view;
    backward_args.y = in.y.view;
    backward_args.weight = in.weight.view;
    backward_args.solution = {out.solution.data(), k, 1, {d * k}};
    backward_args.factor = {out.factor.data(), d, 1, {d * d}};
    backward_args.info = {out.info.data(), 0, 0, {1}};
    resize(out.grad_x, problems * n * d);
    resize(out.grad_y, problems * n * k);
    resize(out.grad_weight, problems * n);
    resize(out.grad_ridge, problems * d);
    backward_args.grad_x = out.grad_x.data();
    backward_args.grad_y = out.grad_y.data();
    backward_args.grad_weight = out.grad_weight.data();
    backward_args.grad_ridge = out.grad_ridge.data();

    SolveSpdArgs<T> spd_args;
    std::vector<T> system = out.gram;
    for (int64_t problem = 0; problem < problems; ++problem) {
        for (int64_t i = 0; i < d; ++i) {
            system[(problem * d + i) * d + i] += T(1);
            for (int64_t j = i + 1; j < d; ++j) {
                system[(problem * d + i) * d + j] = std::numeric_limits<T>::quiet_NaN();  // must not be read
            }
        }
    }
    spd_args.batch = in.batch;
    spd_args.d = d;
    spd_args.k = k;
    spd_args.a = {system.data(), d, 1, {d * d}};
    spd_args.b = in.grad.view;
    std::vector<T> factor(out.factor.size());
    resize(out.spd, problems * d * k);
    resize(out.spd_info, problems);
    spd_args.solution = out.spd.data();
    spd_args.factor = factor.data();
    spd_args.info = out.spd_info.data();

    CholeskySolveArgs<T> packed_args;
    packed_args.batch = in.batch;
    packed_args.d = d;
    packed_args.k = k;
    packed_args.factor = {factor.data(), d, 1, {d * d}};
    packed_args.b = in.grad.view;
    resize(out.packed, problems * d * k);
    packed_args.solution = out.packed.data();

    if constexpr (Tuned) {
        attempt("solve_normal_backward", [&] { return solve_normal_backward(backward_args); });
        attempt("solve_spd", [&] { return solve_spd(spd_args); });
        attempt("cholesky_solve", [&] { return cholesky_solve(packed_args); });
    } else {
        check(reference::solve_normal_backward(backward_args) == Status::ok &&
                  reference::solve_spd(spd_args) == Status::ok && reference::cholesky_solve(packed_args) == Status::ok,
              "reference");
    }
    return out;
}

template <class T>
void compare(const Inputs<T>& in, const std::string& name) {
    const Results<T> expected = run<false>(in);
    const Results<T> got = run<true>(in);
    const double condition = 50.0 + static_cast<double>(in.size.n);
    const auto close = [&](const auto& a, const auto& b, const char* what) {
        const double error = difference(a, b);
        check(error <= tolerance<T>(condition), name + " " + what + ": error " + std::to_string(error));
    };
    close(got.gram, expected.gram, "gram");
    close(got.cross, expected.cross, "cross");
    close(got.moments, expected.moments, "moments");
    close(got.means, expected.means, "means");
    close(got.solution, expected.solution, "solution");
    close(got.factor, expected.factor, "factor");
    close(got.grad_x, expected.grad_x, "grad_x");
    close(got.grad_y, expected.grad_y, "grad_y");
    close(got.grad_weight, expected.grad_weight, "grad_weight");
    close(got.grad_ridge, expected.grad_ridge, "grad_ridge");
    close(got.spd, expected.spd, "solve_spd");
    close(got.packed, expected.packed, "cholesky_solve");
    check(identical(got.info, expected.info), name + " info");
    check(identical(got.spd_info, expected.spd_info), name + " solve_spd info");
    for (size_t i = 0; i < got.rcond.size(); ++i) {
        const double ratio = static_cast<double>(got.rcond[i]) / static_cast<double>(expected.rcond[i]);
        check(ratio > 0.99 && ratio < 3.0, name + " rcond ratio " + std::to_string(ratio));
    }

    const Results<T> threaded = with_threads([&] { return run<true>(in); });
    check(identical(threaded.solution, got.solution) && identical(threaded.factor, got.factor) &&
              identical(threaded.gram, got.gram) && identical(threaded.cross, got.cross) &&
              identical(threaded.grad_x, got.grad_x) && identical(threaded.spd, got.spd) &&
              identical(threaded.moments, got.moments),
          name + " with threads: not bitwise the same");
}

template <class T>
void test_sizes(const char* type) {
    std::mt19937 random(1);
    const std::vector<Size<T>> sizes = {
        {1, 1, 1, 1},     {3, 0, 2, 1},    {17, 5, 2, 3},     {9, 16, 8, 1},    {5, 20, 15, 2},  {33, 33, 16, 16},
        {6, 40, 31, 5},   {4, 50, 32, 16}, {3, 60, 32, 17},   {2, 70, 33, 1},   {2, 129, 47, 4}, {1, 128, 48, 3},
        {1, 140, 49, 49}, {2, 100, 95, 2}, {1, 110, 96, 100}, {1, 130, 97, 1},  {1, 60, 120, 7}, {1, 70, 257, 2},
        {69, 6, 5, 17},   {70, 9, 7, 37},  {66, 12, 9, 53},   {65, 20, 24, 33}, {1, 4097, 5, 2}, {2, 8200, 10, 1},
        {1, 12500, 5, 1}, {1, 40, 400, 1},
    };
    using Layout = typename Table<T>::Layout;
    for (const Size<T>& size : sizes) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
            // The layouts differ in loading alone, which small sizes show.
            if (layout != Layout::rows && (size.d > 64 || size.n > 200)) {
                continue;
            }
            for (const int64_t refine : {0, 1, 2}) {
                // Refinement reads rows as the first pass does, and solves as for smaller matrices. Of a pack two steps
                // are looked at, which begin from other sums.
                const bool packed = size.d <= 32 && size.k <= 16 && size.n < 200;
                if ((refine > 0 && (layout != Layout::rows || size.d > 257)) || (refine > 1 && !packed)) {
                    continue;
                }
                const std::string name = std::string(type) + " B" + std::to_string(size.problems) + " n" +
                                         std::to_string(size.n) + " d" + std::to_string(size.d) + " k" +
                                         std::to_string(size.k) + " layout " +
                                         std::to_string(static_cast<int>(layout)) + " refine " + std::to_string(refine);
                compare(Inputs<T>(random, size, layout, refine), name);
            }
        }
    }
}

// Rows of 16 bits: as the reference has them, and bitwise what the same numbers in float give.
void test_half() {
    std::mt19937 random(5);
    using Layout = Table<float>::Layout;
    for (const Element element : {Element::bfloat16, Element::float16}) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
            for (const Size<float>& size :
                 {Size<float>{17, 9, 5, 2}, {5, 40, 31, 3}, {2, 70, 33, 1}, {1, 300, 75, 2}}) {
                Inputs<float> in(random, size, layout, size.d == 31 || size.d == 33 ? 1 : 0);
                in.narrow(element);
                const std::string name = "half " + std::to_string(static_cast<int>(element)) + " d" +
                                         std::to_string(size.d) + " layout " + std::to_string(static_cast<int>(layout));
                compare(in, name);
                const Results<float> half = run<true>(in);
                in.x_half = {};
                const Results<float> wide = run<true>(in);
                check(identical(half.gram, wide.gram) && identical(half.cross, wide.cross) &&
                          identical(half.moments, wide.moments) && identical(half.solution, wide.solution),
                      name + ": not bitwise that of floats");
            }
        }
    }
    Inputs<float> long_rows(random, {1, 8300, 9, 1}, Layout::rows, 0);
    long_rows.narrow(Element::bfloat16);
    compare(long_rows, "half long");
}

// Gram matrices of bfloat16 rows without weights and targets. Small whole numbers leave nothing to round.
void test_half_alone() {
    std::mt19937 random(6);
    const std::string target = target_name(active_target());
    for (const auto& [n, d] : {std::pair<int64_t, int64_t>{1, 128}, {31, 150}, {130, 200}, {4100, 128}, {129, 780}}) {
        for (const bool by_columns : {false, true}) {
            if (by_columns && n * d > 30'000) {
                continue;  // the layouts differ in loading alone
            }
            std::vector<float> values(static_cast<size_t>(n * d));
            std::vector<uint16_t> half(values.size());
            for (size_t e = 0; e < values.size(); ++e) {
                values[e] = static_cast<float>(static_cast<int>(random() % 9) - 4);
                uint32_t bits;
                std::memcpy(&bits, &values[e], sizeof(bits));
                half[e] = static_cast<uint16_t>(bits >> 16);
            }
            const int64_t row = by_columns ? 1 : d;
            const int64_t col = by_columns ? n : 1;
            GramArgs<float> args;
            args.n = n;
            args.d = d;
            args.x_half = {Element::bfloat16, {half.data(), row, col}};
            std::vector<float> found(static_cast<size_t>(d * d));
            args.gram = found.data();
            const std::string name = target + " half alone n" + std::to_string(n) + " d" + std::to_string(d) +
                                     (by_columns ? " by columns" : "");
            check(gram(args) == Status::ok, name + " status");
            std::vector<float> expected(found.size(), 0.0F);
            for (int64_t p = 0; p < n; ++p) {
                for (int64_t i = 0; i < d; ++i) {
                    for (int64_t j = i; j < d; ++j) {
                        expected[static_cast<size_t>(i * d + j)] += values[static_cast<size_t>(p * row + i * col)] *
                                                                    values[static_cast<size_t>(p * row + j * col)];
                    }
                }
            }
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t j = 0; j < i; ++j) {
                    expected[static_cast<size_t>(i * d + j)] = expected[static_cast<size_t>(j * d + i)];
                }
            }
            check(identical(found, expected), name);
        }
    }
    // The only kernel of the family that amx does not share with avx512.
    if (active_target() == Target::avx512 && target_supported(Target::amx)) {
        check(select_target("amx") == SelectResult::ok, "select_target");
        test_half_alone();
        check(select_target("avx512") == SelectResult::ok, "select_target");
    }
}

// A bad problem must be reported and must not change one bit of another.
template <class T>
void test_isolation_of(const std::string& name, int64_t d, int64_t refine) {
    std::mt19937 random(2);
    Inputs<T> in(random, {37, 2 * d, d, 2}, Table<T>::Layout::rows, refine);
    const Results<T> clean = run<true>(in);
    in.x.data[static_cast<size_t>(11 * 2 * d * d + d + 2)] = std::numeric_limits<T>::quiet_NaN();
    in.y.data[static_cast<size_t>(20 * 2 * d * 2 + 3)] = std::numeric_limits<T>::infinity();
    const Results<T> got = run<true>(in);
    for (int64_t problem = 0; problem < 37; ++problem) {
        const bool bad = problem == 11 || problem == 20;
        const auto same = [&](const std::vector<T>& a, const std::vector<T>& b, int64_t each) {
            return std::memcmp(a.data() + problem * each, b.data() + problem * each,
                               static_cast<size_t>(each) * sizeof(T)) == 0;
        };
        check((got.info[static_cast<size_t>(problem)] != 0) == bad, name + " info " + std::to_string(problem));
        if (bad) {
            check(std::isnan(got.solution[static_cast<size_t>(problem * d * 2)]), name + " NaN solution");
            check(got.grad_x[static_cast<size_t>(problem * 2 * d * d)] == T(0), name + " zero gradient");
        } else {
            check(same(got.solution, clean.solution, d * 2) && same(got.factor, clean.factor, d * d) &&
                      same(got.grad_x, clean.grad_x, 2 * d * d),
                  name + " changed problem " + std::to_string(problem));
        }
    }
    check(got.info[11] == 3, name + ": info is " + std::to_string(got.info[11]));
    check(got.info[20] == d + 1, name + ": info is " + std::to_string(got.info[20]));
}

template <class T>
void test_isolation(const char* type) {
    for (const int64_t d : {5, 40}) {
        for (const int64_t refine : {0, 1}) {
            test_isolation_of<T>(
                std::string(type) + " isolation d" + std::to_string(d) + " refine " + std::to_string(refine), d,
                refine);
        }
    }
}

template <class T>
void test_segments(const char* type) {
    std::mt19937 random(4);
    using Layout = typename Table<T>::Layout;
    for (const int64_t d : {1, 7, 25, 48, 130}) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
            if (layout != Layout::rows && d > 25) {
                continue;
            }
            const int64_t k = d % 3 + 1;
            const std::string name = std::string(type) + " segments d" + std::to_string(d) + " layout " +
                                     std::to_string(static_cast<int>(layout));
            Segments<T> gathered(random, lengths_around(d), d, k, true, layout);
            gathered.compare(name + " ridge of each");
            gathered.args.ridge.row = 0;  // one ridge for all: the dual form
            gathered.compare(name + " ridge");
            gathered.args.ridge = {};
            gathered.args.weight = {};
            gathered.compare(name + " base alone");
            Segments<T> in_order(random, lengths_around(d), d, k, false, layout);
            in_order.args.base = in_order.args.ridge = {};
            in_order.args.uniform_ridge = 0.5;
            in_order.compare(name + " uniform ridge");
        }
    }
    Segments<T>(random, {3, 8200, 5, 12300, 2}, 5, 1, true, Layout::rows).compare(std::string(type) + " long segments");
    // Bad rows of a dual problem and of a primal one fail these two alone.
    Segments<T> in(random, lengths_around(20), 20, 1, false, Layout::rows);
    in.args.ridge.row = 0;
    const Results<T> clean = in.run(true, false);
    in.x.data[static_cast<size_t>(in.offsets[1] * 20 + 4)] = std::numeric_limits<T>::quiet_NaN();
    in.x.data[static_cast<size_t>(in.offsets[16] * 20 + 4)] = std::numeric_limits<T>::quiet_NaN();
    in.y.data[static_cast<size_t>(in.offsets[15])] = std::numeric_limits<T>::infinity();
    const Results<T> got = in.run(true, false);
    for (int64_t segment = 0; segment < in.args.segments; ++segment) {
        const int32_t expected = segment == 1 || segment == 16 ? 5 : segment == 15 ? 21 : 0;
        check(got.info[segment] == expected, std::string(type) + " segments: info " + std::to_string(segment));
        const bool same = std::memcmp(&got.solution[segment * 20], &clean.solution[segment * 20], 20 * sizeof(T)) == 0;
        check(same == (expected == 0), std::string(type) + " segments: isolation " + std::to_string(segment));
    }
}

// Every allocation fails once, and every parallel loop: packs, one problem, rows in pieces and groups of columns, a
// factorisation that is shared among threads, refinement.
template <class T>
void test_faults(const char* type) {
    trial = Trial::faults;
    std::mt19937 random(3);
    const std::vector<Size<T>> sizes = {
        {17, 5, 2, 3}, {2, 100, 95, 2}, {1, 290, 160, 2}, {1, 8200, 10, 1}, {1, 40, 257, 1}};
    for (const Size<T>& size : sizes) {
        for (const int64_t refine : {0, 1}) {
            compare(Inputs<T>(random, size, Table<T>::Layout::rows, refine), std::string(type) + " faults");
        }
    }
    Segments<T>(random, lengths_around(9), 9, 2, true, Table<T>::Layout::rows).compare("segments faults");
    Segments<T>(random, {8200, 2}, 3, 1, false, Table<T>::Layout::rows).compare("long segments faults");
    // Singular matrices that get jitter, in a pack and alone.
    for (const int64_t d : {3, 40}) {
        const std::vector<T> x(static_cast<size_t>(20 * d), T(1));
        std::vector<T> solution(static_cast<size_t>(d)), jittered(1);
        int32_t info = -1;
        SolveNormalArgs<T> args;
        args.n = 20;
        args.d = d;
        args.k = 1;
        args.x = {x.data(), d, 1, {}};
        args.y = {x.data(), 1, 1, {}};
        args.jitter = 1e-3;
        args.solution = solution.data();
        args.info = &info;
        args.jittered = jittered.data();
        attempt("jitter", [&] { return solve_normal(args); });
        const auto sum = static_cast<double>(std::accumulate(solution.begin(), solution.end(), T(0)));
        check(info == 0 && jittered[0] > T(0) && std::abs(sum - 1.0) < 1e-2, std::string(type) + " jitter's solution");
    }
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(
        argc, argv,
        {{"unknown_target",
          [] { check(select_target("no such target") == SelectResult::unknown, "select_target of an unknown name"); }},
         {"sizes_fp32", [] { test_sizes<float>("fp32"); }},
         {"sizes_fp64", [] { test_sizes<double>("fp64"); }},
         {"gram_packs_fp32", [] { test_gram_packs<float>("fp32"); }},
         {"gram_packs_fp64", [] { test_gram_packs<double>("fp64"); }},
         {"half", test_half},
         {"half_alone", test_half_alone},
         {"segments_fp32", [] { test_segments<float>("fp32"); }},
         {"segments_fp64", [] { test_segments<double>("fp64"); }},
         {"isolation_fp32", [] { test_isolation<float>("fp32"); }},
         {"isolation_fp64", [] { test_isolation<double>("fp64"); }},
         {"faults_fp32", [] { test_faults<float>("fp32"); }, Where::first_target},
         {"faults_fp64", [] { test_faults<double>("fp64"); }, Where::first_target}},
        Target::avx512);
}
