// Gradients and their tangents on AMX's tile registers, and the work memory of all kernels; see amx-planes-inl.hpp. The
// keys of an AttentionHead::tile are packed once; for each kSquare queries, there is a loop over squares of these keys.
// The sums of k's and v's gradients are transposed, with a key in each lane.
#pragma once

#include "attention/cpu/amx-planes-inl.hpp"
#include "attention/cpu/backward-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Keys and values of one tile: packed for products over columns, the scores, and k for one over rows, the gradient of
// q.
struct KeyPlanes {
    Planes kt, vt, k;
    Planes kt_tangent, vt_tangent, k_tangent;
};

// Queries and cotangents of one square: packed for products over columns, the scores, and (qt, gt) for those over rows,
// the gradients of k and v.
struct QueryPlanes {
    Planes q, g, qt, gt;
    Planes q_tangent, g_tangent, qt_tangent, gt_tangent;
};

template <bool Tangent>
inline KeyPlanes pack_key_planes(const AttentionHead<float>& head, int64_t begin, int64_t count, Work<float>& work) {
    KeyPlanes keys;
    const auto over_columns = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::right, Inner::columns>(slice, begin, count, cols, work);
    };
    const auto over_rows = [&](const AttentionSlice& slice) {
        return packed_planes<AmxSide::right, Inner::rows>(slice, begin, count, head.d, work);
    };
    keys.kt = over_columns(head.primal.k, head.d);
    keys.vt = over_columns(head.primal.v, head.dv);
    keys.k = over_rows(head.primal.k);
    if constexpr (Tangent) {
        keys.kt_tangent = over_columns(head.tangent.k, head.d);
        keys.vt_tangent = over_columns(head.tangent.v, head.dv);
        keys.k_tangent = over_rows(head.tangent.k);
    }
    return keys;
}

// The part of a tile's keys from its key `at` on.
inline KeyPlanes from_key(const KeyPlanes& keys, int64_t at) {
    const int64_t block = at / kAmxBlock;
    const int64_t step = at / kAmxStep;
    return {keys.kt.from_block(block),         keys.vt.from_block(block),         keys.k.from_step(step),
            keys.kt_tangent.from_block(block), keys.vt_tangent.from_block(block), keys.k_tangent.from_step(step)};
}

template <bool Tangent>
inline QueryPlanes pack_query_planes(const AttentionHead<float>& head, int64_t begin, int64_t count,
                                     Work<float>& work) {
    QueryPlanes queries;
    const auto over_columns = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::left, Inner::columns>(slice, begin, count, cols, work);
    };
    const auto over_rows = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::left, Inner::rows>(slice, begin, count, cols, work);
    };
    queries.q = over_columns(head.primal.q, head.d);
    queries.qt = over_rows(head.primal.q, head.d);
    queries.g = over_columns(head.primal.grad, head.dv);
    queries.gt = over_rows(head.primal.grad, head.dv);
    if constexpr (Tangent) {
        queries.q_tangent = over_columns(head.tangent.q, head.d);
        queries.qt_tangent = over_rows(head.tangent.q, head.d);
        queries.g_tangent = over_columns(head.tangent.grad, head.dv);
        queries.gt_tangent = over_rows(head.tangent.grad, head.dv);
    }
    return queries;
}

// P, dS and their tangents of one square, in rows of keys.width (whole steps). The padding is set to zero: products
// read it, and what finish_scores leaves there need not be finite.
template <bool Tangent>
inline void compute_square(AmxTiles& tiles, const AttentionHead<float>& head, const AttentionDeltas<float>& deltas,
                           const KeyTile<float>& keys, const KeyPlanes& k, const QueryTile<float>& queries,
                           const QueryPlanes& q, const ScoreTile<float>& scores) {
    const int64_t width = keys.width;
    const auto product = [&](const PlaneProducts& products, float* to) {
        multiply_planes<false>(tiles, whole_blocks(queries.count), whole_blocks(keys.count), products, to, width);
    };
    PlaneProducts s(head.d);
    s.add(q.q, k.kt);
    product(s, scores.p);
    scale_tile(queries.count * width, head.scale, scores.p);
    PlaneProducts dp(head.dv);
    dp.add(q.g, k.vt);
    product(dp, scores.ds);
    if constexpr (Tangent) {
        PlaneProducts s_tangent(head.d);
        s_tangent.add(q.q_tangent, k.kt);
        s_tangent.add(q.q, k.kt_tangent);
        product(s_tangent, scores.p_tangent);
        scale_tile(queries.count * width, head.scale, scores.p_tangent);
        PlaneProducts dp_tangent(head.dv);
        dp_tangent.add(q.g_tangent, k.vt);
        dp_tangent.add(q.g, k.vt_tangent);
        product(dp_tangent, scores.ds_tangent);
    }
    finish_scores<float, Tangent>(head, deltas, keys, queries, scores);
    for (float* tile : {scores.p, scores.ds, scores.p_tangent, scores.ds_tangent}) {
        if (tile == nullptr) {
            continue;
        }
        for (int64_t i = 0; keys.count < width && i < queries.count; ++i) {
            clear(tile + i * width + keys.count, width - keys.count);
        }
        clear(tile + queries.count * width, (whole_steps(queries.count) - queries.count) * width);
    }
}

// Work memory for the scores of a square. Set to zero: rows are whole steps, products write whole blocks, and
// finish_scores reads all of a row.
inline ScoreTile<float> take_square(bool tangent, Work<float>& work) {
    const ScoreTile<float> scores = take_scores<float>(kSquare * kSquare, tangent, work);
    for (float* tile : {scores.p, scores.ds, scores.p_tangent, scores.ds_tangent}) {
        if (tile != nullptr) {
            clear(tile, kSquare * kSquare);
        }
    }
    return scores;
}

// Calls square(queries, their planes, keys, their planes, work) for each square of the keys [begin, begin + count) and
// the queries [first, end) in which a query sees a key.
template <bool Tangent, class Square>
ONESTEP_INLINE void for_squares_by_queries(const AttentionHead<float>& head, int64_t begin, int64_t count,
                                           const KeyPlanes& key_planes, int64_t first, int64_t end,
                                           const Work<float>& work, const Square& square) {
    for (int64_t i = first; i < end; i += kSquare) {
        Work<float> inner = work.rest();
        QueryTile<float> queries = {};
        queries.begin = i;
        queries.count = minimum(kSquare, end - i);
        const QueryPlanes query_planes = pack_query_planes<Tangent>(head, i, queries.count, inner);
        const int64_t seen = head.causal ? minimum(count, i + queries.count - begin) : count;
        for (int64_t at = 0; at < seen; at += kSquare) {
            KeyTile<float> keys = {};
            keys.begin = begin + at;
            keys.count = minimum(kSquare, seen - at);
            keys.width = whole_steps(keys.count);
            square(queries, query_planes, keys, from_key(key_planes, at), inner);
        }
    }
}

// Gradients of k and v of the keys [begin, end), and what these keys add to the gradient of q; with Tangent their
// tangents.
template <bool Tangent>
inline void bfloat16_backward(const AttentionHead<float>& head, const AttentionDeltas<float>& deltas, int64_t begin,
                              int64_t end, const AttentionGrads<float>& grads, const WorkMemory<float>& memory) {
    AmxTiles tiles;
    const int64_t d_row = whole_vectors<float>(head.d);
    const int64_t dv_row = whole_vectors<float>(head.dv);
    Work<float> outer(memory);
    const ScoreTile<float> scores = take_square(Tangent, outer);
    for (int64_t j = begin; j < end; j += head.tile) {
        Work<float> middle = outer.rest();
        const int64_t count = minimum(head.tile, end - j);
        const int64_t ld = whole_vectors<float>(count);
        float* kt_sums = take_zeroed(d_row * ld, middle);
        float* vt_sums = take_zeroed(dv_row * ld, middle);
        const KeyPlanes key_planes = pack_key_planes<Tangent>(head, j, count, middle);
        const auto square = [&](const QueryTile<float>& queries, const QueryPlanes& q, const KeyTile<float>& keys,
                                const KeyPlanes& k, Work<float> work) {
            compute_square<Tangent>(tiles, head, deltas, keys, k, queries, q, scores);
            PlaneProducts for_v(queries.count);
            PlaneProducts for_k(queries.count);
            PlaneProducts for_q(keys.count);
            // Scores are packed only if the operand that they are multiplied by is there.
            const auto add_over_rows = [&](const Planes& left, const float* from, PlaneProducts& products) {
                if (left.high != nullptr) {
                    products.add(
                        left, pack_over_rows<AmxSide::right>(from, queries.count, keys.count, keys.width, false, work));
                }
            };
            const auto add_over_columns = [&](const float* from, const Planes& right) {
                if (right.high != nullptr) {
                    for_q.add(pack_over_columns<AmxSide::left>(from, queries.count, keys.count, keys.width, head.scale,
                                                               false, work),
                              right);
                }
            };
            if constexpr (Tangent) {
                add_over_rows(q.gt, scores.p_tangent, for_v);
                add_over_rows(q.gt_tangent, scores.p, for_v);
                add_over_rows(q.qt, scores.ds_tangent, for_k);
                add_over_rows(q.qt_tangent, scores.ds, for_k);
                add_over_columns(scores.ds_tangent, k.k);
                add_over_columns(scores.ds, k.k_tangent);
            } else {
                add_over_rows(q.gt, scores.p, for_v);
                add_over_rows(q.qt, scores.ds, for_k);
                add_over_columns(scores.ds, k.k);
            }
            const int64_t at = keys.begin - j;
            const int64_t columns = whole_blocks(keys.count);
            multiply_planes<true>(tiles, dv_row, columns, for_v, vt_sums + at, ld);
            multiply_planes<true>(tiles, d_row, columns, for_k, kt_sums + at, ld);
            multiply_planes<true>(tiles, queries.count, grads.q_row, for_q, grads.q + queries.begin * grads.q_row,
                                  grads.q_row);
        };
        for_squares_by_queries<Tangent>(head, j, count, key_planes, head.causal ? j : 0, head.queries, middle, square);
        float* sums = middle.take(count * maximum(d_row, dv_row));
        put_transpose(kt_sums, ld, head.d, count, sums, d_row);
        put_rows<float>(sums, count, head.d, head.scale, grads.add, grads.k + j * head.d);
        put_transpose(vt_sums, ld, head.dv, count, sums, dv_row);
        put_rows<float>(sums, count, head.dv, 1.0F, grads.add, grads.v + j * head.dv);
    }
}

// sum += dS, or with Tangent dṠ, of the tile that begins at query i and key j, square by square.
template <bool Tangent>
inline void bfloat16_score_grad(const AttentionHead<float>& head, const AttentionDeltas<float>& deltas, int64_t i,
                                int64_t j, float* sum, const WorkMemory<float>& memory) {
    AmxTiles tiles;
    Work<float> work(memory);
    const ScoreTile<float> scores = take_square(Tangent, work);
    const int64_t count = minimum(head.tile, head.keys - j);
    const KeyPlanes key_planes = pack_key_planes<Tangent>(head, j, count, work);
    const auto square = [&](const QueryTile<float>& queries, const QueryPlanes& q, const KeyTile<float>& keys,
                            const KeyPlanes& k, const Work<float>&) {
        compute_square<Tangent>(tiles, head, deltas, keys, k, queries, q, scores);
        add_rows<float>(Tangent ? scores.ds_tangent : scores.ds, keys.width, queries.count, keys.count,
                        sum + (queries.begin - i) * head.tile + keys.begin - j, head.tile);
    };
    for_squares_by_queries<Tangent>(head, j, count, key_planes, i, minimum(i + head.tile, head.queries), work, square);
}

// rowsum(G∘O) is the diagonal of GOᵀ, and its tangent that of ĠOᵀ + GȮᵀ. Only blocks on the diagonal are computed, by
// the products that compute dP: they sum in the same order, so that dP − δ is exactly 0 where a query sees one key.
inline void bfloat16_deltas(const AttentionHead<float>& head, int64_t begin, int64_t rows,
                            const AttentionDeltas<float>& deltas, const WorkMemory<float>& memory) {
    AmxTiles tiles;
    Work<float> work(memory);
    const auto left = [&](const AttentionSlice& slice) {
        return packed_planes<AmxSide::left, Inner::columns>(slice, begin, rows, head.dv, work);
    };
    const auto right = [&](const AttentionSlice& slice) {
        return packed_planes<AmxSide::right, Inner::columns>(slice, begin, rows, head.dv, work);
    };
    const Planes grad = left(head.primal.grad);
    const Planes out = right(head.primal.out);
    const Planes grad_tangent = deltas.tangent != nullptr ? left(head.tangent.grad) : Planes{};
    const Planes out_tangent = deltas.tangent != nullptr ? right(head.tangent.out) : Planes{};
    alignas(64) float primal[kAmxBlock * kAmxBlock];
    alignas(64) float tangent[kAmxBlock * kAmxBlock] = {};
    for (int64_t block = 0; block < amx_blocks(rows); ++block) {
        PlaneProducts sum(head.dv);
        sum.add(grad.from_block(block), out.from_block(block));
        multiply_planes<false>(tiles, kAmxBlock, kAmxBlock, sum, primal, kAmxBlock);
        if (deltas.tangent != nullptr) {
            PlaneProducts sum_tangent(head.dv);
            sum_tangent.add(grad_tangent.from_block(block), out.from_block(block));
            sum_tangent.add(grad.from_block(block), out_tangent.from_block(block));
            multiply_planes<false>(tiles, kAmxBlock, kAmxBlock, sum_tangent, tangent, kAmxBlock);
        }
        const int64_t first = block * kAmxBlock;
        for (int64_t i = 0; i < minimum(kAmxBlock, rows - first); ++i) {
            const int64_t diagonal = i * (kAmxBlock + 1);
            put_delta<float>(head, begin + first + i, primal[diagonal], tangent[diagonal], deltas);
        }
    }
}

// Floats of work memory that are enough for any kernel here. `tile` is a multiple of kSquare.
inline int64_t bfloat16_work(int64_t d, int64_t dv, int64_t tile) {
    // A packed operand takes two floats for each element: one for two planes, one for the float rows that these are
    // made of, if it is not bfloat16. At most four have d columns and four dv, of the rows of a tile or, in the inner
    // loop, of a square. Sums of gradients, or of O or Ȯ, are there twice: as summed and transposed.
    const int64_t features = whole_steps(d) + whole_steps(dv);
    const int64_t operands = (8 * (tile + kSquare) + 2 * tile) * features;
    // At most 11 squares: four of scores and their tangents, one of the mask, six of planes. Then room for a few values
    // of each query and for rounding; tile² is to spare, since the tile of the mask's gradient is a part of its own
    // (`mask_sum`).
    return operands + 12 * kSquare * kSquare + tile * tile + 64 * Work<float>::rounded(1) + 8 * tile;
}

}  // namespace onestep::attention::ONESTEP_NS
