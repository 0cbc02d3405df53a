// Cholesky factors of matrices that no block holds: blocks of 64 columns, from left to right, a launch for each.
//
// A thread block has the 64 × 64 block on the diagonal and one of those below it, as one matrix of 128 × 64: it
// subtracts the products with all columns to the left by tensor cores (panel_gram.cuh: rows of U are the rows of X),
// then factors it by panels (panels.cuh). So the block on the diagonal is factored as often as there are blocks below;
// nobody waits for it.
#pragma once

#include "normal/cuda/panel_gram.cuh"
#include "normal/cuda/panels.cuh"

namespace onestep::normal::cuda {

inline constexpr int kBlockColumns = 64;
using BlockedShape = PanelShape<2 * kBlockColumns, 4, 1, kBlockColumns>;

// Where a thread block is: columns [first, first + cols), and rows [below, below + rows) beside those on the diagonal.
struct BlockedPlace {
    int64_t problem;
    int first, cols;
    int below, rows;
    bool writes_diagonal;

    __device__ BlockedPlace(int64_t index, int step, int d) {
        const int first_ = step * kBlockColumns;
        const int blocks_below = ceil_div(d - first_, kBlockColumns) - 1;
        const int per_problem = blocks_below > 1 ? blocks_below : 1;
        problem = index / per_problem;
        const int block = static_cast<int>(index % per_problem);
        first = first_;
        cols = d - first < kBlockColumns ? d - first : kBlockColumns;
        below = first + (block + 1) * kBlockColumns;
        rows = d - below < kBlockColumns ? d - below : kBlockColumns;
        rows = rows < 0 ? 0 : rows;
        writes_diagonal = block == 0;
    }
};

// Begins to bring rows [row, row + count) and `cols` columns from `first` of A to rows of shared memory from `to_row`;
// zeros to the next multiple of eight in both directions.
__device__ __forceinline__ void load_block(const Matrix<const float>& a, int row, int count, int first, int cols,
                                           int to_row, float* shared) {
    const int thread = static_cast<int>(threadIdx.x);
    const int all = ceil_div(count, kPanel) * kPanel * kBlockColumns;
    const bool by_columns = a.row == 1 && a.col != 1;
#pragma unroll 4
    for (int at = thread; at < all; at += BlockedShape::threads) {
        const int down = ceil_div(count, kPanel) * kPanel;
        const int r = by_columns ? at % down : at / kBlockColumns;
        const int c = by_columns ? at / down : at % kBlockColumns;
        if (to_row + r < c / kPanel * kPanel) {
            continue;
        }
        const bool inside = r < count && c < cols;
        cp_async<4>(shared + BlockedShape::panel(c / kPanel) + (to_row + r) * kPanelPitch + c % kPanel,
                    inside ? a.data + (row + r) * a.row + (first + c) * a.col : a.data, inside ? 4 : 0);
    }
}

// Begins to bring kGramRows rows of U from `begin` on, of the columns that the block has.
__device__ __forceinline__ void load_factor_rows(const float* u, int d, const BlockedPlace& place, int64_t begin,
                                                 float* stage) {
    using Stage = GramStage<BlockedShape>;
    const int thread = static_cast<int>(threadIdx.x);
    if (d % kVector<float> == 0) {
        constexpr int kAcross = BlockedShape::order / kVector<float>;
        constexpr int kDown = BlockedShape::threads / kAcross;
        const int first = thread / kAcross;
        const int c = thread % kAcross * kVector<float>;
        const int col = c < kBlockColumns ? place.first + c : place.below + c - kBlockColumns;
        const float* from = u + (begin + first) * d + col;
#pragma unroll
        for (int r = 0; r < kGramRows; r += kDown) {
            cp_async<16>(stage + (first + r) * Stage::pitch + c, col < d ? from : u, col < d ? 16 : 0);
            from += kDown * d;
        }
        return;
    }
    // A column for each thread.
    const int col = thread < kBlockColumns ? place.first + thread : place.below + thread - kBlockColumns;
    const float* from = u + begin * d + col;
#pragma unroll
    for (int r = 0; r < kGramRows; ++r) {
        cp_async<4>(stage + r * Stage::pitch + thread, col < d ? from : u, col < d ? 4 : 0);
        from += d;
    }
}

__global__ void __launch_bounds__(BlockedShape::threads, 3)
    blocked_step_kernel(const CholeskyArgs args, int64_t count, int step) {
    using Shape = BlockedShape;
    ONESTEP_DYNAMIC_SHARED(float, shared);
    const int thread = static_cast<int>(threadIdx.x);
    const int warp = thread / kWarpSize;
    const int d = static_cast<int>(args.d);
    for (int64_t index = static_cast<int64_t>(blockIdx.x); index < count; index += static_cast<int64_t>(gridDim.x)) {
        const BlockedPlace place(index, step, d);
        const Matrix<const float> a = args.a.at(args.batch, place.problem);
        float* const u = args.factor + place.problem * d * d;
        load_block(a, place.first, place.cols, place.first, place.cols, 0, shared);
        load_block(a, place.below, place.rows, place.first, place.cols, kBlockColumns, shared);
        cp_async_commit();

        GramSums<Shape> sums = {};
        const auto load = [&](int64_t stage, float* to) { load_factor_rows(u, d, place, stage * kGramRows, to); };
        sum_stages<false>(place.first / kGramRows, warp, place.rows > 0 ? Shape::order : kBlockColumns,
                          shared + Shape::floats, load, sums);
        each_pair(sums, warp, shared, [](float* to, float2 pair) {
            float2* const at = reinterpret_cast<float2*>(to);
            *at = make_float2(at->x - pair.x, at->y - pair.y);
        });
        if (thread < kBlockColumns) {
            float floor = 0.0f;
            if (thread < place.cols) {
                const int64_t row = place.first + thread;
                floor = pivot_floor(a.data[row * (a.row + a.col)], args.singular_epsilons);
            }
            shared[Shape::floors_at + thread] = floor;
        }
        panel_barrier<Shape::warps>();
        if (thread >= place.cols && thread < kBlockColumns) {
            shared[Shape::panel(thread / kPanel) + thread * kPanelPitch + thread % kPanel] = 1.0f;
        }
        panel_barrier<Shape::warps>();

        float z[Shape::rows][Shape::columns] = {};
        const int panels = ceil_div(place.cols, kPanel);
        const int last = (place.rows > 0 ? kBlockColumns + ceil_div(place.rows, kPanel) * kPanel : panels * kPanel) - 1;
        const int failed = first_failure<Shape>(shared, last, factor_panels<Shape>(shared, panels, last, z));
        float* const block = u + static_cast<int64_t>(place.first) * d;
        if (place.writes_diagonal) {
            write_factor<Shape>(shared, panels, 0, place.cols, false, block + place.first, d);
            if (thread == 0 && (step == 0 || (failed != 0 && args.info[place.problem] == 0))) {
                args.info[place.problem] = failed != 0 ? place.first + failed : 0;
            }
        }
        write_factor<Shape>(shared, panels, kBlockColumns, kBlockColumns + place.rows, false, block + place.below, d);
        for (int at = thread; at < place.rows * kBlockColumns; at += Shape::threads) {
            u[static_cast<int64_t>(place.below + at / kBlockColumns) * d + place.first + at % kBlockColumns] = 0.0f;
        }
        panel_barrier<Shape::warps>();
    }
}

// NaN where the factorisation failed.
__global__ void __launch_bounds__(256) blocked_failed_kernel(const CholeskyArgs args, int64_t count) {
    for (int64_t problem = static_cast<int64_t>(blockIdx.x); problem < count;
         problem += static_cast<int64_t>(gridDim.x)) {
        if (args.info[problem] == 0) {
            continue;
        }
        float* const u = args.factor + problem * args.d * args.d;
        for (int64_t at = static_cast<int64_t>(threadIdx.x); at < args.d * args.d; at += 256) {
            u[at] = quiet_nan<float>();
        }
    }
}

}  // namespace onestep::normal::cuda
