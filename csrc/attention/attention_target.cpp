// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "attention/backward-inl.hpp"
#include "attention/forward-inl.hpp"

namespace onestep::ONESTEP_NS {

template <class T>
constexpr AttentionKernels<T> attention_kernels() {
    return {
        kLanes<T>,
        64,
        32,
        attention_work<T>,
        attention_forward<T>,
        attention_jvp<T>,
        forward_rows<T, true>,
        row_deltas<T>,
        attention_backward<T>,
        attention_backward_jvp<T>,
        backward_keys<T, true, true>,
        score_grad<T, false>,
        score_grad<T, true>,
    };
}

extern const AttentionKernels<float> attention_f32 = attention_kernels<float>();
extern const AttentionKernels<double> attention_f64 = attention_kernels<double>();

}  // namespace onestep::ONESTEP_NS
