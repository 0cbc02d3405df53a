// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "lmhead/cpu/lmhead-inl.hpp"

namespace onestep::lmhead::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T, class Input>
constexpr HeadKernels<T, Input> head_kernels() {
    return {
        kTileRows,
        kPanel<T>,
        sizeof(T),
        pack_input<T, Input>,
        pack_input_columns<T, Input>,
        score_block<T, Input>,
        gradient_block<T, Input>,
        block_work<T, Input>,
    };
}

extern const HeadKernels<float, float> f32 = head_kernels<float, float>();
extern const HeadKernels<double, double> f64 = head_kernels<double, double>();
extern const HeadKernels<float, BFloat16> bf16 = head_kernels<float, BFloat16>();

}  // namespace onestep::lmhead::ONESTEP_NS
