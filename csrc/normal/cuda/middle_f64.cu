#include "normal/cuda/middle.cuh"
#include "normal/cuda/solve.cuh"

namespace onestep::normal::cuda {

template <>
int64_t middle_columns<double>(int64_t d) {
    return d <= 84 ? 4 : 8;
}

template <>
int64_t most_features<double>(int64_t shared_bytes) {
    int64_t d = kMostFeatures;
    while (d > kSmallFeatures && MiddleShape<double, 8>(d, 1).shared_bytes() > shared_bytes) {
        --d;
    }
    return d;
}

template <>
Status middle_system(const SystemArgs<double>& args, cudaStream_t stream) {
    return args.d <= 84 ? launch_middle<double, 4, 84, 2>(args, stream)
                        : launch_middle<double, 8, 168, 1>(args, stream);
}

template Status middle_factor_solve(const FactorSolveArgs<double>&, cudaStream_t);

}  // namespace onestep::normal::cuda
