// O and L, and their tangents: a block owns rows of queries, keys pass by.
#pragma once

#include "attention/cuda/blocks.cuh"

namespace onestep::attention::cuda {

template <class Sizes>
inline constexpr int64_t kAlignmentBytes = Sizes::Products::kAlignment <= 128 ? 0 : Sizes::Products::kAlignment;

template <class Sizes>
inline constexpr int64_t kForwardBytes =
    kAlignmentBytes<Sizes> +
    int64_t{sizeof(typename Sizes::T)} * (Sizes::kOwnTile + Sizes::kStages * 2 * Sizes::kInnerTile);

template <class Sizes>
inline constexpr int64_t kJvpBytes =
    kAlignmentBytes<Sizes> +
    int64_t{sizeof(typename Sizes::T)} * (2 * Sizes::kOwnTile + Sizes::kStages * 4 * Sizes::kInnerTile);

// Calls step(i, stage) for i in [0, count), each with the tiles that load(i, stage) asked for. The first load may
// follow other copies of the same group.
template <class Sizes, class Load, class Step>
__device__ __forceinline__ void for_each_block(int count, const Load& load, const Step& step) {
    constexpr int Stages = Sizes::kStages;
    if (count > 0) {
        load(0, 0);
    }
    cp_async_commit();
    for (int i = 0; i < count; ++i) {
        const int stage = Stages == 2 ? i % 2 : 0;
        if (Stages == 2) {
            if (i + 1 < count) {
                load(i + 1, 1 - stage);
            }
            cp_async_commit();
            cp_async_wait<1>();
        } else {
            cp_async_wait<0>();
        }
        Sizes::Products::publish();
        __syncthreads();
        step(i, stage);
        __syncthreads();
        if (Stages == 1 && i + 1 < count) {
            load(i + 1, 0);
            cp_async_commit();
        }
    }
    cp_async_wait<0>();
}

// S − max, softmax and PV in one pass, rescaled where the maximum rises (Milakov and Gimelshein, 2018).
template <class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads)
    attention_forward_kernel(const __grid_constant__ AttentionProblem problem, typename Sizes::T* out, double* lse) {
    using T = typename Sizes::T;
    using Products = typename Sizes::Products;
    using Acc = typename Sizes::Acc;
    constexpr int kD = Sizes::kD;
    constexpr int kM = Sizes::kM;
    constexpr int kN = Sizes::kN;
    constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
    ONESTEP_DYNAMIC_SHARED(T, shared);
    T* const q_tile = align_tiles<Products>(shared);
    T* const inner = q_tile + Sizes::kOwnTile;

    const BlockPlace place(problem.heads, problem.queries, Sizes::kRows, problem.causal);
    const int64_t kv_head = place.head / (problem.heads / problem.kv_heads);
    const HeadRows<T> q(problem.primal.q, problem.batch, place.index, place.head);
    const HeadRows<T> k(problem.primal.k, problem.batch, place.index, kv_head);
    const HeadRows<T> v(problem.primal.v, problem.batch, place.index, kv_head);
    const HeadScores<T> scores(problem, place.index, place.head);
    const int first = place.first_row;
    const int warp_row = warp_index() * 16 * kM;
    const int group_last = first + warp_row / Sizes::kGroupRows * Sizes::kGroupRows + Sizes::kGroupRows - 1;

    load_tile<Products, Sizes::kRows, Sizes::kThreads>(q_tile, q.at(first), q.operand.row, scores.queries - first,
                                                       problem.d);
    const auto load = [&](int block, int stage) {
        const int key = block * Sizes::kInner;
        T* const to = inner + stage * 2 * Sizes::kInnerTile;
        load_tile<Products, Sizes::kInner, Sizes::kThreads>(to, k.at(key), k.operand.row, scores.keys - key, problem.d);
        load_tile<Products, Sizes::kInner, Sizes::kThreads>(to + Sizes::kInnerTile, v.at(key), v.operand.row,
                                                            scores.keys - key, problem.dv);
    };

    Acc acc[kM][kD / 8][4];
    clear(acc);
    Acc most[kM][2];
    Acc total[kM][2];
    for (int m = 0; m < kM; ++m) {
        most[m][0] = most[m][1] = -kInfinity;
        total[m][0] = total[m][1] = Acc(0);
    }
    const LanePlace lane;
    const int count = ceil_div(scores.keys_before(min(first + Sizes::kRows, scores.queries)), Sizes::kInner);
    for_each_block<Sizes>(count, load, [&](int block, int stage) {
        const int key = block * Sizes::kInner;
        if (scores.causal && key > group_last) {
            return;
        }
        const T* const k_tile = inner + stage * 2 * Sizes::kInnerTile;
        const T* const no_tile = nullptr;
        Acc weights[kM][kN][4];
        Acc unused[kM][kN][4];
        clear(weights);
        clear(unused);
        Products::prepare(weights, unused);
        Products::template multiply_rows<kM, kN, Sizes::kRows, Sizes::kInner>(weights, unused, q_tile, no_tile, k_tile,
                                                                              no_tile, warp_row);
        Products::finish(weights, unused);
        const bool seen = scores.all_seen(first + warp_row, key, Sizes::kInner);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + warp_row + 16 * m + lane.row + 8 * half;
                Acc highest = most[m][half];
                const auto each_score = [&](auto checked) {
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
#pragma unroll
                        for (int odd = 0; odd < 2; ++odd) {
                            Acc& score = weights[m][n][2 * half + odd];
                            score = scores.template exponent<decltype(checked)::value>(
                                score, query, key + 8 * n + lane.col + odd, Acc(0));
                            highest = max(highest, score);
                        }
                    }
                };
                // One branch around all elements, so that they are computed beside each other.
                if (seen) {
                    each_score(std::false_type());
                } else {
                    each_score(std::true_type());
                }
                highest = max_of_row(highest);
                const Acc reference = highest == -kInfinity ? Acc(0) : highest;
                const Acc shrink = power_of_two(most[m][half] - reference);
                most[m][half] = highest;
                Acc sum = Acc(0);
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        Acc& weight = weights[m][n][2 * half + odd];
                        weight = power_of_two(weight - reference);
                        sum += weight;
                    }
                }
                total[m][half] = total[m][half] * shrink + sum;
#pragma unroll
                for (int j = 0; j < kD / 8; ++j) {
                    acc[m][j][2 * half] *= shrink;
                    acc[m][j][2 * half + 1] *= shrink;
                }
            }
        }
        Products::template multiply_weights<kM, kN, Sizes::kInner>(acc, weights, k_tile + Sizes::kInnerTile, unused,
                                                                   no_tile);
    });

#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Acc sum = sum_of_row(total[m][half]);
            const Acc factor = sum == Acc(0) ? Acc(0) : Acc(1) / sum;
#pragma unroll
            for (int j = 0; j < kD / 8; ++j) {
                acc[m][j][2 * half] *= factor;
                acc[m][j][2 * half + 1] *= factor;
            }
            const int query = first + warp_row + 16 * m + lane.row + 8 * half;
            if (lane.col == 0 && query < scores.queries) {
                lse[place.flat * problem.queries + query] =
                    sum == Acc(0) ? -std::numeric_limits<double>::infinity()
                                  : static_cast<double>(most[m][half]) * kLn2 + log(static_cast<double>(sum));
            }
        }
    }
    store_rows(acc, Acc(1), out + place.flat * problem.queries * problem.dv, first + warp_row, problem.queries,
               problem.dv);
}

// Ȯ = Σⱼ Pⱼ(Ṡⱼ − c)Vⱼ + Σⱼ PⱼV̇ⱼ − (L̇ − c)O for any c: with one near L̇, neither the rounding of the weights nor that
// of O is multiplied by what all of a row's Ṡ have in common. c is the mean of Ṡ over the first keys.
template <class Sizes>
__global__ void __launch_bounds__(Sizes::kThreads)
    attention_jvp_kernel(const __grid_constant__ AttentionProblem problem, typename Sizes::T* out, double* lse) {
    using T = typename Sizes::T;
    using Products = typename Sizes::Products;
    using Acc = typename Sizes::Acc;
    constexpr int kD = Sizes::kD;
    constexpr int kM = Sizes::kM;
    constexpr int kN = Sizes::kN;
    ONESTEP_DYNAMIC_SHARED(T, shared);
    T* const q_tile = align_tiles<Products>(shared);
    T* const inner = q_tile + 2 * Sizes::kOwnTile;

    const BatchShape& batch = problem.batch;
    const BlockPlace place(problem.heads, problem.queries, Sizes::kRows, problem.causal);
    const int64_t kv_head = place.head / (problem.heads / problem.kv_heads);
    const HeadRows<T> q(problem.primal.q, batch, place.index, place.head);
    const HeadRows<T> k(problem.primal.k, batch, place.index, kv_head);
    const HeadRows<T> v(problem.primal.v, batch, place.index, kv_head);
    const HeadRows<T> q_tangent(problem.tangent.q, batch, place.index, place.head);
    const HeadRows<T> k_tangent(problem.tangent.k, batch, place.index, kv_head);
    const HeadRows<T> v_tangent(problem.tangent.v, batch, place.index, kv_head);
    const HeadScores<T> scores(problem, place.index, place.head);
    const int first = place.first_row;
    const int warp_row = warp_index() * 16 * kM;
    const int group_last = first + warp_row / Sizes::kGroupRows * Sizes::kGroupRows + Sizes::kGroupRows - 1;

    const auto load_own = [&](const HeadRows<T>& from, T* to) {
        if (from) {
            load_tile<Products, Sizes::kRows, Sizes::kThreads>(to, from.at(first), from.operand.row,
                                                               scores.queries - first, problem.d);
        }
    };
    load_own(q, q_tile);
    load_own(q_tangent, q_tile + Sizes::kOwnTile);
    const auto load = [&](int block, int stage) {
        const int key = block * Sizes::kInner;
        T* to = inner + stage * 4 * Sizes::kInnerTile;
        const auto load_inner = [&](const HeadRows<T>& from, int cols) {
            if (from) {
                load_tile<Products, Sizes::kInner, Sizes::kThreads>(to, from.at(key), from.operand.row,
                                                                    scores.keys - key, cols);
            }
            to += Sizes::kInnerTile;
        };
        load_inner(k, problem.d);
        load_inner(k_tangent, problem.d);
        load_inner(v, problem.dv);
        load_inner(v_tangent, problem.dv);
    };

    const LanePlace lane;
    Acc lse2[kM][2];
    Acc shift[kM][2];
    Acc mean[kM][2];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + warp_row + 16 * m + lane.row + 8 * half;
            const double given =
                query < scores.queries ? problem.primal.lse[place.flat * problem.queries + query] : 0.0;
            lse2[m][half] =
                given == -std::numeric_limits<double>::infinity() ? Acc(0) : static_cast<Acc>(given * kLog2E);
            shift[m][half] = mean[m][half] = Acc(0);
        }
    }
    Acc acc[kM][kD / 8][4];
    clear(acc);
    const int count = ceil_div(scores.keys_before(min(first + Sizes::kRows, scores.queries)), Sizes::kInner);
    for_each_block<Sizes>(count, load, [&](int block, int stage) {
        const int key = block * Sizes::kInner;
        if (scores.causal && key > group_last) {
            return;
        }
        const T* const k_tile = inner + stage * 4 * Sizes::kInnerTile;
        const T* const k_tangent_tile = k_tile + Sizes::kInnerTile;
        const T* const v_tile = k_tile + 2 * Sizes::kInnerTile;
        const T* const v_tangent_tile = k_tile + 3 * Sizes::kInnerTile;
        Acc p[kM][kN][4];
        Acc weights[kM][kN][4];
        clear(p);
        clear(weights);
        Products::prepare(p, weights);
        Products::template multiply_rows<kM, kN, Sizes::kRows, Sizes::kInner>(
            p, weights, q_tile, q_tangent ? q_tile + Sizes::kOwnTile : nullptr, k_tile,
            k_tangent ? k_tangent_tile : nullptr, warp_row);
        Products::finish(p, weights);
        const bool seen = scores.all_seen(first + warp_row, key, Sizes::kInner);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int query = first + warp_row + 16 * m + lane.row + 8 * half;
                const auto each_score = [&](auto checked) {
                    constexpr bool kChecked = decltype(checked)::value;
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
#pragma unroll
                        for (int odd = 0; odd < 2; ++odd) {
                            const int at = 2 * half + odd;
                            const int other = key + 8 * n + lane.col + odd;
                            p[m][n][at] = power_of_two(
                                scores.template exponent<kChecked>(p[m][n][at], query, other, lse2[m][half]));
                            weights[m][n][at] = scores.template tangent<kChecked>(weights[m][n][at], query, other);
                        }
                    }
                };
                if (seen) {
                    each_score(std::false_type());
                } else {
                    each_score(std::true_type());
                }
                if (block == 0) {
                    Acc sum = Acc(0);
                    Acc weighed = Acc(0);
#pragma unroll
                    for (int n = 0; n < kN; ++n) {
#pragma unroll
                        for (int odd = 0; odd < 2; ++odd) {
                            sum += p[m][n][2 * half + odd];
                            weighed += p[m][n][2 * half + odd] * weights[m][n][2 * half + odd];
                        }
                    }
                    sum = sum_of_row(sum);
                    weighed = sum_of_row(weighed);
                    shift[m][half] = sum > Acc(0) ? weighed / sum : Acc(0);
                }
#pragma unroll
                for (int n = 0; n < kN; ++n) {
#pragma unroll
                    for (int odd = 0; odd < 2; ++odd) {
                        Acc& weight = weights[m][n][2 * half + odd];
                        weight = p[m][n][2 * half + odd] * (weight - shift[m][half]);
                        mean[m][half] += weight;
                    }
                }
            }
        }
        Products::template multiply_weights<kM, kN, Sizes::kInner>(acc, weights, v_tile, p,
                                                                   v_tangent ? v_tangent_tile : nullptr);
    });

    const HeadRows<T> primal_out(problem.primal.out, batch, place.index, place.head);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int query = first + warp_row + 16 * m + lane.row + 8 * half;
            const Acc rest = sum_of_row(mean[m][half]);
            if (query >= scores.queries) {
                continue;
            }
            const int64_t flat = place.flat * problem.queries + query;
            if (lane.col == 0 && lse != nullptr) {
                const bool blind = problem.primal.lse[flat] == -std::numeric_limits<double>::infinity();
                lse[flat] = blind ? 0.0 : static_cast<double>(rest) + static_cast<double>(shift[m][half]);
            }
            const T* const line = primal_out.at(query);
#pragma unroll
            for (int j = 0; j < kD / 8; ++j) {
                const int col = 8 * j + lane.col;
                if (col < problem.dv) {
                    acc[m][j][2 * half] -= rest * static_cast<Acc>(to_float(line[col]));
                    acc[m][j][2 * half + 1] -= rest * static_cast<Acc>(to_float(line[col + 1]));
                }
            }
        }
    }
    store_rows(acc, Acc(1), out + place.flat * problem.queries * problem.dv, first + warp_row, problem.queries,
               problem.dv);
}

}  // namespace onestep::attention::cuda
