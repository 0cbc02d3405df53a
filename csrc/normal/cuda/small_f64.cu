#include "normal/cuda/condition.cuh"
#include "normal/cuda/small.cuh"

namespace onestep::normal::cuda {
template Status small_system(const SystemArgs<double>&, cudaStream_t);
template Status small_factor_solve(const FactorSolveArgs<double>&, cudaStream_t);
template Status small_condition(const ConditionArgs<double>&, cudaStream_t);
}  // namespace onestep::normal::cuda
