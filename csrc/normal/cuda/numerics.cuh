// Arithmetic that the normal-equations kernels share.
#pragma once

#include "base/cuda/device.cuh"

namespace onestep::normal::cuda {

using namespace onestep::cuda;

// Numbers in a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ __forceinline__ void load_vector(const float* from, float (&to)[4]) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
}
__device__ __forceinline__ void load_vector(const double* from, double (&to)[2]) {
    const double2 v = *reinterpret_cast<const double2*>(from);
    to[0] = v.x;
    to[1] = v.y;
}
__device__ __forceinline__ void store_vector(float* to, const float (&v)[4]) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void store_vector(double* to, const double (&v)[2]) {
    *reinterpret_cast<double2*>(to) = make_double2(v[0], v[1]);
}

template <class T>
__device__ __forceinline__ T quiet_nan() {
    if constexpr (sizeof(T) == 4) {
        return __int_as_float(0x7fffffff);
    } else {
        return __longlong_as_double(0x7fffffffffffffffLL);
    }
}

template <class T>
inline constexpr T kEpsilon = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

// False for NaN, too.
__device__ __forceinline__ bool finite(float value) { return fabsf(value) <= 3.402823466e38f; }
__device__ __forceinline__ bool finite(double value) { return fabs(value) <= 1.7976931348623157e308; }

// 1 / sqrt(pivot), or 0 if the pivot is not good: not above `floor`, or not finite. Without a branch: all threads of a
// block wait for these one after another.
template <class T>
__device__ __forceinline__ T inverse_root(T pivot, T floor) {
    T root;
    if constexpr (sizeof(T) == 4) {
        root = rsqrtf(pivot);
    } else {
        root = rsqrt(pivot);
    }
    // A Newton step: the instruction is off by up to two units in the last place.
    const T half = T(0.5) * (pivot * root);
    root = root + root * (T(0.5) - half * root);
    return pivot > floor && finite(pivot) ? root : T(0);
}

// As std::max(T(0), value * epsilons): 0 for NaN.
template <class T>
__device__ __forceinline__ T pivot_floor(T diagonal, int singular_epsilons) {
    const T floor = diagonal * (static_cast<T>(singular_epsilons) * kEpsilon<T>);
    return floor > T(0) ? floor : T(0);
}

// Negative penalties become NaN.
template <class T>
__device__ __forceinline__ T checked_ridge(T ridge) {
    return ridge < T(0) ? quiet_nan<T>() : ridge;
}

__device__ __forceinline__ float square_root(float value) { return sqrtf(value); }
__device__ __forceinline__ double square_root(double value) { return sqrt(value); }

// A block per problem, as many as there can be at once.
inline dim3 middle_grid(int64_t count) {
    return dim3(static_cast<unsigned>(count < kMostBlocks ? count : kMostBlocks));
}

}  // namespace onestep::normal::cuda
