// The family's kernels that the amx target does not share with avx512.
#include "lmhead/cpu/amx-inl.hpp"

namespace onestep::lmhead::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

extern const HeadKernels<float, BFloat16> bf16 = {
    kAmxStep,        kAmxPanel,          sizeof(BFloat16), amx_pack_input, amx_pack_input_columns,
    amx_score_block, amx_gradient_block, amx_block_work,
};

}  // namespace onestep::lmhead::ONESTEP_NS
