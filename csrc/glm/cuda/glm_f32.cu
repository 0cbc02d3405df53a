#include "glm/cuda/glm-inl.cuh"

namespace onestep::glm::cuda {

ONESTEP_INSTANTIATE_GLM_PASSES(float, float)
ONESTEP_INSTANTIATE_GLM_CHUNKS(float)

}  // namespace onestep::glm::cuda
