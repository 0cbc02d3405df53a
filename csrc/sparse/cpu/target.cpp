// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "sparse/cpu/multiply-inl.hpp"

namespace onestep::sparse::ONESTEP_NS {

extern const SparseKernels<float> f32 = {row_length<float>, multiply<float>};
extern const SparseKernels<double> f64 = {row_length<double>, multiply<double>};

}  // namespace onestep::sparse::ONESTEP_NS
