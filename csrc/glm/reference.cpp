// The GLM family as plain loops, in double throughout.
#include <algorithm>
#include <cmath>
#include <vector>

#include "glm/glm.hpp"

namespace onestep::reference {
namespace {

double value(double x) { return x; }
double value(BFloat16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    return static_cast<double>(__builtin_bit_cast(float, bits));
}

template <class X, class T>
double x_at(const GlmData<X, T>& data, int64_t i, int64_t j) {
    return j == data.d ? 1.0 : value(data.x.data[i * data.x.row + j * data.x.col]);
}

template <class X, class T>
double weight_at(const GlmData<X, T>& data, int64_t i) {
    return data.weight.data == nullptr ? 1.0 : static_cast<double>(data.weight.data[i * data.weight.row]);
}

template <class X, class T>
double y_at(const GlmData<X, T>& data, int64_t i, int64_t c) {
    if (data.labels.data != nullptr) {
        return data.labels.data[i * data.labels.row] == c ? 1.0 : 0.0;
    }
    return static_cast<double>(data.y.data[i * data.y.row + c * data.y.col]);
}

double softplus(double eta) { return std::max(eta, 0.0) + std::log1p(std::exp(-std::abs(eta))); }

template <class X, class T>
std::vector<double> times(const GlmData<X, T>& data, int64_t i, Matrix<const T> w) {
    std::vector<double> eta(static_cast<size_t>(data.k), 0.0);
    for (int64_t j = 0; j < data.rows_of_w(); ++j) {
        for (int64_t c = 0; c < data.k; ++c) {
            eta[static_cast<size_t>(c)] += x_at(data, i, j) * static_cast<double>(w.data[j * w.row + c * w.col]);
        }
    }
    return eta;
}

template <class X, class T>
void store(const GlmData<X, T>& data, const std::vector<double>& sum, T* to) {
    for (int64_t index = 0; index < data.rows_of_w() * data.k; ++index) {
        to[index] = static_cast<T>(sum[static_cast<size_t>(index)]);
    }
}

template <class X, class T>
void add_outer(const GlmData<X, T>& data, int64_t i, const std::vector<double>& row, std::vector<double>& sum) {
    for (int64_t j = 0; j < data.rows_of_w(); ++j) {
        for (int64_t c = 0; c < data.k; ++c) {
            sum[static_cast<size_t>(j * data.k + c)] += x_at(data, i, j) * row[static_cast<size_t>(c)];
        }
    }
}

}  // namespace

template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args) {
    const GlmData<X, T>& data = args.data;
    std::vector<double> sum(static_cast<size_t>(data.rows_of_w() * data.k), 0.0);
    double loss = 0.0;
    for (int64_t i = 0; i < data.n; ++i) {
        const double w = weight_at(data, i);
        if (w < 0.0) {
            return Status::negative_weight;
        }
        const std::vector<double> eta = times(data, i, args.w);
        std::vector<double> slope(eta.size()), curvature(eta.size());
        double lse = 0.0;
        if (data.family == GlmFamily::softmax) {
            const double most = *std::max_element(eta.begin(), eta.end());
            double exponentials = 0.0;
            for (int64_t c = 0; c < data.k; ++c) {
                exponentials += std::exp(eta[static_cast<size_t>(c)] - most);
            }
            lse = most + std::log(exponentials);
        }
        for (int64_t c = 0; c < data.k; ++c) {
            const auto at = static_cast<size_t>(c);
            const double y = y_at(data, i, c);
            const double e = eta[at];
            const double p = 1.0 / (1.0 + std::exp(-e));
            switch (data.family) {
                case GlmFamily::gaussian:
                    loss += w * (e - y) * (e - y) / 2.0;
                    slope[at] = w * (e - y);
                    curvature[at] = w;
                    break;
                case GlmFamily::logistic:
                    loss += w * (softplus(e) - y * e);
                    slope[at] = w * (p - y);
                    curvature[at] = w * p * (1.0 / (1.0 + std::exp(e)));
                    break;
                case GlmFamily::poisson:
                    loss += w * (std::exp(e) - y * e);
                    slope[at] = w * (std::exp(e) - y);
                    curvature[at] = w * std::exp(e);
                    break;
                case GlmFamily::softmax:
                    loss += w * y * (lse - e);
                    slope[at] = w * (std::exp(e - lse) - y);
                    curvature[at] = std::exp(e - lse);
                    break;
            }
        }
        add_outer(data, i, slope, sum);
        if (args.curvature != nullptr) {
            std::transform(curvature.begin(), curvature.end(), args.curvature + i * data.k,
                           [](double entry) { return static_cast<T>(entry); });
        }
    }
    *args.loss = loss;
    if (args.gradient != nullptr) {
        store(data, sum, args.gradient);
    }
    return Status::ok;
}

template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args) {
    const GlmData<X, T>& data = args.data;
    BatchShape groups;
    groups.dims = 1;
    groups.size[0] = args.m;
    for (int64_t g = 0; g < args.m; ++g) {
        std::vector<double> sum(static_cast<size_t>(data.rows_of_w() * data.k), 0.0);
        for (int64_t i = 0; i < data.n; ++i) {
            std::vector<double> z = times(data, i, args.v.at(groups, g));
            const T* c = args.curvature + i * data.k;
            double mean = 0.0;
            for (int64_t j = 0; j < data.k; ++j) {
                mean += static_cast<double>(c[j]) * z[static_cast<size_t>(j)];
            }
            for (int64_t j = 0; j < data.k; ++j) {
                double& entry = z[static_cast<size_t>(j)];
                entry = data.family == GlmFamily::softmax
                            ? weight_at(data, i) * static_cast<double>(c[j]) * (entry - mean)
                            : static_cast<double>(c[j]) * entry;
            }
            add_outer(data, i, z, sum);
        }
        store(data, sum, args.product + g * data.rows_of_w() * data.k);
    }
    return Status::ok;
}

#define ONESTEP_INSTANTIATE(X, T)                         \
    template Status glm_point(const GlmPointArgs<X, T>&); \
    template Status glm_product(const GlmProductArgs<X, T>&);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(BFloat16, float)

}  // namespace onestep::reference
