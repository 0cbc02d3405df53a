// O, L and their tangents on AMX's tile registers; see amx-planes-inl.hpp. The queries of an AttentionHead::tile are
// packed once; for each kSquare keys, there is a loop over squares of these queries. Sums are Oᵀ, with a query in each
// lane.
#pragma once

#include "attention/cpu/amx-planes-inl.hpp"
#include "attention/cpu/forward-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Calls square(i, queries, j, keys) for each square in which a query sees a key: queries from begin + i on, keys from j
// on. pack(j, keys) is called before the squares of those keys.
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
                             const WorkMemory<float>& memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const int64_t ld = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work(memory);
    float* sums = take_zeroed(v_row * ld, work);
    float* scores = work.take(kSquare * kSquare);
    const MaskTile<float> mask = take_mask<float>(kSquare, kSquare, work);
    const SoftmaxRows<float> state = take_softmax<float>(ld, work);
    const Planes q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    Work<float> inner = work.rest();
    Planes k, vt;
    // A positive scale keeps the order of scores, so that softmax_step can apply it after it has found their maximum.
    // Any other is applied before.
    const bool late_scale = head.scale > 0.0F;
    const auto pack = [&](int64_t j, int64_t keys) {
        inner = work.rest();
        k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
    };
    const auto square = [&](int64_t i, int64_t queries, int64_t j, int64_t keys) {
        Work<float> own = inner.rest();
        const int64_t width = whole_vectors<float>(queries);
        const SoftmaxRows<float> rows_state = {state.top + i, state.sum + i, state.decay + i};
        PlaneProducts s(head.d);
        s.add(k, q.from_block(i / kAmxBlock));
        multiply_planes<false>(tiles, whole_blocks(keys), width, s, scores, width);
        if (!late_scale) {
            scale_tile(keys * width, head.scale, scores);
        }
        add_to_softmax<float, true>(head, begin + i, queries, j, keys, width, late_scale ? head.scale : 1.0F, scores,
                                    mask, rows_state);
        // Packing reads whole steps of keys.
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
    put_transpose(sums, ld, head.dv, rows, o, v_row);
    put_outputs<float>(head, begin, rows, state, o, v_row, out, lse);
}

inline void bfloat16_jvp(const AttentionHead<float>& head, int64_t begin, int64_t rows, float* out, double* lse,
                         const WorkMemory<float>& memory) {
    AmxTiles tiles;
    const AttentionSlices& primal = head.primal;
    const AttentionSlices& tangent = head.tangent;
    const int64_t ld = whole_vectors<float>(rows);
    const int64_t v_row = whole_vectors<float>(head.dv);
    Work<float> work(memory);
    float* sums = take_zeroed(v_row * ld, work);
    float* scores = work.take(kSquare * kSquare);
    float* tangents = work.take(kSquare * kSquare);
    const MaskTile<float> mask = take_mask<float>(kSquare, kSquare, work);
    const TangentRows<float> state = take_tangent_rows<float>(head, begin, rows, work);
    const Planes q = packed_planes<AmxSide::right, Inner::columns>(primal.q, begin, rows, head.d, work);
    const Planes q_tangent = packed_planes<AmxSide::right, Inner::columns>(tangent.q, begin, rows, head.d, work);
    Work<float> inner = work.rest();
    Planes k, k_tangent, vt, vt_tangent;
    const auto pack = [&](int64_t j, int64_t keys) {
        inner = work.rest();
        k = packed_planes<AmxSide::left, Inner::columns>(primal.k, j, keys, head.d, inner);
        k_tangent = packed_planes<AmxSide::left, Inner::columns>(tangent.k, j, keys, head.d, inner);
        vt = packed_planes<AmxSide::left, Inner::rows>(primal.v, j, keys, head.dv, inner);
        vt_tangent = packed_planes<AmxSide::left, Inner::rows>(tangent.v, j, keys, head.dv, inner);
    };
    const auto square = [&](int64_t i, int64_t queries, int64_t j, int64_t keys) {
        Work<float> own = inner.rest();
        const int64_t width = whole_vectors<float>(queries);
        const TangentRows<float> rows_state = {state.high + i, state.low + i, state.lse_tangent + i};
        const Planes own_q = q.from_block(i / kAmxBlock);
        PlaneProducts s(head.d);
        s.add(k, own_q);
        multiply_planes<false>(tiles, whole_blocks(keys), width, s, scores, width);
        scale_tile(keys * width, head.scale, scores);
        PlaneProducts s_tangent(head.d);
        s_tangent.add(k, q_tangent.from_block(i / kAmxBlock));
        s_tangent.add(k_tangent, own_q);
        multiply_planes<false>(tiles, whole_blocks(keys), width, s_tangent, tangents, width);
        scale_tile(keys * width, head.scale, tangents);
        weigh_masked_tangents<float>(head, begin + i, queries, j, keys, width, scores, tangents, mask, rows_state);
        // Packing reads whole steps of keys.
        clear(scores + keys * width, (whole_steps(keys) - keys) * width);
        clear(tangents + keys * width, (whole_steps(keys) - keys) * width);
        PlaneProducts pv(keys);
        pv.add(vt, pack_over_rows<AmxSide::right>(tangents, keys, width, width, false, own));
        if (vt_tangent.high != nullptr) {
            pv.add(vt_tangent, pack_over_rows<AmxSide::right>(scores, keys, width, width, false, own));
        }
        multiply_planes<true>(tiles, v_row, width, pv, sums + i, ld);
    };
    for_squares_by_keys(head, begin, rows, pack, square);
    float* sums_by_rows = work.take(rows * v_row);
    put_transpose(sums, ld, head.dv, rows, sums_by_rows, v_row);
    put_output_tangents<float>(head, begin, rows, state, sums_by_rows, v_row, work.take(rows * v_row), out, lse);
}

}  // namespace onestep::attention::ONESTEP_NS
