// O and L, and their tangents: one tile of queries goes over all tiles of keys. Scores are transposed, in rows of
// `width`: a row is a key, and each lane a query, so that sums over keys need no sums across lanes. Lanes past the last
// query hold numbers that are computed and never read.
#pragma once

#include "attention/cpu/tiles-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// How many keys the queries [begin, begin + rows) see.
template <class T>
ONESTEP_INLINE int64_t keys_seen(const AttentionHead<T>& head, int64_t begin, int64_t rows) {
    return head.causal ? minimum(head.keys, begin + rows) : head.keys;
}

// Work memory for the mask of a tile: transposed, as scores are, and by rows as it is read.
template <class T>
struct MaskTile {
    T *columns, *rows;
};

// For each query, in a lane: the largest score so far or, with Lazy, one up to kLazyMaximum below it (`top`); the sum
// of exp(S − top); and the factor by which sums of earlier tiles are multiplied, since they were taken with the `top`
// before.
template <class T>
struct SoftmaxRows {
    T *top, *sum, *decay;
};

// With Lazy, scores may exceed `top` by this much before `top` follows them. Terms of the sums are then up to e⁸, which
// is far from overflow, and sums of earlier tiles seldom have to be multiplied by a decay.
inline constexpr int kLazyMaximum = 8;

// Online softmax over one more tile (Milakov and Gimelshein 2018). Products in `scores`, times `scale`, plus the mask,
// are S; they are replaced by exp(S − top), and `state` is brought up to date. A scale other than 1 must be positive:
// without a mask, the maximum is taken before the scale is applied.
template <class T, bool Masked, bool Lazy>
inline void softmax_step(int64_t keys, int64_t width, T scale, T* scores, const T* mask, const SoftmaxRows<T>& state) {
    const Vec<T> hidden = broadcast<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        const Vec<T> old = load<T>(state.top + v);
        Vec<T> most = hidden;
        for (int64_t j = 0; j < keys; ++j) {
            T* at = scores + j * width + v;
            Vec<T> x = load<T>(at);
            if constexpr (Masked) {
                x = x * scale + load<T>(mask + j * width + v);
                store<T>(at, x);
            }
            most = maximum_lanes<T>(most, x);
        }
        if constexpr (!Masked) {
            most *= scale;
        }
        const Vec<T> slack = broadcast<T>(Lazy ? T(kLazyMaximum) : T(0));
        const Mask<T> raised = most > old + slack;
        most = raised ? most : old;
        // A query that has seen no key yet: all terms are exp(−∞ − 0) = 0, where −∞ − (−∞) would be NaN.
        const Vec<T> shift = most == hidden ? Vec<T>{} : most;
        const T factor = Masked ? T(1) : scale;  // with a mask, the scale is in the scores already
        Vec<T> total = {};
        for (int64_t j = 0; j < keys; ++j) {
            T* at = scores + j * width + v;
            const Vec<T> p = exp_lanes<T>(load<T>(at) * factor - shift);
            store<T>(at, p);
            total += p;
        }
        const Vec<T> decay = raised ? exp_lanes<T>(old - shift) : broadcast<T>(T(1));
        store<T>(state.top + v, most);
        store<T>(state.sum + v, load<T>(state.sum + v) * decay + total);
        store<T>(state.decay + v, decay);
    }
}

// softmax_step for the keys [j, j + keys), with the mask if there is one.
template <class T, bool Lazy = false>
inline void add_to_softmax(const AttentionHead<T>& head, int64_t begin, int64_t rows, int64_t j, int64_t keys,
                           int64_t width, T scale, T* scores, const MaskTile<T>& mask, const SoftmaxRows<T>& state) {
    if (is_masked<T>(head, begin, j, keys)) {
        pack_mask_columns<T>(head, begin, j, rows, keys, mask.columns, width, mask.rows);
        softmax_step<T, true, Lazy>(keys, width, scale, scores, mask.columns, state);
    } else {
        softmax_step<T, false, Lazy>(keys, width, scale, scores, nullptr, state);
    }
}

template <class T>
inline MaskTile<T> take_mask(int64_t rows, int64_t keys, Work<T>& work) {
    return {work.take(keys * whole_vectors<T>(rows)), work.take(rows * whole_vectors<T>(keys))};
}

template <class T>
inline SoftmaxRows<T> take_softmax(int64_t width, Work<T>& work) {
    const SoftmaxRows<T> state = {work.take(width), work.take(width), work.take(width)};
    for (int64_t i = 0; i < width; ++i) {
        state.top[i] = -static_cast<T>(__builtin_inf());
        state.sum[i] = T(0);
    }
    return state;
}

// Writes O = sums / state.sum, where `sums` has the rows of Σ exp(S − top) V, and L.
template <class T>
inline void put_outputs(const AttentionHead<T>& head, int64_t begin, int64_t rows, const SoftmaxRows<T>& state,
                        const T* sums, int64_t ld, T* out, double* lse) {
    for (int64_t i = 0; i < rows; ++i) {
        // Zero only if the query sees no key: where `top` was set, the term was exp(0) = 1.
        const T sum = state.sum[i];
        const bool sees_none = sum == T(0);
        const T inverse = sees_none ? T(0) : T(1) / sum;
        lse[begin + i] =
            sees_none ? -__builtin_inf() : static_cast<double>(state.top[i]) + __builtin_log(static_cast<double>(sum));
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * ld + c] * inverse;
        }
    }
}

// For each query, in a lane: L as a Shift, and L̇ = the sum of P∘Ṡ so far.
template <class T>
struct TangentRows {
    T *high, *low, *lse_tangent;
};

// Replaces scores by P and their tangents by P∘Ṡ, and adds the sums of P∘Ṡ to `state.lse_tangent`.
template <class T, bool Masked>
inline void weigh_tangents(int64_t keys, int64_t width, T* scores, T* tangents, const T* mask,
                           const TangentRows<T>& state) {
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        const Vec<T> shift = load<T>(state.high + v);
        const Vec<T> rest = load<T>(state.low + v);
        Vec<T> total = {};
        for (int64_t j = 0; j < keys; ++j) {
            const int64_t at = j * width + v;
            Vec<T> x = load<T>(scores + at);
            if constexpr (Masked) {
                x += load<T>(mask + at);
            }
            const Vec<T> p = exp_lanes<T>((x - shift) - rest);
            const Vec<T> weighed = p * load<T>(tangents + at);
            store<T>(scores + at, p);
            store<T>(tangents + at, weighed);
            total += weighed;
        }
        store<T>(state.lse_tangent + v, load<T>(state.lse_tangent + v) + total);
    }
}

template <class T>
inline void add_mask_tangent(const AttentionHead<T>& head, int64_t begin, int64_t rows, int64_t j, int64_t keys,
                             int64_t width, const MaskTile<T>& mask, T* tangents) {
    if (head.tangent.mask.data != nullptr) {
        pack_columns<T>(head.tangent.mask, begin, j, rows, keys, T(1), mask.columns, width);
        add_tile<T>(keys * width, mask.columns, tangents);
    }
}

// weigh_tangents for the keys [j, j + keys), with the mask and its tangent if there are any.
template <class T>
inline void weigh_masked_tangents(const AttentionHead<T>& head, int64_t begin, int64_t rows, int64_t j, int64_t keys,
                                  int64_t width, T* scores, T* tangents, const MaskTile<T>& mask,
                                  const TangentRows<T>& state) {
    add_mask_tangent<T>(head, begin, rows, j, keys, width, mask, tangents);
    if (is_masked<T>(head, begin, j, keys)) {
        pack_mask_columns<T>(head, begin, j, rows, keys, mask.columns, width, mask.rows);
        weigh_tangents<T, true>(keys, width, scores, tangents, mask.columns, state);
    } else {
        weigh_tangents<T, false>(keys, width, scores, tangents, nullptr, state);
    }
}

template <class T>
inline TangentRows<T> take_tangent_rows(const AttentionHead<T>& head, int64_t begin, int64_t rows, Work<T>& work) {
    const int64_t width = whole_vectors<T>(rows);
    const TangentRows<T> state = {work.take(width), work.take(width), work.take(width)};
    for (int64_t i = 0; i < width; ++i) {
        const Shift<T> shift = i < rows ? shift_of<T>(head.primal.lse, begin + i) : Shift<T>{};
        state.high[i] = shift.high;
        state.low[i] = shift.low;
        state.lse_tangent[i] = T(0);
    }
    return state;
}

// Writes Ȯ = sums − L̇∘O, where `sums` has the rows of (P∘Ṡ)V + PV̇, and L̇. `o` is work memory for rows of O.
template <class T>
inline void put_output_tangents(const AttentionHead<T>& head, int64_t begin, int64_t rows, const TangentRows<T>& state,
                                const T* sums, int64_t ld, T* o, T* out, double* lse) {
    pack_rows<T>(head.primal.out, begin, 0, rows, head.dv, T(1), o, ld);
    for (int64_t i = 0; i < rows; ++i) {
        if (lse != nullptr) {
            lse[begin + i] = static_cast<double>(state.lse_tangent[i]);
        }
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * ld + c] - state.lse_tangent[i] * o[i * ld + c];
        }
    }
}

// Packed operands: a tile of queries, transposed and with the scale in them, and one tile of keys and values, by rows.
// Absent tangents are null.
template <class T>
struct ForwardOperands {
    T *qt, *k, *v;
    T *qt_tangent, *k_tangent, *v_tangent;
};

// Packs the queries; keys and values get memory alone, for pack_keys_and_values.
template <class T>
inline ForwardOperands<T> take_operands(const AttentionHead<T>& head, int64_t begin, int64_t rows, bool tangent,
                                        Work<T>& work) {
    const auto take_if = [&](bool wanted, int64_t count) { return wanted ? work.take(count) : nullptr; };
    const int64_t width = whole_vectors<T>(rows);
    const int64_t k_size = head.tile * whole_vectors<T>(head.d);
    const int64_t v_size = head.tile * whole_vectors<T>(head.dv);
    ForwardOperands<T> operands = {};
    operands.qt = work.take(head.d * width);
    operands.k = work.take(k_size);
    operands.v = work.take(v_size);
    pack_columns<T>(head.primal.q, begin, 0, rows, head.d, head.scale, operands.qt, width);
    if (tangent) {
        operands.qt_tangent = take_if(head.tangent.q.data != nullptr, head.d * width);
        operands.k_tangent = take_if(head.tangent.k.data != nullptr, k_size);
        operands.v_tangent = take_if(head.tangent.v.data != nullptr, v_size);
        if (operands.qt_tangent != nullptr) {
            pack_columns<T>(head.tangent.q, begin, 0, rows, head.d, head.scale, operands.qt_tangent, width);
        }
    }
    return operands;
}

template <class T>
inline void pack_keys_and_values(const AttentionHead<T>& head, int64_t j, int64_t keys,
                                 const ForwardOperands<T>& operands) {
    const auto pack = [&](const AttentionSlice& slice, int64_t cols, T* to) {
        if (to != nullptr) {
            pack_rows<T>(slice, j, 0, keys, cols, T(1), to, whole_vectors<T>(cols));
        }
    };
    pack(head.primal.k, head.d, operands.k);
    pack(head.primal.v, head.dv, operands.v);
    pack(head.tangent.k, head.d, operands.k_tangent);
    pack(head.tangent.v, head.dv, operands.v_tangent);
}

template <class T>
inline void multiply_scores(const AttentionHead<T>& head, int64_t keys, int64_t width,
                            const ForwardOperands<T>& operands, T* scores) {
    Products<T> s(head.d, width);
    s.add({operands.k, whole_vectors<T>(head.d), 1}, operands.qt);
    multiply<T, false>(keys, width / kLanes<T>, s, scores, width);
}

template <class T>
inline void multiply_score_tangents(const AttentionHead<T>& head, int64_t keys, int64_t width,
                                    const ForwardOperands<T>& operands, T* tangents) {
    const int64_t k_row = whole_vectors<T>(head.d);
    Products<T> s_tangent(head.d, width);
    s_tangent.add({operands.k, k_row, 1}, operands.qt_tangent);
    s_tangent.add({operands.k_tangent, k_row, 1}, operands.qt);
    multiply<T, false>(keys, width / kLanes<T>, s_tangent, tangents, width);
}

// sums += P V over a tile of keys. `p` holds Pᵀ, since scores are transposed.
template <class T>
inline void add_values(int64_t rows, int64_t keys, int64_t width, int64_t v_row, const T* p, const T* v, T* sums) {
    Products<T> pv(keys, v_row);
    pv.add({p, 1, width}, v);
    multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
}

// sums += (P∘Ṡ) V + P V̇, with `weighed` holding P∘Ṡ, transposed.
template <class T>
inline void add_value_tangents(int64_t rows, int64_t keys, int64_t width, int64_t v_row, const T* p, const T* weighed,
                               const ForwardOperands<T>& operands, T* sums) {
    Products<T> pv(keys, v_row);
    pv.add({weighed, 1, width}, operands.v);
    pv.add({p, 1, width}, operands.v_tangent);
    multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
}

// Multiplies the sums of earlier tiles by the decay of their rows, where the largest score has grown.
template <class T>
inline void decay_rows(int64_t rows, int64_t ld, const T* decay, T* sums) {
    for (int64_t i = 0; i < rows; ++i) {
        if (decay[i] != T(1)) {
            for (int64_t c = 0; c < ld; c += kLanes<T>) {
                T* at = sums + i * ld + c;
                store<T>(at, load<T>(at) * decay[i]);
            }
        }
    }
}

// Replaces tangents by exp(S − top)∘Ṡ, where `scores` holds exp(S − top). sum = decay · sum + their sum over the tile's
// keys, for each query.
template <class T>
inline void weigh_online(int64_t keys, int64_t width, const T* scores, const T* decay, T* tangents, T* sum) {
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        Vec<T> total = load<T>(sum + v) * load<T>(decay + v);
        for (int64_t at = v; at < keys * width; at += width) {
            const Vec<T> weighed = load<T>(scores + at) * load<T>(tangents + at);
            store<T>(tangents + at, weighed);
            total += weighed;
        }
        store<T>(sum + v, total);
    }
}

// Writes L̇ = weighed_sum / state.sum, with weighed_sum = Σ exp(S − top) Ṡ, and Ȯ = sums / state.sum − L̇∘O, where
// `sums` has the rows of Σ exp(S − top)(Ṡ V + V̇). O is read from `out`.
template <class T>
inline void put_online_tangents(const AttentionHead<T>& head, int64_t begin, int64_t rows, const SoftmaxRows<T>& state,
                                const T* weighed_sum, const T* sums, int64_t ld, const T* out,
                                const AttentionRows<T>& tangents) {
    for (int64_t i = 0; i < rows; ++i) {
        const T inverse = state.sum[i] == T(0) ? T(0) : T(1) / state.sum[i];
        const T lse_tangent = weighed_sum[i] * inverse;
        tangents.lse[begin + i] = static_cast<double>(lse_tangent);
        const int64_t row = (begin + i) * head.dv;
        for (int64_t c = 0; c < head.dv; ++c) {
            tangents.out[row + c] = sums[i * ld + c] * inverse - lse_tangent * out[row + c];
        }
    }
}

// O and L of a tile of queries, and with Tangent their tangents, in one pass over the keys.
template <class T, bool Tangent>
inline void forward_rows(const AttentionHead<T>& head, int64_t begin, int64_t rows, const AttentionRows<T>& values,
                         const AttentionRows<T>& tangents, const WorkMemory<T>& memory) {
    const int64_t tile = head.tile;
    const int64_t width = whole_vectors<T>(rows);
    const int64_t v_row = whole_vectors<T>(head.dv);
    Work<T> work(memory);
    const ForwardOperands<T> operands = take_operands<T>(head, begin, rows, Tangent, work);
    T* sums = work.take(rows * v_row);
    T* scores = work.take(tile * width);
    T* sum_tangents = Tangent ? work.take(rows * v_row) : nullptr;
    T* score_tangents = Tangent ? work.take(tile * width) : nullptr;
    T* weighed_sum = Tangent ? work.take(width) : nullptr;
    const MaskTile<T> mask = take_mask<T>(rows, tile, work);
    const SoftmaxRows<T> state = take_softmax<T>(width, work);
    __builtin_memset(sums, 0, static_cast<size_t>(rows * v_row) * sizeof(T));
    if constexpr (Tangent) {
        __builtin_memset(sum_tangents, 0, static_cast<size_t>(rows * v_row) * sizeof(T));
        __builtin_memset(weighed_sum, 0, static_cast<size_t>(width) * sizeof(T));
    }
    const int64_t end = keys_seen<T>(head, begin, rows);
    for (int64_t j = 0; j < end; j += tile) {
        const int64_t keys = minimum(tile, end - j);
        pack_keys_and_values<T>(head, j, keys, operands);
        multiply_scores<T>(head, keys, width, operands, scores);
        if constexpr (Tangent) {
            multiply_score_tangents<T>(head, keys, width, operands, score_tangents);
            add_mask_tangent<T>(head, begin, rows, j, keys, width, mask, score_tangents);
        }
        add_to_softmax<T>(head, begin, rows, j, keys, width, T(1), scores, mask, state);
        if (j > 0) {
            decay_rows<T>(rows, v_row, state.decay, sums);
        }
        add_values<T>(rows, keys, width, v_row, scores, operands.v, sums);
        if constexpr (Tangent) {
            weigh_online<T>(keys, width, scores, state.decay, score_tangents, weighed_sum);
            if (j > 0) {
                decay_rows<T>(rows, v_row, state.decay, sum_tangents);
            }
            add_value_tangents<T>(rows, keys, width, v_row, scores, score_tangents, operands, sum_tangents);
        }
    }
    put_outputs<T>(head, begin, rows, state, sums, v_row, values.out, values.lse);
    if constexpr (Tangent) {
        put_online_tangents<T>(head, begin, rows, state, weighed_sum, sum_tangents, v_row, values.out, tangents);
    }
}

template <class T>
inline void attention_forward(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse,
                              const WorkMemory<T>& memory) {
    forward_rows<T, false>(head, begin, rows, {out, lse}, {}, memory);
}

// Ȯ and L̇ of a tile of queries. L is known, so that scores become P at once and no sum has to be decayed.
template <class T>
inline void attention_jvp(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse,
                          const WorkMemory<T>& memory) {
    const int64_t tile = head.tile;
    const int64_t width = whole_vectors<T>(rows);
    const int64_t v_row = whole_vectors<T>(head.dv);
    Work<T> work(memory);
    const ForwardOperands<T> operands = take_operands<T>(head, begin, rows, true, work);
    T* sums = work.take(rows * v_row);
    T* scores = work.take(tile * width);
    T* tangents = work.take(tile * width);
    const MaskTile<T> mask = take_mask<T>(rows, tile, work);
    const TangentRows<T> state = take_tangent_rows<T>(head, begin, rows, work);
    __builtin_memset(sums, 0, static_cast<size_t>(rows * v_row) * sizeof(T));
    const int64_t end = keys_seen<T>(head, begin, rows);
    for (int64_t j = 0; j < end; j += tile) {
        const int64_t keys = minimum(tile, end - j);
        pack_keys_and_values<T>(head, j, keys, operands);
        multiply_scores<T>(head, keys, width, operands, scores);
        multiply_score_tangents<T>(head, keys, width, operands, tangents);
        weigh_masked_tangents<T>(head, begin, rows, j, keys, width, scores, tangents, mask, state);
        add_value_tangents<T>(rows, keys, width, v_row, scores, tangents, operands, sums);
    }
    // The values' memory is free again, and large enough for rows of O: a tile of queries is no more than one of keys.
    put_output_tangents<T>(head, begin, rows, state, sums, v_row, operands.v, out, lse);
}

}  // namespace onestep::attention::ONESTEP_NS
