#include "glm/cuda/sums.cuh"

namespace onestep::glm::cuda {

int64_t glm_chunk_losses(int64_t n) { return ceil_div<int64_t>(n, kChunkRows); }

template <class T>
Status glm_sum_losses(int64_t count, const double* losses, const int* statuses, double* loss, T* info,
                      cudaStream_t stream) {
    SumArgs<T> args;
    args.blocks = count;
    args.losses = losses;
    args.statuses = statuses;
    args.loss = loss;
    args.info = info;
    return launch(sum_kernel<T>, dim3(1), dim3(kThreads), 0, stream, args);
}
template Status glm_sum_losses(int64_t, const double*, const int*, double*, float*, cudaStream_t);
template Status glm_sum_losses(int64_t, const double*, const int*, double*, double*, cudaStream_t);

}  // namespace onestep::glm::cuda
