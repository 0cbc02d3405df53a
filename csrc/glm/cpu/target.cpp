// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "glm/cpu/glm-inl.hpp"
#include "glm/cpu/wide-inl.hpp"

namespace onestep::glm::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class X, class T>
constexpr GlmKernels<X, T> glm_kernels() {
    return {kLanes<T>,
            kPanel<T>,
            glm_work<X, T>,
            glm_pack<X, T>,
            glm_point_rows<X, T>,
            glm_product_rows<X, T>,
            wide_work<X, T>,
            wide_point<X, T>,
            wide_product<X, T>,
            wide_back<X, T>};
}

extern const GlmKernels<float, float> f32 = glm_kernels<float, float>();
extern const GlmKernels<double, double> f64 = glm_kernels<double, double>();
extern const GlmKernels<BFloat16, float> bf16 = glm_kernels<BFloat16, float>();

}  // namespace onestep::glm::ONESTEP_NS
