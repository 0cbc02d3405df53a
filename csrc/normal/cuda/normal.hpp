// The normal-equations family on a GPU, for problems that one warp (d to 32) or one block (d to kMostFeatures) holds,
// and Cholesky factors of any d. Larger problems are composed of these and of torch's products; see
// python/onestep/ops/normal/cuda.py.
//
// Results, statuses and layouts are those of normal/normal.hpp. What the CPU refuses before it computes, a negative
// weight or penalty, becomes NaN here, so that its problem fails. Launches are asynchronous and need no workspace.
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "base/operand.hpp"
#include "base/status.hpp"

namespace onestep::normal::cuda {

// The largest d whose matrix a block holds, on any device.
inline constexpr int64_t kMostFeatures = 168;

// The same, where a block has so many bytes of shared memory.
template <class T>
int64_t most_features(int64_t shared_bytes);
template <>
int64_t most_features<float>(int64_t shared_bytes);
template <>
int64_t most_features<double>(int64_t shared_bytes);

// One system per problem, A W = R: A and R from rows (`a` null), A = XᵀDX + diag(ridge), R = XᵀDY; or given (`a` set),
// of which the lower triangle is read, and R = B.
template <class T>
struct SystemArgs {
    BatchShape batch;
    int64_t n = 0, d = 0, k = 0;
    Batched<const T> x;       // n × d
    Batched<const T> y;       // n × k
    Batched<const T> weight;  // n (row stride), or null for ones
    Batched<const T> ridge;   // d (row stride), or null for uniform_ridge
    double uniform_ridge = 0.0;
    Batched<const T> a;  // d × d
    Batched<const T> b;  // d × k
    // A pivot must exceed so many epsilons of its diagonal element: kSingularEpsilons, or 0 as LAPACK.
    int singular_epsilons = 0;

    T* gram = nullptr;      // d × d: A is written here, R to `cross`, and that is all
    T* cross = nullptr;     // d × k
    T* solution = nullptr;  // d × k; null: only the factor is wanted
    T* factor = nullptr;    // d × d, U; may be null
    int32_t* info = nullptr;
    T* norm = nullptr;  // ‖A‖₁; may be null
};

// Right-hand sides that `system` takes for this d, at most.
template <class T>
int64_t most_columns(int64_t d);

// Gram matrices, or factors and solutions. d ≤ most_features, k ≤ most_columns(d).
template <class T>
Status system(const SystemArgs<T>& args, cudaStream_t stream);

// Factors of fp32 matrices of any d, of which the lower triangle is read.
struct CholeskyArgs {
    BatchShape batch;
    int64_t d = 0;
    Batched<const float> a;  // d × d
    int singular_epsilons = 0;
    float* factor = nullptr;  // d × d, U; begins at a multiple of 16 bytes
    int32_t* info = nullptr;
};
Status blocked_cholesky(const CholeskyArgs& args, cudaStream_t stream);

// A⁻¹B from the factor U, d ≤ most_features.
template <class T>
struct FactorSolveArgs {
    BatchShape batch;
    int64_t d = 0, k = 0;
    Batched<const T> factor;  // d × d, U (upper triangle read)
    Batched<const T> b;       // d × k
    T* solution = nullptr;    // d × k
};
template <class T>
Status factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream);

inline constexpr int64_t kSmallFeatures = 32;

// rcond = 1 / (‖A‖₁ ‖A⁻¹‖₁) from `count` factors and norms, exactly, d ≤ kSmallFeatures; 0 where info says failed.
template <class T>
struct ConditionArgs {
    int64_t count = 0, d = 0;
    const T* factor = nullptr;  // d × d, U, row-major
    const T* norm = nullptr;
    const int32_t* info = nullptr;
    T* rcond = nullptr;
};
template <class T>
Status condition(const ConditionArgs<T>& args, cudaStream_t stream);

// The size classes: d ≤ kSmallFeatures, and more: panels.cuh in fp32 to d = 160, middle.cuh else.
template <class T>
Status small_system(const SystemArgs<T>& args, cudaStream_t stream);
template <class T>
Status small_factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream);
template <class T>
Status small_condition(const ConditionArgs<T>& args, cudaStream_t stream);
template <class T>
int64_t middle_columns(int64_t d);
template <class T>
Status middle_system(const SystemArgs<T>& args, cudaStream_t stream);
template <class T>
Status middle_factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream);
template <>
int64_t middle_columns<float>(int64_t d);
template <>
int64_t middle_columns<double>(int64_t d);
template <>
Status middle_system<float>(const SystemArgs<float>& args, cudaStream_t stream);
template <>
Status middle_system<double>(const SystemArgs<double>& args, cudaStream_t stream);

}  // namespace onestep::normal::cuda
