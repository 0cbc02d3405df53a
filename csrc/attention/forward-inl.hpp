// O and L, and their tangents: one tile of queries passes over all keys. Scores are held transposed, a query per lane,
// so that row statistics need no sums across lanes.
#pragma once

#include "attention/tiles-inl.hpp"

namespace onestep::ONESTEP_NS {

// Keys that the queries [begin, begin + rows) see.
template <class T>
ONESTEP_INLINE int64_t keys_seen(const AttentionHead<T>& head, int64_t begin, int64_t rows) {
    return head.causal ? minimum(head.keys, begin + rows) : head.keys;
}

// Scratch for the mask of a tile: transposed, and by rows on the way there.
template <class T>
struct MaskTile {
    T *columns, *rows;
};

// Per query: the largest score so far, the sum of exp(S − top), and what earlier sums have to be multiplied by.
template <class T>
struct SoftmaxRows {
    T *top, *sum, *decay;
};

// Online softmax over one more tile (Milakov and Gimelshein 2018): scores become exp(S − top), and `state` is brought
// up to date.
template <class T, bool Masked>
inline void softmax_step(int64_t keys, int64_t width, T* scores, const T* mask, const SoftmaxRows<T>& state) {
    const Vec<T> hidden = broadcast<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        const Vec<T> old = load<T>(state.top + v);
        Vec<T> most = old;
        for (int64_t j = 0; j < keys; ++j) {
            T* at = scores + j * width + v;
            Vec<T> x = load<T>(at);
            if constexpr (Masked) {
                x += load<T>(mask + j * width + v);
                store<T>(at, x);
            }
            most = maximum_lanes<T>(most, x);
        }
        const Vec<T> shift = most == hidden ? Vec<T>{} : most;
        Vec<T> total = {};
        for (int64_t j = 0; j < keys; ++j) {
            T* at = scores + j * width + v;
            const Vec<T> p = exp_lanes<T>(load<T>(at) - shift);
            store<T>(at, p);
            total += p;
        }
        const Vec<T> factor = exp_lanes<T>(old - shift);
        store<T>(state.top + v, most);
        store<T>(state.sum + v, load<T>(state.sum + v) * factor + total);
        store<T>(state.decay + v, factor);
    }
}

// The same for the keys [j, j + keys), with the mask.
template <class T>
inline void add_to_softmax(const AttentionHead<T>& head, int64_t begin, int64_t rows, int64_t j, int64_t keys,
                           int64_t width, T* scores, const MaskTile<T>& mask, const SoftmaxRows<T>& state) {
    if (is_masked<T>(head, begin, j, keys)) {
        pack_mask_columns<T>(head, begin, j, rows, keys, mask.columns, width, mask.rows);
        softmax_step<T, true>(keys, width, scores, mask.columns, state);
    } else {
        softmax_step<T, false>(keys, width, scores, nullptr, state);
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

// O from rows of `ld` sums of exp(S − top) V, and L.
template <class T>
inline void put_outputs(const AttentionHead<T>& head, int64_t begin, int64_t rows, const SoftmaxRows<T>& state,
                        const T* sums, int64_t ld, T* out, double* lse) {
    for (int64_t i = 0; i < rows; ++i) {
        const T sum = state.sum[i];
        const bool blind = sum == T(0);
        const T inverse = blind ? T(0) : T(1) / sum;
        lse[begin + i] =
            blind ? -__builtin_inf() : static_cast<double>(state.top[i]) + __builtin_log(static_cast<double>(sum));
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * ld + c] * inverse;
        }
    }
}

template <class T>
inline void attention_forward(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse,
                              T* memory) {
    const int64_t tile = head.tile;
    const int64_t d = head.d;
    const int64_t width = whole_vectors<T>(rows);
    const int64_t k_row = whole_vectors<T>(d);
    const int64_t v_row = whole_vectors<T>(head.dv);
    Work<T> work{memory};
    T* qt = work.take(d * width);
    T* k = work.take(tile * k_row);
    T* v = work.take(tile * v_row);
    T* sums = work.take(rows * v_row);
    T* scores = work.take(tile * width);
    const MaskTile<T> mask = take_mask<T>(rows, tile, work);
    const SoftmaxRows<T> state = take_softmax<T>(width, work);
    __builtin_memset(sums, 0, static_cast<size_t>(rows * v_row) * sizeof(T));
    pack_columns<T>(head.primal.q, begin, 0, rows, d, head.scale, qt, width);
    const int64_t end = keys_seen<T>(head, begin, rows);
    for (int64_t j = 0; j < end; j += tile) {
        const int64_t keys = minimum(tile, end - j);
        pack_rows<T>(head.primal.k, j, 0, keys, d, T(1), k, k_row);
        pack_rows<T>(head.primal.v, j, 0, keys, head.dv, T(1), v, v_row);
        Products<T> s(d, width);
        s.add({k, k_row, 1}, qt);
        multiply<T, false>(keys, width / kLanes<T>, s, scores, width);
        add_to_softmax<T>(head, begin, rows, j, keys, width, scores, mask, state);
        for (int64_t i = 0; j > 0 && i < rows; ++i) {
            if (state.decay[i] != T(1)) {
                for (int64_t c = 0; c < v_row; c += kLanes<T>) {
                    T* at = sums + i * v_row + c;
                    store<T>(at, load<T>(at) * state.decay[i]);
                }
            }
        }
        Products<T> pv(keys, v_row);
        pv.add({scores, 1, width}, v);
        multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
    }
    put_outputs<T>(head, begin, rows, state, sums, v_row, out, lse);
}

// Per query: L as Shift, and the sum of P∘Ṡ.
template <class T>
struct TangentRows {
    T *high, *low, *mean;
};

// Scores become P, their tangents P∘Ṡ, whose sums go to `state.mean`.
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
        store<T>(state.mean + v, load<T>(state.mean + v) + total);
    }
}

// The same for the keys [j, j + keys), with the mask and its tangent.
template <class T>
inline void weigh_masked_tangents(const AttentionHead<T>& head, int64_t begin, int64_t rows, int64_t j, int64_t keys,
                                  int64_t width, T* scores, T* tangents, const MaskTile<T>& mask,
                                  const TangentRows<T>& state) {
    if (head.tangent.mask.data != nullptr) {
        pack_columns<T>(head.tangent.mask, begin, j, rows, keys, T(1), mask.columns, width);
        add_tile<T>(keys * width, mask.columns, tangents);
    }
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
        state.mean[i] = T(0);
    }
    return state;
}

// Ȯ from rows of `ld` sums of (P∘Ṡ)V + PV̇, and L̇. `o` has room for the rows of O.
template <class T>
inline void put_output_tangents(const AttentionHead<T>& head, int64_t begin, int64_t rows, const TangentRows<T>& state,
                                const T* sums, int64_t ld, T* o, T* out, double* lse) {
    pack_rows<T>(head.primal.out, begin, 0, rows, head.dv, T(1), o, ld);
    for (int64_t i = 0; i < rows; ++i) {
        if (lse != nullptr) {
            lse[begin + i] = static_cast<double>(state.mean[i]);
        }
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * ld + c] - state.mean[i] * o[i * ld + c];
        }
    }
}

template <class T>
inline void attention_jvp(const AttentionHead<T>& head, int64_t begin, int64_t rows, T* out, double* lse, T* memory) {
    const AttentionSlices& primal = head.primal;
    const AttentionSlices& tangent = head.tangent;
    const int64_t tile = head.tile;
    const int64_t d = head.d;
    const int64_t width = whole_vectors<T>(rows);
    const int64_t k_row = whole_vectors<T>(d);
    const int64_t v_row = whole_vectors<T>(head.dv);
    const bool q_moves = tangent.q.data != nullptr;
    const bool k_moves = tangent.k.data != nullptr;
    const bool v_moves = tangent.v.data != nullptr;
    Work<T> work{memory};
    T* qt = work.take(d * width);
    T* dqt = q_moves ? work.take(d * width) : nullptr;
    T* k = work.take(tile * k_row);
    T* dk = k_moves ? work.take(tile * k_row) : nullptr;
    T* v = work.take(tile * v_row);
    T* dv = v_moves ? work.take(tile * v_row) : nullptr;
    T* sums = work.take(rows * v_row);
    T* scores = work.take(tile * width);
    T* tangents = work.take(tile * width);
    const MaskTile<T> mask = take_mask<T>(rows, tile, work);
    const TangentRows<T> state = take_tangent_rows<T>(head, begin, rows, work);
    __builtin_memset(sums, 0, static_cast<size_t>(rows * v_row) * sizeof(T));
    pack_columns<T>(primal.q, begin, 0, rows, d, head.scale, qt, width);
    if (q_moves) {
        pack_columns<T>(tangent.q, begin, 0, rows, d, head.scale, dqt, width);
    }
    const int64_t end = keys_seen<T>(head, begin, rows);
    for (int64_t j = 0; j < end; j += tile) {
        const int64_t keys = minimum(tile, end - j);
        pack_rows<T>(primal.k, j, 0, keys, d, T(1), k, k_row);
        pack_rows<T>(primal.v, j, 0, keys, head.dv, T(1), v, v_row);
        if (k_moves) {
            pack_rows<T>(tangent.k, j, 0, keys, d, T(1), dk, k_row);
        }
        if (v_moves) {
            pack_rows<T>(tangent.v, j, 0, keys, head.dv, T(1), dv, v_row);
        }
        Products<T> s(d, width);
        s.add({k, k_row, 1}, qt);
        multiply<T, false>(keys, width / kLanes<T>, s, scores, width);
        Products<T> ds(d, width);
        ds.add({k, k_row, 1}, dqt);
        ds.add({dk, k_row, 1}, qt);
        multiply<T, false>(keys, width / kLanes<T>, ds, tangents, width);
        weigh_masked_tangents<T>(head, begin, rows, j, keys, width, scores, tangents, mask, state);
        Products<T> pv(keys, v_row);
        pv.add({tangents, 1, width}, v);
        pv.add({scores, 1, width}, dv);
        multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
    }
    put_output_tangents<T>(head, begin, rows, state, sums, v_row, v, out, lse);
}

}  // namespace onestep::ONESTEP_NS
