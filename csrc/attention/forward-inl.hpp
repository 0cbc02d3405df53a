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

// Online softmax over one more tile (Milakov and Gimelshein 2018): scores become exp(S − top), `top` and `sum` are
// brought up to date, and `decay` is what earlier sums have to be multiplied by.
template <class T, bool Masked>
inline void softmax_step(int64_t keys, int64_t width, T* scores, const T* mask, T* top, T* sum, T* decay) {
    const Vec<T> hidden = broadcast<T>(-static_cast<T>(__builtin_inf()));
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        const Vec<T> old = load<T>(top + v);
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
        store<T>(top + v, most);
        store<T>(sum + v, load<T>(sum + v) * factor + total);
        store<T>(decay + v, factor);
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
    T* mask = work.take(tile * width);
    T* mask_rows = work.take(tile * tile);
    T* top = work.take(width);
    T* sum = work.take(width);
    T* decay = work.take(width);
    for (int64_t i = 0; i < width; ++i) {
        top[i] = -static_cast<T>(__builtin_inf());
        sum[i] = T(0);
    }
    for (int64_t e = 0; e < rows * v_row; ++e) {
        sums[e] = T(0);
    }
    pack_columns<T>(head.primal.q, begin, 0, rows, d, head.scale, qt, width);
    const int64_t end = keys_seen<T>(head, begin, rows);
    for (int64_t j = 0; j < end; j += tile) {
        const int64_t keys = minimum(tile, end - j);
        pack_rows<T>(head.primal.k, j, 0, keys, d, T(1), k, k_row);
        pack_rows<T>(head.primal.v, j, 0, keys, head.dv, T(1), v, v_row);
        Products<T> s(d, width);
        s.add({k, k_row, 1}, qt);
        multiply<T, false>(keys, width / kLanes<T>, s, scores, width);
        if (is_masked<T>(head, begin, j, keys)) {
            pack_mask_columns<T>(head, begin, j, rows, keys, mask, width, mask_rows);
            softmax_step<T, true>(keys, width, scores, mask, top, sum, decay);
        } else {
            softmax_step<T, false>(keys, width, scores, mask, top, sum, decay);
        }
        for (int64_t i = 0; j > 0 && i < rows; ++i) {
            if (decay[i] != T(1)) {
                for (int64_t c = 0; c < v_row; c += kLanes<T>) {
                    T* at = sums + i * v_row + c;
                    store<T>(at, load<T>(at) * decay[i]);
                }
            }
        }
        Products<T> pv(keys, v_row);
        pv.add({scores, 1, width}, v);
        multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
    }
    for (int64_t i = 0; i < rows; ++i) {
        const bool blind = sum[i] == T(0);
        const T inverse = blind ? T(0) : T(1) / sum[i];
        lse[begin + i] =
            blind ? -__builtin_inf() : static_cast<double>(top[i]) + __builtin_log(static_cast<double>(sum[i]));
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * v_row + c] * inverse;
        }
    }
}

// Scores become P, their tangents P∘Ṡ, whose sums go to `mean`.
template <class T, bool Masked>
inline void weigh_tangents(int64_t keys, int64_t width, T* scores, T* tangents, const T* mask, const T* high,
                           const T* low, T* mean) {
    for (int64_t v = 0; v < width; v += kLanes<T>) {
        const Vec<T> shift = load<T>(high + v);
        const Vec<T> rest = load<T>(low + v);
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
        store<T>(mean + v, load<T>(mean + v) + total);
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
    T* mask = work.take(tile * width);
    T* mask_rows = work.take(tile * tile);
    T* high = work.take(width);
    T* low = work.take(width);
    T* mean = work.take(width);
    for (int64_t i = 0; i < width; ++i) {
        const Shift<T> shift = i < rows ? shift_of<T>(primal.lse, begin + i) : Shift<T>{};
        high[i] = shift.high;
        low[i] = shift.low;
        mean[i] = T(0);
    }
    for (int64_t e = 0; e < rows * v_row; ++e) {
        sums[e] = T(0);
    }
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
        if (tangent.mask.data != nullptr) {
            pack_columns<T>(tangent.mask, begin, j, rows, keys, T(1), mask, width);
            add_tile<T>(keys * width, mask, tangents);
        }
        if (is_masked<T>(head, begin, j, keys)) {
            pack_mask_columns<T>(head, begin, j, rows, keys, mask, width, mask_rows);
            weigh_tangents<T, true>(keys, width, scores, tangents, mask, high, low, mean);
        } else {
            weigh_tangents<T, false>(keys, width, scores, tangents, nullptr, high, low, mean);
        }
        Products<T> pv(keys, v_row);
        pv.add({tangents, 1, width}, v);
        pv.add({scores, 1, width}, dv);
        multiply<T, true>(rows, v_row / kLanes<T>, pv, sums, v_row);
    }
    pack_rows<T>(primal.out, begin, 0, rows, head.dv, T(1), v, v_row);
    for (int64_t i = 0; i < rows; ++i) {
        if (lse != nullptr) {
            lse[begin + i] = static_cast<double>(mean[i]);
        }
        for (int64_t c = 0; c < head.dv; ++c) {
            out[(begin + i) * head.dv + c] = sums[i * v_row + c] - mean[i] * v[i * v_row + c];
        }
    }
}

}  // namespace onestep::ONESTEP_NS
