// Plain loops: the oracle that the tests hold the tuned kernels against.
#include <algorithm>
#include <cmath>
#include <vector>

#include "mlp/mlp.hpp"

namespace onestep::reference {
namespace {

template <class T>
T activate(MlpActivation activation, T z) {
    switch (activation) {
        case MlpActivation::relu:
            return z < T(0) ? T(0) : z;
        case MlpActivation::tanh:
            return std::tanh(z);
        case MlpActivation::sigmoid:
            return T(1) / (T(1) + std::exp(-z));
        default:
            return z;
    }
}

template <class T>
T slope(MlpActivation activation, T a) {
    switch (activation) {
        case MlpActivation::relu:
            return a > T(0) ? T(1) : T(0);
        case MlpActivation::tanh:
            return T(1) - a * a;
        case MlpActivation::sigmoid:
            return a * (T(1) - a);
        default:
            return T(1);
    }
}

// a_0 ... a_count of one row.
template <class T>
std::vector<std::vector<T>> forward(const MlpArgs<T>& args, int64_t row) {
    std::vector<std::vector<T>> activations(1);
    for (int64_t i = 0; i < args.inputs(); ++i) {
        activations[0].push_back(args.x.data[row * args.x.row + i * args.x.col]);
    }
    for (int64_t l = 0; l < args.count; ++l) {
        const MlpLayer& layer = args.layers[l];
        std::vector<T> next;
        for (int64_t u = 0; u < layer.outputs; ++u) {
            T z = layer.biased ? args.parameters[layer.bias_at() + u] : T(0);
            for (int64_t i = 0; i < layer.inputs; ++i) {
                z += args.parameters[layer.weight_at + u * layer.inputs + i] *
                     activations.back()[static_cast<size_t>(i)];
            }
            next.push_back(activate(layer.activation, z));
        }
        activations.push_back(next);
    }
    return activations;
}

// gradient += Jᵀ cotangent of one row.
template <class T>
void add_backward(const MlpArgs<T>& args, const std::vector<std::vector<T>>& activations, std::vector<T> cotangent,
                  T* gradient) {
    for (int64_t l = args.count - 1; l >= 0; --l) {
        const MlpLayer& layer = args.layers[l];
        const std::vector<T>& inputs = activations[static_cast<size_t>(l)];
        std::vector<T> next(inputs.size());
        for (int64_t u = 0; u < layer.outputs; ++u) {
            const auto at = static_cast<size_t>(u);
            const T delta = cotangent[at] * slope(layer.activation, activations[static_cast<size_t>(l) + 1][at]);
            for (int64_t i = 0; i < layer.inputs; ++i) {
                const int64_t weight = layer.weight_at + u * layer.inputs + i;
                gradient[weight] += delta * inputs[static_cast<size_t>(i)];
                next[static_cast<size_t>(i)] += args.parameters[weight] * delta;
            }
            if (layer.biased) {
                gradient[layer.bias_at() + u] += delta;
            }
        }
        cotangent = next;
    }
}

}  // namespace

template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args) {
    const MlpArgs<T>& network = args.network;
    *args.loss = 0.0;
    for (int64_t at = 0; args.gradient != nullptr && at < network.size(); ++at) {
        args.gradient[at] = T(0);
    }
    for (int64_t row = 0; row < network.n; ++row) {
        const auto activations = forward(network, row);
        std::vector<T> cotangent;
        for (int64_t u = 0; u < network.outputs(); ++u) {
            const T residual =
                activations.back()[static_cast<size_t>(u)] - args.y.data[row * args.y.row + u * args.y.col];
            *args.loss += static_cast<double>(residual * residual);
            cotangent.push_back(T(2) * residual);
        }
        if (args.gradient != nullptr) {
            add_backward(network, activations, cotangent, args.gradient);
        }
    }
    return Status::ok;
}

template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args) {
    const MlpArgs<T>& network = args.network;
    const int64_t outputs = network.outputs();
    for (int64_t row = 0; row < network.n; ++row) {
        const auto activations = forward(network, row);
        for (int64_t u = 0; u < outputs; ++u) {
            T* to = args.jacobian + (row * outputs + u) * network.size();
            for (int64_t at = 0; at < network.size(); ++at) {
                to[at] = T(0);
            }
            std::vector<T> cotangent(static_cast<size_t>(outputs));
            cotangent[static_cast<size_t>(u)] = args.scale;
            add_backward(network, activations, cotangent, to);
        }
    }
    return Status::ok;
}

// By the Jacobian's rows.
template <class T>
Status mlp_product(const MlpProductArgs<T>& args) {
    const MlpArgs<T>& network = args.network;
    const int64_t size = network.size();
    std::vector<T> jacobian(static_cast<size_t>(network.n * network.outputs() * size));
    (void)reference::mlp_jacobian(MlpJacobianArgs<T>{network, T(1), jacobian.data()});  // cannot fail
    std::fill_n(args.product, size, T(0));
    for (int64_t row = 0; row < network.n * network.outputs(); ++row) {
        const T* from = jacobian.data() + row * size;
        T along = T(0);
        for (int64_t at = 0; args.v != nullptr && at < size; ++at) {
            along += from[at] * args.v[at];
        }
        for (int64_t at = 0; at < size; ++at) {
            args.product[at] += T(2) * from[at] * (args.v != nullptr ? along : from[at]);
        }
    }
    return Status::ok;
}

template Status mlp_gradient<float>(const MlpGradientArgs<float>&);
template Status mlp_gradient<double>(const MlpGradientArgs<double>&);
template Status mlp_product<float>(const MlpProductArgs<float>&);
template Status mlp_product<double>(const MlpProductArgs<double>&);
template Status mlp_jacobian<float>(const MlpJacobianArgs<float>&);
template Status mlp_jacobian<double>(const MlpJacobianArgs<double>&);

}  // namespace onestep::reference
