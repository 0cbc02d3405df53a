// The entry compensated_sweep: blocks of columns one after the other, threads over rows. A block's changes go to the
// rest of its run of blocks at once, and to all columns behind the run when the run is done, so that W is read and
// written once a run.
#include <type_traits>

#include "base/parallel.hpp"
#include "compensated/cpu/plan.hpp"

namespace onestep {
namespace {

// Columns of a run, if a block is not longer.
constexpr int64_t kRunColumns = 256;
// Panels that a piece of work packs.
constexpr int64_t kPanels = 8;

// The most columns of a block.
template <class T>
int64_t widest_block(const SweepArgs<T>& args) {
    int64_t widest = 0;
    for (int64_t start = 0; start < args.columns; start = sweep_block_end(args, start)) {
        widest = std::max(widest, sweep_block_end(args, start) - start);
    }
    return widest;
}

// The end of the run that starts at a column. A grid is found from all columns of its group, which may lie behind the
// run: groups longer than a block begin a run.
template <class T>
int64_t run_end(const SweepArgs<T>& args, int64_t start) {
    const bool grids = args.bits > 0 && args.group == nullptr && args.group_size > kSweepBlock;
    int64_t end = sweep_block_end(args, start);
    while (end < args.columns && !(grids && end % args.group_size == 0)) {
        const int64_t next = sweep_block_end(args, end);
        if (next - start > kRunColumns) {
            break;
        }
        end = next;
    }
    return end;
}

// The score up to which the elements of a block are removed; below 0: none is.
template <class T>
T threshold_of(const SweepArgs<T>& args, const SweepMatrices<T>& matrices, int64_t start, int64_t end, T* scores) {
    const int64_t width = end - start;
    const int64_t removed = sweep_removed(args.rows * width, args.sparsity);
    if (removed == 0) {
        return T(-1);
    }
    for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t j = start; j < end; ++j) {
            const T ratio = matrices.w[row * matrices.ld + j] / args.factor[j * args.columns + j];
            scores[row * width + j - start] = ratio * ratio;
        }
    }
    std::nth_element(scores, scores + removed - 1, scores + args.rows * width);
    return scores[removed - 1];
}

}  // namespace

template <class T>
SweepPlan<T> plan(const SweepArgs<T>& args) {
    SweepPlan<T> plan;
    if constexpr (std::is_same_v<T, float>) {
        plan.kernels = &ONESTEP_KERNELS(compensated, f32);
    } else {
        plan.kernels = &ONESTEP_KERNELS(compensated, f64);
    }
    const int64_t widest = widest_block(args);
    plan.pieces = {args.rows, kSweepRows};
    plan.run_width = std::max(widest, std::min(kRunColumns, args.columns));
    // Rows that are a multiple of a page apart fall on the same sets of the cache.
    plan.ld = args.columns + (args.columns * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? plan.kernels->panel : 0);
    plan.w = plan.layout.template add<T>("w", args.rows * plan.ld);
    plan.diagonal = plan.layout.template add<T>("diagonal", widest * widest);
    plan.right = plan.layout.template add<T>("right", plan.run_width * round_up(args.columns, plan.kernels->panel));
    plan.changes = plan.layout.template add<T>("changes", plan.pieces.pieces() * plan.run_width * kSweepRows);
    plan.scores = plan.layout.template add<T>("scores", args.sparsity > 0.0 ? args.rows * widest : 0);
    plan.work = plan.own_layout.template add<T>("work", plan.kernels->sweep_work(widest));
    return plan;
}

template <class T>
Status run(const SweepPlan<T>& plan, const SweepArgs<T>& args, const Workspace& workspace) {
    const CompensatedKernels<T>& kernels = *plan.kernels;
    const int64_t n = args.columns;
    std::fill_n(args.error, args.rows, 0.0);
    T* right = workspace.get(plan.right);
    T* changes = workspace.get(plan.changes);
    T* scores = workspace.get(plan.scores);
    T* diagonal = workspace.get(plan.diagonal);
    const SweepMatrices<T> matrices{workspace.get(plan.w), plan.ld, diagonal};
    auto copy = [&](int64_t piece) {
        const Range rows = plan.pieces[piece];
        for (int64_t row = rows.begin; row < rows.end; ++row) {
            std::copy_n(args.w + row * n, n, matrices.w + row * plan.ld);
        }
    };
    const Status copied = parallel_for(
        plan.pieces.pieces(), nanoseconds_of_bytes(2 * kSweepRows * n * static_cast<int64_t>(sizeof(T))), copy);
    if (copied != Status::ok) {
        return copied;
    }
    int64_t run_start = 0;
    int64_t run_stop = 0;
    for (int64_t start = 0; start < n;) {
        const int64_t end = sweep_block_end(args, start);
        if (start == run_stop) {
            run_start = start;
            run_stop = run_end(args, start);
        }
        // The changes of this block go to the rest of the run; those of the whole run behind it.
        const int64_t first = end < run_stop ? start : run_start;
        const int64_t until = end < run_stop ? run_stop : n;
        const int64_t depth = end - first;
        const FixedCut packs{ceil_div(until - end, kernels.panel), kPanels};
        auto pack = [&](int64_t piece) {
            const Range columns{packs[piece].begin * kernels.panel,
                                std::min(until - end, packs[piece].end * kernels.panel)};
            kernels.pack_right(args.factor + first * n + end + columns.begin, n, depth, columns.size(),
                               right + columns.begin * depth);
        };
        Status status =
            parallel_for(packs.pieces(),
                         nanoseconds_of_bytes(kPanels * kernels.panel * depth * static_cast<int64_t>(sizeof(T))), pack);
        if (status != Status::ok) {
            return status;
        }
        for (int64_t j = start; j < end; ++j) {
            std::copy_n(args.factor + j * n + start, end - start, diagonal + (j - start) * (end - start));
        }
        const T threshold = threshold_of(args, matrices, start, end, scores);
        auto body = [&](int64_t piece) {
            const CachedWorkspace own(plan.own_layout);
            const Range rows = plan.pieces[piece];
            const SweepChanges<T> spread{changes + piece * plan.run_width * kSweepRows,
                                         plan.run_width,
                                         start - run_start,
                                         first - run_start,
                                         depth,
                                         until,
                                         right};
            kernels.sweep_block(args, rows.begin, rows.size(), start, end, threshold, matrices, spread,
                                own.get(plan.work));
        };
        status = parallel_for(
            plan.pieces.pieces(),
            nanoseconds_of_products(kSweepRows * (depth * (until - end) + (end - start) * (end - start))), body);
        if (status != Status::ok) {
            return status;
        }
        start = end;
    }
    return Status::ok;
}

template <class T>
Status compensated_sweep(const SweepArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                       \
    template SweepPlan<T> plan(const SweepArgs<T>&);                                 \
    template Status run(const SweepPlan<T>&, const SweepArgs<T>&, const Workspace&); \
    template Status compensated_sweep(const SweepArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
