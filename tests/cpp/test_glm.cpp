// The tuned GLM kernels against the plain loops, for every CPU target of this machine, in every type and family, at
// every tile edge, serially and with threads. Built with AddressSanitizer and UndefinedBehaviorSanitizer by make
// test-cpp.
#include "glm/glm.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

struct Size {
    int64_t n, d, k, m;
};

BFloat16 rounded(float value) { return {static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16)}; }

template <class X, class T>
struct Inputs {
    using Layout = typename Table<T>::Layout;

    Size size;
    Table<T> x, y, weight, w, v;
    std::vector<BFloat16> narrow;
    std::vector<int64_t> labels;
    GlmData<X, T> data;

    Inputs(std::mt19937& random, Size size_, GlmFamily family, Layout layout, bool weighted, bool intercept,
           bool labelled)
        : size(size_),
          x(random, 1, size.n, size.d, layout),
          y(random, 1, size.n, size.k, layout, T(0)),
          weight(random, 1, size.n, 1, layout, T(0)),
          w(random, 1, size.d + 1, size.k, layout),
          v(random, size.m, size.d + 1, size.k, layout) {
        data.family = family;
        data.intercept = intercept;
        data.n = size.n;
        data.d = size.d;
        data.k = size.k;
        data.x.row = x.view.row;
        data.x.col = x.view.col;
        if constexpr (std::is_same_v<X, BFloat16>) {
            for (const T value : x.data) {
                narrow.push_back(rounded(value));
            }
            data.x.data = narrow.data();
        } else {
            data.x.data = x.data.data();
        }
        data.y = y.view.at(BatchShape{}, 0);
        if (family == GlmFamily::softmax) {
            for (int64_t i = 0; i < size.n; ++i) {
                T sum = T(0);
                for (int64_t c = 0; c < size.k; ++c) {
                    sum += data.y.data[i * data.y.row + c * data.y.col];
                }
                for (int64_t c = 0; c < size.k; ++c) {
                    y.data[static_cast<size_t>(i * data.y.row + c * data.y.col)] /= sum;
                }
                labels.push_back((7 * i + 3) % size.k);
            }
        }
        if (labelled) {
            data.y = {};
            data.labels = {labels.data(), 1, 0};
        }
        if (weighted) {
            data.weight = weight.view.at(BatchShape{}, 0);
        }
    }
};

template <class T>
struct Results {
    std::vector<double> loss;
    std::vector<T> gradient, curvature, product;
};

template <bool Tuned, class X, class T>
Results<T> run(const Inputs<X, T>& in) {
    const auto [n, d, k, m] = in.size;
    const int64_t height = in.data.rows_of_w();
    Results<T> out;
    out.loss.resize(1);
    out.gradient.resize(static_cast<size_t>(height * k));
    out.curvature.resize(static_cast<size_t>(n * k + kCurvatureSlack));
    out.product.resize(static_cast<size_t>(m * height * k));
    GlmPointArgs<X, T> point;
    point.data = in.data;
    point.w = in.w.view.at(BatchShape{}, 0);
    point.loss = out.loss.data();
    point.gradient = out.gradient.data();
    point.curvature = out.curvature.data();
    GlmProductArgs<X, T> product;
    product.data = in.data;
    product.curvature = out.curvature.data();
    product.m = m;
    product.v = in.v.view;
    product.product = out.product.data();
    if constexpr (Tuned) {
        attempt("glm_point", [&] { return glm_point(point); });
        attempt("glm_product", [&] { return glm_product(product); });
        // The loss alone must be the same loss.
        const double loss = out.loss[0];
        point.gradient = point.curvature = nullptr;
        attempt("loss", [&] { return glm_point(point); });
        check(loss == out.loss[0], "the loss alone differs");
    } else {
        check(reference::glm_point(point) == Status::ok && reference::glm_product(product) == Status::ok, "reference");
    }
    return out;
}

template <class X, class T>
void compare(const Inputs<X, T>& in, const std::string& name) {
    const Results<T> expected = run<false>(in);
    const Results<T> got = run<true>(in);
    const double tolerance = 100.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
    const auto close = [&](const auto& a, const auto& b, const char* what) {
        const double error = difference(a, b);
        check(error <= tolerance, name + " " + what + ": error " + std::to_string(error / tolerance) + " tolerances");
    };
    close(got.loss, expected.loss, "loss");
    close(got.gradient, expected.gradient, "gradient");
    close(got.curvature, expected.curvature, "curvature");
    close(got.product, expected.product, "product");

    const Results<T> threaded = with_threads([&] { return run<true>(in); });
    check(identical(threaded.loss, got.loss) && identical(threaded.gradient, got.gradient) &&
              identical(threaded.curvature, got.curvature) && identical(threaded.product, got.product),
          name + " with threads: not bitwise the same");
}

template <class X, class T>
void test_family(const char* type, GlmFamily family, const std::vector<Size>& sizes, bool labelled) {
    std::mt19937 random(1);
    using Layout = typename Table<T>::Layout;
    for (const Size& size : sizes) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
            for (const bool extras : {false, true}) {
                if ((layout != Layout::rows || !extras) && size.n > 300) {
                    continue;
                }
                const std::string name = std::string(type) + " family " + std::to_string(static_cast<int>(family)) +
                                         " n" + std::to_string(size.n) + " d" + std::to_string(size.d) + " k" +
                                         std::to_string(size.k) + " m" + std::to_string(size.m) + " layout " +
                                         std::to_string(static_cast<int>(layout)) +
                                         (extras ? " weighted, intercept" : "") + (labelled ? " labels" : "");
                compare(Inputs<X, T>(random, size, family, layout, extras, extras, labelled), name);
            }
        }
    }
}

template <class X, class T>
void test_type(const char* type) {
    const std::vector<Size> single = {{0, 3, 1, 1},    {1, 1, 1, 1},   {5, 7, 1, 1},  {9, 8, 1, 1},
                                      {64, 16, 1, 1},  {65, 17, 1, 1}, {3, 0, 1, 1},  {130, 31, 1, 1},
                                      {700, 33, 1, 1}, {17, 40, 1, 3}, {70, 9, 1, 9}, {33, 300, 1, 1}};
    const std::vector<Size> several = {{0, 3, 2, 1},    {1, 1, 2, 1},    {9, 8, 3, 1},      {65, 17, 10, 1},
                                       {66, 5, 8, 2},   {70, 12, 25, 1}, {40, 300, 5, 3},   {700, 9, 4, 1},
                                       {19, 20, 50, 2}, {1, 1, 200, 1},  {1100, 6, 110, 1}, {20, 260, 101, 1},
                                       {65, 9, 30, 7},  {5, 0, 120, 1},  {129, 19, 210, 1}};
    for (const GlmFamily family : {GlmFamily::gaussian, GlmFamily::logistic, GlmFamily::poisson}) {
        test_family<X, T>(type, family, single, false);
        test_family<X, T>(type, family, several, false);
    }
    test_family<X, T>(type, GlmFamily::softmax, several, false);
    test_family<X, T>(type, GlmFamily::softmax, several, true);
}

// Loss and slope where eᶯ overflows or p rounds to 0 or 1.
void test_extremes() {
    const std::vector<double> x = {-1000.0, -40.0, 40.0, 1000.0, 0.0};
    const std::vector<double> y = {0.0, 1.0, 1.0, 0.0, 1.0};
    const double one = 1.0;
    double loss = 0.0, gradient = 0.0;
    for (size_t i = 0; i < x.size(); ++i) {
        GlmPointArgs<double, double> args;
        args.data.family = GlmFamily::logistic;
        args.data.n = args.data.d = args.data.k = 1;
        args.data.x = {&one, 1, 1};
        args.data.y = {&y[i], 1, 1};
        args.w = {&x[i], 1, 1};
        args.loss = &loss;
        args.gradient = &gradient;
        attempt("extremes", [&] { return glm_point(args); });
        const double toward = y[i] > 0.0 ? -x[i] : x[i];
        const double expected = std::max(toward, 0.0) + std::log1p(std::exp(-std::abs(toward)));
        check(std::abs(loss - expected) <= 1e-14 * expected, "logistic loss at " + std::to_string(x[i]));
        const double slope = (y[i] > 0.0 ? -1.0 : 1.0) / (1.0 + std::exp(-toward));
        check(std::abs(gradient - slope) <= 1e-14 * std::abs(slope), "logistic slope at " + std::to_string(x[i]));
    }
}

void test_negative_weight() {
    const double values[] = {1.0, 2.0};
    const double weight[] = {1.0, -1.0};
    double loss = 0.0;
    GlmPointArgs<double, double> args;
    args.data.n = 2;
    args.data.d = args.data.k = 1;
    args.data.x = args.data.y = {values, 1, 1};
    args.data.weight = {weight, 1, 0};
    args.w = {values, 1, 1};
    args.loss = &loss;
    check(glm_point(args) == Status::negative_weight, "negative weight");
}

// Every allocation fails once, and every parallel loop: one column, a few, many.
template <class X, class T>
void test_faults(const char* type) {
    trial = Trial::faults;
    std::mt19937 random(2);
    for (const Size& size : std::vector<Size>{{700, 33, 1, 1}, {65, 17, 10, 2}, {1100, 6, 110, 1}}) {
        compare(Inputs<X, T>(random, size, GlmFamily::logistic, Table<T>::Layout::rows, true, true, false),
                std::string(type) + " faults");
    }
    trial = Trial::plain;
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"fp32", [] { test_type<float, float>("fp32"); }},
                        {"fp64", [] { test_type<double, double>("fp64"); }},
                        {"bf16", [] { test_type<BFloat16, float>("bf16"); }},
                        {"faults_fp32", [] { test_faults<float, float>("fp32"); }, Where::first_target},
                        {"faults_bf16", [] { test_faults<BFloat16, float>("bf16"); }, Where::first_target},
                        {"extremes", test_extremes},
                        {"negative_weight", test_negative_weight}},
                       Target::avx512);
}
