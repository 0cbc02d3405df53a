#include "glm/cuda/glm-inl.cuh"

namespace onestep::cuda {

ONESTEP_INSTANTIATE_GLM_PASSES(bfloat16, float)

}  // namespace onestep::cuda
