#include "normal/cuda/middle.cuh"
#include "normal/cuda/solve.cuh"

namespace onestep::normal::cuda {

template <>
int64_t middle_columns<float>(int64_t d) {
    return d <= 64 ? 4 : 8;
}

template <>
Status middle_system(const SystemArgs<float>& args, cudaStream_t stream) {
    // Tiles of d features and of the right-hand sides: at most 152, 152 and 252.
    if (args.d <= 64) {
        return launch_middle<float, 4, 64, 4>(args, stream);
    }
    return args.d <= 128 ? launch_middle<float, 8, 128, 2>(args, stream)
                         : launch_middle<float, 8, 168, 1>(args, stream);
}

template Status middle_factor_solve(const FactorSolveArgs<float>&, cudaStream_t);

}  // namespace onestep::normal::cuda
