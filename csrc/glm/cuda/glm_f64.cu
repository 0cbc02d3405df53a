#include "glm/cuda/glm-inl.cuh"

namespace onestep::glm::cuda {

ONESTEP_INSTANTIATE_GLM_PASSES(double, double)
ONESTEP_INSTANTIATE_GLM_CHUNKS(double)

}  // namespace onestep::glm::cuda
