// The family's kernels for bfloat16 q, k and v on tile registers. Operands enter products as they are; scores, P, dS
// and their tangents are float and enter as two bfloat16 planes, and so does any float operand whose low plane is not
// all zeros. The scale multiplies sums, never operands. An infinity in v gives NaN: it meets low planes of either sign.
//
// Pairs of the inner dimension share a word in a packed tile. Of scores in rows of lanes, pairs of rows make the right
// operand of a product over rows, without a shuffle, and pairs of lanes the left operand of one over lanes. Hence
// results over rows come out transposed: Oᵀ in the forward pass, dKᵀ and dVᵀ in the backward pass.
//
// Packing an operand is dear beside products of tiles, so a tile of the head (AttentionHead::tile) is large: what
// passes by is packed once for all of it. Scores are taken in squares of it that stay in the first-level cache.
#pragma once

#include "attention/backward-inl.hpp"
#include "attention/forward-inl.hpp"
#include "base/amx-inl.hpp"

namespace onestep::ONESTEP_NS {

inline constexpr int64_t kSquare = 64;  // queries and keys of a square

// A packed operand; null high: absent, null low: zero.
struct Planes {
    const BFloat16* high = nullptr;
    const BFloat16* low = nullptr;
    int64_t block = 0;

    Planes from_block(int64_t index) const { return shifted(index * block); }
    Planes from_step(int64_t index) const { return shifted(index * kAmxTile); }

    Planes shifted(int64_t by) const {
        return {high != nullptr ? high + by : nullptr, low != nullptr ? low + by : nullptr, block};
    }
};

ONESTEP_INLINE BFloat16* take_bfloat16(int64_t count, Work<float>& work) {
    return reinterpret_cast<BFloat16*>(work.take((count + 1) / 2));
}

// value = high + low, and the upper half of `low`'s bits is its plane: exact to 2⁻¹⁶. A third of the instructions of
// split_to_bfloat16, of which this is the one for T × T numbers: low is cut off, and an infinity becomes NaN.
struct SplitBits {
    AmxWords high, low;
};

ONESTEP_INLINE SplitBits split_bits(Vec<float> value) {
    const AmxWords high = (reinterpret_cast<AmxWords>(value) + 0x8000U) & 0xFFFF0000U;
    return {high, reinterpret_cast<AmxWords>(value - reinterpret_cast<Vec<float>>(high))};
}

// One tile in two planes from its 16 lines of pairs: load(line, first, second). Turned: the lines are the other side's,
// see store_tile. The bits that there are in the low plane.
template <bool Turned, class Load>
ONESTEP_INLINE AmxWords pack_tile(const Load& load_pair, BFloat16* high, BFloat16* low) {
    Vec<float> lines[2][kAmxBlock];
    AmxWords bits = {};
#pragma GCC unroll 16
    for (int line = 0; line < kAmxBlock; ++line) {
        Vec<float> first;
        Vec<float> second;
        load_pair(line, first, second);
        const SplitBits lower = split_bits(first);
        const SplitBits upper = split_bits(second);
        const AmxWords highs = (lower.high >> 16) | upper.high;
        const AmxWords lows = (lower.low >> 16) | (upper.low & 0xFFFF0000U);
        bits |= lows;
        if constexpr (Turned) {
            lines[0][line] = reinterpret_cast<Vec<float>>(highs);
            lines[1][line] = reinterpret_cast<Vec<float>>(lows);
        } else {
            *reinterpret_cast<UnalignedAmxWords*>(high + line * kAmxStep) = highs;
            *reinterpret_cast<UnalignedAmxWords*>(low + line * kAmxStep) = lows;
        }
    }
    if constexpr (Turned) {
        store_tile<true>(lines[0], high);
        store_tile<true>(lines[1], low);
    }
    return bits;
}

ONESTEP_INLINE bool any_bits(AmxWords bits) {
    uint32_t any = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        any |= bits[lane];
    }
    return any != 0;
}

// Rows of `ld` floats, filled up with zeros to whole steps of rows and whole blocks of columns, as an operand of a
// product over the rows. `sparse`: look whether the low plane is zero.
template <AmxSide Side>
inline Planes pack_over_rows(const float* from, int64_t rows, int64_t cols, int64_t ld, bool sparse,
                             Work<float>& work) {
    const int64_t size = amx_size(cols, rows);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), cols, rows);
    AmxWords bits = {};
    for (int64_t s = 0; s < amx_steps(rows); ++s) {
        for (int64_t b = 0; b < amx_blocks(cols); ++b) {
            const float* corner = from + s * kAmxStep * ld + b * kAmxBlock;
            BFloat16* tile = to.data + b * to.block + s * kAmxTile;
            bits |= pack_tile<Side == AmxSide::left>(
                [&](int line, Vec<float>& first, Vec<float>& second) {
                    first = load<float>(corner + 2 * line * ld);
                    second = load<float>(corner + (2 * line + 1) * ld);
                },
                tile, tile + size);
        }
    }
    return {to.data, sparse && !any_bits(bits) ? nullptr : to.data + size, to.block};
}

template <int Odd, int... Lane>
ONESTEP_INLINE Vec<float> every_other(Vec<float> a, Vec<float> b, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, (2 * Lane + Odd)...);
}

// factor times the same, filled up to whole blocks of rows and whole steps of columns, as an operand of a product over
// the columns.
template <AmxSide Side>
inline Planes pack_over_columns(const float* from, int64_t rows, int64_t cols, int64_t ld, float factor, bool sparse,
                                Work<float>& work) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
    const int64_t size = amx_size(rows, cols);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), rows, cols);
    AmxWords bits = {};
    for (int64_t b = 0; b < amx_blocks(rows); ++b) {
        for (int64_t s = 0; s < amx_steps(cols); ++s) {
            const float* corner = from + b * kAmxBlock * ld + s * kAmxStep;
            BFloat16* tile = to.data + b * to.block + s * kAmxTile;
            bits |= pack_tile<Side == AmxSide::right>(
                [&](int line, Vec<float>& first, Vec<float>& second) {
                    const Vec<float> a = load<float>(corner + line * ld) * factor;
                    const Vec<float> c = load<float>(corner + line * ld + kAmxBlock) * factor;
                    first = every_other<0>(a, c, lanes);
                    second = every_other<1>(a, c, lanes);
                },
                tile, tile + size);
        }
    }
    return {to.data, sparse && !any_bits(bits) ? nullptr : to.data + size, to.block};
}

ONESTEP_INLINE int64_t whole_steps(int64_t count) { return amx_steps(count) * kAmxStep; }

ONESTEP_INLINE void clear(float* to, int64_t count) {
    __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

ONESTEP_INLINE float* take_zeroed(int64_t count, Work<float>& work) {
    float* to = work.take(count);
    clear(to, count);
    return to;
}

enum class Inner { columns, rows };

// Rows [row, row + rows) of a slice as the operand of a product over its columns, or over those rows.
template <AmxSide Side, Inner Along>
inline Planes packed_planes(const AttentionSlice& slice, int64_t row, int64_t rows, int64_t cols, Work<float>& work) {
    if (slice.data == nullptr) {
        return {};
    }
    if (!slice.bfloat16) {
        const int64_t ld = whole_steps(cols);
        float* padded = work.take(whole_steps(rows) * ld);
        pack_rows<float>(slice, row, 0, rows, cols, 1.0F, padded, ld);
        clear(padded + rows * ld, (whole_steps(rows) - rows) * ld);
        if constexpr (Along == Inner::columns) {
            return pack_over_columns<Side>(padded, rows, cols, ld, 1.0F, true, work);
        } else {
            return pack_over_rows<Side>(padded, rows, cols, ld, true, work);
        }
    }
    const int64_t count = Along == Inner::columns ? rows : cols;
    const int64_t depth = Along == Inner::columns ? cols : rows;
    const AmxPacked to = AmxPacked::whole(take_bfloat16(amx_size(count, depth), work), count, depth);
    // The packers read along rows; a matrix held by columns is the other way round.
    const bool turned = slice.row == 1 && slice.col != 1;
    const StridedRows<BFloat16> lines = {element<BFloat16>(slice, row, 0), turned ? slice.col : slice.row};
    const int64_t step = turned ? slice.row : slice.col;
    if ((Along == Inner::columns) != turned) {
        amx_pack_rows<Side>(lines, 0, count, step, 0, depth, to);
    } else {
        amx_pack_columns<Side>(lines, 0, depth, step, 0, count, to);
    }
    return {to.data, nullptr, to.block};
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

ONESTEP_INLINE void scale_tile(int64_t count, float factor, float* to) {
    for (int64_t e = 0; e < count; e += kLanes<float>) {
        store<float>(to + e, load<float>(to + e) * factor);
    }
}

// to (cols × ld) = the transpose of `from` (rows × cols, from_row apart).
ONESTEP_INLINE void turn(const float* from, int64_t from_row, int64_t rows, int64_t cols, float* to, int64_t ld) {
    pack_columns_of<float>(from, from_row, 1, rows, cols, 1.0F, to, ld);
}

// sums (rows × cols, rows of `ld`) times the decay of their columns.
inline void decay_sums(int64_t rows, int64_t cols, const float* decay, float* sums, int64_t ld) {
    for (int64_t c = 0; c < cols; c += kLanes<float>) {
        const Vec<float> factor = load<float>(decay + c);
        for (int64_t r = 0; r < rows; ++r) {
            float* at = sums + r * ld + c;
            store<float>(at, load<float>(at) * factor);
        }
    }
}

// square(i, queries, j, keys): each square of the queries [begin + i, …) and the keys [j, …) in which any key is seen.
// pack(j, keys) comes before the squares of those keys.
template <class Pack, class Square>
ONESTEP_INLINE void for_squares_by_keys(const AttentionHead<float>& head, int64_t begin, int64_t rows, const Pack& pack,
                                        const Square& square) {
    const int64_t end = keys_seen<float>(head, begin, rows);
    for (int64_t j = 0; j < end; j += kSquare) {
        const int64_t keys = minimum(kSquare, end - j);
        pack(j, keys);
        const int64_t first = head.causal ? maximum(0, j - begin) / kSquare * kSquare : 0;
        for (int64_t i = first; i < rows; i += kSquare) {
            square(i, minimum(kSquare, rows - i), j, keys);
        }
    }
}

inline void bfloat16_forward(const AttentionHead<float>& head, int64_t begin, int64_t rows, float* out, double* lse,
                             float* memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const int64_t ld = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work{memory};
    float* sums = take_zeroed(v_row * ld, work);
    float* scores = work.take(kSquare * kSquare);
    const MaskTile<float> mask = take_mask<float>(kSquare, kSquare, work);
    const SoftmaxRows<float> state = take_softmax<float>(ld, work);
    const Planes q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    Work<float> inner = work;
    Planes k, vt;
    const auto pack = [&](int64_t j, int64_t keys) {
        inner = work;
        k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
    };
    const auto square = [&](int64_t i, int64_t queries, int64_t j, int64_t keys) {
        Work<float> own = inner;
        const int64_t width = whole_vectors<float>(queries);
        const SoftmaxRows<float> rows_state = {state.top + i, state.sum + i, state.decay + i};
        PlaneProducts s(head.d);
        s.add(k, q.from_block(i / kAmxBlock));
        multiply_planes<false>(tiles, whole_blocks(keys), width, s, scores, width);
        scale_tile(keys * width, head.scale, scores);
        add_to_softmax<float>(head, begin + i, queries, j, keys, width, scores, mask, rows_state);
        clear(scores + keys * width, (whole_steps(keys) - keys) * width);
        if (j > 0) {
            decay_sums(head.dv, width, rows_state.decay, sums + i, ld);
        }
        PlaneProducts pv(keys);
        pv.add(vt, pack_over_rows<AmxSide::right>(scores, keys, width, width, false, own));
        multiply_planes<true>(tiles, v_row, width, pv, sums + i, ld);
    };
    for_squares_by_keys(head, begin, rows, pack, square);
    float* o = work.take(rows * v_row);
    turn(sums, ld, head.dv, rows, o, v_row);
    put_outputs<float>(head, begin, rows, state, o, v_row, out, lse);
}

inline void bfloat16_jvp(const AttentionHead<float>& head, int64_t begin, int64_t rows, float* out, double* lse,
                         float* memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const AttentionSlices& tangent = head.tangent;
    const int64_t ld = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work{memory};
    float* sums = take_zeroed(v_row * ld, work);
    float* scores = work.take(kSquare * kSquare);
    float* tangents = work.take(kSquare * kSquare);
    const MaskTile<float> mask = take_mask<float>(kSquare, kSquare, work);
    const TangentRows<float> state = take_tangent_rows<float>(head, begin, rows, work);
    const Planes q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    const Planes dq = packed_planes<AmxSide::right, Inner::columns>(tangent.q, begin, rows, head.d, work);
    Work<float> inner = work;
    Planes k, dk, vt, dvt;
    const auto pack = [&](int64_t j, int64_t keys) {
        inner = work;
        k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        dk = packed_planes<AmxSide::left, Inner::columns>(tangent.k, j, keys, head.d, inner);
        vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
        dvt = packed_planes<AmxSide::left, Inner::rows>(tangent.v, j, keys, head.dv, inner);
    };
    const auto square = [&](int64_t i, int64_t queries, int64_t j, int64_t keys) {
        Work<float> own = inner;
        const int64_t width = whole_vectors<float>(queries);
        const TangentRows<float> rows_state = {state.high + i, state.low + i, state.mean + i};
        const Planes own_q = q.from_block(i / kAmxBlock);
        PlaneProducts s(head.d);
        s.add(k, own_q);
        multiply_planes<false>(tiles, whole_blocks(keys), width, s, scores, width);
        scale_tile(keys * width, head.scale, scores);
        PlaneProducts ds(head.d);
        ds.add(k, dq.from_block(i / kAmxBlock));
        ds.add(dk, own_q);
        multiply_planes<false>(tiles, whole_blocks(keys), width, ds, tangents, width);
        scale_tile(keys * width, head.scale, tangents);
        weigh_masked_tangents<float>(head, begin + i, queries, j, keys, width, scores, tangents, mask, rows_state);
        clear(scores + keys * width, (whole_steps(keys) - keys) * width);
        clear(tangents + keys * width, (whole_steps(keys) - keys) * width);
        PlaneProducts pv(keys);
        pv.add(vt, pack_over_rows<AmxSide::right>(tangents, keys, width, width, false, own));
        if (dvt.high != nullptr) {
            pv.add(dvt, pack_over_rows<AmxSide::right>(scores, keys, width, width, false, own));
        }
        multiply_planes<true>(tiles, v_row, width, pv, sums + i, ld);
    };
    for_squares_by_keys(head, begin, rows, pack, square);
    float* turned = work.take(rows * v_row);
    turn(sums, ld, head.dv, rows, turned, v_row);
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

// Those of a square that starts `at` keys after the tile.
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

// P, dS and their tangents of one square in rows of keys.width, whole steps. What fills a tile is zero: it meets rows
// of operands that are not there.
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

// Scratch for the scores of a square, zero: rows are longer than what products write.
inline ScoreTile<float> take_square(bool tangent, Work<float>& work) {
    const ScoreTile<float> scores = take_scores<float>(kSquare * kSquare, tangent, work);
    for (float* tile : {scores.p, scores.ds, scores.p_tangent, scores.ds_tangent}) {
        if (tile != nullptr) {
            clear(tile, kSquare * kSquare);
        }
    }
    return scores;
}

// square(queries, planes of them, keys, planes of those, work): each square of the keys [begin, begin + count), of
// which any is seen, with the queries [first, end).
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
            // Only what meets an operand is packed.
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

// In floats, at most; `tile` is a multiple of kSquare.
inline int64_t bfloat16_work(int64_t d, int64_t dv, int64_t tile) {
    // Each operand of a tile or of what passes by: two planes, and the float rows that they are made of. There are four
    // of q and k, four of v and G; and sums of the gradients, or O and Ȯ, on both ways round.
    const int64_t features = whole_steps(d) + whole_steps(dv);
    const int64_t operands = (8 * (tile + kSquare) + 2 * tile) * features;
    // Scores with their mask and planes of them in squares; and the sum that grad_of_mask keeps here.
    return operands + 12 * kSquare * kSquare + tile * tile + 64 * Work<float>::rounded(1) + 8 * tile;
}

}  // namespace onestep::ONESTEP_NS
