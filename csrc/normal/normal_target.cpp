// The family's kernels for one CPU target; CMake compiles this file once per target.
#include "normal/cholesky-inl.hpp"
#include "normal/gram-inl.hpp"
#include "normal/pack-inl.hpp"
#include "normal/rows-inl.hpp"

namespace onestep::ONESTEP_NS {

template <class T>
constexpr NormalKernels<T> normal_kernels() {
    return {
        kLanes<T>,          kTileRows,
        kPanel<T>,          gram_rows<T>,
        factor_diagonal<T>, factor_panel<T>,
        factor_update<T>,   solve_transposed<T>,
        solve_upper<T>,     inverse_norm1<T>,
        residual_rows<T>,   backward_rows<T>,
        backward_work<T>,   pack_solve_normal<T>,
        pack_solve_spd<T>,  pack_cholesky_solve<T>,
        pack_work<T>,
    };
}

extern const NormalKernels<float> normal_f32 = normal_kernels<float>();
extern const NormalKernels<double> normal_f64 = normal_kernels<double>();

}  // namespace onestep::ONESTEP_NS
