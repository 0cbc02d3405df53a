// The inverses of positive definite matrices that the polar factor needs, on the emulator: A A⁻¹ = I in every kernel,
// statuses, and batches that a failure does not touch.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "polar/cuda/polar.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

// I + c XXᵀ of random X, as in the iteration; rows `row` apart and matrices `matrix` apart.
template <class T>
std::vector<T> matrices(std::mt19937& random, int64_t batch, int64_t n, int64_t row, int64_t matrix) {
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    std::vector<T> a(static_cast<size_t>((batch - 1) * matrix + (n - 1) * row + n), T(-7));
    for (int64_t b = 0; b < batch; ++b) {
        std::vector<double> x(static_cast<size_t>(n * (n + 3)));
        for (double& entry : x) {
            entry = uniform(random);
        }
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                double sum = i == j ? 1.0 : 0.0;
                for (int64_t k = 0; k < n + 3; ++k) {
                    sum += 0.5 * x[static_cast<size_t>(i * (n + 3) + k)] * x[static_cast<size_t>(j * (n + 3) + k)];
                }
                a[static_cast<size_t>(b * matrix + i * row + j)] = static_cast<T>(sum);
            }
        }
    }
    return a;
}

template <class T>
double residual(const std::vector<T>& a, const std::vector<T>& inverse, int64_t b, int64_t n, int64_t row,
                int64_t matrix) {
    double worst = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            double sum = i == j ? -1.0 : 0.0;
            for (int64_t k = 0; k < n; ++k) {
                sum += static_cast<double>(a[static_cast<size_t>(b * matrix + i * row + k)]) *
                       static_cast<double>(inverse[static_cast<size_t>((b * n + k) * n + j)]);
            }
            // NaN does not pass.
            worst = std::abs(sum) <= worst ? worst : std::abs(sum);
        }
    }
    return worst;
}

template <class T>
polar::cuda::SpdInverseArgs<T> arguments(std::vector<T>& a, std::vector<T>& inverse, std::vector<int>& info, int64_t n,
                                         int64_t row, int64_t matrix) {
    polar::cuda::SpdInverseArgs<T> args;
    args.batch = static_cast<int64_t>(info.size());
    args.n = n;
    args.a = a.data();
    args.a_matrix = matrix;
    args.a_row = row;
    args.inverse = inverse.data();
    args.inverse_matrix = n * n;
    args.inverse_row = n;
    args.info = info.data();
    args.offset = 100;
    return args;
}

template <class T>
void test_orders() {
    const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-12;
    for (const int64_t n : {1, 2, 7, 8, 31, 32, 33, 57, 64, 65, 100, 127, 128}) {
        std::mt19937 random(static_cast<unsigned>(n));
        const int64_t batch = n < 40 ? 3 : 2;
        const int64_t row = n + 2;
        const int64_t matrix = n * row + 5;
        std::vector<T> a = matrices<T>(random, batch, n, row, matrix);
        std::vector<T> inverse(static_cast<size_t>(batch * n * n), std::numeric_limits<T>::quiet_NaN());
        std::vector<int> info(static_cast<size_t>(batch), 0);
        check(polar::cuda::spd_inverse(arguments(a, inverse, info, n, row, matrix), nullptr) == Status::ok,
              polar::cuda::last_device_error());
        for (int64_t b = 0; b < batch; ++b) {
            const double off = residual(a, inverse, b, n, row, matrix);
            check(off < tolerance, "order " + std::to_string(n) + ": residual " + std::to_string(off));
            check(info[static_cast<size_t>(b)] == 0, "info");
        }
    }
    check(polar::cuda::spd_inverse(polar::cuda::SpdInverseArgs<T>{1, 129}, nullptr) == Status::device_error,
          "order 129");
    check(polar::cuda::spd_inverse(polar::cuda::SpdInverseArgs<T>{0, 5}, nullptr) == Status::ok, "no matrices");
}

void test_failures() {
    std::mt19937 random(9);
    const int64_t n = 40;
    for (const float bad :
         {-1.0f, 0.0f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        std::vector<float> a = matrices<float>(random, 3, n, n, n * n);
        std::vector<float> good(3 * n * n), inverse(3 * n * n);
        std::vector<int> info(3, 0);
        check(polar::cuda::spd_inverse(arguments(a, good, info, n, n, n * n), nullptr) == Status::ok, "good");
        // Matrix 1 fails at order 18, where its row and column are 0 but for the diagonal.
        for (int64_t j = 0; j < n; ++j) {
            a[static_cast<size_t>(n * n + 17 * n + j)] = a[static_cast<size_t>(n * n + j * n + 17)] = 0.0f;
        }
        a[static_cast<size_t>(n * n + 17 * n + 17)] = bad;
        check(polar::cuda::spd_inverse(arguments(a, inverse, info, n, n, n * n), nullptr) == Status::ok, "bad");
        check(info == std::vector<int>({0, 118, 0}), "info of a bad pivot: " + std::to_string(info[1]));
        check(std::isnan(inverse[n * n]) && std::isnan(inverse[2 * n * n - 1]), "NaN");
        bool same = true;
        for (size_t i = 0; i < static_cast<size_t>(n * n); ++i) {
            same = same && good[i] == inverse[i] && good[2 * n * n + i] == inverse[2 * n * n + i];
        }
        check(same, "neighbours keep their bits");
        info = {0, 3, 0};
        check(polar::cuda::spd_inverse(arguments(a, inverse, info, n, n, n * n), nullptr) == Status::ok, "again");
        check(info[1] == 3, "an earlier failure stays");
    }
}

}  // namespace

int main() {
    test_orders<float>();
    test_orders<double>();
    test_failures();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
