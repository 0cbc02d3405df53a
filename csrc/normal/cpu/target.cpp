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
        .lanes = kLanes<T>,
        .tile_rows = kTileRows,
        .panel = kPanel<T>,
        .gram_rows = gram_rows<T>,
        .factor_diagonal = factor_diagonal<T>,
        .factor_panel = factor_panel<T>,
        .factor_update = factor_update<T>,
        .solve_transposed = solve_transposed<T>,
        .solve_upper = solve_upper<T>,
        .inverse_norm1 = inverse_norm1<T>,
        .residual_rows = residual_rows<T>,
        .backward_rows = backward_rows<T>,
        .backward_work = backward_work<T>,
        .widen_rows = widen_rows<T>,
        .multiply_rows = multiply_rows<T>,
        .dual_gram = dual_gram<T>,
        .dual_back = dual_back<T>,
        .pack_gram_matrices = pack_gram_matrices<T>,
        .pack_gram_work = pack_gram_work<T>,
        .pack_solve_normal = pack_solve_normal<T>,
        .pack_solve_spd = pack_solve_spd<T>,
        .pack_cholesky_solve = pack_cholesky_solve<T>,
        .pack_work = pack_work<T>,
        .pack_inverse = pack_inverse<T>,
        .pack_gradient = pack_gradient<T>,
        .pack_gradient_work = pack_gradient_work<T>,
    };
}

extern const NormalKernels<float> f32 = normal_kernels<float>();
extern const NormalKernels<double> f64 = normal_kernels<double>();
extern const HalfGramKernels bf16 = {gram_rows<float>};

}  // namespace onestep::normal::ONESTEP_NS
