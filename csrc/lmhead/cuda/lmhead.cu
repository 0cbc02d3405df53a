#include "lmhead/cuda/kernels.cuh"

namespace onestep::lmhead::cuda {
namespace {

constexpr dim3 kBlock(kThreads);

dim3 grid(int64_t blocks) { return dim3(static_cast<unsigned>(blocks)); }

template <class T, class Input>
Status check_layout(const HeadChunk<T, Input>& chunk) {
    const auto aligned = [](const T* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
    if (chunk.leading % kSpan != 0 || !aligned(chunk.logits) || !aligned(chunk.logits_tangent)) {
        return device_error("rows of logits have to begin at a multiple of 16 bytes");
    }
    return Status::ok;
}

}  // namespace

template <class T, class Input>
Status head_statistics(const HeadChunk<T, Input>& chunk, int64_t first, int64_t count, T* losses, double* values,
                       cudaStream_t stream) {
    const Status status = check_layout(chunk);
    if (status != Status::ok || first % kSpan != 0) {
        return status != Status::ok ? status : device_error("a block of classes has to begin at a multiple of 8");
    }
    return launch(
        chunk.logits_tangent != nullptr ? statistics_kernel<true, T, Input> : statistics_kernel<false, T, Input>,
        grid(chunk.rows), kBlock, 0, stream, chunk, first, count, losses, values);
}

template <class T, class Input>
Status head_bias_gradient(const HeadChunk<T, Input>& chunk, T* grad_bias, cudaStream_t stream) {
    return launch(chunk.logits_tangent != nullptr ? bias_kernel<true, T, Input> : bias_kernel<false, T, Input>,
                  grid(ceil_div<int64_t>(chunk.classes, kWarpSize)), kBlock, 0, stream, chunk, grad_bias);
}

template <class T, class Input>
Status head_gradient(const HeadChunk<T, Input>& chunk, bool cross, const T* scale, cudaStream_t stream) {
    const Status status = check_layout(chunk);
    if (status != Status::ok) {
        return status;
    }
    return launch(chunk.logits_tangent != nullptr ? gradient_kernel<true, T, Input> : gradient_kernel<false, T, Input>,
                  grid(chunk.rows), kBlock, 0, stream, chunk, cross, scale);
}

template <class T>
Status head_value(int64_t count, const double* values, T* value, cudaStream_t stream) {
    return launch(value_kernel<T>, grid(1), kBlock, 0, stream, count, values, value);
}

#define ONESTEP_INSTANTIATE(T, Input)                                                                         \
    template Status head_statistics(const HeadChunk<T, Input>&, int64_t, int64_t, T*, double*, cudaStream_t); \
    template Status head_bias_gradient(const HeadChunk<T, Input>&, T*, cudaStream_t);                         \
    template Status head_gradient(const HeadChunk<T, Input>&, bool, const T*, cudaStream_t);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(float, bfloat16)
ONESTEP_INSTANTIATE(float, float16)
template Status head_value(int64_t, const double*, float*, cudaStream_t);
template Status head_value(int64_t, const double*, double*, cudaStream_t);

}  // namespace onestep::lmhead::cuda
