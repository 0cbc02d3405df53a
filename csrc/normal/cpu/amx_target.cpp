// The family's kernels that the amx target does not share with avx512.
#include "normal/cpu/amx-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

extern const HalfGramKernels bf16 = {amx_gram_rows};

}  // namespace onestep::normal::ONESTEP_NS
