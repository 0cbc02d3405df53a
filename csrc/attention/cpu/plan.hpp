// How an attention call runs on the CPU: tiles, the pieces that keys are cut into, and work memory.
#pragma once

#include "attention/attention.hpp"
#include "attention/cpu/kernels.hpp"
#include "base/plan.hpp"
#include "base/workspace.hpp"

namespace onestep {

// The functions of the family, which share their arguments.
enum class AttentionFunction { forward, jvp, forward_and_jvp, backward, backward_jvp, backward_and_jvp };

template <class T>
struct AttentionPlan {
    const AttentionKernels<T>* kernels = nullptr;
    AttentionFunction function = AttentionFunction::forward;
    // Of the two functions that compute values and tangents: whether one pass over the scores gives both. Otherwise
    // there are two passes, one after the other.
    bool together = false;
    int64_t tile = 1;      // a tile of scores is of so many queries and keys, fewer at the ends
    int64_t heads = 0;     // query heads of all problems
    int64_t kv_heads = 0;  // key and value heads of all problems
    FixedCut query_tiles, key_tiles;

    // The backward functions cut the keys of a head into pieces of whole tiles and of about equal work: piece i has the
    // keys [cuts[i], cuts[i + 1]). A forward function's piece is a tile of queries.
    static constexpr int64_t kMostPieces = 16;
    int64_t pieces = 1;  // of each head
    int64_t cuts[kMostPieces + 1] = {};

    // Memory of the whole call.
    Layout layout;
    int64_t q_row = 0;               // elements of a row of q's gradient in `partial`: whole vectors
    Part<T> deltas, delta_tangents;  // δ and δ̇ of each query
    // Each piece's sums for the gradient of q, since all keys add to it: [value, tangent][piece][head][query][q_row].
    Part<T> partial;
    // There is one piece, and rows are whole vectors: its sums go to the gradient of q, and `partial` is empty.
    bool direct = false;

    // Memory of a thread while it works on a tile or a piece.
    Layout own_layout;
    Part<T> work;
    Part<T> mask_sum;  // a tile of the mask's gradient

    // Elements of `partial` that one piece takes, for values or for tangents.
    int64_t piece_size() const { return heads * query_tiles.count * q_row; }
};

template <class T>
AttentionPlan<T> plan(const AttentionArgs<T>& args, AttentionFunction function);

// `workspace` holds plan.layout.bytes().
template <class T>
Status run(const AttentionPlan<T>& plan, const AttentionArgs<T>& args, const Workspace& workspace);

}  // namespace onestep
