#include "normal/cuda/panel_system.cuh"

namespace onestep::normal::cuda {

Status panel_system(const SystemArgs<float>& args, cudaStream_t stream) {
    const bool one = args.k <= 1;
    if (args.d <= 32) {
        return one ? launch_panels<32, 1, 1, 20, 24>(args, stream) : launch_panels<32, 1, 4, 16, 24>(args, stream);
    }
    if (args.d <= 64) {
        return one ? launch_panels<64, 1, 1, 12, 16>(args, stream) : launch_panels<64, 1, 4, 10, 16>(args, stream);
    }
    if (args.d <= 96) {
        return one ? launch_panels<96, 3, 1, 4, 5>(args, stream) : launch_panels<96, 3, 8, 4, 4>(args, stream);
    }
    if (args.d <= 128) {
        return one ? launch_panels<128, 4, 1, 3, 4>(args, stream) : launch_panels<128, 4, 8, 3, 3>(args, stream);
    }
    if (args.d <= 160) {
        return one ? launch_panels<160, 5, 1, 2, 2>(args, stream) : launch_panels<160, 5, 8, 2, 2>(args, stream);
    }
    return one ? launch_panels<192, 6, 1, 1, 1>(args, stream) : launch_panels<192, 6, 8, 1, 1>(args, stream);
}

}  // namespace onestep::normal::cuda
