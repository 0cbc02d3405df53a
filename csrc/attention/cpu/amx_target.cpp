// The amx target's own kernels, for bfloat16 q, k and v. Values and tangents together have no kernel (null): they take
// two passes, one after the other.
#include "attention/cpu/amx-backward-inl.hpp"
#include "attention/cpu/amx-forward-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

extern const AttentionKernels<float> f32 = {
    kLanes<float>,
    256,
    128,
    bfloat16_work,
    bfloat16_forward,
    bfloat16_jvp,
    nullptr,
    bfloat16_deltas,
    bfloat16_backward<false>,
    bfloat16_backward<true>,
    nullptr,
    bfloat16_score_grad<false>,
    bfloat16_score_grad<true>,
};

}  // namespace onestep::attention::ONESTEP_NS
