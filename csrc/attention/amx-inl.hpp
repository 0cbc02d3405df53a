// The family's kernels for bfloat16 q, k and v on tile registers. Operands enter products as they are; scores, P, dS
// and their tangents are float and enter as two bfloat16 planes, and so does any float operand whose low plane is not
// all zeros. The scale multiplies sums, never operands.
//
// Pairs of the inner dimension share a word in a packed tile. Of scores in rows of lanes, pairs of rows make the right
// operand of a product over rows, without a shuffle, and pairs of lanes the left operand of one over lanes. Hence
// results over rows come out transposed: Oᵀ in the forward pass, dKᵀ and dVᵀ in the backward pass.
#pragma once

#include "attention/backward-inl.hpp"
#include "attention/forward-inl.hpp"
#include "base/amx-inl.hpp"

namespace onestep::ONESTEP_NS {

// What passes by (keys, in the forward pass; queries, in the backward pass) is taken so many rows at a time: scores of
// a whole tile of the others then stay in the caches, and their columns fit in the first level.
inline constexpr int64_t kPassingRows = 64;

// A packed operand; null high: absent, null low: zero.
struct Planes {
    const BFloat16* high = nullptr;
    const BFloat16* low = nullptr;
    int64_t block = 0;

    Planes from_block(int64_t index) const {
        return {high != nullptr ? high + index * block : nullptr, low != nullptr ? low + index * block : nullptr,
                block};
    }
};

ONESTEP_INLINE BFloat16* take_bfloat16(int64_t count, Work<float>& work) {
    return reinterpret_cast<BFloat16*>(work.take((count + 1) / 2));
}

inline bool any_bits(const BFloat16* from, int64_t count) {
    AmxWords bits = {};
    for (int64_t e = 0; e < count; e += kAmxStep) {
        bits |= *reinterpret_cast<const UnalignedAmxWords*>(from + e);
    }
    uint32_t any = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        any |= bits[lane];
    }
    return any != 0;
}

enum class Inner { columns, rows };

template <AmxSide Side, Inner Along, class E>
inline Planes packed_planes_of(const E* from, int64_t row, int64_t col, int64_t rows, int64_t cols, Work<float>& work) {
    const int64_t count = Along == Inner::columns ? rows : cols;
    const int64_t depth = Along == Inner::columns ? cols : rows;
    const int64_t size = amx_size(count, depth);
    constexpr bool kTwo = sizeof(E) == sizeof(float);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(kTwo ? 2 * size : size, work), count, depth);
    // The packers read along rows; a matrix held by columns is the other way round.
    const bool turned = row == 1 && col != 1;
    const StridedRows<E> lines = {from, turned ? col : row};
    const int64_t step = turned ? row : col;
    if ((Along == Inner::columns) != turned) {
        amx_pack_rows<Side>(lines, 0, count, step, 0, depth, to);
    } else {
        amx_pack_columns<Side>(lines, 0, depth, step, 0, count, to);
    }
    const BFloat16* low = to.data + size;
    return {to.data, kTwo && any_bits(low, size) ? low : nullptr, to.block};
}

// Rows [row, row + rows) of a slice as the operand of a product over its columns, or over those rows.
template <AmxSide Side, Inner Along>
inline Planes packed_planes(const AttentionSlice& slice, int64_t row, int64_t rows, int64_t cols, Work<float>& work) {
    if (slice.data == nullptr) {
        return {};
    }
    if (slice.bfloat16) {
        return packed_planes_of<Side, Along>(element<BFloat16>(slice, row, 0), slice.row, slice.col, rows, cols, work);
    }
    return packed_planes_of<Side, Along>(element<float>(slice, row, 0), slice.row, slice.col, rows, cols, work);
}

// value = high + low up to 2⁻¹⁷ of it; the upper half of `low`'s bits is its plane. Rounded upwards and downwards,
// which takes half the instructions of rounding to nearest; unlike split_to_bfloat16, an infinity becomes NaN.
struct SplitBits {
    AmxWords high, low;
};

ONESTEP_INLINE SplitBits split_bits(Vec<float> value) {
    const AmxWords high = (reinterpret_cast<AmxWords>(value) + 0x8000U) & 0xFFFF0000U;
    return {high, reinterpret_cast<AmxWords>(value - reinterpret_cast<Vec<float>>(high))};
}

// Words of pairs: elements of `first` in the lower halves, of `second` in the upper ones.
ONESTEP_INLINE void store_pairs(Vec<float> first, Vec<float> second, BFloat16* high, BFloat16* low) {
    const SplitBits lower = split_bits(first);
    const SplitBits upper = split_bits(second);
    *reinterpret_cast<UnalignedAmxWords*>(high) = (lower.high >> 16) | upper.high;
    *reinterpret_cast<UnalignedAmxWords*>(low) = (lower.low >> 16) | (upper.low & 0xFFFF0000U);
}

// Scores, rows of `width`, as the right operand of a product over rows.
inline Planes pack_score_rows(const float* from, int64_t rows, int64_t width, Work<float>& work) {
    const int64_t size = amx_size(width, rows);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), width, rows);
    for (int64_t r = 0; r < amx_steps(rows) * kAmxStep; r += 2) {
        BFloat16* line = to.data + r / kAmxStep * kAmxTile + r % kAmxStep * kAmxBlock;
        for (int64_t c = 0; c < width; c += kAmxBlock) {
            const float* at = from + r * width + c;
            const Vec<float> first = r < rows ? load<float>(at) : Vec<float>{};
            const Vec<float> second = r + 1 < rows ? load<float>(at + width) : Vec<float>{};
            BFloat16* high = line + c / kAmxBlock * to.block;
            store_pairs(first, second, high, high + size);
        }
    }
    return {to.data, to.data + size, to.block};
}

template <int Odd, int... Lane>
ONESTEP_INLINE Vec<float> every_other(Vec<float> a, Vec<float> b, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, (2 * Lane + Odd)...);
}

// factor · scores as the left operand of a product over columns. Rows that only fill a block are not written: they add
// to no row of the result that is kept.
inline Planes pack_score_columns(const float* from, int64_t rows, int64_t width, float factor, Work<float>& work) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
    const int64_t size = amx_size(rows, width);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), rows, width);
    for (int64_t r = 0; r < rows; ++r) {
        BFloat16* line = to.data + r / kAmxBlock * to.block + r % kAmxBlock * kAmxStep;
        for (int64_t c = 0; c < width; c += kAmxStep) {
            const float* at = from + r * width + c;
            const Vec<float> a = load<float>(at) * factor;
            const Vec<float> b = c + kAmxBlock < width ? load<float>(at + kAmxBlock) * factor : Vec<float>{};
            BFloat16* high = line + c / kAmxStep * kAmxTile;
            store_pairs(every_other<0>(a, b, lanes), every_other<1>(a, b, lanes), high, high + size);
        }
    }
    return {to.data, to.data + size, to.block};
}

// A sum of products of one depth, as Products. Of two low planes no product is taken: it is 2⁻¹⁶ of the whole.
struct PlaneProducts {
    int64_t depth;
    int count = 0;
    AmxTerm terms[6];

    explicit PlaneProducts(int64_t depth_) : depth(depth_) {}

    void add(const Planes& left, const Planes& right) {
        if (left.high == nullptr || right.high == nullptr) {
            return;
        }
        terms[count++] = {left.high, left.block, right.high, right.block};
        if (left.low != nullptr) {
            terms[count++] = {left.low, left.block, right.high, right.block};
        }
        if (right.low != nullptr) {
            terms[count++] = {left.high, left.block, right.low, right.block};
        }
    }
};

// c = Σ products over `rows` × `cols`, or c += with Add.
template <bool Add>
inline void multiply_planes(AmxTiles& tiles, int64_t rows, int64_t cols, const PlaneProducts& products, float* c,
                            int64_t ldc) {
    if (Add && products.count == 0) {
        return;
    }
    amx_multiply(tiles, amx_blocks(rows), amx_blocks(cols), amx_steps(products.depth), products.terms, products.count,
                 Add, {c, ldc, kAmxPanel, rows, cols});
}

ONESTEP_INLINE int64_t whole_blocks(int64_t count) { return amx_blocks(count) * kAmxBlock; }

ONESTEP_INLINE float* take_zeroed(int64_t count, Work<float>& work) {
    float* to = work.take(count);
    __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
    return to;
}

ONESTEP_INLINE void scale_tile(int64_t count, float factor, float* to) {
    for (int64_t e = 0; e < count; e += kLanes<float>) {
        store<float>(to + e, load<float>(to + e) * factor);
    }
}

// to (cols × ld) = the transpose of `from` (rows × cols, from_row apart).
ONESTEP_INLINE void turn(const float* from, int64_t from_row, int64_t rows, int64_t cols, float* to, int64_t ld) {
    pack_columns_of<float>(from, from_row, 1, rows, cols, 1.0F, to, ld);
}

// Queries of a forward tile before the first block of those that see any of the keys [j, …).
ONESTEP_INLINE int64_t blind_queries(const AttentionHead<float>& head, int64_t begin, int64_t j) {
    return head.causal ? maximum(0, j - begin) / kAmxBlock * kAmxBlock : 0;
}

// Columns of sums, times their decay.
inline void decay_columns(int64_t rows, int64_t cols, const float* decay, float* sums, int64_t ld) {
    for (int64_t c = 0; c < cols; c += kLanes<float>) {
        const Vec<float> factor = load<float>(decay + c);
        for (int64_t r = 0; r < rows; ++r) {
            float* at = sums + r * ld + c;
            store<float>(at, load<float>(at) * factor);
        }
    }
}

inline void bfloat16_forward(const AttentionHead<float>& head, int64_t begin, int64_t rows, float* out, double* lse,
                             float* memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const int64_t width = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work{memory};
    float* sums = take_zeroed(v_row * width, work);
    float* scores = work.take(kPassingRows * width);
    const MaskTile<float> mask = take_mask<float>(rows, kPassingRows, work);
    const SoftmaxRows<float> state = take_softmax<float>(width, work);
    const Planes all_q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    const int64_t end = keys_seen<float>(head, begin, rows);
    for (int64_t j = 0; j < end; j += kPassingRows) {
        Work<float> inner = work;
        const int64_t keys = minimum(kPassingRows, end - j);
        const int64_t first = blind_queries(head, begin, j);
        const int64_t seeing = width - first;
        const SoftmaxRows<float> own = {state.top + first, state.sum + first, state.decay + first};
        const Planes q = all_q.from_block(first / kAmxBlock);
        const Planes k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        const Planes vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
        PlaneProducts s(head.d);
        s.add(k, q);
        multiply_planes<false>(tiles, whole_blocks(keys), seeing, s, scores, seeing);
        scale_tile(keys * seeing, head.scale, scores);
        add_to_softmax<float>(head, begin + first, rows - first, j, keys, seeing, scores, mask, own);
        if (j > 0) {
            decay_columns(head.dv, seeing, own.decay, sums + first, width);
        }
        PlaneProducts pv(keys);
        pv.add(vt, pack_score_rows(scores, keys, seeing, inner));
        multiply_planes<true>(tiles, v_row, seeing, pv, sums + first, width);
    }
    float* o = work.take(rows * v_row);
    turn(sums, width, head.dv, rows, o, v_row);
    put_outputs<float>(head, begin, rows, state, o, v_row, out, lse);
}

inline void bfloat16_jvp(const AttentionHead<float>& head, int64_t begin, int64_t rows, float* out, double* lse,
                         float* memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const AttentionSlices& tangent = head.tangent;
    const int64_t width = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work{memory};
    float* sums = take_zeroed(v_row * width, work);
    float* scores = work.take(kPassingRows * width);
    float* tangents = work.take(kPassingRows * width);
    const MaskTile<float> mask = take_mask<float>(rows, kPassingRows, work);
    const TangentRows<float> state = take_tangent_rows<float>(head, begin, rows, work);
    const Planes all_q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    const Planes all_dq = packed_planes<AmxSide::right, Inner::columns>(tangent.q, begin, rows, head.d, work);
    const int64_t end = keys_seen<float>(head, begin, rows);
    for (int64_t j = 0; j < end; j += kPassingRows) {
        Work<float> inner = work;
        const int64_t keys = minimum(kPassingRows, end - j);
        const int64_t first = blind_queries(head, begin, j);
        const int64_t seeing = width - first;
        const TangentRows<float> own = {state.high + first, state.low + first, state.mean + first};
        const Planes q = all_q.from_block(first / kAmxBlock);
        const Planes dq = all_dq.from_block(first / kAmxBlock);
        const Planes k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        const Planes dk = packed_planes<AmxSide::left, Inner::columns>(tangent.k, j, keys, head.d, inner);
        const Planes vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
        const Planes dvt = packed_planes<AmxSide::left, Inner::rows>(tangent.v, j, keys, head.dv, inner);
        PlaneProducts s(head.d);
        s.add(k, q);
        multiply_planes<false>(tiles, whole_blocks(keys), seeing, s, scores, seeing);
        scale_tile(keys * seeing, head.scale, scores);
        PlaneProducts ds(head.d);
        ds.add(k, dq);
        ds.add(dk, q);
        multiply_planes<false>(tiles, whole_blocks(keys), seeing, ds, tangents, seeing);
        scale_tile(keys * seeing, head.scale, tangents);
        weigh_masked_tangents<float>(head, begin + first, rows - first, j, keys, seeing, scores, tangents, mask, own);
        PlaneProducts pv(keys);
        pv.add(vt, pack_score_rows(tangents, keys, seeing, inner));
        if (dvt.high != nullptr) {
            pv.add(dvt, pack_score_rows(scores, keys, seeing, inner));
        }
        multiply_planes<true>(tiles, v_row, seeing, pv, sums + first, width);
    }
    float* turned = work.take(rows * v_row);
    turn(sums, width, head.dv, rows, turned, v_row);
    put_output_tangents<float>(head, begin, rows, state, turned, v_row, work.take(rows * v_row), out, lse);
}

// Keys and values of one tile: by columns for the scores, k by rows for the gradient of q.
struct KeyPlanes {
    Planes kt, vt, k;
    Planes dkt, dvt, dk;
};

// Passing queries and cotangents: by rows for the scores, by columns for the gradients of k and v.
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

// Those of `keys` that any of `queries` sees. Not empty: the queries begin no earlier than the keys.
ONESTEP_INLINE KeyTile<float> keys_seen_by(const AttentionHead<float>& head, const QueryTile<float>& queries,
                                           KeyTile<float> keys) {
    if (head.causal) {
        keys.count = minimum(keys.count, queries.begin + queries.count - keys.begin);
        keys.width = whole_vectors<float>(keys.count);
    }
    return keys;
}

// P, dS and their tangents in rows of keys.width, zero in what fills the rows: it meets whatever tiles hold there.
template <bool Tangent>
inline void compute_plane_scores(AmxTiles& tiles, const AttentionHead<float>& head,
                                 const AttentionDeltas<float>& deltas, const KeyTile<float>& keys, const KeyPlanes& k,
                                 const QueryTile<float>& queries, const QueryPlanes& q,
                                 const ScoreTile<float>& scores) {
    const int64_t width = keys.width;
    const auto product = [&](const PlaneProducts& products, float* to) {
        multiply_planes<false>(tiles, whole_blocks(queries.count), width, products, to, width);
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
    for (int64_t i = 0; keys.count < width && i < queries.count; ++i) {
        for (float* tile : {scores.p, scores.ds, scores.p_tangent, scores.ds_tangent}) {
            if (tile != nullptr) {
                __builtin_memset(tile + i * width + keys.count, 0,
                                 static_cast<size_t>(width - keys.count) * sizeof(float));
            }
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
    const ScoreTile<float> scores = take_scores<float>(kPassingRows * head.tile, Tangent, outer);
    for (int64_t j = begin; j < end; j += head.tile) {
        Work<float> middle = outer;
        KeyTile<float> all_keys = {};
        all_keys.begin = j;
        all_keys.count = minimum(head.tile, end - j);
        all_keys.width = whole_vectors<float>(all_keys.count);
        const int64_t ld = all_keys.width;
        const KeyPlanes k = pack_key_planes<Tangent>(head, j, all_keys.count, middle);
        float* kt_sums = take_zeroed(d_row * ld, middle);
        float* vt_sums = take_zeroed(dv_row * ld, middle);
        for (int64_t i = head.causal ? j : 0; i < head.queries; i += kPassingRows) {
            Work<float> inner = middle;
            QueryTile<float> queries = {};
            queries.begin = i;
            queries.count = minimum(kPassingRows, head.queries - i);
            const KeyTile<float> keys = keys_seen_by(head, queries, all_keys);
            const QueryPlanes q = pack_query_planes<Tangent>(head, i, queries.count, inner);
            compute_plane_scores<Tangent>(tiles, head, deltas, keys, k, queries, q, scores);
            PlaneProducts for_v(queries.count);
            PlaneProducts for_k(queries.count);
            PlaneProducts for_q(keys.count);
            // Only what meets an operand is packed.
            const auto by_rows = [&](const Planes& left, const float* from, PlaneProducts& products) {
                if (left.high != nullptr) {
                    products.add(left, pack_score_rows(from, queries.count, keys.width, inner));
                }
            };
            const auto by_columns = [&](const float* from, const Planes& right) {
                if (right.high != nullptr) {
                    for_q.add(pack_score_columns(from, queries.count, keys.width, head.scale, inner), right);
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
            multiply_planes<true>(tiles, dv_row, keys.width, for_v, vt_sums, ld);
            multiply_planes<true>(tiles, d_row, keys.width, for_k, kt_sums, ld);
            multiply_planes<true>(tiles, queries.count, grads.q_row, for_q, grads.q + i * grads.q_row, grads.q_row);
        }
        float* sums = middle.take(all_keys.count * maximum(d_row, dv_row));
        turn(kt_sums, ld, head.d, all_keys.count, sums, d_row);
        put_rows<float>(sums, all_keys.count, head.d, head.scale, grads.add, grads.k + j * head.d);
        turn(vt_sums, ld, head.dv, all_keys.count, sums, dv_row);
        put_rows<float>(sums, all_keys.count, head.dv, 1.0F, grads.add, grads.v + j * head.dv);
    }
}

template <bool Tangent>
inline void bfloat16_score_grad(const AttentionHead<float>& head, const AttentionDeltas<float>& deltas, int64_t i,
                                int64_t j, float* sum, float* memory) {
    AmxTiles tiles;
    Work<float> work{memory};
    const ScoreTile<float> scores = take_scores<float>(kPassingRows * head.tile, Tangent, work);
    KeyTile<float> all_keys = {};
    all_keys.begin = j;
    all_keys.count = minimum(head.tile, head.keys - j);
    all_keys.width = whole_vectors<float>(all_keys.count);
    const KeyPlanes k = pack_key_planes<Tangent>(head, j, all_keys.count, work);
    const int64_t end = minimum(i + head.tile, head.queries);
    for (int64_t at = i; at < end; at += kPassingRows) {
        Work<float> inner = work;
        QueryTile<float> queries = {};
        queries.begin = at;
        queries.count = minimum(kPassingRows, end - at);
        const KeyTile<float> keys = keys_seen_by(head, queries, all_keys);
        const QueryPlanes q = pack_query_planes<Tangent>(head, at, queries.count, inner);
        compute_plane_scores<Tangent>(tiles, head, deltas, keys, k, queries, q, scores);
        add_rows<float>(Tangent ? scores.ds_tangent : scores.ds, keys.width, queries.count, keys.count,
                        sum + (at - i) * head.tile, head.tile);
    }
}

// δ and δ̇ are on the diagonal of GOᵀ: tiles sum them as they sum dP, so that dP − δ is exactly 0 where a query sees one
// key.
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

// In floats; see bfloat16_backward with tangents, which takes the most. `tile` is a multiple of kPassingRows.
inline int64_t bfloat16_work(int64_t d, int64_t dv, int64_t tile) {
    const int64_t features = amx_steps(d) + amx_steps(dv);
    // Both planes of operands, and sums of the gradients.
    const int64_t rows = (6 * tile + 4 * kPassingRows) * features * kAmxStep;
    // Five tiles of scores and the planes of six; and the sum that grad_of_mask keeps there.
    return rows + 11 * kPassingRows * tile + tile * tile + 64 * Work<float>::rounded(1);
}

}  // namespace onestep::ONESTEP_NS
