// Gradients and their tangents: for each tile of keys, a loop over the tiles of queries. Scores are in rows of queries,
// a key in each lane. L and δ of each query are known, so that a tile's P and dS are computed once and at once, for all
// products.
#pragma once

#include "attention/cpu/tiles-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Keys and values of one tile: transposed for the scores, by rows for the gradient of q. All of k is multiplied by the
// scale; the gradient of k, of which q is the operand, is multiplied by it at the end (put_sums).
template <class T>
struct KeyTile {
    int64_t begin, count, width;
    T *kt, *vt, *k;
    T *kt_tangent, *vt_tangent, *k_tangent;
};

// Queries of one tile and the cotangents of their outputs, by rows.
template <class T>
struct QueryTile {
    int64_t begin, count;
    T *q, *g;
    T *q_tangent, *g_tangent;
};

// P and dS of a tile and their tangents, in rows of KeyTile::width. Before finish_scores: S in p and dP in ds, and
// their tangents likewise. `mask` is work memory.
template <class T>
struct ScoreTile {
    T *p, *ds;
    T *p_tangent, *ds_tangent;
    T* mask;
};

template <class T>
inline T* packed_columns(const AttentionSlice& slice, int64_t row, int64_t rows, int64_t cols, T factor, int64_t ld,
                         Work<T>& work) {
    if (slice.data == nullptr) {
        return nullptr;
    }
    T* to = work.take(cols * ld);
    pack_columns<T>(slice, row, 0, rows, cols, factor, to, ld);
    return to;
}

template <class T>
inline T* packed_rows(const AttentionSlice& slice, int64_t row, int64_t rows, int64_t cols, T factor, Work<T>& work) {
    if (slice.data == nullptr) {
        return nullptr;
    }
    const int64_t ld = whole_vectors<T>(cols);
    T* to = work.take(rows * ld);
    pack_rows<T>(slice, row, 0, rows, cols, factor, to, ld);
    return to;
}

template <class T, bool Tangent>
inline KeyTile<T> pack_keys(const AttentionHead<T>& head, int64_t begin, int64_t end, Work<T>& work) {
    KeyTile<T> keys = {};
    keys.begin = begin;
    keys.count = minimum(head.tile, end - begin);
    keys.width = whole_vectors<T>(keys.count);
    const int64_t count = keys.count;
    keys.kt = packed_columns<T>(head.primal.k, begin, count, head.d, head.scale, keys.width, work);
    keys.vt = packed_columns<T>(head.primal.v, begin, count, head.dv, T(1), keys.width, work);
    keys.k = packed_rows<T>(head.primal.k, begin, count, head.d, head.scale, work);
    if constexpr (Tangent) {
        keys.kt_tangent = packed_columns<T>(head.tangent.k, begin, count, head.d, head.scale, keys.width, work);
        keys.vt_tangent = packed_columns<T>(head.tangent.v, begin, count, head.dv, T(1), keys.width, work);
        keys.k_tangent = packed_rows<T>(head.tangent.k, begin, count, head.d, head.scale, work);
    }
    return keys;
}

template <class T, bool Tangent>
inline QueryTile<T> pack_queries(const AttentionHead<T>& head, int64_t begin, Work<T>& work) {
    QueryTile<T> queries = {};
    queries.begin = begin;
    queries.count = minimum(head.tile, head.queries - begin);
    queries.q = packed_rows<T>(head.primal.q, begin, queries.count, head.d, T(1), work);
    queries.g = packed_rows<T>(head.primal.grad, begin, queries.count, head.dv, T(1), work);
    if constexpr (Tangent) {
        queries.q_tangent = packed_rows<T>(head.tangent.q, begin, queries.count, head.d, T(1), work);
        queries.g_tangent = packed_rows<T>(head.tangent.grad, begin, queries.count, head.dv, T(1), work);
    }
    return queries;
}

template <class T>
inline ScoreTile<T> take_scores(int64_t size, bool tangent, Work<T>& work) {
    ScoreTile<T> scores = {};
    scores.p = work.take(size);
    scores.ds = work.take(size);
    scores.mask = work.take(size);
    if (tangent) {
        scores.p_tangent = work.take(size);
        scores.ds_tangent = work.take(size);
    }
    return scores;
}

// Replaces S (in p) and dP (in ds) by P and dS, and likewise their tangents.
template <class T, bool Tangent, bool Masked>
inline void finish_rows(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, const QueryTile<T>& queries,
                        int64_t width, const ScoreTile<T>& scores) {
    for (int64_t i = 0; i < queries.count; ++i) {
        const int64_t row = queries.begin + i;
        const Shift<T> lse = shift_of<T>(head.primal.lse, row);
        const Vec<T> shift = broadcast<T>(lse.high);
        const Vec<T> rest = broadcast<T>(lse.low);
        const Vec<T> delta = broadcast<T>(deltas.primal[row]);
        Vec<T> lse_tangent = {};
        Vec<T> delta_tangent = {};
        if constexpr (Tangent) {
            if (head.tangent.lse.data != nullptr) {
                lse_tangent = broadcast<T>(static_cast<T>(*element<double>(head.tangent.lse, row, 0)));
            }
            delta_tangent = broadcast<T>(deltas.tangent[row]);
        }
        for (int64_t at = i * width; at < (i + 1) * width; at += kLanes<T>) {
            Vec<T> x = load<T>(scores.p + at);
            if constexpr (Masked) {
                x += load<T>(scores.mask + at);
            }
            const Vec<T> p = exp_lanes<T>((x - shift) - rest);
            const Vec<T> centred = load<T>(scores.ds + at) - delta;
            store<T>(scores.p + at, p);
            store<T>(scores.ds + at, p * centred);
            if constexpr (Tangent) {
                const Vec<T> p_tangent = p * (load<T>(scores.p_tangent + at) - lse_tangent);
                store<T>(scores.p_tangent + at, p_tangent);
                const Vec<T> centred_tangent = load<T>(scores.ds_tangent + at) - delta_tangent;
                store<T>(scores.ds_tangent + at, p_tangent * centred + p * centred_tangent);
            }
        }
    }
}

// finish_rows with the mask and its tangent, if there are any.
template <class T, bool Tangent>
inline void finish_scores(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, const KeyTile<T>& keys,
                          const QueryTile<T>& queries, const ScoreTile<T>& scores) {
    if (Tangent && head.tangent.mask.data != nullptr) {
        pack_rows<T>(head.tangent.mask, queries.begin, keys.begin, queries.count, keys.count, T(1), scores.mask,
                     keys.width);
        add_tile<T>(queries.count * keys.width, scores.mask, scores.p_tangent);
    }
    if (is_masked<T>(head, queries.begin, keys.begin, keys.count)) {
        pack_mask<T>(head, queries.begin, keys.begin, queries.count, keys.count, scores.mask, keys.width);
        finish_rows<T, Tangent, true>(head, deltas, queries, keys.width, scores);
    } else {
        finish_rows<T, Tangent, false>(head, deltas, queries, keys.width, scores);
    }
}

// P and dS of a tile, and with Tangent Ṗ and dṠ.
template <class T, bool Tangent>
inline void compute_scores(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, const KeyTile<T>& keys,
                           const QueryTile<T>& queries, const ScoreTile<T>& scores) {
    const int64_t vectors = keys.width / kLanes<T>;
    const int64_t q_row = whole_vectors<T>(head.d);
    const int64_t g_row = whole_vectors<T>(head.dv);
    Products<T> s(head.d, keys.width);
    s.add({queries.q, q_row, 1}, keys.kt);
    multiply<T, false>(queries.count, vectors, s, scores.p, keys.width);
    Products<T> dp(head.dv, keys.width);
    dp.add({queries.g, g_row, 1}, keys.vt);
    multiply<T, false>(queries.count, vectors, dp, scores.ds, keys.width);
    if constexpr (Tangent) {
        Products<T> s_tangent(head.d, keys.width);
        s_tangent.add({queries.q_tangent, q_row, 1}, keys.kt);
        s_tangent.add({queries.q, q_row, 1}, keys.kt_tangent);
        multiply<T, false>(queries.count, vectors, s_tangent, scores.p_tangent, keys.width);
        Products<T> dp_tangent(head.dv, keys.width);
        dp_tangent.add({queries.g_tangent, g_row, 1}, keys.vt);
        dp_tangent.add({queries.g, g_row, 1}, keys.vt_tangent);
        multiply<T, false>(queries.count, vectors, dp_tangent, scores.ds_tangent, keys.width);
    }
    finish_scores<T, Tangent>(head, deltas, keys, queries, scores);
}

// to = factor · sums, or with `add` to += factor · sums. Rows of `sums` are padded to whole vectors, those of `to` are
// not.
template <class T>
inline void put_rows(const T* sums, int64_t rows, int64_t cols, T factor, bool add, T* to) {
    const int64_t ld = whole_vectors<T>(cols);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            const T value = sums[r * ld + c] * factor;
            to[r * cols + c] = add ? to[r * cols + c] + value : value;
        }
    }
}

// Sums over all queries of the gradients of a tile of keys, before put_sums adds or writes them to AttentionGrads.
template <class T>
struct GradSums {
    T *k, *v;
};

template <class T>
inline GradSums<T> take_sums(const AttentionHead<T>& head, bool wanted, Work<T>& work) {
    return wanted ? GradSums<T>{work.take(head.tile * whole_vectors<T>(head.d)),
                                work.take(head.tile * whole_vectors<T>(head.dv))}
                  : GradSums<T>{};
}

template <class T>
inline void clear_sums(const AttentionHead<T>& head, int64_t keys, const GradSums<T>& sums) {
    __builtin_memset(sums.k, 0, static_cast<size_t>(keys * whole_vectors<T>(head.d)) * sizeof(T));
    __builtin_memset(sums.v, 0, static_cast<size_t>(keys * whole_vectors<T>(head.dv)) * sizeof(T));
}

// Adds what a tile of scores contributes: to the sums of its keys, and to the rows of its queries in grads.q.
template <class T, bool Tangent>
inline void add_grads(const AttentionHead<T>& head, const KeyTile<T>& keys, const QueryTile<T>& queries,
                      const ScoreTile<T>& scores, const GradSums<T>& sums, const AttentionGrads<T>& grads) {
    const int64_t d_row = whole_vectors<T>(head.d);
    const int64_t dv_row = whole_vectors<T>(head.dv);
    Products<T> for_v(queries.count, dv_row);
    Products<T> for_k(queries.count, d_row);
    Products<T> for_q(keys.count, d_row);
    if constexpr (Tangent) {
        for_v.add({scores.p_tangent, 1, keys.width}, queries.g);
        for_v.add({scores.p, 1, keys.width}, queries.g_tangent);
        for_k.add({scores.ds_tangent, 1, keys.width}, queries.q);
        for_k.add({scores.ds, 1, keys.width}, queries.q_tangent);
        for_q.add({scores.ds_tangent, keys.width, 1}, keys.k);
        for_q.add({scores.ds, keys.width, 1}, keys.k_tangent);
    } else {
        for_v.add({scores.p, 1, keys.width}, queries.g);
        for_k.add({scores.ds, 1, keys.width}, queries.q);
        for_q.add({scores.ds, keys.width, 1}, keys.k);
    }
    multiply<T, true>(keys.count, dv_row / kLanes<T>, for_v, sums.v, dv_row);
    multiply<T, true>(keys.count, d_row / kLanes<T>, for_k, sums.k, d_row);
    multiply<T, true>(queries.count, d_row / kLanes<T>, for_q, grads.q + queries.begin * grads.q_row, grads.q_row);
}

template <class T>
inline void put_sums(const AttentionHead<T>& head, const KeyTile<T>& keys, const GradSums<T>& sums,
                     const AttentionGrads<T>& grads) {
    put_rows<T>(sums.k, keys.count, head.d, head.scale, grads.add, grads.k + keys.begin * head.d);
    put_rows<T>(sums.v, keys.count, head.dv, T(1), grads.add, grads.v + keys.begin * head.dv);
}

// Gradients of k and v of the keys [begin, end), and what these keys add to the gradient of q: values (Gradient),
// tangents or both. With a causal mask, the loop over queries begins at the tile of the keys: earlier queries see none
// of them.
template <class T, bool Gradient, bool Tangent>
inline void backward_keys(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin, int64_t end,
                          const AttentionGrads<T>& grads, const AttentionGrads<T>& tangents,
                          const WorkMemory<T>& memory) {
    // Each loop begins again with the memory that was left when it was entered.
    Work<T> outer(memory);
    const GradSums<T> sums = take_sums<T>(head, Gradient, outer);
    const GradSums<T> sum_tangents = take_sums<T>(head, Tangent, outer);
    const ScoreTile<T> scores = take_scores<T>(head.tile * head.tile, Tangent, outer);
    for (int64_t j = begin; j < end; j += head.tile) {
        Work<T> middle = outer.rest();
        const KeyTile<T> keys = pack_keys<T, Tangent>(head, j, end, middle);
        if constexpr (Gradient) {
            clear_sums<T>(head, keys.count, sums);
        }
        if constexpr (Tangent) {
            clear_sums<T>(head, keys.count, sum_tangents);
        }
        for (int64_t i = head.causal ? j : 0; i < head.queries; i += head.tile) {
            Work<T> inner = middle.rest();
            const QueryTile<T> queries = pack_queries<T, Tangent>(head, i, inner);
            compute_scores<T, Tangent>(head, deltas, keys, queries, scores);
            if constexpr (Gradient) {
                add_grads<T, false>(head, keys, queries, scores, sums, grads);
            }
            if constexpr (Tangent) {
                add_grads<T, true>(head, keys, queries, scores, sum_tangents, tangents);
            }
        }
        if constexpr (Gradient) {
            put_sums<T>(head, keys, sums, grads);
        }
        if constexpr (Tangent) {
            put_sums<T>(head, keys, sum_tangents, tangents);
        }
    }
}

template <class T>
inline void attention_backward(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin,
                               int64_t end, const AttentionGrads<T>& grads, const WorkMemory<T>& memory) {
    backward_keys<T, true, false>(head, deltas, begin, end, grads, {}, memory);
}

template <class T>
inline void attention_backward_jvp(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t begin,
                                   int64_t end, const AttentionGrads<T>& tangents, const WorkMemory<T>& memory) {
    backward_keys<T, false, true>(head, deltas, begin, end, {}, tangents, memory);
}

// to += from, matrices with rows of `to_row` and `from_row` elements.
template <class T>
inline void add_rows(const T* from, int64_t from_row, int64_t rows, int64_t cols, T* to, int64_t to_row) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            to[r * to_row + c] += from[r * from_row + c];
        }
    }
}

// sum += dS, or with Tangent dṠ, of the tile that begins at query i and key j; see AttentionKernels.
template <class T, bool Tangent>
inline void score_grad(const AttentionHead<T>& head, const AttentionDeltas<T>& deltas, int64_t i, int64_t j, T* sum,
                       const WorkMemory<T>& memory) {
    Work<T> work(memory);
    const ScoreTile<T> scores = take_scores<T>(head.tile * head.tile, Tangent, work);
    const KeyTile<T> keys = pack_keys<T, Tangent>(head, j, head.keys, work);
    const QueryTile<T> queries = pack_queries<T, Tangent>(head, i, work);
    compute_scores<T, Tangent>(head, deltas, keys, queries, scores);
    add_rows<T>(Tangent ? scores.ds_tangent : scores.ds, keys.width, queries.count, keys.count, sum, head.tile);
}

// sum + a·b, column by column, for a row in each lane. An absent operand is zero. multiply_tile sums dP in the same
// order: where a query sees one key, O is that key's v, so that δ has the bits of dP, and dS = P∘(dP − δ) is 0 as it
// should be.
template <class T>
ONESTEP_INLINE Vec<T> add_row_products(int64_t cols, int64_t ld, const T* a, const T* b, Vec<T> sum) {
    for (int64_t c = 0; a != nullptr && b != nullptr && c < cols; ++c) {
        sum += load<T>(a + c * ld) * load<T>(b + c * ld);
    }
    return sum;
}

// Writes δ = sum − g of a query, where sum = rowsum(G∘O), and δ̇ = sum_tangent − ġ.
template <class T>
ONESTEP_INLINE void put_delta(const AttentionHead<T>& head, int64_t row, T sum, T sum_tangent,
                              const AttentionDeltas<T>& deltas) {
    const auto cotangent = [&](const AttentionSlice& slice) {
        return slice.data != nullptr ? static_cast<T>(*element<double>(slice, row, 0)) : T(0);
    };
    deltas.primal[row] = sum - cotangent(head.primal.grad_lse);
    if (deltas.tangent != nullptr) {
        deltas.tangent[row] = sum_tangent - cotangent(head.tangent.grad_lse);
    }
}

// δ, and δ̇ if it is wanted, of a tile of queries; see AttentionKernels.
template <class T>
inline void row_deltas(const AttentionHead<T>& head, int64_t begin, int64_t rows, const AttentionDeltas<T>& deltas,
                       const WorkMemory<T>& memory) {
    const AttentionSlices& primal = head.primal;
    const AttentionSlices& tangent = head.tangent;
    const int64_t width = whole_vectors<T>(rows);
    Work<T> work(memory);
    const auto columns = [&](const AttentionSlice& slice) {
        return packed_columns<T>(slice, begin, rows, head.dv, T(1), width, work);
    };
    const T* out = columns(primal.out);
    const T* grad = columns(primal.grad);
    const T* out_tangent = deltas.tangent != nullptr ? columns(tangent.out) : nullptr;
    const T* grad_tangent = deltas.tangent != nullptr ? columns(tangent.grad) : nullptr;
    const auto at = [](const T* packed, int64_t row) { return packed != nullptr ? packed + row : nullptr; };
    for (int64_t first = 0; first < rows; first += kLanes<T>) {
        const T* out_rows = at(out, first);
        const T* grad_rows = at(grad, first);
        const Vec<T> sum = add_row_products<T>(head.dv, width, grad_rows, out_rows, Vec<T>{});
        Vec<T> sum_tangent = add_row_products<T>(head.dv, width, at(grad_tangent, first), out_rows, Vec<T>{});
        sum_tangent = add_row_products<T>(head.dv, width, grad_rows, at(out_tangent, first), sum_tangent);
        for (int64_t lane = 0; lane < minimum(kLanes<T>, rows - first); ++lane) {
            put_delta<T>(head, begin + first + lane, sum[lane], sum_tangent[lane], deltas);
        }
    }
}

}  // namespace onestep::attention::ONESTEP_NS
