// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "polar/cpu/products-inl.hpp"

namespace onestep::polar::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

extern const PolarKernels<float> f32 = {kTileRows,         kPanel<float>,   pack_left<float>,
                                        pack_right<float>, multiply<float>, largest<float>};

}  // namespace onestep::polar::ONESTEP_NS
