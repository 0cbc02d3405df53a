#include <cmath>
#include <limits>
#include <vector>

#include "base/guarded.hpp"
#include "base/singular.hpp"
#include "compensated/compensated.hpp"

namespace onestep::reference {
namespace {

using Doubles = std::vector<double>;

// L of the reversed matrix; returns info.
template <class T>
int32_t factor(Doubles& c, int64_t n) {
    for (const double value : c) {
        if (!(std::abs(value) <= static_cast<double>(std::numeric_limits<T>::max()))) {
            return kNotFinite;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const double least = kSingularEpsilons * static_cast<double>(std::numeric_limits<T>::epsilon()) * c[i * n + i];
        for (int64_t j = 0; j <= i; ++j) {
            double sum = c[i * n + j];
            for (int64_t p = 0; p < j; ++p) {
                sum -= c[i * n + p] * c[j * n + p];
            }
            if (i == j && !(sum > std::max(least, 0.0))) {
                return static_cast<int32_t>(i + 1);
            }
            c[i * n + j] = i == j ? std::sqrt(sum) : sum / c[j * n + j];
        }
    }
    return 0;
}

// The columns [begin, end) of a row: the grid that covers them and 0.
template <class T>
void grid(const SweepArgs<T>& args, int64_t row, int64_t begin, int64_t end, int64_t group) {
    T low = 0;
    T high = 0;
    for (int64_t j = begin; j < end; ++j) {
        low = std::min(low, args.swept[row * args.columns + j]);
        high = std::max(high, args.swept[row * args.columns + j]);
    }
    if (args.symmetric) {
        high = std::max(high, -low);
        low = -high;
    }
    if (low == 0 && high == 0) {
        low = -1;
        high = 1;
    }
    const T most = static_cast<T>((int64_t{1} << args.bits) - 1);
    const T scale = (high - low) / most;
    args.scale[row * args.groups + group] = scale;
    args.zero[row * args.groups + group] = args.symmetric ? (most + 1) / 2 : std::nearbyint(-low / scale);
}

}  // namespace

template <class T>
Status inverse_cholesky(const InverseCholeskyArgs<T>& args) {
    const int64_t n = args.n;
    for (int64_t problem = 0; problem < args.batch.count(); ++problem) {
        const Matrix<const T> a = args.a.at(args.batch, problem);
        double trace = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            trace += static_cast<double>(a.data[i * (a.row + a.col)]);
        }
        const double added =
            trace / static_cast<double>(n) * static_cast<double>(*args.damping.at(args.batch, problem).data);
        Doubles c(static_cast<size_t>(n * n));
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j <= i; ++j) {
                // Symmetric, so that the reversed lower triangle is the upper one mirrored.
                c[i * n + j] = static_cast<double>(a.data[(n - 1 - j) * a.row + (n - 1 - i) * a.col]);
            }
            c[i * n + i] += added;
        }
        const int32_t info = factor<T>(c, n);
        args.info[problem] = info;
        T* to = args.factor + problem * n * n;
        Doubles inverse(static_cast<size_t>(n * n));
        for (int64_t j = 0; j < n && info == 0; ++j) {
            for (int64_t i = j; i < n; ++i) {
                double sum = i == j ? 1.0 : 0.0;
                for (int64_t p = j; p < i; ++p) {
                    sum -= c[i * n + p] * inverse[p * n + j];
                }
                inverse[i * n + j] = sum / c[i * n + i];
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                double value = std::numeric_limits<double>::quiet_NaN();
                if (info == 0 && args.unit) {
                    const double pivot = c[(n - 1 - j) * (n + 1)];
                    value = i == j ? pivot : i < j ? c[(n - 1 - i) * n + (n - 1 - j)] / pivot : 0.0;
                } else if (info == 0) {
                    value = inverse[(n - 1 - i) * n + (n - 1 - j)];
                }
                to[i * n + j] = static_cast<T>(value);
            }
        }
    }
    return Status::ok;
}

template <class T>
Status compensated_sweep(const SweepArgs<T>& args) {
    const int64_t n = args.columns;
    std::fill_n(args.error, args.rows, 0.0);
    std::copy_n(args.w, args.rows * n, args.swept);
    const auto score = [&](int64_t row, int64_t j) {
        const T ratio = args.swept[row * n + j] / args.factor[j * n + j];
        return ratio * ratio;
    };
    for (int64_t start = 0; start < n;) {
        const int64_t end = sweep_block_end(args, start);
        T threshold = T(-1);
        const int64_t removed = sweep_removed(args.rows * (end - start), args.sparsity);
        if (removed > 0) {
            std::vector<T> scores;
            for (int64_t row = 0; row < args.rows; ++row) {
                for (int64_t j = start; j < end; ++j) {
                    scores.push_back(score(row, j));
                }
            }
            std::sort(scores.begin(), scores.end());
            threshold = scores[static_cast<size_t>(removed - 1)];
        }
        for (int64_t row = 0; row < args.rows; ++row) {
            T* w = args.swept + row * n;
            // Decided for the whole block, and for each run of `of` columns, before anything of it changes.
            std::vector<bool> gone(static_cast<size_t>(end - start));
            for (int64_t j = start; j < end; ++j) {
                gone[static_cast<size_t>(j - start)] = score(row, j) <= threshold;
            }
            for (int64_t j = start; j < end; ++j) {
                if (args.of > 0 && j % args.of == 0) {
                    for (int64_t k = 0; k < args.of; ++k) {
                        int64_t smaller = 0;
                        for (int64_t l = 0; l < args.of; ++l) {
                            const T a = score(row, j + l);
                            const T b = score(row, j + k);
                            smaller += a < b || (a == b && l < k) ? 1 : 0;
                        }
                        gone[static_cast<size_t>(j + k - start)] = smaller < args.of - args.keep;
                    }
                }
                const int64_t group = args.group != nullptr ? args.group[j] : j / args.group_size;
                if (args.bits > 0 && args.group == nullptr && j % args.group_size == 0) {
                    grid(args, row, j, std::min(n, j + args.group_size), group);
                }
                T q = gone[static_cast<size_t>(j - start)] ? T(0) : w[j];
                if (args.bits > 0) {
                    const T scale = args.scale[row * args.groups + group];
                    const T zero = args.zero[row * args.groups + group];
                    const T most = static_cast<T>((int64_t{1} << args.bits) - 1);
                    const T code = std::clamp(std::nearbyint(q / scale) + zero, T(0), most);
                    args.codes[row * n + j] = static_cast<uint8_t>(code);
                    q = scale * (code - zero);
                }
                const T pivot = args.factor[j * n + j];
                const T e = args.unit ? (w[j] - q) * pivot : (w[j] - q) / pivot;
                const T change = args.unit ? args.w[row * n + j] - q : -e;
                args.error[row] += static_cast<double>(e) * static_cast<double>(e);
                for (int64_t l = j + 1; l < n; ++l) {
                    w[l] += change * args.factor[j * n + l];
                }
                w[j] = q;
            }
        }
        start = end;
    }
    return Status::ok;
}

#define ONESTEP_INSTANTIATE(T)                                       \
    template Status inverse_cholesky(const InverseCholeskyArgs<T>&); \
    template Status compensated_sweep(const SweepArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep::reference
