// The tuned perceptron kernels against the plain loops, for every CPU target of this machine, in both types, at every
// tile edge and with every activation, serially and with threads. Built with AddressSanitizer and
// UndefinedBehaviorSanitizer by make test-cpp.
#include "mlp/cpu/kernels.hpp"
#include "mlp/mlp.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

struct Network {
    std::vector<int64_t> widths;
    std::vector<MlpActivation> activations;
    bool biased;
};

template <class T>
struct Results {
    std::vector<double> loss;
    std::vector<T> gradient, jacobian, product, diagonal;
};

template <class T>
struct Inputs {
    using Layout = typename Table<T>::Layout;

    int64_t n;
    std::vector<MlpLayer> layers;
    Table<T> x, y;
    std::vector<T> parameters;

    Inputs(std::mt19937& random, int64_t n_, const Network& network, Layout layout)
        : n(n_), x(random, 1, n_, network.widths.front(), layout), y(random, 1, n_, network.widths.back(), layout) {
        int64_t at = 0;
        for (size_t l = 0; l < network.activations.size(); ++l) {
            layers.push_back({network.widths[l], network.widths[l + 1], network.activations[l], network.biased, at});
            at = layers.back().end();
        }
        // Exactly as long as the layers say.
        std::uniform_real_distribution<double> uniform(-1.0, 1.0);
        for (int64_t i = 0; i < at; ++i) {
            parameters.push_back(static_cast<T>(uniform(random)));
        }
    }

    MlpArgs<T> args() const {
        MlpArgs<T> result;
        result.layers = layers.data();
        result.count = static_cast<int64_t>(layers.size());
        result.n = n;
        result.x = x.view.at(BatchShape{}, 0);
        result.parameters = parameters.data();
        return result;
    }
};

template <bool Tuned, class T>
Results<T> run(const Inputs<T>& in) {
    Results<T> out;
    const MlpArgs<T> network = in.args();
    out.loss.resize(2);
    out.gradient.resize(static_cast<size_t>(network.size()));
    out.jacobian.resize(static_cast<size_t>(in.n * network.outputs() * network.size()));
    MlpGradientArgs<T> gradient{network, in.y.view.at(BatchShape{}, 0), out.loss.data(), out.gradient.data()};
    MlpGradientArgs<T> loss{network, gradient.y, out.loss.data() + 1, nullptr};
    MlpJacobianArgs<T> jacobian{network, T(0.7), out.jacobian.data()};
    out.product.resize(out.gradient.size());
    out.diagonal.resize(out.gradient.size());
    // Any vector will do: the parameters from the last to the first.
    const std::vector<T> v(in.parameters.rbegin(), in.parameters.rend());
    MlpProductArgs<T> product{network, v.data(), out.product.data()};
    MlpProductArgs<T> diagonal{network, nullptr, out.diagonal.data()};
    if constexpr (Tuned) {
        attempt("gradient", [&] { return mlp_gradient(gradient); });
        attempt("loss", [&] { return mlp_gradient(loss); });
        attempt("jacobian", [&] { return mlp_jacobian(jacobian); });
        attempt("product", [&] { return mlp_product(product); });
        attempt("diagonal", [&] { return mlp_product(diagonal); });
    } else {
        check(reference::mlp_gradient(gradient) == Status::ok, "reference");
        check(reference::mlp_gradient(loss) == Status::ok, "reference");
        check(reference::mlp_jacobian(jacobian) == Status::ok, "reference");
        check(reference::mlp_product(product) == Status::ok, "reference");
        check(reference::mlp_product(diagonal) == Status::ok, "reference");
    }
    return out;
}

template <class T>
void test_case(std::mt19937& random, int64_t n, const Network& network, typename Table<T>::Layout layout) {
    const Inputs<T> in(random, n, network, layout);
    const Results<T> expected = run<false>(in);
    const Results<T> serial = run<true>(in);
    std::string label = "n " + std::to_string(n) + ", layout " + std::to_string(static_cast<int>(layout)) +
                        (sizeof(T) == 4 ? " f32" : " f64") + ", widths";
    for (const int64_t width : network.widths) {
        label += " " + std::to_string(width);
    }
    const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-13;
    check(difference(serial.loss, expected.loss) < tolerance, "loss " + label);
    check(difference(serial.gradient, expected.gradient) < tolerance, "gradient " + label);
    check(difference(serial.jacobian, expected.jacobian) < tolerance, "jacobian " + label);
    check(difference(serial.product, expected.product) < tolerance, "product " + label);
    check(difference(serial.diagonal, expected.diagonal) < tolerance, "diagonal " + label);
    const Results<T> threaded = with_threads([&] { return run<true>(in); });
    check(identical(threaded.loss, serial.loss) && identical(threaded.gradient, serial.gradient) &&
              identical(threaded.jacobian, serial.jacobian) && identical(threaded.product, serial.product) &&
              identical(threaded.diagonal, serial.diagonal),
          "threads " + label);
}

template <class T>
void test_type() {
    using A = MlpActivation;
    using Layout = typename Table<T>::Layout;
    std::mt19937 random(7);
    const std::vector<Network> networks = {
        {{1, 1}, {A::identity}, true},
        {{10, 64, 1}, {A::relu, A::identity}, true},
        {{5, 7, 3}, {A::tanh, A::identity}, false},
        {{3, 9, 4, 2}, {A::sigmoid, A::tanh, A::sigmoid}, true},
        {{8, 8, 8, 8}, {A::relu, A::identity, A::relu}, true},
        {{13, 100, 5}, {A::tanh, A::identity}, true},
    };
    for (const Network& network : networks) {
        for (const int64_t n : {0, 1, 5, 23, 24, 25, 48, 97, 700}) {
            test_case<T>(random, n, network, Layout::rows);
        }
        for (const Layout layout : {Layout::columns, Layout::strided}) {
            test_case<T>(random, 50, network, layout);
        }
    }
    // Many blocks, and more of them than pieces.
    test_case<T>(random, 20'000, {{2, 3, 1}, {A::tanh, A::identity}, true}, Layout::rows);
}

// tanh near 0, where it meets its series, and far out; NaN goes through every activation.
template <class T>
void test_activations() {
    std::vector<T> x;
    for (double value = -12.0; value <= 12.0; value += 1.0 / 64) {
        x.push_back(static_cast<T>(value));
        x.push_back(static_cast<T>(value * 1e-4));
    }
    const auto n = static_cast<int64_t>(x.size());
    const T identity[] = {T(1)};
    for (const auto activation : {MlpActivation::tanh, MlpActivation::sigmoid}) {
        const MlpLayer layer{1, 1, activation, false, 0};
        for (int64_t i = 0; i < n; ++i) {
            const T target = T(0);
            double loss = 0.0;
            MlpGradientArgs<T> args{
                {&layer, 1, 1, {&x[static_cast<size_t>(i)], 1, 1}, identity}, {&target, 1, 1}, &loss, nullptr};
            attempt("activation", [&] { return mlp_gradient(args); });
            const auto at = static_cast<double>(x[static_cast<size_t>(i)]);
            const double exact = activation == MlpActivation::tanh ? std::tanh(at) : 1.0 / (1.0 + std::exp(-at));
            const double off = std::abs(std::sqrt(loss) - std::abs(exact)) / std::max(std::abs(exact), 1e-30);
            check(off < 8 * static_cast<double>(std::numeric_limits<T>::epsilon()),
                  "activation at " + std::to_string(at));
        }
    }
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (int activation = 0; activation < 4; ++activation) {
        const MlpLayer layer{1, 1, static_cast<MlpActivation>(activation), false, 0};
        const T target = T(0);
        double loss = 0.0;
        MlpGradientArgs<T> args{{&layer, 1, 1, {&nan, 1, 1}, identity}, {&target, 1, 1}, &loss, nullptr};
        attempt("NaN", [&] { return mlp_gradient(args); });
        check(std::isnan(loss), "NaN through activation " + std::to_string(activation));
    }
}

template <class T>
const MlpKernels<T>& kernels() {
    if constexpr (sizeof(T) == 8) {
        return ONESTEP_KERNELS(mlp, f64);
    } else {
        return ONESTEP_KERNELS(mlp, f32);
    }
}

template <class T>
void test_work_memory() {
    std::mt19937 random(4);
    using A = MlpActivation;
    const int64_t rows = 2 * kernels<T>().panel;
    const Inputs<T> in(random, rows, {{3, 9, 2}, {A::tanh, A::identity}, true}, Table<T>::Layout::rows);
    const MlpArgs<T> args = in.args();
    MlpNetwork<T> network{args.layers, args.count, args.x, in.y.view.at(BatchShape{}, 0), args.parameters, nullptr};
    std::vector<T> packed(static_cast<size_t>(kernels<T>().packed_size(args.layers, args.count)));
    kernels<T>().pack(network, packed.data());
    network.packed = packed.data();
    const int64_t wanted = kernels<T>().work(args.layers, args.count, rows);
    std::vector<T> result(static_cast<size_t>(rows * args.outputs() * args.size()));
    check_work_memory<T>("gradient", wanted, [&](const WorkMemory<T>& work) {
        (void)kernels<T>().gradient(network, 0, rows, result.data(), work);
    });
    check_work_memory<T>("product", wanted, [&](const WorkMemory<T>& work) {
        kernels<T>().product(network, network, 0, rows, result.data(), work);
    });
    check_work_memory<T>("diagonal", wanted, [&](const WorkMemory<T>& work) {
        kernels<T>().diagonal(network, 0, rows, result.data(), work);
    });
    check_work_memory<T>("jacobian", wanted, [&](const WorkMemory<T>& work) {
        kernels<T>().jacobian(network, 0, rows, T(1), result.data(), work);
    });
}

void test_faults() {
    trial = Trial::faults;
    std::mt19937 random(3);
    using A = MlpActivation;
    test_case<float>(random, 3000, {{3, 9, 4, 2}, {A::sigmoid, A::tanh, A::sigmoid}, true}, Table<float>::Layout::rows);
    test_case<double>(random, 25, {{10, 64, 1}, {A::relu, A::identity}, true}, Table<double>::Layout::rows);
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"faults", test_faults, Where::first_target},
                        {"fp32", test_type<float>},
                        {"fp64", test_type<double>},
                        {"work_memory_fp32", test_work_memory<float>},
                        {"work_memory_fp64", test_work_memory<double>},
                        {"activations_fp32", test_activations<float>},
                        {"activations_fp64", test_activations<double>}},
                       Target::avx512);
}
