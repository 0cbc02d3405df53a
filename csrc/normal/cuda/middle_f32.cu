#include "normal/cuda/middle.cuh"
#include "normal/cuda/panel_system.cuh"
#include "normal/cuda/solve.cuh"

namespace onestep::normal::cuda {

template <>
int64_t middle_columns<float>(int64_t d) {
    return d <= 64 ? 4 : 8;
}

// Every device has shared memory for all.
template <>
int64_t most_features<float>(int64_t) {
    return kMostFeatures;
}

template <>
Status middle_system(const SystemArgs<float>& args, cudaStream_t stream) {
    const bool one = args.k <= 1;
    if (args.d <= 64) {
        // Problems of one warp fill the device only if there are many.
        constexpr int kMany = 16;
        if (args.a && args.batch.count() < kMany * device_limits().multiprocessors) {
            return one ? launch_matrices<64, 2, 1, 8>(args, stream) : launch_matrices<64, 2, 4, 8>(args, stream);
        }
        return one ? launch_panels<64, 1, 1, 12, 16>(args, stream) : launch_panels<64, 1, 4, 8, 16>(args, stream);
    }
    if (args.d <= 96) {
        return one ? launch_panels<96, 3, 1, 4, 5>(args, stream) : launch_panels<96, 3, 8, 2, 4>(args, stream);
    }
    if (args.d <= 128) {
        return one ? launch_panels<128, 4, 1, 3, 4>(args, stream) : launch_panels<128, 4, 8, 2, 3>(args, stream);
    }
    if (args.d <= 160) {
        return one ? launch_panels<160, 5, 1, 2, 3>(args, stream) : launch_panels<160, 5, 8, 1, 2>(args, stream);
    }
    // Panels of so many rows take more shared memory than a block has on devices of capability 8.6 and 8.9.
    return launch_middle<float, 8, 168, 1>(args, stream);
}

template Status middle_factor_solve(const FactorSolveArgs<float>&, cudaStream_t);

}  // namespace onestep::normal::cuda
