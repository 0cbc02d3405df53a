// What one CPU target provides to attention.cpp: loops over the tiles of one head. Everything here is plain data, so
// that it has one definition in all targets.
//
// A tile, here and in the plan, is a square of scores: those of `tile` queries and `tile` keys. The kernels multiply
// its operands by smaller tiles, which are held in registers (base/tile-inl.hpp, base/amx-inl.hpp).
#pragma once

#include <cstdint>

#include "base/operand.hpp"
#include "base/target.hpp"
#include "base/work_memory.hpp"

namespace onestep {

// One head's matrix of a HeadedOperand.
struct AttentionSlice {
    const void* data = nullptr;
    Element element = Element::float32;
    int64_t row = 0;
    int64_t col = 0;
};

struct AttentionSlices {
    AttentionSlice q, k, v, mask, out, lse, grad, grad_lse;
};

// One query head, with the key and value head that it reads. `tile` is the same for all heads of a call.
template <class T>
struct AttentionHead {
    int64_t queries = 0, keys = 0, d = 0, dv = 0, tile = 0;
    T scale = T(1);
    bool causal = false;
    AttentionSlices primal, tangent;
};

// Where O and L of one query head go, or their tangents: the addresses of the head's first query. Rows of O have dv
// elements.
template <class T>
struct AttentionRows {
    T* out = nullptr;
    double* lse = nullptr;
};

// Row statistics for the backward passes: δ and its tangent, one of each for a query.
template <class T>
struct AttentionDeltas {
    T* primal = nullptr;
    T* tangent = nullptr;
};

// Where the gradients of one query head go: the addresses of the head's first query or key. The gradient of q is added
// to, and its rows have `q_row` elements (whole vectors); rows of k and v have d and dv.
template <class T>
struct AttentionGrads {
    T* q = nullptr;
    int64_t q_row = 0;
    T* k = nullptr;
    T* v = nullptr;
    bool add = false;  // whether those of k and v are added to, or overwritten
};

template <class T>
struct AttentionKernels {
    int64_t lanes;
    // Queries and keys of a tile. With these, the work memory of a kernel fits the second-level cache.
    int64_t tile;
    int64_t wide_tile;  // the same where rows of q, k or v are long (kWideBytes in attention.cpp)

    // Elements of work memory (`work`) that are enough for any of the kernels below.
    int64_t (*work)(int64_t d, int64_t dv, int64_t tile);

    // O and L, or their tangents, of the queries [begin, begin + rows), which are a tile. `out` and `lse` are those of
    // the head's first query, as in AttentionRows.
    void (*forward)(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse,
                    const WorkMemory<T>& work);
    void (*jvp)(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse,
                const WorkMemory<T>& work);
    // Both at once; O and L are not read. Null: the target has no such kernel.
    void (*forward_and_jvp)(const AttentionHead<T>& head, int64_t begin, int64_t rows, const AttentionRows<T>& values,
                            const AttentionRows<T>& tangents, const WorkMemory<T>& work);

    // δ, and δ̇ if deltas.tangent is given, of the queries [begin, begin + rows).
    void (*deltas)(const AttentionHead<T>& head, int64_t begin, int64_t rows, const AttentionDeltas<T>& deltas,
                   const WorkMemory<T>& work);

    // The gradients of k and v of the keys [begin, end), and what these keys add to the gradient of q. A tile begins at
    // `begin`. With a causal mask, queries before `begin` do not see these keys, and their rows of q are left alone.
    void (*backward)(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin, int64_t end,
                     const AttentionGrads<T>& grads, const WorkMemory<T>& work);
    void (*backward_jvp)(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin, int64_t end,
                         const AttentionGrads<T>& grads, const WorkMemory<T>& work);
    // Both at once. Null: the target has no such kernel.
    void (*backward_and_jvp)(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin, int64_t end,
                             const AttentionGrads<T>& grads, const AttentionGrads<T>& tangents,
                             const WorkMemory<T>& work);

    // sum += dS (or dṠ) of the tile that starts at query i and key j; rows of `tile` elements.
    void (*score_grad)(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t i, int64_t j, T* sum,
                       const WorkMemory<T>& work);
    void (*score_grad_jvp)(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t i, int64_t j, T* sum,
                           const WorkMemory<T>& work);
};

ONESTEP_DECLARE_TABLE(attention, f32, AttentionKernels<float>)
ONESTEP_DECLARE_TABLE(attention, f64, AttentionKernels<double>)
// The amx target's own kernels, for bfloat16 q, k and v. Other operands take avx512's table.
ONESTEP_DECLARE_AMX_TABLE(attention, f32, AttentionKernels<float>)

}  // namespace onestep
