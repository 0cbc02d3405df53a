// The backward pass and its tangent on tile registers, and the work memory of all passes; see amx-planes-inl.hpp.
#pragma once

#include "attention/cpu/amx-planes-inl.hpp"
#include "attention/cpu/backward-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Keys and values of one tile: packed over columns for the scores, k over rows for the gradient of q.
struct KeyPlanes {
    Planes kt, vt, k;
    Planes dkt, dvt, dk;
};

// Queries and cotangents of the inner loop: over columns for the scores, over rows for the gradients of k and v.
struct QueryPlanes {
    Planes q, g, qt, gt;
    Planes dq, dg, dqt, dgt;
};

template <bool Tangent>
inline KeyPlanes pack_key_planes(const AttentionHead<float>& head, int64_t begin, int64_t count, Work<float>& work) {
    KeyPlanes keys;
    const auto columns = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::right, Inner::columns>(slice, begin, count, cols, work);
    };
    const auto rows = [&](const AttentionSlice& slice) {
        return packed_planes<AmxSide::right, Inner::rows>(slice, begin, count, head.d, work);
    };
    keys.kt = columns(head.primal.k, head.d);
    keys.vt = columns(head.primal.v, head.dv);
    keys.k = rows(head.primal.k);
    if constexpr (Tangent) {
        keys.dkt = columns(head.tangent.k, head.d);
        keys.dvt = columns(head.tangent.v, head.dv);
        keys.dk = rows(head.tangent.k);
    }
    return keys;
}

// The part of a tile's keys from its key `at` on.
inline KeyPlanes from_key(const KeyPlanes& keys, int64_t at) {
    const int64_t block = at / kAmxBlock;
    const int64_t step = at / kAmxStep;
    return {keys.kt.from_block(block),  keys.vt.from_block(block),  keys.k.from_step(step),
            keys.dkt.from_block(block), keys.dvt.from_block(block), keys.dk.from_step(step)};
}

template <bool Tangent>
inline QueryPlanes pack_query_planes(const AttentionHead<float>& head, int64_t begin, int64_t count,
                                     Work<float>& work) {
    QueryPlanes queries;
    const auto rows = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::left, Inner::columns>(slice, begin, count, cols, work);
    };
    const auto columns = [&](const AttentionSlice& slice, int64_t cols) {
        return packed_planes<AmxSide::left, Inner::rows>(slice, begin, count, cols, work);
    };
    queries.q = rows(head.primal.q, head.d);
    queries.qt = columns(head.primal.q, head.d);
    queries.g = rows(head.primal.grad, head.dv);
    queries.gt = columns(head.primal.grad, head.dv);
    if constexpr (Tangent) {
        queries.dq = rows(head.tangent.q, head.d);
        queries.dqt = columns(head.tangent.q, head.d);
        queries.dg = rows(head.tangent.grad, head.dv);
        queries.dgt = columns(head.tangent.grad, head.dv);
    }
    return queries;
}

// P, dS and their tangents of one square, in rows of keys.width (whole steps). The padding is set to zero, since it is
// multiplied by padding of the operands.
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
        s_tangent.add(q.dq, k.kt);
        s_tangent.add(q.q, k.dkt);
        product(s_tangent, scores.p_tangent);
        scale_tile(queries.count * width, head.scale, scores.p_tangent);
        PlaneProducts dp_tangent(head.dv);
        dp_tangent.add(q.dg, k.vt);
        dp_tangent.add(q.g, k.dvt);
        product(dp_tangent, scores.ds_tangent);
    }
    weigh_scores<float, Tangent>(head, deltas, keys, queries, scores);
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

// Work memory for the scores of a square. Set to zero: products do not write the ends of the rows.
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
        Work<float> inner = work;
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

template <bool Tangent>
inline void bfloat16_backward(const AttentionHead<float>& head, const AttentionDeltas<float>& deltas, int64_t begin,
                              int64_t end, const AttentionGrads<float>& grads, float* memory) {
    AmxTiles tiles;
    const int64_t d_row = whole_vectors<float>(head.d);
    const int64_t dv_row = whole_vectors<float>(head.dv);
    Work<float> outer{memory};
    const ScoreTile<float> scores = take_square(Tangent, outer);
    for (int64_t j = begin; j < end; j += head.tile) {
        Work<float> middle = outer;
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
            const auto by_rows = [&](const Planes& left, const float* from, PlaneProducts& products) {
                if (left.high != nullptr) {
                    products.add(
                        left, pack_over_rows<AmxSide::right>(from, queries.count, keys.count, keys.width, false, work));
                }
            };
            const auto by_columns = [&](const float* from, const Planes& right) {
                if (right.high != nullptr) {
                    for_q.add(pack_over_columns<AmxSide::left>(from, queries.count, keys.count, keys.width, head.scale,
                                                               false, work),
                              right);
                }
            };
            if constexpr (Tangent) {
                by_rows(q.gt, scores.p_tangent, for_v);
                by_rows(q.dgt, scores.p, for_v);
                by_rows(q.qt, scores.ds_tangent, for_k);
                by_rows(q.dqt, scores.ds, for_k);
                by_columns(scores.ds_tangent, k.k);
                by_columns(scores.ds, k.dk);
            } else {
                by_rows(q.gt, scores.p, for_v);
                by_rows(q.qt, scores.ds, for_k);
                by_columns(scores.ds, k.k);
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
        turn(kt_sums, ld, head.d, count, sums, d_row);
        put_rows<float>(sums, count, head.d, head.scale, grads.add, grads.k + j * head.d);
        turn(vt_sums, ld, head.dv, count, sums, dv_row);
        put_rows<float>(sums, count, head.dv, 1.0F, grads.add, grads.v + j * head.dv);
    }
}

template <bool Tangent>
inline void bfloat16_score_grad(const AttentionHead<float>& head, const AttentionDeltas<float>& deltas, int64_t i,
                                int64_t j, float* sum, float* memory) {
    AmxTiles tiles;
    Work<float> work{memory};
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

// δ and δ̇ are the diagonal of GOᵀ. Tiles sum them in the order in which they sum dP, so that dP − δ is exactly 0 where
// a query sees one key.
inline void bfloat16_deltas(const AttentionHead<float>& head, int64_t begin, int64_t rows,
                            const AttentionDeltas<float>& deltas, float* memory) {
    AmxTiles tiles;
    Work<float> work{memory};
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
            PlaneProducts moved(head.dv);
            moved.add(grad_tangent.from_block(block), out.from_block(block));
            moved.add(grad.from_block(block), out_tangent.from_block(block));
            multiply_planes<false>(tiles, kAmxBlock, kAmxBlock, moved, tangent, kAmxBlock);
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
    // Each packed operand takes two planes and the float rows that these are made of. Of q and k there are four, of v
    // and G four; sums of the gradients, or O and Ȯ, are there twice, as summed and transposed.
    const int64_t features = whole_steps(d) + whole_steps(dv);
    const int64_t operands = (8 * (tile + kSquare) + 2 * tile) * features;
    // Scores, their mask and their planes, in squares; and the tile of the mask's gradient.
    return operands + 12 * kSquare * kSquare + tile * tile + 64 * Work<float>::rounded(1) + 8 * tile;
}

}  // namespace onestep::attention::ONESTEP_NS
