// The GLM kernels for CUDA, on the emulator, against the plain loops in double: every kernel that dispatch can choose,
// every family, type and layout, bitwise repeatable.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/cuda/numbers.cuh"
#include "glm/cuda/glm.hpp"
#include "glm/glm.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

enum class Layout { rows, strided };

template <class X>
X narrowed(double value) {
    return glm::cuda::from_float<X>(static_cast<float>(value));
}
template <>
double narrowed<double>(double value) {
    return value;
}

// Numbers as the kernels read them, and the same in double; exactly as long as the strides reach.
template <class X>
struct Numbers {
    std::vector<X> data;
    std::vector<double> wide;
    int64_t row = 0, col = 0;

    Numbers(std::mt19937& random, int64_t rows, int64_t cols, Layout layout, double low = -1.0) {
        const int64_t step = layout == Layout::strided ? 3 : 1;
        row = cols * step;
        col = step;
        const int64_t count = rows * cols == 0 ? 0 : (rows * cols - 1) * step + 1;
        std::uniform_real_distribution<double> uniform(low, 1.0);
        for (int64_t i = 0; i < count; ++i) {
            data.push_back(narrowed<X>(uniform(random)));
            wide.push_back(static_cast<double>(glm::cuda::to_float(data.back())));
        }
    }

    void set(int64_t i, int64_t j, double value) {
        const auto at = static_cast<size_t>(i * row + j * col);
        data[at] = narrowed<X>(value);
        wide[at] = static_cast<double>(glm::cuda::to_float(data[at]));
    }
    double get(int64_t i, int64_t j) const { return wide[static_cast<size_t>(i * row + j * col)]; }

    Matrix<const X> view() const { return {data.data(), row, col}; }
    Matrix<const double> wide_view() const { return {wide.data(), row, col}; }
};

struct Case {
    int64_t n, d, k, m;
    GlmFamily family = GlmFamily::logistic;
    Layout layout = Layout::rows;
    bool weighted = true, intercept = true, labelled = false;

    std::string name() const {
        return "n " + std::to_string(n) + ", d " + std::to_string(d) + ", k " + std::to_string(k) + ", m " +
               std::to_string(m) + ", family " + std::to_string(static_cast<int>(family)) +
               (layout == Layout::strided ? ", strided" : "") + (weighted ? ", weighted" : "") +
               (intercept ? ", intercept" : "") + (labelled ? ", labels" : "");
    }
};

template <class X, class T>
struct Inputs {
    Case of;
    Numbers<X> x;
    Numbers<T> y, weight, w, v;
    std::vector<int64_t> labels;

    Inputs(std::mt19937& random, const Case& of_)
        : of(of_),
          x(random, of.n, of.d, of.layout),
          y(random, of.n, of.k, of.layout, 0.0),
          weight(random, of.n, 1, of.layout, 0.0),
          w(random, of.d + (of.intercept ? 1 : 0), of.k, of.layout),
          v(random, of.m * (of.d + (of.intercept ? 1 : 0)), of.k, of.layout) {
        for (int64_t i = 0; i < of.n && of.family == GlmFamily::softmax; ++i) {
            double sum = 0.0;
            for (int64_t c = 0; c < of.k; ++c) {
                sum += y.get(i, c);
            }
            for (int64_t c = 0; c < of.k; ++c) {
                y.set(i, c, y.get(i, c) / sum);
            }
            labels.push_back((7 * i + 3) % of.k);
        }
        // Outputs of order one, whatever d is.
        const double scale = 2.0 / std::sqrt(static_cast<double>(of.d));
        for (int64_t j = 0; j < of.d; ++j) {
            for (int64_t c = 0; c < of.k; ++c) {
                w.set(j, c, w.get(j, c) * scale);
            }
        }
    }

    template <class Y, class U>
    GlmData<Y, U> data_with(Matrix<const Y> rows, Matrix<const U> targets, Matrix<const U> weights) const {
        GlmData<Y, U> data;
        data.family = of.family;
        data.intercept = of.intercept;
        data.n = of.n;
        data.d = of.d;
        data.k = of.k;
        data.x = rows;
        if (of.labelled) {
            data.labels = {labels.data(), 1, 0};
        } else {
            data.y = targets;
        }
        if (of.weighted) {
            data.weight = weights;
        }
        return data;
    }
    GlmData<X, T> data() const { return data_with(x.view(), y.view(), weight.view()); }
    GlmData<double, double> wide() const { return data_with(x.wide_view(), y.wide_view(), weight.wide_view()); }
};

template <class T>
Batched<const T> sides(const Numbers<T>& v, int64_t height) {
    Batched<const T> view;
    view.data = v.data.data();
    view.row = v.row;
    view.col = v.col;
    view.batch[0] = height * v.row;
    return view;
}

template <class T>
struct Results {
    std::vector<double> loss = {-1.0};
    std::vector<T> gradient, curvature, product, info = {T(-1)};
};

template <class X, class T>
Results<T> on_device(const Inputs<X, T>& in) {
    const GlmData<X, T> data = in.data();
    const int64_t height = data.rows_of_w();
    const T poison = std::numeric_limits<T>::quiet_NaN();
    Results<T> out;
    out.gradient.assign(static_cast<size_t>(height * data.k), poison);
    out.curvature.assign(static_cast<size_t>(data.n * data.k), poison);
    out.product.assign(static_cast<size_t>(in.of.m * height * data.k), poison);
    std::vector<double> workspace(static_cast<size_t>(glm::cuda::glm_workspace(data, 1) + 7) / 8);
    GlmPointArgs<X, T> point;
    point.data = data;
    point.w = in.w.view();
    point.loss = out.loss.data();
    point.gradient = out.gradient.data();
    point.curvature = out.curvature.data();
    check(glm::cuda::glm_point(point, out.info.data(), workspace.data(), nullptr) == Status::ok,
          "point: " + glm::cuda::last_device_error());
    workspace.assign(static_cast<size_t>(glm::cuda::glm_workspace(data, in.of.m) + 7) / 8, 0.0);
    GlmProductArgs<X, T> product;
    product.data = data;
    product.curvature = out.curvature.data();
    product.m = in.of.m;
    product.v = sides(in.v, height);
    product.product = out.product.data();
    check(glm::cuda::glm_product(product, workspace.data(), nullptr) == Status::ok,
          "product: " + glm::cuda::last_device_error());
    return out;
}

template <class X, class T>
Results<double> in_loops(const Inputs<X, T>& in) {
    const GlmData<double, double> data = in.wide();
    const int64_t height = data.rows_of_w();
    Results<double> out;
    out.gradient.resize(static_cast<size_t>(height * data.k));
    out.curvature.resize(static_cast<size_t>(data.n * data.k));
    out.product.resize(static_cast<size_t>(in.of.m * height * data.k));
    GlmPointArgs<double, double> point;
    point.data = data;
    point.w = in.w.wide_view();
    point.loss = out.loss.data();
    point.gradient = out.gradient.data();
    point.curvature = out.curvature.data();
    check(reference::glm_point(point) == Status::ok, "reference");
    GlmProductArgs<double, double> product;
    product.data = data;
    product.curvature = out.curvature.data();
    product.m = in.of.m;
    product.v.data = in.v.wide.data();
    product.v.row = in.v.row;
    product.v.col = in.v.col;
    product.v.batch[0] = height * in.v.row;
    product.product = out.product.data();
    check(reference::glm_product(product) == Status::ok, "reference");
    return out;
}

template <class T>
std::vector<double> wide(const std::vector<T>& values) {
    return {values.begin(), values.end()};
}

template <class T>
void compare(const Results<T>& got, const Results<double>& expected, const std::string& name) {
    const double tolerance = sizeof(T) == 4 ? 2e-6 : 1e-13;
    check(difference(got.loss, expected.loss) < tolerance, "loss: " + name);
    check(difference(wide(got.gradient), expected.gradient) < 4 * tolerance, "gradient: " + name);
    check(difference(wide(got.curvature), expected.curvature) < 4 * tolerance, "curvature: " + name);
    check(difference(wide(got.product), expected.product) < 8 * tolerance, "product: " + name);
    check(got.info[0] == T(0), "info: " + name);
}

template <class X, class T>
void test_case(const Case& of, const std::string& type) {
    std::mt19937 random(static_cast<unsigned>(of.n + 31 * of.d + 7 * of.k + of.m));
    const Inputs<X, T> in(random, of);
    check(of.m * of.k <= glm::cuda::glm_most_columns<X, T>(of.d, of.intercept), "columns: " + of.name());
    compare(on_device(in), in_loops(in), type + ", " + of.name());
}

// Each kernel once, at sizes beside its edges, with every kind of operand somewhere.
template <class X, class T>
void test_kernels(const std::string& type) {
    const int64_t chunk = 16 / static_cast<int64_t>(sizeof(X));
    const auto gaussian = GlmFamily::gaussian;
    const auto poisson = GlmFamily::poisson;
    const auto softmax = GlmFamily::softmax;
    const auto strided = Layout::strided;
    // Rows in registers, 8 lanes to a row: one chunk a lane, whole chunks and not, several tiles a block.
    test_case<X, T>({1700, 4 * chunk, 1, 1}, type);
    test_case<X, T>({33, 8 * chunk - 1, 1, 1, poisson, strided}, type);
    test_case<X, T>({1, 1, 1, 1, gaussian, Layout::rows, false, false}, type);
    // Four chunks a lane.
    test_case<X, T>({900, 9 * chunk, 1, 1, gaussian}, type);
    test_case<X, T>({70, 32 * chunk - 1, 1, 1, GlmFamily::logistic, strided, false}, type);
    // A warp to a row.
    test_case<X, T>({500, 33 * chunk, 1, 1, poisson, Layout::rows, true, false}, type);
    test_case<X, T>({40, 64 * chunk, 1, 1}, type);
    test_case<X, T>({150, 65 * chunk, 1, 1}, type);
    test_case<X, T>({9, 256 * chunk - 3, 1, 1, gaussian, strided}, type);
    // Tiles of up to 4, 8 and 16 columns.
    test_case<X, T>({400, 8 * chunk, 2, 2}, type);
    test_case<X, T>({70, 3, 3, 1, softmax, Layout::rows, true, true, true}, type);
    test_case<X, T>({37, 300, 3, 1, softmax, strided}, type);
    test_case<X, T>({65, 64, 1, 7, poisson, strided, false}, type);
    test_case<X, T>({250, 40, 2, 3, softmax, Layout::rows, true, false}, type);
    test_case<X, T>({45, 320, 5, 1, gaussian}, type);
    test_case<X, T>({300, 32, 10, 1, softmax, Layout::rows, true, true, true}, type);
    test_case<X, T>({66, 200, 16, 1, softmax, strided, false, true, true}, type);
    test_case<X, T>({130, 7, 3, 5, softmax}, type);
    test_case<X, T>({31, 255, 1, 16, gaussian}, type);
}

// A row that is wrong makes the results NaN and says why; others' curvature stays.
template <class X, class T>
void test_status() {
    std::mt19937 random(3);
    for (const bool tiled : {false, true}) {
        const Case of{100, 8, tiled ? 3 : 1, 1};
        Inputs<X, T> bad_target(random, of);
        bad_target.y.set(41, 0, 1.5);
        Results<T> out = on_device(bad_target);
        check(out.info[0] == T(1) && std::isnan(out.loss[0]) && std::isnan(out.gradient[0]), "target out of range");
        Inputs<X, T> negative(random, of);
        negative.y.set(41, 0, -2.0);
        negative.weight.set(77, 0, -0.5);
        out = on_device(negative);
        check(out.info[0] == T(2) && std::isnan(out.loss[0]) && std::isnan(out.gradient[0]), "negative weight");
        check(std::isnan(out.curvature[static_cast<size_t>(77 * of.k)]) && !std::isnan(out.curvature[0]), "its row");
    }
    Case of{50, 8, 4, 1, GlmFamily::softmax};
    of.labelled = true;
    for (const int64_t label : {int64_t{-1}, int64_t{4}, std::numeric_limits<int64_t>::max()}) {
        Inputs<X, T> in(random, of);
        in.labels[17] = label;
        const Results<T> out = on_device(in);
        check(out.info[0] == T(1) && std::isnan(out.loss[0]) && std::isnan(out.gradient[3]), "label out of range");
        check(std::isnan(out.product[0]), "product with a label out of range");
    }
    of.labelled = false;
    Inputs<X, T> in(random, of);
    in.y.set(20, 2, 0.9);
    check(on_device(in).info[0] == T(1), "probabilities that do not sum to 1");
}

// What lies between two GEMMs gives what the fused kernels give.
template <class T>
void test_chunks() {
    for (const GlmFamily family : {GlmFamily::softmax, GlmFamily::logistic}) {
        std::mt19937 random(5);
        const Case of{150, 1, 37, 2, family, Layout::rows, true, false};
        const Inputs<T, T> in(random, of);
        const Results<double> expected = in_loops(in);
        const GlmData<T, T> data = in.data();
        std::vector<T> outputs;
        for (int64_t i = 0; i < of.n; ++i) {
            for (int64_t c = 0; c < of.k; ++c) {
                outputs.push_back(static_cast<T>(in.x.get(i, 0) * in.w.get(0, c)));
            }
        }
        Results<T> got;
        got.curvature.resize(outputs.size());
        const auto blocks = static_cast<size_t>(glm::cuda::glm_chunk_losses(of.n));
        std::vector<double> losses(blocks);
        std::vector<int> statuses(blocks);
        check(glm::cuda::glm_chunk_point(data, outputs.data(), got.curvature.data(), losses.data(), statuses.data(),
                                         nullptr) == Status::ok,
              glm::cuda::last_device_error());
        check(glm::cuda::glm_sum_losses(static_cast<int64_t>(blocks), losses.data(), statuses.data(), got.loss.data(),
                                        got.info.data(), nullptr) == Status::ok,
              glm::cuda::last_device_error());
        const auto back = [&](const std::vector<T>& rows, int64_t columns) {
            std::vector<T> sums(static_cast<size_t>(columns));
            for (int64_t q = 0; q < columns; ++q) {
                double sum = 0.0;
                for (int64_t i = 0; i < of.n; ++i) {
                    sum += in.x.get(i, 0) * static_cast<double>(rows[static_cast<size_t>(i * columns + q)]);
                }
                sums[static_cast<size_t>(q)] = static_cast<T>(sum);
            }
            return sums;
        };
        got.gradient = back(outputs, of.k);
        std::vector<T> sides;
        for (int64_t i = 0; i < of.n; ++i) {
            for (int64_t g = 0; g < of.m; ++g) {
                for (int64_t c = 0; c < of.k; ++c) {
                    sides.push_back(static_cast<T>(in.x.get(i, 0) * in.v.get(g, c)));
                }
            }
        }
        check(glm::cuda::glm_chunk_product(data, of.m, sides.data(), got.curvature.data(), nullptr) == Status::ok,
              glm::cuda::last_device_error());
        got.product = back(sides, of.m * of.k);
        compare(got, expected, "chunks");
    }
}

void test_repeatable() {
    std::mt19937 random(11);
    for (const Case& of : {Case{3000, 20, 1, 1}, Case{500, 20, 5, 1}}) {
        const Inputs<float, float> in(random, of);
        const Results<float> once = on_device(in);
        const Results<float> again = on_device(in);
        check(identical(once.loss, again.loss) && identical(once.gradient, again.gradient) &&
                  identical(once.product, again.product),
              "the same bits again");
    }
}

void test_no_rows() {
    std::mt19937 random(13);
    const Inputs<float, float> in(random, {0, 6, 2, 1});
    const Results<float> out = on_device(in);
    check(out.loss[0] == 0.0 && out.info[0] == 0.0f, "loss of no rows");
    for (const float entry : out.gradient) {
        check(entry == 0.0f, "gradient of no rows");
    }
}

}  // namespace

int main() {
    test_kernels<float, float>("f32");
    test_kernels<double, double>("f64");
    test_kernels<glm::cuda::bfloat16, float>("bf16");
    test_kernels<glm::cuda::float16, float>("f16");
    test_status<float, float>();
    test_chunks<float>();
    test_chunks<double>();
    test_repeatable();
    test_no_rows();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
