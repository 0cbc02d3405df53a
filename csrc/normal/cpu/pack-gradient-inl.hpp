// Gradients of small problems, one per vector lane: ∂X = D (Y − XW) Vᵀ − D X V Wᵀ with V = A⁻¹ grad, and those of Y,
// weights and penalties, in one pass over the rows.
#pragma once

#include "normal/cpu/pack-inl.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Rows whose sums are under way at once: one row's would wait for each other.
inline constexpr int kGradientTile = 4;

template <class T>
inline int64_t pack_gradient_work(int64_t d, int64_t k) {
    // W and V; then, of a block of rows: [X | Y], ∂X, ∂Y, the gradients of weights, and the weights.
    return (2 * d * k + kPackRows * (d + k) + kPackRows * d + kPackRows * (k + 1) + kPackRows) * kLanes<T>;
}

// kRows rows from `x` and `y` on, with their weights.
template <class T, int kRows>
ONESTEP_INLINE void pack_gradient_rows(int64_t d, int64_t k, const Vec<T>* w, const Vec<T>* v, const Vec<T>* x,
                                       const Vec<T>* weight, Vec<T>* grad_x, Vec<T>* grad_y, Vec<T>* grad_weight) {
    const int64_t width = d + k;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        grad_weight[r] = Vec<T>{};
    }
    for (int64_t c = 0; c < k; ++c) {
        Vec<T> xw[kRows] = {};
        Vec<T> xv[kRows] = {};
        for (int64_t j = 0; j < d; ++j) {
            const Vec<T> wj = w[j * k + c];
            const Vec<T> vj = v[j * k + c];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                xw[r] += x[r * width + j] * wj;
                xv[r] += x[r * width + j] * vj;
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const Vec<T> residual = x[r * width + d + c] - xw[r];
            grad_weight[r] += xv[r] * residual;
            xw[r] = weight[r] * residual;
            xv[r] *= weight[r];
            grad_y[r * k + c] = xv[r];
        }
        for (int64_t j = 0; j < d; ++j) {
            const Vec<T> wj = w[j * k + c];
            const Vec<T> vj = v[j * k + c];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const Vec<T> part = xw[r] * vj - xv[r] * wj;
                grad_x[r * d + j] = c == 0 ? part : grad_x[r * d + j] + part;
            }
        }
    }
}

// Writes `count` vectors to every lane's output from `offset` on; zeros to lanes that are not good.
template <class T>
inline void store_gradient(Vec<T>* from, int64_t count, Mask<T> good, T* const* to, int64_t offset) {
    if (to[0] == nullptr) {
        return;
    }
    T* at[kMostLanes];
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        at[lane] = to[lane] != nullptr ? to[lane] + offset : nullptr;
    }
    for (int64_t e = 0; e < count; ++e) {
        from[e] = good ? from[e] : Vec<T>{};
    }
    store_lanes<T>(from, count, at);
}

template <class T>
inline void pack_gradient(const PackGradientArgs<T>& args, T* work) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    Vec<T>* const w = reinterpret_cast<Vec<T>*>(work);
    Vec<T>* const v = w + d * k;
    Vec<T>* const rows = v + d * k;
    Vec<T>* const grad_x = rows + kPackRows * (d + k);
    Vec<T>* const grad_y = grad_x + kPackRows * d;
    Vec<T>* const grad_weight = grad_y + kPackRows * k;
    Vec<T>* const weight = grad_weight + kPackRows;
    Mask<T> good;
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        good[lane] = args.failed[lane] ? 0 : -1;
    }
    load_block<T>(args.solution, 0, d, k, w, k);
    load_block<T>(args.adjoint, 0, d, k, v, k);
    for (int64_t j = 0; j < d; ++j) {
        Vec<T> sum{};
        for (int64_t c = 0; c < k; ++c) {
            sum -= w[j * k + c] * v[j * k + c];
        }
        rows[j] = sum;
    }
    store_gradient<T>(rows, d, good, args.grad_ridge, 0);
    for (int64_t block = 0; block < args.n; block += kPackRows) {
        const int64_t count = minimum(kPackRows, args.n - block);
        load_block<T>(args.x, block, count, d, rows, d + k);
        load_block<T>(args.y, block, count, k, rows + d, d + k);
        for (int64_t p = 0; p < count; ++p) {
            weight[p] = broadcast<T>(T(1));
        }
        if (args.weight.given) {
            load_lanes<T>(args.weight, block * args.weight.row, args.weight.row, count, weight, 1);
        }
        int64_t p = 0;
        for (; p + kGradientTile <= count; p += kGradientTile) {
            pack_gradient_rows<T, kGradientTile>(d, k, w, v, rows + p * (d + k), weight + p, grad_x + p * d,
                                                 grad_y + p * k, grad_weight + p);
        }
        for (; p < count; ++p) {
            pack_gradient_rows<T, 1>(d, k, w, v, rows + p * (d + k), weight + p, grad_x + p * d, grad_y + p * k,
                                     grad_weight + p);
        }
        store_gradient<T>(grad_x, count * d, good, args.grad_x, block * d);
        store_gradient<T>(grad_y, count * k, good, args.grad_y, block * k);
        store_gradient<T>(grad_weight, count, good, args.grad_weight, block);
    }
}

}  // namespace onestep::normal::ONESTEP_NS
