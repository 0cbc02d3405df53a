#include "glm/cuda/glm-inl.cuh"

namespace onestep::glm::cuda {

ONESTEP_INSTANTIATE_GLM_PASSES(float16, float)

}  // namespace onestep::glm::cuda
