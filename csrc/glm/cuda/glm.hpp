// The GLM family on a CUDA device. Arguments are those of glm.hpp with device pointers; see there for the formulas.
//
// Few columns: one kernel reads X once. A block takes tiles of rows, multiplies them by the right-hand sides, applies
// the curvature and multiplies back while the tile is in registers or shared memory. Blocks leave partial results, and
// a second kernel adds them up in order, in double. Results are bitwise repeatable on one device.
//
// Many columns: Python multiplies chunks of rows by torch's GEMM; glm_chunk_* do what lies between.
//
// Nothing here waits for the device. A bad target or a negative weight makes the results NaN and sets `info`, a number
// of the results' type, so that it can stand behind a curvature (kCurvatureSlack).
#pragma once

#include <cstdint>

#include "base/cuda/runtime.hpp"
#include "glm/glm.hpp"

namespace onestep::glm::cuda {

using namespace onestep::cuda;

// What a point's `info` says; the larger code wins.
enum class GlmInfo : int { ok = 0, bad_target = 1, negative_weight = 2 };

// The most columns m·k that one pass takes for X of d features with or without an intercept; 0 if it takes none.
template <class X, class T>
int64_t glm_most_columns(int64_t d, bool intercept);

// Bytes of device memory that the next two functions need for m·k columns on the current device.
template <class X, class T>
int64_t glm_workspace(const GlmData<X, T>& data, int64_t m);

// As in glm.hpp, for at most glm_most_columns columns. `info` (1) gets a GlmInfo.
template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args, T* info, void* workspace, cudaStream_t stream);
template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args, void* workspace, cudaStream_t stream);

// How many losses and statuses the outputs of n rows leave.
int64_t glm_chunk_losses(int64_t n);

// Replaces the outputs η (n × k) of a chunk of rows by the slope there, stores the curvature (n × k) unless it is null,
// and a loss and a status for each of glm_chunk_losses(n) blocks. X is not read.
template <class X, class T>
Status glm_chunk_point(const GlmData<X, T>& data, T* outputs, T* curvature, double* losses, int* statuses,
                       cudaStream_t stream);
// Replaces the outputs XV (n × m·k) of a chunk of rows by C(XV).
template <class X, class T>
Status glm_chunk_product(const GlmData<X, T>& data, int64_t m, T* outputs, const T* curvature, cudaStream_t stream);

// The sum of `count` losses and the largest of as many statuses.
template <class T>
Status glm_sum_losses(int64_t count, const double* losses, const int* statuses, double* loss, T* info,
                      cudaStream_t stream);

}  // namespace onestep::glm::cuda
