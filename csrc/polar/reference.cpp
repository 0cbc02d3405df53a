#include <cmath>
#include <limits>
#include <vector>

#include "base/guarded.hpp"
#include "polar/polar.hpp"

namespace onestep::reference {
namespace {

using Doubles = std::vector<double>;

// X ← (b/c)X + (a − b/c)A⁻¹X with A = I + cXXᵀ, X n × m, by Cholesky's factor.
void iterate(const PolarStep& step, int64_t n, int64_t m, Doubles& x) {
    Doubles l(static_cast<size_t>(n * n));
    const auto at = [](auto& matrix, int64_t i, int64_t j, int64_t row) -> auto& {
        return matrix[static_cast<size_t>(i * row + j)];
    };
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < m; ++p) {
                sum += at(x, i, p, m) * at(x, j, p, m);
            }
            sum = step.c * sum + (i == j ? 1.0 : 0.0);
            for (int64_t p = 0; p < j; ++p) {
                sum -= at(l, i, p, n) * at(l, j, p, n);
            }
            at(l, i, j, n) = i == j ? std::sqrt(sum) : sum / at(l, j, j, n);
        }
    }
    for (int64_t column = 0; column < m; ++column) {
        Doubles z(static_cast<size_t>(n));
        for (int64_t i = 0; i < n; ++i) {
            double sum = at(x, i, column, m);
            for (int64_t p = 0; p < i; ++p) {
                sum -= at(l, i, p, n) * z[static_cast<size_t>(p)];
            }
            z[static_cast<size_t>(i)] = sum / at(l, i, i, n);
        }
        for (int64_t i = n - 1; i >= 0; --i) {
            double sum = z[static_cast<size_t>(i)];
            for (int64_t p = i + 1; p < n; ++p) {
                sum -= at(l, p, i, n) * z[static_cast<size_t>(p)];
            }
            z[static_cast<size_t>(i)] = sum / at(l, i, i, n);
        }
        const double first = step.b / step.c;
        for (int64_t i = 0; i < n; ++i) {
            double& value = at(x, i, column, m);
            value = first * value + (step.a - first) * z[static_cast<size_t>(i)];
        }
    }
}

// ‖XXᵀ‖ in Frobenius' norm.
double gram_norm(int64_t n, int64_t m, const Doubles& x) {
    double total = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < m; ++p) {
                sum += x[static_cast<size_t>(i * m + p)] * x[static_cast<size_t>(j * m + p)];
            }
            total += sum * sum;
        }
    }
    return std::sqrt(total);
}

template <class T>
void polar_of(const PolarArgs<T>& args, int64_t problem) {
    const bool tall = args.rows > args.columns;
    const int64_t n = tall ? args.columns : args.rows;
    const int64_t m = tall ? args.rows : args.columns;
    const Matrix<const T> from = args.m.at(args.batch, problem);
    T* to = args.factor + problem * n * m;
    Doubles x;
    double largest = 0.0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
            x.push_back(
                static_cast<double>(from.data[tall ? j * from.row + i * from.col : i * from.row + j * from.col]));
            finite = finite && std::isfinite(x.back());
            largest = std::max(largest, std::abs(x.back()));
        }
    }
    args.info[problem] = finite ? 0 : 1;
    if (finite && largest > 0.0) {
        for (double& value : x) {
            value /= largest;
        }
        const double norm = std::sqrt(gram_norm(n, m, x));
        for (double& value : x) {
            value /= norm;
        }
        for (int step = 0; step < args.steps; ++step) {
            iterate(args.step[step], n, m, x);
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
            to[tall ? j * n + i : i * m + j] =
                finite ? static_cast<T>(x[static_cast<size_t>(i * m + j)]) : std::numeric_limits<T>::quiet_NaN();
        }
    }
}

}  // namespace

template <class T>
Status polar_factor(const PolarArgs<T>& args) {
    return guarded([&] {
        for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
            polar_of(args, problem);
        }
        return Status::ok;
    });
}

template Status polar_factor(const PolarArgs<float>&);

}  // namespace onestep::reference
