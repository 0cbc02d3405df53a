#include "normal/cuda/middle.cuh"
#include "normal/cuda/solve.cuh"

namespace onestep::normal::cuda {

template <>
int64_t middle_columns<float>(int64_t) {
    return 8;
}

template <>
Status middle_system(const SystemArgs<float>& args, cudaStream_t stream) {
    return args.d <= 128 ? launch_middle<float, 8, 128, 2>(args, stream)
                         : launch_middle<float, 8, 168, 1>(args, stream);
}

template Status middle_factor_solve(const FactorSolveArgs<float>&, cudaStream_t);

}  // namespace onestep::normal::cuda
