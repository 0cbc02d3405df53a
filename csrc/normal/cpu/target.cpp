// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "normal/cpu/cholesky-inl.hpp"
#include "normal/cpu/gram-inl.hpp"
#include "normal/cpu/half-inl.hpp"
#include "normal/cpu/pack-gradient-inl.hpp"
#include "normal/cpu/pack-gram-inl.hpp"
#include "normal/cpu/pack-inverse-inl.hpp"
#include "normal/cpu/pack-solve-inl.hpp"
#include "normal/cpu/rows-inl.hpp"
#include "normal/cpu/segments-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
constexpr NormalKernels<T> normal_kernels() {
    return {
        kLanes<T>,          kTileRows,
        kPanel<T>,          gram_rows<T>,
        factor_diagonal<T>, factor_panel<T>,
        factor_update<T>,   solve_transposed<T>,
        solve_upper<T>,     inverse_norm1<T>,
        residual_rows<T>,   backward_rows<T>,
        backward_work<T>,   widen_rows<T>,
        multiply_rows<T>,   dual_gram<T>,
        dual_back<T>,       pack_gram_matrices<T>,
        pack_gram_work<T>,  pack_solve_normal<T>,
        pack_solve_spd<T>,  pack_cholesky_solve<T>,
        pack_work<T>,       pack_inverse<T>,
        pack_gradient<T>,   pack_gradient_work<T>,
    };
}

extern const NormalKernels<float> f32 = normal_kernels<float>();
extern const NormalKernels<double> f64 = normal_kernels<double>();
extern const HalfGramKernels bf16 = {gram_rows<float>};

}  // namespace onestep::normal::ONESTEP_NS
