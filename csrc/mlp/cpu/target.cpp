// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "mlp/cpu/mlp-inl.hpp"

namespace onestep::mlp::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
constexpr MlpKernels<T> mlp_kernels() {
    return {kPanel<T>,           mlp_packed_size,      mlp_pack<T>,         mlp_work<T>, mlp_gradient_rows<T>,
            mlp_product_rows<T>, mlp_diagonal_rows<T>, mlp_jacobian_rows<T>};
}

extern const MlpKernels<float> f32 = mlp_kernels<float>();
extern const MlpKernels<double> f64 = mlp_kernels<double>();

}  // namespace onestep::mlp::ONESTEP_NS
