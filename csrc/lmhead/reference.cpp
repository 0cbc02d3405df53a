// The language-model head as plain loops in double, row by row: the oracle of tests/cpp/test_lmhead.cpp.
#include <algorithm>
#include <cmath>
#include <vector>

#include "lmhead/lmhead.hpp"

namespace onestep::reference {
namespace {

double number(float value) { return static_cast<double>(value); }
double number(double value) { return value; }
double number(BFloat16 value) {
    const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
    float result;
    static_assert(sizeof(result) == sizeof(word));
    std::copy_n(reinterpret_cast<const char*>(&word), sizeof(word), reinterpret_cast<char*>(&result));
    return static_cast<double>(result);
}

using Dense = std::vector<double>;  // row-major

// Element (i, j), or zero where the operand is not given.
template <class Input>
double at(const Matrix<const Input>& a, int64_t i, int64_t j) {
    return a.data == nullptr ? 0.0 : number(a.data[i * a.row + j * a.col]);
}

template <class T>
void write(const Dense& from, T* to) {
    if (to != nullptr) {
        std::transform(from.begin(), from.end(), to, [](double value) { return static_cast<T>(value); });
    }
}

}  // namespace

template <class T, class Input>
Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>& args) {
    const int64_t n = args.rows.count();
    const int64_t d = args.d;
    const int64_t classes = args.v;
    Dense losses(static_cast<size_t>(n));
    Dense grad_input(static_cast<size_t>(n * d));
    Dense grad_weight(static_cast<size_t>(classes * d));
    Dense grad_bias(static_cast<size_t>(classes));
    double value = 0.0;
    for (int64_t i = 0; i < n; ++i) {
        const int64_t target = *args.target.at(args.rows, i).data;
        if (target == args.ignore_index) {
            continue;
        }
        const Matrix<const Input> h{args.input.at(args.rows, i).data, 0, args.input.row};
        const Matrix<const Input> dh{args.input_tangent.at(args.rows, i).data, 0, args.input_tangent.row};
        const double c = number(*args.row_weight.at(args.rows, i).data);
        const double dc = args.row_weight_tangent ? number(*args.row_weight_tangent.at(args.rows, i).data) : 0.0;
        Dense z(static_cast<size_t>(classes));
        Dense dz(z.size());
        Dense q(z.size(), args.label_smoothing / static_cast<double>(classes));
        q[static_cast<size_t>(target)] += 1.0 - args.label_smoothing;
        for (int64_t v = 0; v < classes; ++v) {
            const auto e = static_cast<size_t>(v);
            z[e] = at(args.bias, v, 0);
            dz[e] = at(args.bias_tangent, v, 0);
            for (int64_t j = 0; j < d; ++j) {
                z[e] += at(h, 0, j) * at(args.weight, v, j);
                dz[e] += at(dh, 0, j) * at(args.weight, v, j) + at(h, 0, j) * at(args.weight_tangent, v, j);
            }
        }
        const double peak = *std::max_element(z.begin(), z.end());
        double sum = 0.0, mean = 0.0, loss = 0.0, tangent = 0.0;
        for (size_t e = 0; e < z.size(); ++e) {
            sum += std::exp(z[e] - peak);
            mean += std::exp(z[e] - peak) * dz[e];
            loss -= q[e] == 0.0 ? 0.0 : q[e] * z[e];
            tangent -= q[e] * dz[e];
        }
        mean /= sum;
        loss += peak + std::log(sum);
        tangent += mean;
        losses[static_cast<size_t>(i)] = args.tangent ? tangent : loss;
        value += args.tangent ? c * tangent + dc * loss : c * loss;
        for (int64_t v = 0; v < classes; ++v) {
            const auto e = static_cast<size_t>(v);
            const double p = std::exp(z[e] - peak) / sum;
            const double g = c * (p - q[e]);
            const double dg = c * p * (dz[e] - mean) + dc * (p - q[e]);
            const double main = args.tangent ? dg : g;
            const double cross = args.tangent && !args.gauss_newton ? g : 0.0;
            grad_bias[e] += main;
            for (int64_t j = 0; j < d; ++j) {
                grad_input[static_cast<size_t>(i * d + j)] +=
                    main * at(args.weight, v, j) + cross * at(args.weight_tangent, v, j);
                grad_weight[static_cast<size_t>(v * d + j)] += main * at(h, 0, j) + cross * at(dh, 0, j);
            }
        }
    }
    write({value}, args.value);
    write(losses, args.loss);
    write(grad_input, args.grad_input);
    write(grad_weight, args.grad_weight);
    write(grad_bias, args.grad_bias);
    return Status::ok;
}

template Status linear_cross_entropy<float, float>(const LinearCrossEntropyArgs<float, float>&);
template Status linear_cross_entropy<double, double>(const LinearCrossEntropyArgs<double, double>&);
template Status linear_cross_entropy<float, BFloat16>(const LinearCrossEntropyArgs<float, BFloat16>&);

}  // namespace onestep::reference
