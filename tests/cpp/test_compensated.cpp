// inverse_cholesky and compensated_sweep against the plain loops, for every CPU target of this machine, in both types,
// at every edge of tiles, steps, blocks and groups, serially and with threads. Built with AddressSanitizer and
// UndefinedBehaviorSanitizer by make test-cpp.
#include "compensated/compensated.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

template <class T>
std::string described(const std::string& what) {
    return what + (sizeof(T) == 4 ? " f32" : " f64");
}

// ---------------------------------------------------------------- inverse_cholesky

// `problems` matrices XᵀX / n + 0.1 that are well conditioned; only the lower triangles hold them.
template <class T>
std::vector<T> gram_matrices(std::mt19937& random, int64_t problems, int64_t n) {
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    std::vector<T> result;
    for (int64_t problem = 0; problem < problems; ++problem) {
        const int64_t rows = n + 3;
        std::vector<double> x(static_cast<size_t>(rows * n));
        std::generate(x.begin(), x.end(), [&] { return uniform(random); });
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                double sum = i == j ? 0.1 : 0.0;
                for (int64_t r = 0; r < rows; ++r) {
                    sum += x[static_cast<size_t>(r * n + i)] * x[static_cast<size_t>(r * n + j)] /
                           static_cast<double>(rows);
                }
                result.push_back(j > i ? std::numeric_limits<T>::quiet_NaN() : static_cast<T>(sum));
            }
        }
    }
    return result;
}

template <class T>
struct Inverse {
    std::vector<T> factor;
    std::vector<int32_t> info;
};

// `transposed`: the matrices are stored by columns. `unit`: R, not U.
template <bool Tuned, class T>
Inverse<T> invert(const std::vector<T>& a, int64_t problems, int64_t n, bool transposed = false, bool unit = false) {
    const std::vector<T> damping = {T(0.01)};
    Inverse<T> out{std::vector<T>(a.size()), std::vector<int32_t>(static_cast<size_t>(problems), 7)};
    InverseCholeskyArgs<T> args;
    args.batch.dims = 1;
    args.batch.size[0] = problems;
    args.n = n;
    args.unit = unit;
    args.a = {a.data(), transposed ? 1 : n, transposed ? n : 1, {n * n}};
    args.damping = {damping.data(), 0, 0, {0}};
    args.factor = out.factor.data();
    args.info = out.info.data();
    if constexpr (Tuned) {
        attempt("inverse_cholesky", [&] { return inverse_cholesky(args); });
    } else {
        check(reference::inverse_cholesky(args) == Status::ok, "reference");
    }
    return out;
}

template <class T>
void test_inverse_case(std::mt19937& random, int64_t problems, int64_t n) {
    const std::string label = described<T>(std::to_string(problems) + " matrices of order " + std::to_string(n));
    const std::vector<T> a = gram_matrices<T>(random, problems, n);
    const Inverse<T> expected = invert<false>(a, problems, n);
    const Inverse<T> serial = invert<true>(a, problems, n);
    check(serial.info == expected.info, "info " + label);
    check(difference(serial.factor, expected.factor) < (sizeof(T) == 4 ? 2e-5 : 1e-12), "factor " + label);
    const Inverse<T> threaded = with_threads([&] { return invert<true>(a, problems, n); });
    check(identical(threaded.factor, serial.factor), "threads " + label);
    const Inverse<T> without = invert<false>(a, problems, n, false, true);
    const Inverse<T> unit = invert<true>(a, problems, n, false, true);
    check(unit.info == expected.info, "info of R " + label);
    check(difference(unit.factor, without.factor) < (sizeof(T) == 4 ? 2e-5 : 1e-12), "R " + label);
    check(identical(with_threads([&] { return invert<true>(a, problems, n, false, true); }).factor, unit.factor),
          "threads of R " + label);
    std::vector<T> columns(a.size());
    for (int64_t problem = 0; problem < problems; ++problem) {
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                columns[static_cast<size_t>((problem * n + j) * n + i)] =
                    a[static_cast<size_t>((problem * n + i) * n + j)];
            }
        }
    }
    check(identical(invert<true>(columns, problems, n, true).factor, serial.factor), "by columns " + label);
}

template <class T>
void test_inverse() {
    std::mt19937 random(1);
    for (const int64_t n : {2, 3, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33}) {
        test_inverse_case<T>(random, 19, n);
    }
    for (const int64_t n : {1, 4, 47, 95, 96, 97, 191, 192, 193, 241, 288, 300}) {
        test_inverse_case<T>(random, n < 50 ? 5 : 1, n);
    }
    test_inverse_case<T>(random, 0, 3);
    test_inverse_case<T>(random, 3, 0);
}

// A matrix that fails says why, and leaves its neighbours' bits alone.
template <class T>
void test_inverse_failures(int64_t n) {
    std::mt19937 random(2);
    std::vector<T> a = gram_matrices<T>(random, 3, n);
    const Inverse<T> good = invert<true>(a, 3, n);
    T* second = a.data() + n * n;
    const T before = second[n / 4 * 3 * n + n / 10];
    second[n / 4 * 3 * n + n / 10] = std::numeric_limits<T>::quiet_NaN();
    const auto neighbours_are_the_same = [&](const Inverse<T>& found) {
        const auto size = static_cast<size_t>(n * n) * sizeof(T);
        return std::memcmp(found.factor.data(), good.factor.data(), size) == 0 &&
               std::memcmp(found.factor.data() + 2 * n * n, good.factor.data() + 2 * n * n, size) == 0;
    };
    Inverse<T> found = invert<true>(a, 3, n);
    check(found.info == std::vector<int32_t>({0, kNotFinite, 0}), described<T>("NaN: info"));
    check(neighbours_are_the_same(found), described<T>("NaN: neighbours"));
    check(std::isnan(found.factor[static_cast<size_t>(n * n)]), described<T>("NaN: factor"));
    second[n / 4 * 3 * n + n / 10] = before;
    // The second of the last two features is minus what it was: the minor of order 2 from the end is not positive.
    second[(n - 2) * (n + 1)] = T(-1);
    found = invert<true>(a, 3, n);
    check(found.info == std::vector<int32_t>({0, 2, 0}), described<T>("indefinite: info"));
    check(found.info == invert<false>(a, 3, n).info, described<T>("indefinite: reference"));
    check(neighbours_are_the_same(found), described<T>("indefinite: neighbours"));
}

template <class T>
void test_inverse_failures() {
    test_inverse_failures<T>(20);
    test_inverse_failures<T>(200);
}

// ---------------------------------------------------------------- compensated_sweep

struct Sweep {
    const char* name;
    int64_t rows, columns;
    int64_t bits = 0;
    bool symmetric = false;
    int64_t group_size = 1;
    bool given = false;  // grids of interleaved groups
    double sparsity = 0.0;
    int64_t keep = 0, of = 0;
    bool unit = false;
};

template <class T>
struct Swept {
    std::vector<T> w, scale, zero;
    std::vector<uint8_t> codes;
    std::vector<double> error;
};

template <bool Tuned, class T>
Swept<T> sweep(const Sweep& sizes, const std::vector<T>& w, const std::vector<T>& factor) {
    const auto rows = static_cast<size_t>(sizes.rows);
    const auto columns = static_cast<size_t>(sizes.columns);
    const size_t groups =
        sizes.given ? 2 : (columns + static_cast<size_t>(sizes.group_size) - 1) / static_cast<size_t>(sizes.group_size);
    std::vector<int64_t> group(columns);
    for (size_t j = 0; j < columns; ++j) {
        group[j] = static_cast<int64_t>(j % 2);
    }
    Swept<T> out;
    out = {w, std::vector<T>(rows * groups), std::vector<T>(rows * groups), std::vector<uint8_t>(rows * columns),
           std::vector<double>(rows)};
    const auto once = [&] {
        std::fill(out.scale.begin(), out.scale.end(), T(0.07));
        std::fill(out.zero.begin(), out.zero.end(), T(5));
        SweepArgs<T> args;
        args.rows = sizes.rows;
        args.columns = sizes.columns;
        args.w = w.data();
        args.swept = out.w.data();
        args.factor = factor.data();
        args.unit = sizes.unit;
        args.bits = sizes.bits;
        args.symmetric = sizes.symmetric;
        args.group_size = sizes.group_size;
        args.group = sizes.given ? group.data() : nullptr;
        args.groups = static_cast<int64_t>(groups);
        args.scale = out.scale.data();
        args.zero = out.zero.data();
        args.codes = out.codes.data();
        args.sparsity = sizes.sparsity;
        args.keep = sizes.keep;
        args.of = sizes.of;
        args.error = out.error.data();
        return Tuned ? compensated_sweep(args) : reference::compensated_sweep(args);
    };
    if constexpr (Tuned) {
        attempt("compensated_sweep", once);
    } else {
        check(once() == Status::ok, "reference");
    }
    return out;
}

template <class T>
void test_sweep_case(std::mt19937& random, const Sweep& sizes) {
    const std::string label = described<T>(std::string(sizes.name) + " " + std::to_string(sizes.rows) + " x " +
                                           std::to_string(sizes.columns));
    const std::vector<T> factor =
        invert<false>(gram_matrices<T>(random, 1, sizes.columns), 1, sizes.columns, false, sizes.unit).factor;
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    std::vector<T> w(static_cast<size_t>(sizes.rows * sizes.columns));
    std::generate(w.begin(), w.end(), [&] { return static_cast<T>(uniform(random)); });
    // A row of zeros.
    std::fill_n(w.begin(), sizes.rows > 0 ? sizes.columns : 0, T(0));
    const Swept<T> expected = sweep<false>(sizes, w, factor);
    const Swept<T> serial = sweep<true>(sizes, w, factor);
    if (sizeof(T) == 8 && !sizes.symmetric) {
        check(serial.codes == expected.codes, "codes " + label);
        check(difference(serial.w, expected.w) < 1e-10, "weights " + label);
        check(difference(serial.scale, expected.scale) < 1e-10, "scale " + label);
        check(difference(serial.error, expected.error) < 1e-10, "error " + label);
    } else {
        // A tie may go the other way, and all that follows in its row with it: the rows' errors are alike. In float
        // there are some, and the least weight of a symmetric grid is one in any type.
        int64_t unlike = 0;
        double off = 0.0;
        double sum = 1e-30;
        for (size_t i = 0; i < serial.w.size(); ++i) {
            unlike += std::abs(serial.w[i] - expected.w[i]) > 1e-3F ? 1 : 0;
        }
        for (size_t row = 0; row < serial.error.size(); ++row) {
            off += std::abs(serial.error[row] - expected.error[row]);
            sum += expected.error[row];
        }
        check(sizes.symmetric || unlike * 50 <= static_cast<int64_t>(serial.w.size()), "weights " + label);
        check(off <= 0.02 * sum, "error " + label);
    }
    const Swept<T> threaded = with_threads([&] { return sweep<true>(sizes, w, factor); });
    check(identical(threaded.w, serial.w) && threaded.codes == serial.codes &&
              identical(threaded.scale, serial.scale) && identical(threaded.error, serial.error),
          "threads " + label);
}

const Sweep kSweeps[] = {
    {"one weight", 1, 1, 4, true, 1},
    {"no rows", 0, 5, 4, true, 5},
    {"2 bits in groups of 24", 65, 150, 2, false, 24},
    {"3 bits in groups of 32, symmetric", 63, 131, 3, true, 32},
    {"4 bits in groups of 200", 70, 460, 4, false, 200},
    {"8 bits, a grid a row", 64, 129, 8, true, 129},
    {"4 bits, grids given", 3, 140, 4, false, 1, true},
    {"4 bits, a grid a row, R", 66, 300, 4, false, 300, false, 0.0, 0, 0, true},
    {"4 bits, grids given, R", 67, 512, 4, false, 1, true, 0.0, 0, 0, true},
    {"half", 66, 131, 0, false, 1, false, 0.5},
    {"2 of 4", 65, 420, 0, false, 1, false, 0.0, 2, 4},
    {"1 of 3", 5, 150, 0, false, 1, false, 0.0, 1, 3},
    {"16 of 32, 4 bits in groups of 64", 9, 160, 4, true, 64, false, 0.0, 16, 32},
    {"half, 4 bits in groups of 16", 66, 131, 4, true, 16, false, 0.5},
};

template <class T>
void test_sweep() {
    std::mt19937 random(3);
    for (const Sweep& sizes : kSweeps) {
        test_sweep_case<T>(random, sizes);
    }
}

void test_faults() {
    trial = Trial::faults;
    std::mt19937 random(4);
    test_inverse_case<float>(random, 2, 250);
    test_sweep_case<double>(random, {"faults", 70, 150, 4, true, 64, false, 0.5});
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"faults", test_faults},
                        {"inverse_fp32", test_inverse<float>},
                        {"inverse_fp64", test_inverse<double>},
                        {"failures_fp32", test_inverse_failures<float>},
                        {"failures_fp64", test_inverse_failures<double>},
                        {"sweep_fp32", test_sweep<float>},
                        {"sweep_fp64", test_sweep<double>}},
                       Target::avx512);
}
