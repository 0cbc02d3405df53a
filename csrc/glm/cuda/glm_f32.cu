#include "glm/cuda/glm-inl.cuh"

namespace onestep::cuda {

ONESTEP_INSTANTIATE_GLM_PASSES(float, float)
ONESTEP_INSTANTIATE_GLM_CHUNKS(float)

}  // namespace onestep::cuda
