// The tuned language-model head against the plain loops, for every CPU target of this machine, in every type, at the
// edges of tiles, panels, blocks and chunks, serially and with threads. Built with AddressSanitizer and
// UndefinedBehaviorSanitizer by make test-cpp.
#include <array>
#include <type_traits>

#include "lmhead/lmhead.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

float element(double value, float) { return static_cast<float>(value); }
double element(double value, double) { return value; }
BFloat16 element(double value, BFloat16) {
    const auto number = static_cast<float>(value);
    uint32_t word;
    std::copy_n(reinterpret_cast<const char*>(&number), sizeof(word), reinterpret_cast<char*>(&word));
    return {static_cast<uint16_t>(word >> 16)};
}

enum class Layout { rows, columns, strided };

// Memory of exactly the size that the strides reach, so that AddressSanitizer sees the first element too many.
template <class T>
struct Table {
    std::vector<T> data;
    Matrix<const T> view;

    Table(std::mt19937& random, int64_t rows, int64_t cols, Layout layout, double scale) {
        const int64_t step = layout == Layout::strided ? 3 : 1;
        data.resize(static_cast<size_t>(std::max<int64_t>(rows * cols * step - (step - 1), 0)));
        std::uniform_real_distribution<double> uniform(-scale, scale);
        std::generate(data.begin(), data.end(), [&] { return element(uniform(random), T{}); });
        view.data = data.data();
        view.row = layout == Layout::columns ? 1 : cols * step;
        view.col = layout == Layout::columns ? rows : step;
    }

    Batched<const T> per_row() const {
        Batched<const T> result;
        result.data = view.data;
        result.row = view.col;
        result.batch[0] = view.row;
        return result;
    }
};

struct Case {
    int64_t n, d, v;
    double smoothing = 0.0;
    bool bias = true;
    Layout layout = Layout::rows;
};

template <class T, class Input>
struct Inputs {
    Case size;
    Table<Input> input, weight, bias, input_tangent, weight_tangent, bias_tangent;
    Table<T> row_weight, row_weight_tangent;
    std::vector<int64_t> target;

    Inputs(std::mt19937& random, Case size_)
        : size(size_),
          input(random, size_.n, size_.d, size_.layout, 1.0),
          weight(random, size_.v, size_.d, size_.layout, 1.0),
          bias(random, size_.v, 1, size_.layout, 2.0),
          input_tangent(random, size_.n, size_.d, size_.layout, 1.0),
          weight_tangent(random, size_.v, size_.d, size_.layout, 1.0),
          bias_tangent(random, size_.v, 1, size_.layout, 1.0),
          row_weight(random, size_.n, 1, size_.layout, 1.0),
          row_weight_tangent(random, size_.n, 1, size_.layout, 1.0),
          target(static_cast<size_t>(size_.n)) {
        std::generate(target.begin(), target.end(), [&] {
            return random() % 5 == 0 ? -100 : static_cast<int64_t>(random() % static_cast<uint64_t>(size.v));
        });
    }
};

// Which tangents are given, and which gradients are wanted: one bit each for input, weight, bias.
struct Mode {
    bool tangent = false;
    bool gauss_newton = false;
    bool row_weight_tangent = false;
    int given = 0;
    int wanted = 7;
};

// All results in one vector.
template <bool Tuned, class T, class Input>
std::vector<T> run(const Inputs<T, Input>& in, Mode mode) {
    const auto& size = in.size;
    std::vector<T> out(static_cast<size_t>(1 + size.n + size.n * size.d + size.v * size.d + size.v), T(-7));
    LinearCrossEntropyArgs<T, Input> args;
    args.rows.dims = 1;
    args.rows.size[0] = size.n;
    args.d = size.d;
    args.v = size.v;
    args.input = in.input.per_row();
    args.weight = in.weight.view;
    args.target.data = in.target.data();
    args.target.batch[0] = 1;
    args.row_weight = in.row_weight.per_row();
    args.label_smoothing = size.smoothing;
    args.tangent = mode.tangent;
    args.gauss_newton = mode.gauss_newton;
    if (size.bias) {
        args.bias = in.bias.view;
    }
    if ((mode.given & 1) != 0) {
        args.input_tangent = in.input_tangent.per_row();
    }
    if ((mode.given & 2) != 0) {
        args.weight_tangent = in.weight_tangent.view;
    }
    if ((mode.given & 4) != 0) {
        args.bias_tangent = in.bias_tangent.view;
    }
    if (mode.row_weight_tangent) {
        args.row_weight_tangent = in.row_weight_tangent.per_row();
    }
    args.value = out.data();
    args.loss = args.value + 1;
    T* gradient = args.loss + size.n;
    args.grad_input = (mode.wanted & 1) != 0 ? gradient : nullptr;
    args.grad_weight = (mode.wanted & 2) != 0 ? gradient + size.n * size.d : nullptr;
    args.grad_bias = (mode.wanted & 4) != 0 ? gradient + (size.n + size.v) * size.d : nullptr;
    if (Tuned) {
        attempt("linear_cross_entropy", [&] { return linear_cross_entropy<T, Input>(args); });
    } else {
        check(reference::linear_cross_entropy<T, Input>(args) == Status::ok, "reference");
    }
    return out;
}

// max |a − b| / max |b|, NaN equal to NaN.
template <class T>
double difference(const std::vector<T>& a, const std::vector<T>& b) {
    double most = 0.0;
    double scale = 1e-30;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) != std::isnan(b[i])) {
            return std::numeric_limits<double>::infinity();
        }
        if (!std::isnan(a[i])) {
            most = std::max(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
            scale = std::max(scale, std::abs(static_cast<double>(b[i])));
        }
    }
    return most / scale;
}

template <class T, class Input>
void compare(const Inputs<T, Input>& in, Mode mode, const std::string& name) {
    const auto expected = run<false>(in, mode);
    const auto serial = run<true>(in, mode);
    const auto threaded = with_threads([&] { return run<true>(in, mode); });
    // Part by part: value, losses, gradients.
    const auto [n, d, v] = std::array{in.size.n, in.size.d, in.size.v};
    size_t start = 0;
    for (const int64_t count : {int64_t{1}, n, n * d, v * d, v}) {
        const auto part = [&](const std::vector<T>& all) {
            const auto first = all.begin() + static_cast<std::ptrdiff_t>(start);
            return std::vector<T>(first, first + count);
        };
        const double error = difference(part(serial), part(expected));
        // Gradients are sums of g and ġ, which no target may round to bfloat16: 2⁻¹⁶ in float. But the amx target
        // rounds g of a gradient alone, to 2⁻⁹ each: the error is random, and less than what the result's own rounding
        // adds.
        const bool rounded = active_target() == Target::amx && !mode.tangent;
        const double units = start > static_cast<size_t>(n) ? 128.0 : 2000.0;
        const double most = rounded && start > static_cast<size_t>(n)
                                ? 0x1p-7
                                : units * static_cast<double>(std::numeric_limits<T>::epsilon());
        const bool good = error < most;
        check(good, name + " at " + std::to_string(start) + ": " + std::to_string(error));
        start += static_cast<size_t>(count);
    }
    check(serial == threaded, name + ": differs with threads");
}

template <class T, class Input>
void test_sizes(const std::string& type) {
    std::mt19937 random(0);
    const Case cases[] = {
        {1, 1, 1},
        {1, 3, 2, 0.1},
        {5, 7, 9, 0.0, false},
        {23, 24, 25, 0.2},
        {24, 25, 48},
        {25, 23, 47, 0.1, true, Layout::columns},
        {49, 50, 130, 0.1, false, Layout::strided},
        {15, 16, 31, 0.1, false},
        {16, 31, 33, 0.1, true, Layout::columns},
        {17, 33, 16, 0.0, false},
        {31, 15, 32, 0.1, false, Layout::strided},
        {33, 32, 65, 0.1},
        {7, 0, 5, 0.1},
        {0, 4, 6},
        {3, 300, 70, 0.1},          // more features than one block of the inner dimension
        {18, 530, 40, 0.1},         // the same on AMX
        {1000, 3, 11, 0.1},         // several chunks of rows
        {30, 5, 2100, 0.1, false},  // many blocks of classes, the last one cut
    };
    for (const Case& size : cases) {
        const Inputs<T, Input> in(random, size);
        const std::string name =
            type + " n=" + std::to_string(size.n) + " d=" + std::to_string(size.d) + " v=" + std::to_string(size.v);
        const int all = size.bias ? 7 : 3;
        compare(in, {}, name + " gradient");
        compare(in, {true, false, true, all, 7}, name + " tangent");
        compare(in, {true, true, false, all, 7}, name + " Gauss-Newton");
        if (size.n * size.d * size.v > 20'000) {
            continue;
        }
        for (int given = 0; given <= all; ++given) {
            compare(in, {true, given % 2 == 0, given % 3 == 0, given, 7 - given}, name + " part of the tangents");
        }
        for (int wanted = 0; wanted < 7; ++wanted) {
            compare(in, {false, false, false, 0, wanted}, name + " part of the gradients");
        }
    }
}

// A class masked by a bias of −∞, one row of NaN, and logits far beyond the range of exp.
template <class T, class Input>
void test_extremes(const std::string& type) {
    std::mt19937 random(1);
    Inputs<T, Input> in(random, {30, 6, 300});
    std::fill(in.target.begin(), in.target.end(), 1);
    in.bias.data[3] = element(-std::numeric_limits<double>::infinity(), Input{});
    in.bias.data[200] = element(3000.0, Input{});
    compare(in, {true, false, true, 7, 7}, type + " masked class");
    std::fill_n(in.input.data.begin(), 6, element(std::numeric_limits<double>::quiet_NaN(), Input{}));
    const auto result = run<true>(in, {false, false, false, 0, 1});
    const auto clean = run<false>(in, {false, false, false, 0, 1});
    const auto at = [](const std::vector<T>& values, int64_t index) { return values[static_cast<size_t>(index)]; };
    check(std::isnan(at(result, 0)) && std::isnan(at(result, 1)), type + " NaN in a row reaches the loss");
    bool others = true;
    for (int64_t row = 1; row < 30; ++row) {
        const double expected = static_cast<double>(at(clean, 1 + row));
        others = others && std::abs(static_cast<double>(at(result, 1 + row)) - expected) <= 1e-3 * std::abs(expected);
    }
    check(others, type + " NaN in a row leaves the other losses alone");
}

// Every allocation fails once, and every parallel loop.
template <class T, class Input>
void test_faults(const std::string& type) {
    trial = Trial::faults;
    std::mt19937 random(2);
    for (const Case& size : {Case{1000, 3, 11, 0.1}, Case{33, 32, 300, 0.1}}) {
        const Inputs<T, Input> in(random, size);
        compare(in, {}, type + " faults");
        compare(in, {true, false, true, 7, 7}, type + " faults");
    }
    trial = Trial::plain;
}

// The amx target has kernels of its own for bfloat16 alone.
template <class T, class Input>
void test_type(const std::string& type) {
    if (active_target() == Target::amx && !std::is_same_v<Input, BFloat16>) {
        return;
    }
    test_sizes<T, Input>(type);
    test_extremes<T, Input>(type);
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"fp32", [] { test_type<float, float>("fp32"); }},
                        {"fp64", [] { test_type<double, double>("fp64"); }},
                        {"bf16", [] { test_type<float, BFloat16>("bf16"); }},
                        {"faults_fp64", [] { test_faults<double, double>("fp64"); }, Where::first_target},
                        {"faults_bf16", [] { test_faults<float, BFloat16>("bf16"); }}});
}
