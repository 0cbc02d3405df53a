#include "normal/cuda/condition.cuh"
#include "normal/cuda/small.cuh"

namespace onestep::normal::cuda {
template Status small_system(const SystemArgs<float>&, cudaStream_t);
template Status small_factor_solve(const FactorSolveArgs<float>&, cudaStream_t);
template Status small_condition(const ConditionArgs<float>&, cudaStream_t);
}  // namespace onestep::normal::cuda
