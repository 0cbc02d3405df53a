// The language-model head's CUDA kernels, on the emulator, against the plain loops in double: losses, sums and
// gradients of both kinds in every type, with classes in one block and in several.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/cuda/numbers.cuh"
#include "lmhead/cuda/lmhead.hpp"
#include "lmhead/lmhead.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

using Dense = std::vector<double>;

template <class U>
U narrowed(double value) {
    return lmhead::cuda::from_float<U>(static_cast<float>(value));
}
template <>
double narrowed<double>(double value) {
    return value;
}

// Numbers that U holds exactly, in double.
template <class U>
Dense numbers(std::mt19937& random, int64_t count, double size) {
    std::uniform_real_distribution<double> uniform(-size, size);
    Dense values(static_cast<size_t>(count));
    for (double& value : values) {
        value = static_cast<double>(lmhead::cuda::to_float(narrowed<U>(uniform(random))));
    }
    return values;
}

template <class U>
std::vector<U> narrow(const Dense& values) {
    std::vector<U> result;
    for (const double value : values) {
        result.push_back(narrowed<U>(value));
    }
    return result;
}

struct Case {
    int64_t n, classes, block;
    bool tangent, bias, gauss_newton;
    double smoothing;

    std::string name() const {
        return "n " + std::to_string(n) + ", classes " + std::to_string(classes) + ", block " + std::to_string(block) +
               (tangent ? ", tangent" : "") + (bias ? ", bias" : "") + (gauss_newton ? ", Gauss-Newton" : "");
    }
};

constexpr int64_t kFeatures = 3;
constexpr int64_t kIgnored = -7;

// Operands in double; the kernels get logits that are computed from them in double and rounded to T.
template <class T, class Input>
struct Operands {
    Case of;
    Dense h, w, b, dh, dw, db, c, dc;
    std::vector<int64_t> target;

    Operands(std::mt19937& random, const Case& of_)
        : of(of_),
          h(numbers<Input>(random, of.n * kFeatures, 2.0)),
          w(numbers<Input>(random, of.classes * kFeatures, 2.0)),
          b(numbers<Input>(random, of.classes, 1.0)),
          dh(numbers<Input>(random, of.n * kFeatures, 1.0)),
          dw(numbers<Input>(random, of.classes * kFeatures, 1.0)),
          db(numbers<Input>(random, of.classes, 1.0)),
          c(numbers<T>(random, of.n, 1.0)),
          dc(numbers<T>(random, of.n, 1.0)) {
        for (int64_t i = 0; i < of.n; ++i) {
            target.push_back(i % 4 == 1 ? kIgnored : (11 * i + 2) % of.classes);
        }
    }

    LinearCrossEntropyArgs<double, double> reference_args() const {
        LinearCrossEntropyArgs<double, double> args;
        args.rows.dims = 1;
        args.rows.size[0] = of.n;
        args.d = kFeatures;
        args.v = of.classes;
        args.input = {h.data(), 1, 0, {kFeatures}};
        args.weight = {w.data(), kFeatures, 1};
        args.target = {target.data(), 0, 0, {1}};
        args.row_weight = {c.data(), 0, 0, {1}};
        args.ignore_index = kIgnored;
        args.label_smoothing = of.smoothing;
        args.tangent = of.tangent;
        args.gauss_newton = of.gauss_newton;
        if (of.bias) {
            args.bias = {b.data(), 1, 0};
            args.bias_tangent = {db.data(), 1, 0};
        }
        args.input_tangent = {dh.data(), 1, 0, {kFeatures}};
        args.weight_tangent = {dw.data(), kFeatures, 1};
        args.row_weight_tangent = {dc.data(), 0, 0, {1}};
        return args;
    }
};

struct Results {
    Dense losses, value, grad_input, grad_weight, grad_bias;

    Results(const Case& of)
        : losses(static_cast<size_t>(of.n)),
          value(1),
          grad_input(static_cast<size_t>(of.n * kFeatures)),
          grad_weight(static_cast<size_t>(of.classes * kFeatures)),
          grad_bias(static_cast<size_t>(of.classes)) {}
};

template <class T, class Input>
Results on_device(const Operands<T, Input>& in) {
    const Case& of = in.of;
    const int64_t leading = (of.classes + 7) / 8 * 8;
    const auto at = [&](int64_t i, int64_t v) { return static_cast<size_t>(i * leading + v); };
    std::vector<T> logits(static_cast<size_t>(of.n * leading), std::numeric_limits<T>::quiet_NaN());
    std::vector<T> tangents(logits);
    for (int64_t i = 0; i < of.n; ++i) {
        for (int64_t v = 0; v < of.classes; ++v) {
            double z = 0.0, dz = 0.0;
            for (int64_t j = 0; j < kFeatures; ++j) {
                const auto hj = static_cast<size_t>(i * kFeatures + j);
                const auto wj = static_cast<size_t>(v * kFeatures + j);
                z += in.h[hj] * in.w[wj];
                dz += in.dh[hj] * in.w[wj] + in.h[hj] * in.dw[wj];
            }
            logits[at(i, v)] = static_cast<T>(z);
            tangents[at(i, v)] = static_cast<T>(dz);
        }
    }
    const std::vector<Input> b = narrow<Input>(in.b), db = narrow<Input>(in.db);
    const std::vector<T> c = narrow<T>(in.c), dc = narrow<T>(in.dc);
    std::vector<T> statistics(static_cast<size_t>(lmhead::cuda::kHeadStatistics * of.n),
                              std::numeric_limits<T>::quiet_NaN());
    lmhead::cuda::HeadChunk<T, Input> chunk;
    chunk.rows = of.n;
    chunk.classes = of.classes;
    chunk.logits = logits.data();
    chunk.logits_tangent = of.tangent ? tangents.data() : nullptr;
    chunk.leading = leading;
    if (of.bias) {
        chunk.bias = {b.data(), 1};
        chunk.bias_tangent = {db.data(), 1};
    }
    chunk.target = {in.target.data(), 1};
    chunk.row_weight = {c.data(), 1};
    chunk.row_weight_tangent = {dc.data(), 1};
    chunk.ignore_index = kIgnored;
    chunk.label_smoothing = of.smoothing;
    chunk.statistics = statistics.data();
    std::vector<T> losses(static_cast<size_t>(of.n)), value(1), bias(static_cast<size_t>(of.classes), T(0));
    Dense values(static_cast<size_t>(of.n));
    for (int64_t first = 0; first < of.classes; first += of.block) {
        check(lmhead::cuda::head_statistics(chunk, first, std::min(of.block, of.classes - first), losses.data(),
                                            values.data(), nullptr) == Status::ok,
              lmhead::cuda::last_device_error());
    }
    check(lmhead::cuda::head_value(of.n, values.data(), value.data(), nullptr) == Status::ok,
          lmhead::cuda::last_device_error());
    check(lmhead::cuda::head_bias_gradient(chunk, bias.data(), nullptr) == Status::ok,
          lmhead::cuda::last_device_error());
    // A power of two, which changes no digit.
    const T scale = T(4);
    check(lmhead::cuda::head_gradient(chunk, !of.gauss_newton, &scale, nullptr) == Status::ok,
          lmhead::cuda::last_device_error());

    const int64_t stride = leading * static_cast<int64_t>(sizeof(T) / sizeof(Input));
    const auto slope = [&](const std::vector<T>& rows, int64_t i, int64_t v) {
        return static_cast<double>(
                   lmhead::cuda::to_float(reinterpret_cast<const Input*>(rows.data())[i * stride + v])) /
               4.0;
    };
    Results out(of);
    out.losses.assign(losses.begin(), losses.end());
    out.value.assign(value.begin(), value.end());
    out.grad_bias.assign(bias.begin(), bias.end());
    for (int64_t i = 0; i < of.n; ++i) {
        for (int64_t v = 0; v < of.classes; ++v) {
            const double main = of.tangent ? slope(tangents, i, v) : slope(logits, i, v);
            const double cross = of.tangent && !of.gauss_newton ? slope(logits, i, v) : 0.0;
            for (int64_t j = 0; j < kFeatures; ++j) {
                const auto hj = static_cast<size_t>(i * kFeatures + j);
                const auto wj = static_cast<size_t>(v * kFeatures + j);
                out.grad_input[hj] += main * in.w[wj] + cross * in.dw[wj];
                out.grad_weight[wj] += main * in.h[hj] + cross * in.dh[hj];
            }
        }
    }
    return out;
}

template <class T, class Input>
void test_case(const Case& of, const std::string& type) {
    std::mt19937 random(static_cast<unsigned>(of.n + of.classes));
    const Operands<T, Input> in(random, of);
    Results expected(of);
    LinearCrossEntropyArgs<double, double> args = in.reference_args();
    args.value = expected.value.data();
    args.loss = expected.losses.data();
    args.grad_input = expected.grad_input.data();
    args.grad_weight = expected.grad_weight.data();
    args.grad_bias = expected.grad_bias.data();
    check(reference::linear_cross_entropy(args) == Status::ok, "reference");
    const Results got = on_device(in);
    const std::string name = type + ", " + of.name();
    const double tolerance = sizeof(T) == 4 ? 4e-6 : 1e-13;
    // Slopes are rounded once, to Input.
    const double rounded =
        sizeof(Input) == 2 ? (std::is_same_v<Input, lmhead::cuda::float16> ? 1e-3 : 8e-3) : tolerance;
    check(difference(got.losses, expected.losses) < tolerance, "losses: " + name);
    check(difference(got.value, expected.value) < tolerance, "value: " + name);
    check(difference(got.grad_bias, expected.grad_bias) < tolerance, "grad_bias: " + name);
    check(difference(got.grad_input, expected.grad_input) < rounded, "grad_input: " + name);
    check(difference(got.grad_weight, expected.grad_weight) < rounded, "grad_weight: " + name);
}

template <class T, class Input>
void test_cases(const std::string& type) {
    for (const bool tangent : {false, true}) {
        test_case<T, Input>({5, 33, 40, tangent, true, false, 0.0}, type);
        test_case<T, Input>({9, 2500, 2500, tangent, false, tangent, 0.1}, type);
        test_case<T, Input>({6, 4133, 1024, tangent, true, false, 0.2}, type);
        test_case<T, Input>({2, 1, 8, tangent, true, false, 0.0}, type);
    }
}

// Targets that are no class make their row's loss and the sums NaN; an ignored row counts for nothing, NaN or not.
void test_rows() {
    std::mt19937 random(3);
    const Case of{6, 40, 16, true, true, false, 0.0};
    for (const int64_t target : {int64_t{-1}, int64_t{40}, std::numeric_limits<int64_t>::min()}) {
        Operands<float, float> in(random, of);
        in.target[2] = target;
        const Results out = on_device(in);
        check(std::isnan(out.losses[2]) && std::isnan(out.value[0]) && std::isnan(out.grad_bias[0]), "no class");
        check(!std::isnan(out.losses[0]) && !std::isnan(out.grad_input[0]), "its neighbour");
    }
    Operands<float, float> in(random, of);
    in.h[1 * kFeatures] = std::numeric_limits<double>::quiet_NaN();
    const Results out = on_device(in);
    check(out.losses[1] == 0.0 && !std::isnan(out.value[0]) && !std::isnan(out.grad_bias[5]), "an ignored row of NaN");
}

// Classes that are masked by −∞, all of a span or of a block.
void test_masked() {
    std::mt19937 random(5);
    Case of{3, 64, 16, false, true, false, 0.0};
    Operands<float, float> in(random, of);
    for (int v = 0; v < 64; ++v) {
        if (v < 24 || (v >= 32 && v < 48)) {
            in.b[static_cast<size_t>(v)] = -std::numeric_limits<double>::infinity();
        }
    }
    in.target = {25, kIgnored, 50};
    Results expected(of);
    LinearCrossEntropyArgs<double, double> args = in.reference_args();
    args.loss = expected.losses.data();
    args.grad_bias = expected.grad_bias.data();
    check(reference::linear_cross_entropy(args) == Status::ok, "reference");
    const Results got = on_device(in);
    check(difference(got.losses, expected.losses) < 4e-6, "losses with masked classes");
    check(difference(got.grad_bias, expected.grad_bias) < 4e-6, "gradient with masked classes");
}

}  // namespace

int main() {
    test_cases<float, float>("f32");
    test_cases<double, double>("f64");
    test_cases<float, lmhead::cuda::bfloat16>("bf16");
    test_cases<float, lmhead::cuda::float16>("f16");
    test_rows();
    test_masked();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
