// Multilayer perceptrons under squared error: a₀ = x, z_l = W_l a_{l−1} + b_l, a_l = φ_l(z_l), for the rows of a table.
//   loss      L = Σ ‖a_count − y‖²
//   gradient  δ_count = 2 (a_count − y)∘φ′, δ_{l−1} = W_lᵀδ_l ∘ φ′; ∂W_l = Σ δ_l a_{l−1}ᵀ, ∂b_l = Σ δ_l
//   Jacobian  J of scale · a_count: the same from a unit δ for each output (Rumelhart, Hinton, Williams 1986)
//   product   2 JᵀJ v, the Gauss-Newton matrix's: ȧ_l = (V_l a_{l−1} + v_l + W_l ȧ_{l−1})∘φ′, then the gradient's way
//             back from δ_count = 2 ȧ_count∘φ′ (Schraudolph 2002); its diagonal from squared δ and a, output by output
// Rows pass through all layers while they are in cache; no activations are kept. Layers are meant to be narrow.
//
// Parameters are one vector: W_1 (row-major, outputs × inputs), b_1, W_2, ... x and y are read in place through their
// strides; results are contiguous. Instantiated for float and double.
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

enum class MlpActivation : int { identity = 0, relu = 1, tanh = 2, sigmoid = 3 };

inline constexpr int64_t kMostMlpLayers = 32;

struct MlpLayer {
    int64_t inputs = 0, outputs = 0;
    MlpActivation activation = MlpActivation::identity;
    bool biased = true;
    int64_t weight_at = 0;  // where W and, behind it, b start in the vector of parameters

    int64_t bias_at() const { return weight_at + inputs * outputs; }
    int64_t end() const { return bias_at() + (biased ? outputs : 0); }
};

template <class T>
struct MlpArgs {
    // 1 to kMostMlpLayers, each with as many inputs as the one before has outputs.
    const MlpLayer* layers = nullptr;
    int64_t count = 0;
    int64_t n = 0;
    Matrix<const T> x;  // n × inputs
    const T* parameters = nullptr;

    int64_t inputs() const { return layers[0].inputs; }
    int64_t outputs() const { return layers[count - 1].outputs; }
    int64_t size() const { return layers[count - 1].end(); }
};

template <class T>
struct MlpGradientArgs {
    MlpArgs<T> network;
    Matrix<const T> y;       // n × outputs
    double* loss = nullptr;  // 1
    T* gradient = nullptr;   // as parameters, or null where only the loss is wanted
};
template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args);

template <class T>
struct MlpJacobianArgs {
    MlpArgs<T> network;
    T scale = T(1);
    T* jacobian = nullptr;  // n × outputs × parameters
};
template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args);

template <class T>
struct MlpProductArgs {
    MlpArgs<T> network;
    const T* v = nullptr;  // as parameters; null: the diagonal is wanted
    T* product = nullptr;  // as parameters
};
template <class T>
Status mlp_product(const MlpProductArgs<T>& args);

// The same functions as plain loops: what the tests hold the tuned kernels against.
namespace reference {
template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args);
template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args);
template <class T>
Status mlp_product(const MlpProductArgs<T>& args);
}  // namespace reference

}  // namespace onestep
