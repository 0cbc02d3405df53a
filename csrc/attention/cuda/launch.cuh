// Launches of the attention kernels for one element type and class of feature counts.
#pragma once

#include <algorithm>

#include "attention/cuda/forward.cuh"
#include "attention/cuda/gradients.cuh"
#include "attention/cuda/instances.hpp"

namespace onestep::attention::cuda {

// Block sizes for rows of up to D features: shared memory stays under the 163 KiB of compute capability 8.0.
template <class T, int D>
struct PlainSizes {
    static constexpr int kBytes = D * static_cast<int>(sizeof(T));
    using Forward = BlockSizes<Products<T, D>, 1, kBytes <= 512 ? 4 : 2,
                               kBytes <= 128   ? 64
                               : kBytes == 256 ? 32
                               : kBytes == 512 ? 16
                                               : 8,
                               2>;
    using Queries = BlockSizes<Products<T, D>, 1,
                               kBytes <= 256   ? 4
                               : kBytes == 512 ? 2
                                               : 1,
                               kBytes <= 256   ? 32
                               : kBytes == 512 ? 16
                                               : 8,
                               2>;
    using Keys = Queries;
    // The accumulators of both would not fit into registers.
    static constexpr bool kApart = D * static_cast<int>(sizeof(Accumulator<T>)) >= 1024;
};

inline Status attention_grid(int64_t heads, int64_t rows, int rows_each, dim3& grid) {
    const int64_t blocks = heads * ceil_div(rows, int64_t{rows_each});
    if (blocks > kMostBlocks) {
        return device_error("attention: more than 2^31 - 1 blocks");
    }
    grid = dim3(static_cast<unsigned>(blocks));
    return Status::ok;
}

// Sizes_ has the block sizes of the kernels: Forward (of O and of its tangent), Queries and Keys (of gradients), and
// whether the gradients of keys and values take launches of their own.
template <class Sizes_>
struct AttentionLaunches {
    using Forward = typename Sizes_::Forward;
    using Queries = typename Sizes_::Queries;
    using Keys = typename Sizes_::Keys;
    using T = typename Forward::T;
    using Terms = RowTerms<Accumulator<T>>;

    static Status forward(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
        dim3 grid;
        const Status status =
            attention_grid(problem.batch.count() * problem.heads, problem.queries, Forward::kRows, grid);
        return status != Status::ok
                   ? status
                   : launch(attention_forward_kernel<Forward>, grid, dim3(Forward::kThreads), kForwardBytes<Forward>,
                            stream, problem, static_cast<T*>(outputs.out), outputs.lse);
    }

    static Status jvp(const AttentionProblem& problem, const AttentionOutputs& outputs, cudaStream_t stream) {
        dim3 grid;
        const Status status =
            attention_grid(problem.batch.count() * problem.heads, problem.queries, Forward::kRows, grid);
        return status != Status::ok
                   ? status
                   : launch(attention_jvp_kernel<Forward>, grid, dim3(Forward::kThreads), kJvpBytes<Forward>, stream,
                            problem, static_cast<T*>(outputs.out), outputs.lse);
    }

    template <Own kOwn, bool kX, bool kY>
    static Status gradients_of(const AttentionProblem& problem, bool tangents, const Terms* terms,
                               const GradientRows<T>& to, cudaStream_t stream) {
        constexpr bool kQueries = kOwn == Own::queries;
        using Gradient = std::conditional_t<kQueries, Queries, Keys>;
        dim3 grid;
        const Status status = attention_grid(problem.batch.count() * (kQueries ? problem.heads : problem.kv_heads),
                                             kQueries ? problem.queries : problem.keys, Gradient::kRows, grid);
        return status != Status::ok
                   ? status
                   : launch(attention_gradients_kernel<Gradient, kOwn, kX, kY>, grid, dim3(Gradient::kThreads),
                            kGradientBytes<Gradient>, stream, problem, tangents, terms, to);
    }

    static Status gradients(const AttentionProblem& problem, bool tangents, const AttentionOutputs& outputs,
                            void* workspace, cudaStream_t stream) {
        auto* const terms = static_cast<Terms*>(workspace);
        const int64_t rows = problem.batch.count() * problem.heads * problem.queries;
        dim3 grid;
        Status status = attention_grid(1, rows, 4, grid);
        if (status == Status::ok) {
            status = launch(attention_row_terms_kernel<T>, grid, dim3(128), 0, stream, problem, rows, terms);
        }
        GradientRows<T> to;
        if (status == Status::ok && (outputs.q_grad != nullptr || outputs.score_grad != nullptr)) {
            to.x = static_cast<T*>(outputs.q_grad);
            to.scores = static_cast<Accumulator<T>*>(outputs.score_grad);
            status = gradients_of<Own::queries, true, false>(problem, tangents, terms, to, stream);
        }
        to.x = static_cast<T*>(outputs.k_grad);
        to.y = static_cast<T*>(outputs.v_grad);
        to.scores = nullptr;
        if constexpr (Sizes_::kApart) {
            if (status == Status::ok && to.x != nullptr) {
                status = gradients_of<Own::keys, true, false>(problem, tangents, terms, to, stream);
            }
            if (status == Status::ok && to.y != nullptr) {
                status = gradients_of<Own::keys, false, true>(problem, tangents, terms, to, stream);
            }
        } else if (status == Status::ok && to.x != nullptr) {
            status = gradients_of<Own::keys, true, true>(problem, tangents, terms, to, stream);
        }
        return status;
    }

    static constexpr AttentionInstance instance() {
        return {Forward::kD,
                std::max({kForwardBytes<Forward>, kJvpBytes<Forward>, kGradientBytes<Queries>, kGradientBytes<Keys>}),
                forward, jvp, gradients};
    }
};

}  // namespace onestep::attention::cuda
