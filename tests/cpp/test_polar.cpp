// polar_factor against the plain loops in double, for every CPU target of this machine: at every edge of tiles, panels
// and blocks, by rows, by columns and strided, serially and with threads. Built with AddressSanitizer and
// UndefinedBehaviorSanitizer by make test-cpp.
#include "polar/polar.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

struct Factors {
    std::vector<float> factor;
    std::vector<int32_t> info;
};

// Two iterations for singular values from 1e-2, as ops/polar/schema.py computes them; or three from 0.1.
std::vector<PolarStep> steps_of(int count) {
    if (count == 2) {
        return {{54.324294676139445, 710.8701006769384, 764.1943953530778},
                {4.332885835554185, 2.7770319982094294, 6.109917833763614}};
    }
    return {{11.84842627979188, 29.422088187019774, 40.270514466811655},
            {3.2285104219890126, 1.2415646752284117, 3.470075097217425},
            {3.000070279300067, 1.000070280534862, 3.0001405598349287}};
}

template <bool Tuned>
Factors factors(const Batched<const float>& m, int64_t problems, int64_t rows, int64_t columns, int steps) {
    Factors out{std::vector<float>(static_cast<size_t>(problems * rows * columns)),
                std::vector<int32_t>(static_cast<size_t>(problems), 7)};
    PolarArgs<float> args;
    args.batch.dims = 1;
    args.batch.size[0] = problems;
    args.rows = rows;
    args.columns = columns;
    args.m = m;
    for (const PolarStep& step : steps_of(steps)) {
        args.step[args.steps++] = step;
    }
    args.factor = out.factor.data();
    args.info = out.info.data();
    if constexpr (Tuned) {
        attempt("polar_factor", [&] { return polar_factor(args); });
    } else {
        check(reference::polar_factor(args) == Status::ok, "reference");
    }
    return out;
}

void test_case(std::mt19937& random, int64_t problems, int64_t rows, int64_t columns, int steps) {
    using Layout = Table<float>::Layout;
    for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
        const std::string label = std::to_string(problems) + " of " + std::to_string(rows) + " x " +
                                  std::to_string(columns) + " layout " + std::to_string(static_cast<int>(layout));
        const Table<float> m(random, problems, rows, columns, layout);
        const Factors expected = factors<false>(m.view, problems, rows, columns, steps);
        const Factors serial = factors<true>(m.view, problems, rows, columns, steps);
        check(serial.info == expected.info, "info " + label);
        // Small singular values of square matrices are raised, and their rounding with them.
        check(difference(serial.factor, expected.factor) < 5e-3, "factor " + label);
        const Factors threaded = with_threads([&] { return factors<true>(m.view, problems, rows, columns, steps); });
        check(identical(threaded.factor, serial.factor), "threads " + label);
    }
}

// NaN and infinity are reported, wherever they are; zeros and scales at both ends of the type's range come out right;
// no neighbour's bit changes.
void test_values(std::mt19937& random) {
    const int64_t rows = 13;
    const int64_t columns = 29;
    const int64_t size = rows * columns;
    Table<float> m(random, 4, rows, columns, Table<float>::Layout::rows);
    const Factors good = factors<true>(m.view, 4, rows, columns, 2);
    const auto same = [&](const Factors& found, int64_t problem) {
        return std::memcmp(found.factor.data() + problem * size, good.factor.data() + problem * size,
                           static_cast<size_t>(size) * sizeof(float)) == 0;
    };
    for (const float scale : {0x1p-110F, 0x1p-30F, 0x1p100F}) {
        Table<float> scaled = m;
        scaled.view.data = scaled.data.data();
        std::for_each(scaled.data.begin() + size, scaled.data.begin() + 2 * size, [&](float& x) { x *= scale; });
        const Factors found = factors<true>(scaled.view, 4, rows, columns, 2);
        check(same(found, 0) && same(found, 1) && same(found, 2), "scale");
    }
    for (const int64_t place : {int64_t{0}, size / 2, size - 1}) {
        for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            Table<float> broken = m;
            broken.view.data = broken.data.data();
            broken.data[static_cast<size_t>(2 * size + place)] = bad;
            const Factors found = factors<true>(broken.view, 4, rows, columns, 2);
            check(found.info == std::vector<int32_t>({0, 0, 1, 0}), "not finite: info");
            check(std::isnan(found.factor[static_cast<size_t>(2 * size)]), "not finite: factor");
            check(same(found, 0) && same(found, 1) && same(found, 3), "not finite: neighbours");
        }
    }
    std::fill_n(m.data.begin(), size, 0.0F);
    const Factors zero = factors<true>(m.view, 4, rows, columns, 2);
    check(zero.info[0] == 0 && zero.factor[0] == 0.0F && zero.factor[static_cast<size_t>(size - 1)] == 0.0F, "zero");
    check(same(zero, 1), "zero: neighbour");
}

void test_all() {
    std::mt19937 random(1);
    for (const int64_t n : {1, 3, 4, 5, 23, 24, 25, 47, 49}) {
        test_case(random, 3, n, n + 7, 2);
    }
    test_case(random, 3, 40, 31, 3);
    test_case(random, 2, 97, 97, 2);
    test_case(random, 2, 145, 130, 2);
    test_case(random, 1, 33, 400, 2);
    test_case(random, 1, 400, 33, 2);
    test_case(random, 0, 4, 5, 2);
    test_values(random);
}

void test_faults() {
    std::mt19937 random(2);
    trial = Trial::faults;
    test_case(random, 3, 25, 31, 2);
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv, {{"faults", test_faults}, {"factors", test_all}}, Target::avx512);
}
