// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "attention/cpu/backward-inl.hpp"
#include "attention/cpu/forward-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

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

extern const AttentionKernels<float> f32 = attention_kernels<float>();
extern const AttentionKernels<double> f64 = attention_kernels<double>();

}  // namespace onestep::attention::ONESTEP_NS
