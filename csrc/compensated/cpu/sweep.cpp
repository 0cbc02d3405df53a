// The entry compensated_sweep: blocks of columns one after the other, threads over rows.
#include <type_traits>

#include "base/parallel.hpp"
#include "compensated/cpu/plan.hpp"

namespace onestep {
namespace {

// The most columns of a block.
template <class T>
int64_t widest_block(const SweepArgs<T>& args) {
    int64_t widest = 0;
    for (int64_t start = 0; start < args.columns; start = sweep_block_end(args, start)) {
        widest = std::max(widest, sweep_block_end(args, start) - start);
    }
    return widest;
}

// The score up to which the elements of a block are removed; below 0: none is.
template <class T>
T threshold_of(const SweepArgs<T>& args, int64_t start, int64_t end, T* scores) {
    const int64_t width = end - start;
    const int64_t removed = sweep_removed(args.rows * width, args.sparsity);
    if (removed == 0) {
        return T(-1);
    }
    for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t j = start; j < end; ++j) {
            const T ratio = args.w[row * args.columns + j] / args.u[j * args.columns + j];
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
    plan.right = plan.layout.template add<T>("right", widest * round_up(args.columns, plan.kernels->panel));
    plan.scores = plan.layout.template add<T>("scores", args.sparsity > 0.0 ? args.rows * widest : 0);
    plan.work = plan.own_layout.template add<T>("work", plan.kernels->sweep_work(widest));
    return plan;
}

template <class T>
Status run(const SweepPlan<T>& plan, const SweepArgs<T>& args, const Workspace& workspace) {
    const int64_t n = args.columns;
    std::fill_n(args.error, args.rows, 0.0);
    T* right = workspace.get(plan.right);
    T* scores = workspace.get(plan.scores);
    for (int64_t start = 0; start < n;) {
        const int64_t end = sweep_block_end(args, start);
        const int64_t depth = end - start;
        const T threshold = threshold_of(args, start, end, scores);
        plan.kernels->pack_right(args.u + start * n + end, n, depth, n - end, right);
        auto body = [&](int64_t piece) {
            const CachedWorkspace own(plan.own_layout);
            const Range rows = plan.pieces[piece];
            plan.kernels->sweep_block(args, rows.begin, rows.size(), start, end, threshold, right, own.get(plan.work));
        };
        const Status status =
            parallel_for(plan.pieces.pieces(), nanoseconds_of_products(kSweepRows * depth * (n - end + depth)), body);
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
