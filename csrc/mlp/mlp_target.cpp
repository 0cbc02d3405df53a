// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "mlp/mlp-inl.hpp"

namespace onestep::ONESTEP_NS {

template <class T>
constexpr MlpKernels<T> mlp_kernels() {
    return {kPanel<T>,           mlp_packed_size,      mlp_pack<T>,         mlp_work<T>, mlp_gradient_rows<T>,
            mlp_product_rows<T>, mlp_diagonal_rows<T>, mlp_jacobian_rows<T>};
}

extern const MlpKernels<float> mlp_f32 = mlp_kernels<float>();
extern const MlpKernels<double> mlp_f64 = mlp_kernels<double>();

}  // namespace onestep::ONESTEP_NS
