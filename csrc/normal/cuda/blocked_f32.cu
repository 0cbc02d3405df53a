#include "normal/cuda/blocked.cuh"

namespace onestep::normal::cuda {

Status blocked_cholesky(const CholeskyArgs& args, cudaStream_t stream) {
    const int64_t problems = args.batch.count();
    if (problems == 0 || args.d == 0) {
        return Status::ok;
    }
    constexpr int64_t kBytes =
        static_cast<int64_t>(BlockedShape::floats + kGramStages * GramStage<BlockedShape>::floats) *
        static_cast<int64_t>(sizeof(float));
    static_assert(kBytes <= kLeastSharedBytes);
    const int steps = static_cast<int>(ceil_div<int64_t>(args.d, kBlockColumns));
    for (int step = 0; step < steps; ++step) {
        const int64_t below = steps - 1 - step;
        const int64_t count = problems * (below > 1 ? below : 1);
        const Status status =
            launch(blocked_step_kernel, middle_grid(count), BlockedShape::threads, kBytes, stream, args, count, step);
        if (status != Status::ok) {
            return status;
        }
    }
    return launch(blocked_failed_kernel, middle_grid(problems), 256, 0, stream, args, problems);
}

}  // namespace onestep::normal::cuda
