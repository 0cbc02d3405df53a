// Gradients and their tangents. Two kernels of one form: a block owns rows of queries and adds up dQ while keys pass
// by, or owns rows of keys and adds up dK and dV while queries pass by; nothing is shared between blocks, so that the
// order of every sum is fixed. With X, Y for the own rows of q, grad (or k, v) and X′, Y′ for the others' rows of k, v
// (or q, grad):
//
// S = s XX′ᵀ, dP = YY′ᵀ, dX = s dS X′, and of keys dY = P Y′;
// tangents: dẊ = s (dṠ X′ + dS Ẋ′), and of keys dẎ = Ṗ Y′ + P Ẏ′.
#pragma once

#include "attention/cuda/blocks.cuh"
#include "attention/cuda/forward.cuh"

namespace onestep::attention::cuda {

// What a query's scores are turned into gradients with: L log₂ e, L̇, δ and δ̇.
template <class Acc>
struct alignas(4 * sizeof(Acc)) RowTerms {
    Acc lse2, mean, delta, delta_tangent;
};

template <class Sizes>
inline constexpr int64_t kGradientBytes =
    kAlignmentBytes<Sizes> +
    int64_t{sizeof(typename Sizes::T)} * 4 * (Sizes::kOwnTile + Sizes::kStages * Sizes::kInnerTile) +
    int64_t{sizeof(RowTerms<typename Sizes::Acc>)} * Sizes::kStages * Sizes::kInner;

// δ = rowsum(G∘O) − grad_L and δ̇ = rowsum(Ġ∘O + G∘Ȯ) − grad_L̇; a warp for each row.
template <class T>
__global__ void __launch_bounds__(128) attention_row_terms_kernel(const __grid_constant__ AttentionProblem problem,
                                                                  int64_t rows, RowTerms<Accumulator<T>>* to) {
    using Acc = Accumulator<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + warp_index();
    if (row >= rows) {
        return;
    }
    const int64_t flat = row / problem.queries;
    const int64_t query = row % problem.queries;
    const auto line = [&](const HeadedOperand& operand) {
        const HeadRows<T> rows(operand, problem.batch, flat / problem.heads, flat % problem.heads);
        return rows ? rows.at(query) : nullptr;
    };
    const T* const out = line(problem.primal.out);
    const T* const grad = line(problem.primal.grad);
    const T* const out_tangent = line(problem.tangent.out);
    const T* const grad_tangent = line(problem.tangent.grad);
    const auto product = [](const T* a, const T* b, int col) {
        return a != nullptr && b != nullptr ? static_cast<Acc>(to_float(a[col])) * static_cast<Acc>(to_float(b[col]))
                                            : Acc(0);
    };
    Acc delta = Acc(0);
    Acc delta_tangent = Acc(0);
    for (int col = lane_index(); col < problem.dv; col += kWarpSize) {
        delta += product(grad, out, col);
        delta_tangent += product(grad_tangent, out, col) + product(grad, out_tangent, col);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        delta += __shfl_xor_sync(kFullWarp, delta, distance);
        delta_tangent += __shfl_xor_sync(kFullWarp, delta_tangent, distance);
    }
    if (lane_index() == 0) {
        const auto given = [&](const double* rows) { return rows != nullptr ? rows[row] : 0.0; };
        const double lse = problem.primal.lse[row];
        const bool blind = lse == -std::numeric_limits<double>::infinity();
        to[row] = {blind ? Acc(0) : static_cast<Acc>(lse * kLog2E), static_cast<Acc>(given(problem.tangent.lse)),
                   delta - static_cast<Acc>(given(problem.primal.grad_lse)),
                   delta_tangent - static_cast<Acc>(given(problem.tangent.grad_lse))};
    }
}

// Where the results of attention_gradients_kernel go: dX and dY (or their tangents), and the scores' gradient.
template <class T>
struct GradientRows {
    T* x = nullptr;
    T* y = nullptr;
    Accumulator<T>* scores = nullptr;
};

enum class Own { queries, keys };

// X, Y, Ẋ, Ẏ of one head, of the own side or of the other.
template <class T>
struct GradientSide {
    HeadRows<T> x, x_tangent, y, y_tangent;
    bool tangents;

    __device__ __forceinline__ GradientSide(const AttentionProblem& problem, bool queries, bool tangents_,
                                            int64_t index, int64_t head)
        : x(queries ? problem.primal.q : problem.primal.k, problem.batch, index, head),
          x_tangent(queries ? problem.tangent.q : problem.tangent.k, problem.batch, index, head),
          y(queries ? problem.primal.grad : problem.primal.v, problem.batch, index, head),
          y_tangent(queries ? problem.tangent.grad : problem.tangent.v, problem.batch, index, head),
          tangents(tangents_) {}

    __device__ __forceinline__ bool has_x_tangent() const { return tangents && x_tangent; }
    __device__ __forceinline__ bool has_y_tangent() const { return tangents && y_tangent; }

    // Into four tiles that follow each other, in the order above.
    template <class Products, int Rows, int Threads>
    __device__ __forceinline__ void load(T* to, int member, int first, int rows, int d, int dv) const {
        const auto load_one = [&](const HeadRows<T>& from, bool there, int cols) {
            if (there) {
                load_tile<Products, Rows, Threads>(to, from.at(first, member), from.operand.row, rows - first, cols);
            }
            to += Rows * Products::kRowElements;
        };
        load_one(x, true, d);
        load_one(x_tangent, has_x_tangent(), d);
        load_one(y, true, dv);
        load_one(y_tangent, has_y_tangent(), dv);
    }
};

template <class Sizes, Own kOwn, bool kX, bool kY>
__global__ void __launch_bounds__(Sizes::kThreads)
    attention_gradients_kernel(const __grid_constant__ AttentionProblem problem, bool tangents,
                               const RowTerms<typename Sizes::Acc>* terms, GradientRows<typename Sizes::T> to) {
    using T = typename Sizes::T;
    using Products = typename Sizes::Products;
    using Acc = typename Sizes::Acc;
    using Terms = RowTerms<Acc>;
    constexpr int kD = Sizes::kD;
    constexpr int kM = Sizes::kM;
    constexpr int kN = Sizes::kN;
    constexpr int kInner = Sizes::kInner;
    constexpr int kInnerTiles = 4 * Sizes::kInnerTile;
    constexpr bool kQueries = kOwn == Own::queries;
    ONESTEP_DYNAMIC_SHARED(T, shared);
    T* const own_tiles = align_tiles<Products>(shared);
    T* const inner = own_tiles + 4 * Sizes::kOwnTile;
    Terms* const inner_terms = reinterpret_cast<Terms*>(inner + Sizes::kStages * kInnerTiles);

    const int group = static_cast<int>(problem.heads / problem.kv_heads);
    const int64_t own_heads = kQueries ? problem.heads : problem.kv_heads;
    const int64_t own_rows = kQueries ? problem.queries : problem.keys;
    const BlockPlace place(own_heads, own_rows, Sizes::kRows, kQueries && problem.causal);
    const int first = place.first_row;
    const int warp_row = warp_index() * 16 * kM;
    const int group_first = first + warp_row / Sizes::kGroupRows * Sizes::kGroupRows;
    const int group_last = group_first + Sizes::kGroupRows - 1;
    // The first query head that takes part, and the head of the other side that goes with it.
    const int64_t query_head = kQueries ? place.head : place.head * group;
    const int64_t other_head = kQueries ? place.head / group : query_head;
    const HeadScores<T> scores(problem, place.index, query_head);
    const int queries = static_cast<int>(problem.queries);
    const int keys = static_cast<int>(problem.keys);

    const GradientSide<T> own(problem, kQueries, tangents, place.index, place.head);
    own.template load<Products, Sizes::kRows, Sizes::kThreads>(own_tiles, 0, first, static_cast<int>(own_rows),
                                                               problem.d, problem.dv);
    const GradientSide<T> side(problem, !kQueries, tangents, place.index, other_head);

    // Blocks of the other side that have seen scores: [begin, end).
    int begin = 0;
    int end = 0;
    if constexpr (kQueries) {
        end = ceil_div(problem.causal ? min(keys, min(first + Sizes::kRows, queries)) : keys, kInner);
    } else {
        begin = problem.causal ? min(first, queries) / kInner : 0;
        end = problem.causal && first >= queries ? begin : ceil_div(queries, kInner);
    }
    const int blocks = end - begin;
    const int count = kQueries ? blocks : blocks * group;

    const auto load = [&](int step, int stage) {
        const int member = kQueries ? 0 : step / blocks;
        const int other = (begin + (kQueries ? step : step % blocks)) * kInner;
        side.template load<Products, kInner, Sizes::kThreads>(inner + stage * kInnerTiles, member, other,
                                                              kQueries ? keys : queries, problem.d, problem.dv);
        if constexpr (!kQueries) {
            constexpr int kChunks = static_cast<int>(sizeof(Terms)) / 16;
            const int64_t flat = place.index * problem.heads + query_head + member;
            const char* const from = reinterpret_cast<const char*>(terms + flat * queries + other);
            char* const into = reinterpret_cast<char*>(inner_terms + stage * kInner);
            for (int chunk = static_cast<int>(threadIdx.x); chunk < kInner * kChunks; chunk += Sizes::kThreads) {
                const bool there = other + chunk / kChunks < queries;
                cp_async<16>(into + 16 * chunk, there ? from + 16 * chunk : reinterpret_cast<const char*>(terms),
                             there ? 16 : 0);
            }
        }
    };

    const LanePlace lane;
    Terms own_terms[kM][2];
    if constexpr (kQueries) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + warp_row + 16 * m + lane.row + 8 * half;
                own_terms[m][half] = query < queries ? terms[place.flat * queries + query] : Terms{};
            }
        }
    }

    Acc x_grad[kM][kX ? kD / 8 : 1][4];
    Acc y_grad[kM][kY ? kD / 8 : 1][4];
    clear(x_grad);
    clear(y_grad);
    for_each_block<Sizes>(count, load, [&](int step, int stage) {
        const int member = kQueries ? 0 : step / blocks;
        const int other = (begin + (kQueries ? step : step % blocks)) * kInner;
        const int warp_first = first + warp_row;
        if (problem.causal && (kQueries ? other > group_last : other + kInner - 1 < group_first)) {
            return;
        }
        const T* const tiles = inner + stage * kInnerTiles;
        const T* const own_x_tangent = own.has_x_tangent() ? own_tiles + Sizes::kOwnTile : nullptr;
        const T* const own_y_tangent = own.has_y_tangent() ? own_tiles + 3 * Sizes::kOwnTile : nullptr;
        const T* const other_x = tiles;
        const T* const other_x_tangent = side.has_x_tangent() ? tiles + Sizes::kInnerTile : nullptr;
        const T* const other_y = tiles + 2 * Sizes::kInnerTile;
        const T* const other_y_tangent = side.has_y_tangent() ? tiles + 3 * Sizes::kInnerTile : nullptr;

        // P, Ṗ, dS and dṠ, at first the products that they are made of.
        Acc p[kM][kN][4];
        Acc p_tangent[kM][kN][4];
        Acc ds[kM][kN][4];
        Acc ds_tangent[kM][kN][4];
        clear(p);
        clear(p_tangent);
        clear(ds);
        clear(ds_tangent);
        Products::prepare(p, p_tangent, ds, ds_tangent);
        Products::template multiply_rows<kM, kN, Sizes::kRows, Sizes::kInner>(p, p_tangent, own_tiles, own_x_tangent,
                                                                              other_x, other_x_tangent, warp_row);
        Products::template multiply_rows<kM, kN, Sizes::kRows, Sizes::kInner>(
            ds, ds_tangent, own_tiles + 2 * Sizes::kOwnTile, own_y_tangent, other_y, other_y_tangent, warp_row);
        Products::finish(p, p_tangent, ds, ds_tangent);
        // One branch around all elements, so that they are computed beside each other.
        const auto each_element = [&](auto checked, auto with_tangents) {
            constexpr bool kChecked = decltype(checked)::value;
            constexpr bool kTangents = decltype(with_tangents)::value;
#pragma unroll
            for (int m = 0; m < kM; ++m) {
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        const int column = 8 * n + lane.col + odd;
                        Terms row;
                        if constexpr (!kQueries) {
                            row = inner_terms[stage * kInner + column];
                        }
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int at = 2 * half + odd;
                            const int own_row = warp_first + 16 * m + lane.row + 8 * half;
                            const int query = kQueries ? own_row : other + column;
                            const int key = kQueries ? other + column : own_row;
                            if constexpr (kQueries) {
                                row = own_terms[m][half];
                            }
                            const Acc weight = power_of_two(
                                scores.template exponent<kChecked>(p[m][n][at], query, key, row.lse2, member));
                            const Acc centred = ds[m][n][at] - row.delta;
                            p[m][n][at] = weight;
                            ds[m][n][at] = weight * centred;
                            if constexpr (kTangents) {
                                const Acc score =
                                    scores.template tangent<kChecked>(p_tangent[m][n][at], query, key, member);
                                const Acc weight_tangent = weight * (score - row.mean);
                                p_tangent[m][n][at] = weight_tangent;
                                ds_tangent[m][n][at] =
                                    weight_tangent * centred + weight * (ds_tangent[m][n][at] - row.delta_tangent);
                            } else {
                                p_tangent[m][n][at] = weight;
                                ds_tangent[m][n][at] = ds[m][n][at];
                            }
                            if constexpr (kChecked && kQueries && kX) {
                                // It is wanted for a mask alone, and with a mask all blocks are checked.
                                if (to.scores != nullptr && query < queries && key < keys) {
                                    to.scores[(place.flat * queries + query) * problem.keys + key] =
                                        ds_tangent[m][n][at];
                                }
                            }
                        }
                    }
                }
            }
        };
        const bool seen = kQueries ? scores.all_seen(warp_first, other, kInner)
                                   : other + kInner <= queries && scores.all_seen(other, warp_first, 16 * kM);
        if (seen) {
            if (tangents) {
                each_element(std::false_type(), std::true_type());
            } else {
                each_element(std::false_type(), std::false_type());
            }
        } else if (tangents) {
            each_element(std::true_type(), std::true_type());
        } else {
            each_element(std::true_type(), std::false_type());
        }
        if constexpr (kX) {
            Products::template multiply_weights<kM, kN, Sizes::kInner>(x_grad, ds_tangent, other_x, ds,
                                                                       other_x_tangent);
        }
        if constexpr (kY) {
            Products::template multiply_weights<kM, kN, Sizes::kInner>(y_grad, p_tangent, other_y, p, other_y_tangent);
        }
    });
    const int64_t row = first + warp_row;
    if constexpr (kX) {
        store_rows(x_grad, static_cast<Acc>(problem.scale), to.x + place.flat * own_rows * problem.d, row, own_rows,
                   problem.d);
    }
    if constexpr (kY) {
        store_rows(y_grad, Acc(1), to.y + place.flat * own_rows * problem.dv, row, own_rows, problem.dv);
    }
}

}  // namespace onestep::attention::cuda
