// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "compensated/cpu/sweep-inl.hpp"

namespace onestep::compensated::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
constexpr CompensatedKernels<T> compensated_kernels() {
    return {kPanel<T>, pack_right<T>, pack_left<T>, multiply_add<T>, sweep_block<T>, sweep_work<T>};
}

extern const CompensatedKernels<float> f32 = compensated_kernels<float>();
extern const CompensatedKernels<double> f64 = compensated_kernels<double>();

}  // namespace onestep::compensated::ONESTEP_NS
