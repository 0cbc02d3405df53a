// The orthogonal polar factor of matrices by QDWH with Cholesky (Nakatsukasa, Bai and Gygi, 2010), from the Gram matrix
// of the short side: the long side is read twice, however many iterations there are.
//
// X = M/‖MMᵀ‖^½ and G = XXᵀ. An iteration is X ← (αI + βB)X with α = b/c, β = a − b/c, A = I + cG, B = A⁻¹. Then
//   cG ← α²A + (2αβ − α²)I + (β² − 2αβ)B − β²B²  and  P ← (αI + βB)P, where P = I at first; at last U = PX.
// The error that rounding G causes grows with a²: where a is large, callers take another way (ops/polar/cpu.py).
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep {

// Coefficients of one iteration.
struct PolarStep {
    double a = 3.0, b = 1.0, c = 3.0;
};

inline constexpr int kMostPolarSteps = 8;

// Instantiated for float.
template <class T>
struct PolarArgs {
    BatchShape batch;
    int64_t rows = 0, columns = 0;
    Batched<const T> m;  // rows × columns, of any strides
    int steps = 0;
    PolarStep step[kMostPolarSteps];
    T* factor = nullptr;      // batch × rows × columns, contiguous; NaN where info is not 0
    int32_t* info = nullptr;  // batch: 0, or 1 where the matrix is not finite
};
template <class T>
Status polar_factor(const PolarArgs<T>& args);

// The same as plain loops on M itself, in double: what the tests hold the kernel against.
namespace reference {
template <class T>
Status polar_factor(const PolarArgs<T>& args);
}  // namespace reference

}  // namespace onestep
