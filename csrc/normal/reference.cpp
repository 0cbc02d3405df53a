// The normal-equations family as plain loops, in the order of the formulas: the oracle of tests/cpp/test_normal.cpp.
#include <cmath>
#include <limits>
#include <vector>

#include "base/singular.hpp"
#include "normal/cpu/kernels.hpp"
#include "normal/normal.hpp"

namespace onestep::reference {
namespace {

template <class T>
using Dense = std::vector<T>;  // row-major

template <class T>
T weight_of(const Matrix<const T>& weight, int64_t row) {
    return weight.data == nullptr ? T(1) : weight.data[row * weight.row];
}

template <class T>
T at(const Matrix<const T>& a, int64_t i, int64_t j) {
    return a.data[i * a.row + j * a.col];
}

// The rows of one problem as T, as they are or out of 16 bits, which `storage` keeps.
template <class T>
Matrix<const T> rows_as(const Matrix<const T>& wide, const HalfRows& half, const BatchShape& batch, int64_t problem,
                        int64_t n, int64_t d, Dense<T>& storage) {
    if (!half) {
        return wide;
    }
    const bool bfloat16 = half.element == Element::bfloat16;
    const int fraction = bfloat16 ? 7 : 10;
    const int bias = bfloat16 ? 127 : 15;
    const auto from = half.rows.at(batch, problem);
    for (int64_t e = 0; e < n * d; ++e) {
        const int bits = at(from, e / d, e % d);
        const int exponent = (bits & 0x7FFF) >> fraction;
        const int digits = bits & ((1 << fraction) - 1);
        const int leading = exponent == 0 ? 0 : 1 << fraction;
        const double size = std::ldexp(leading + digits, (exponent == 0 ? 1 : exponent) - bias - fraction);
        const bool special = exponent == 2 * bias + 1;
        const double value = !special      ? size
                             : digits == 0 ? std::numeric_limits<double>::infinity()
                                           : std::numeric_limits<double>::quiet_NaN();
        storage.push_back(static_cast<T>((bits & 0x8000) != 0 ? -value : value));
    }
    return {storage.data(), d, 1};
}

// Upper factor of a (d × d) in place; 0 or the order of the failed minor.
template <class T>
int32_t factor(Dense<T>& a, int64_t d, const Dense<T>& floor) {
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = i; j < d; ++j) {
            T sum = a[i * d + j];
            for (int64_t p = 0; p < i; ++p) {
                sum -= a[p * d + i] * a[p * d + j];
            }
            if (i == j) {
                if (!(sum > floor[i]) || !std::isfinite(sum)) {
                    return static_cast<int32_t>(i + 1);
                }
                a[i * d + i] = std::sqrt(sum);
            } else {
                a[i * d + j] = sum / a[i * d + i];
            }
        }
    }
    return 0;
}

// z = (UᵀU)⁻¹z for d × k right-hand sides.
template <class T>
void solve(const T* u, int64_t row, int64_t col, int64_t d, int64_t k, T* z) {
    for (int64_t c = 0; c < k; ++c) {
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t p = 0; p < i; ++p) {
                z[i * k + c] -= u[p * row + i * col] * z[p * k + c];
            }
            z[i * k + c] /= u[i * (row + col)];
        }
        for (int64_t i = d - 1; i >= 0; --i) {
            for (int64_t p = i + 1; p < d; ++p) {
                z[i * k + c] -= u[i * row + p * col] * z[p * k + c];
            }
            z[i * k + c] /= u[i * (row + col)];
        }
    }
}

template <class T>
T norm1(const Dense<T>& a, int64_t d) {
    T most = T(0);
    for (int64_t j = 0; j < d; ++j) {
        T sum = T(0);
        for (int64_t i = 0; i < d; ++i) {
            sum += std::abs(a[i * d + j]);
        }
        most = std::max(most, sum);
    }
    return most;
}

template <class T>
void write_factor(const Dense<T>& u, int64_t d, bool failed, T* to) {
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < d; ++j) {
            to[i * d + j] = failed ? std::numeric_limits<T>::quiet_NaN() : j < i ? T(0) : u[i * d + j];
        }
    }
}

// Writes z, or NaN if `failed` or z is not finite; returns whether it wrote z.
template <class T>
bool write_solution(const Dense<T>& z, bool failed, T* to) {
    bool good = !failed;
    for (const T value : z) {
        good = good && std::isfinite(value);
    }
    for (size_t e = 0; e < z.size(); ++e) {
        to[e] = good ? z[e] : std::numeric_limits<T>::quiet_NaN();
    }
    return good;
}

}  // namespace

template <class T>
Status gram(const GramArgs<T>& args) {
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        Dense<T> storage;
        const auto x =
            rows_as(args.x.at(args.batch, problem), args.x_half, args.batch, problem, args.n, args.d, storage);
        const auto y = args.y.at(args.batch, problem);
        const auto weight = args.weight.at(args.batch, problem);
        for (int64_t i = 0; i < args.d; ++i) {
            for (int64_t j = 0; j < args.d; ++j) {
                T sum = T(0);
                for (int64_t r = 0; r < args.n; ++r) {
                    sum += weight_of(weight, r) * at(x, r, i) * at(x, r, j);
                }
                args.gram[(problem * args.d + i) * args.d + j] = sum;
            }
            for (int64_t c = 0; c < args.k; ++c) {
                T sum = T(0);
                for (int64_t r = 0; r < args.n; ++r) {
                    sum += weight_of(weight, r) * at(x, r, i) * at(y, r, c);
                }
                args.cross[(problem * args.d + i) * args.k + c] = sum;
            }
        }
    }
    return Status::ok;
}

template <class T>
Status moments(const MomentsArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    Dense<T> storage;
    const auto x = rows_as(args.x, args.x_half, BatchShape{}, 0, args.n, d, storage);
    const auto value = [&](int64_t row, int64_t c) {
        return static_cast<double>(c < d ? at(x, row, c) : at(args.y, row, c - d));
    };
    double total = 0.0;
    Dense<double> mean(static_cast<size_t>(d + k), 0.0);
    for (int64_t r = 0; r < args.n; ++r) {
        const auto w = static_cast<double>(weight_of(args.weight, r));
        total += w;
        for (int64_t c = 0; c < d + k; ++c) {
            mean[c] += w * value(r, c);
        }
    }
    for (double& m : mean) {
        m = args.center && total > 0.0 ? m / total : 0.0;
    }
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t c = 0; c < d + k; ++c) {
            double sum = 0.0;
            for (int64_t r = 0; r < args.n; ++r) {
                sum +=
                    static_cast<double>(weight_of(args.weight, r)) * (value(r, i) - mean[i]) * (value(r, c) - mean[c]);
            }
            (c < d ? args.gram[i * d + c] : args.cross[i * k + c - d]) = sum;
        }
    }
    std::copy(mean.begin(), mean.end(), args.mean);
    *args.weight_sum = total;
    return Status::ok;
}

template <class T>
Status solve_normal(SolveNormalArgs<T> args) {
    const auto uniform = static_cast<T>(args.uniform_ridge);
    if (!args.ridge) {
        args.ridge.data = &uniform;
    }
    const int64_t d = args.d;
    const int64_t k = args.k;
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        Dense<T> a(static_cast<size_t>(d * d));
        Dense<T> z(static_cast<size_t>(d * k));
        GramArgs<T> one;
        one.n = args.n;
        one.d = d;
        one.k = k;
        Dense<T> storage;
        const auto x = rows_as(args.x.at(args.batch, problem), args.x_half, args.batch, problem, args.n, d, storage);
        const auto y = args.y.at(args.batch, problem);
        const auto weight = args.weight.at(args.batch, problem);
        const auto ridge = args.ridge.at(args.batch, problem);
        one.x = {x.data, x.row, x.col, {}};
        one.y = {y.data, y.row, y.col, {}};
        one.weight = {weight.data, weight.row, weight.col, {}};
        one.gram = a.data();
        one.cross = z.data();
        (void)reference::gram(one);  // cannot fail
        T mean = T(0);
        Dense<double> penalty(static_cast<size_t>(d));
        for (int64_t i = 0; i < d; ++i) {
            penalty[i] = static_cast<double>(ridge.data[i * ridge.row]);
            a[i * d + i] += ridge.data[i * ridge.row];
            mean += a[i * d + i] / static_cast<T>(d);
        }
        Dense<T> u;
        T added = T(0);
        int32_t failed = 0;
        for (int attempt = 0;; ++attempt) {
            u = a;
            Dense<T> floor(static_cast<size_t>(d));
            for (int64_t i = 0; i < d; ++i) {
                u[i * d + i] += added;
                floor[i] = singular_floor(u[i * d + i]);
            }
            failed = factor(u, d, floor);
            if (failed == 0 || args.jitter <= 0.0 || !std::isfinite(mean) || added >= mean) {
                break;
            }
            added = mean * static_cast<T>(args.jitter * std::pow(10.0, attempt));
        }
        if (failed == 0) {
            solve(u.data(), d, 1, d, k, z.data());
        }
        for (int64_t step = 0; step < args.refine && failed == 0; ++step) {
            Dense<T> delta(static_cast<size_t>(d * k));
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t c = 0; c < k; ++c) {
                    double sum = -(penalty[i] + static_cast<double>(added)) * static_cast<double>(z[i * k + c]);
                    for (int64_t r = 0; r < args.n; ++r) {
                        auto e = static_cast<double>(at(y, r, c));
                        for (int64_t j = 0; j < d; ++j) {
                            e -= static_cast<double>(at(x, r, j)) * static_cast<double>(z[j * k + c]);
                        }
                        sum += static_cast<double>(weight_of(weight, r)) * static_cast<double>(at(x, r, i)) * e;
                    }
                    delta[i * k + c] = static_cast<T>(sum);
                }
            }
            solve(u.data(), d, 1, d, k, delta.data());
            for (size_t e = 0; e < z.size(); ++e) {
                z[e] += delta[e];
            }
        }
        const bool good = write_solution(z, failed != 0, args.solution + problem * d * k);
        args.info[problem] = failed != 0 ? failed : good ? 0 : static_cast<int32_t>(d + 1);
        if (args.factor != nullptr) {
            write_factor(u, d, failed != 0, args.factor + problem * d * d);
        }
        if (args.jittered != nullptr) {
            args.jittered[problem] = failed != 0 ? T(0) : added;
        }
        if (args.rcond != nullptr) {
            Dense<T> inverse(static_cast<size_t>(d * d), T(0));
            for (int64_t i = 0; i < d; ++i) {
                inverse[i * d + i] = T(1);
                a[i * d + i] += added;
            }
            if (failed == 0) {
                solve(u.data(), d, 1, d, d, inverse.data());
            }
            args.rcond[problem] = failed != 0 ? T(0) : T(1) / (norm1(a, d) * norm1(inverse, d));
        }
    }
    return Status::ok;
}

template <class T>
Status solve_segments(const SolveSegmentsArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    for (int64_t segment = 0; segment < args.segments; ++segment) {
        Dense<T> a(static_cast<size_t>(d * d), T(0));
        Dense<T> z(static_cast<size_t>(d * k), T(0));
        Dense<T> floor(static_cast<size_t>(d));
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j < d && args.base.data != nullptr; ++j) {
                a[i * d + j] = (at(args.base, i, j) + at(args.base, j, i)) / 2;
            }
            a[i * d + i] +=
                args.ridge.data != nullptr ? at(args.ridge, segment, i) : static_cast<T>(args.uniform_ridge);
        }
        for (int64_t e = args.offsets[segment]; e < args.offsets[segment + 1]; ++e) {
            const int64_t row = args.indices != nullptr ? args.indices[e] : e;
            for (int64_t i = 0; i < d; ++i) {
                const T scaled = weight_of(args.weight, e) * at(args.x, row, i);
                for (int64_t j = 0; j < d; ++j) {
                    a[i * d + j] += scaled * at(args.x, row, j);
                }
                for (int64_t c = 0; c < k; ++c) {
                    z[i * k + c] += scaled * at(args.y, e, c);
                }
            }
        }
        for (int64_t i = 0; i < d; ++i) {
            floor[i] = singular_floor(a[i * d + i]);
        }
        const int32_t failed = factor(a, d, floor);
        if (failed == 0) {
            solve(a.data(), d, 1, d, k, z.data());
        }
        const bool good = write_solution(z, failed != 0, args.solution + segment * d * k);
        args.info[segment] = failed != 0 ? failed : good ? 0 : static_cast<int32_t>(d + 1);
        if (args.factor != nullptr) {
            write_factor(a, d, failed != 0, args.factor + segment * d * d);
        }
    }
    return Status::ok;
}

template <class T>
Status solve_normal_backward(const SolveNormalBackwardArgs<T>& args) {
    const int64_t n = args.n;
    const int64_t d = args.d;
    const int64_t k = args.k;
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        const auto x = args.x.at(args.batch, problem);
        const auto y = args.y.at(args.batch, problem);
        const auto weight = args.weight.at(args.batch, problem);
        const auto w = args.solution.at(args.batch, problem);
        const auto u = args.factor.at(args.batch, problem);
        const auto grad = args.grad.at(args.batch, problem);
        const bool failed = *args.info.at(args.batch, problem).data != 0;
        Dense<T> v(static_cast<size_t>(d * k));
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t c = 0; c < k; ++c) {
                v[i * k + c] = at(grad, i, c);
            }
        }
        solve(u.data, u.row, u.col, d, k, v.data());
        for (int64_t i = 0; i < d; ++i) {
            T sum = T(0);
            for (int64_t c = 0; c < k; ++c) {
                sum -= v[i * k + c] * at(w, i, c);
            }
            args.grad_ridge[problem * d + i] = failed ? T(0) : sum;
        }
        for (int64_t r = 0; r < n; ++r) {
            T rowsum = T(0);
            Dense<T> gradient(static_cast<size_t>(d), T(0));
            for (int64_t c = 0; c < k; ++c) {
                T e = at(y, r, c);
                T q = T(0);
                for (int64_t j = 0; j < d; ++j) {
                    e -= at(x, r, j) * at(w, j, c);
                    q += at(x, r, j) * v[j * k + c];
                }
                rowsum += q * e;
                for (int64_t j = 0; j < d; ++j) {
                    gradient[j] += weight_of(weight, r) * (e * v[j * k + c] - q * at(w, j, c));
                }
                if (args.grad_y != nullptr) {
                    args.grad_y[(problem * n + r) * k + c] = failed ? T(0) : weight_of(weight, r) * q;
                }
            }
            for (int64_t j = 0; j < d && args.grad_x != nullptr; ++j) {
                args.grad_x[(problem * n + r) * d + j] = failed ? T(0) : gradient[j];
            }
            if (args.grad_weight != nullptr) {
                args.grad_weight[problem * n + r] = failed ? T(0) : rowsum;
            }
        }
    }
    return Status::ok;
}

template <class T>
Status solve_spd(const SolveSpdArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        const auto a = args.a.at(args.batch, problem);
        Dense<T> u(static_cast<size_t>(d * d), T(0));
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                u[j * d + i] = at(a, i, j);
            }
        }
        const int32_t failed = factor(u, d, Dense<T>(static_cast<size_t>(d), T(0)));
        bool good = failed == 0;
        if (k > 0) {
            const auto b = args.b.at(args.batch, problem);
            Dense<T> z(static_cast<size_t>(d * k));
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t c = 0; c < k; ++c) {
                    z[i * k + c] = at(b, i, c);
                }
            }
            if (good) {
                solve(u.data(), d, 1, d, k, z.data());
            }
            good = write_solution(z, failed != 0, args.solution + problem * d * k);
        }
        args.info[problem] = failed != 0 ? failed : good ? 0 : static_cast<int32_t>(d + 1);
        if (args.factor != nullptr) {
            write_factor(u, d, failed != 0, args.factor + problem * d * d);
        }
    }
    return Status::ok;
}

template <class T>
Status cholesky(const CholeskyArgs<T>& args) {
    SolveSpdArgs<T> solve_args;
    solve_args.batch = args.batch;
    solve_args.d = args.d;
    solve_args.a = args.a;
    solve_args.factor = args.factor;
    solve_args.info = args.info;
    return reference::solve_spd(solve_args);
}

template <class T>
Status cholesky_solve(const CholeskySolveArgs<T>& args) {
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        const auto u = args.factor.at(args.batch, problem);
        const auto b = args.b.at(args.batch, problem);
        T* z = args.solution + problem * args.d * args.k;
        for (int64_t i = 0; i < args.d; ++i) {
            for (int64_t c = 0; c < args.k; ++c) {
                z[i * args.k + c] = at(b, i, c);
            }
        }
        solve(u.data, u.row, u.col, args.d, args.k, z);
    }
    return Status::ok;
}

#define ONESTEP_INSTANTIATE(T)                                                   \
    template Status gram<T>(const GramArgs<T>&);                                 \
    template Status moments<T>(const MomentsArgs<T>&);                           \
    template Status solve_normal<T>(SolveNormalArgs<T>);                         \
    template Status solve_segments<T>(const SolveSegmentsArgs<T>&);              \
    template Status solve_normal_backward<T>(const SolveNormalBackwardArgs<T>&); \
    template Status solve_spd<T>(const SolveSpdArgs<T>&);                        \
    template Status cholesky<T>(const CholeskyArgs<T>&);                         \
    template Status cholesky_solve<T>(const CholeskySolveArgs<T>&);

ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

#undef ONESTEP_INSTANTIATE

}  // namespace onestep::reference
