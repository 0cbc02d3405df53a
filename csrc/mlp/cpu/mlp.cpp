// The entries mlp_gradient, mlp_product and mlp_jacobian. Rows are cut into pieces for threads, and pieces into blocks.
#include "mlp/mlp.hpp"

#include <algorithm>
#include <type_traits>

#include "base/parallel.hpp"
#include "base/reduce.hpp"
#include "base/target.hpp"
#include "mlp/cpu/plan.hpp"

namespace onestep {
namespace {

// Bytes of work memory of a block of rows; it stays in the second-level cache.
constexpr int64_t kBlockBytes = int64_t{192} << 10;
// The most rows of a block.
constexpr int64_t kMostBlockRows = 1024;
// The most pieces.
constexpr int64_t kMostPieces = 16;
// Partial results of all pieces take at most this much memory; there are fewer pieces if need be.
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

template <class T>
const MlpKernels<T>& active_kernels() {
    if constexpr (std::is_same_v<T, double>) {
        return ONESTEP_KERNELS(mlp, f64);
    } else {
        return ONESTEP_KERNELS(mlp, f32);
    }
}

// `result_size` elements are summed over the rows.
template <class T>
MlpPlan<T> plan_for(const MlpArgs<T>& network, int64_t result_size, bool has_direction) {
    MlpPlan<T> plan;
    plan.kernels = &active_kernels<T>();
    const MlpKernels<T>& kernels = *plan.kernels;
    const int64_t panel_bytes =
        kernels.work(network.layers, network.count, kernels.panel) * static_cast<int64_t>(sizeof(T));
    const int64_t panels = std::clamp(kBlockBytes / panel_bytes, int64_t{1}, kMostBlockRows / kernels.panel);
    plan.blocks = {network.n, panels * kernels.panel};
    const int64_t affordable = results_within(kMostPartialBytes, network.size() * static_cast<int64_t>(sizeof(T)));
    plan.pieces = {plan.blocks.pieces(), std::min({kMostPieces, affordable, plan.blocks.pieces()})};
    plan.result_size = result_size;
    plan.row_nanoseconds = nanoseconds_of_products(4 * network.size());
    const int64_t packed_size = kernels.packed_size(network.layers, network.count);
    plan.packed = plan.layout.template add<T>("packed", packed_size);
    plan.direction = plan.layout.template add<T>("direction", has_direction ? packed_size : 0);
    plan.partial = plan.layout.template add<T>("partial", plan.pieces.pieces * result_size);
    plan.losses = plan.layout.template add<double>("losses", plan.pieces.pieces);
    plan.work = plan.own_layout.template add<T>("work", kernels.work(network.layers, network.count, plan.blocks.size));
    return plan;
}

template <class T>
MlpNetwork<T> pack(const MlpPlan<T>& plan, const MlpArgs<T>& args, const Matrix<const T>& y, const Part<T>& part,
                   const Workspace& workspace) {
    MlpNetwork<T> network{args.layers, args.count, args.x, y, args.parameters, nullptr};
    // Whole tiles are read, of which packing may leave the last elements alone.
    T* packed = workspace.zeroed(part);
    plan.kernels->pack(network, packed);
    network.packed = packed;
    return network;
}

// result (unless null) = Σ over all blocks of what rows(begin, count, partial result, work) adds; loss (unless null)
// the sum of what that returns.
template <class T, class Rows>
Status sum_over_rows(const MlpPlan<T>& plan, T* result, double* loss, const Workspace& workspace, const Rows& rows) {
    T* partial = workspace.zeroed(plan.partial);
    double* losses = workspace.zeroed(plan.losses);
    const int64_t size = plan.result_size;
    const int64_t pieces = plan.pieces.pieces;
    auto piece_rows = [&](int64_t piece) {
        const CachedWorkspace own(plan.own_layout);
        const WorkMemory<T> work = own.work(plan.work);
        T* to = result == nullptr ? nullptr : partial + piece * size;
        const Range blocks = plan.pieces.spread(piece);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            const Range range = plan.blocks[block];
            losses[piece] += rows(range.begin, range.size(), to, work);
        }
    };
    const Status status =
        parallel_for(pieces, plan.blocks.count * plan.row_nanoseconds / std::max<int64_t>(pieces, 1), piece_rows);
    if (status != Status::ok) {
        return status;
    }
    if (loss != nullptr) {
        sum_pieces<double>(losses, pieces, 1, 0, 1, [&](int64_t, double sum) { *loss = sum; });
    }
    if (result != nullptr) {
        sum_pieces<double>(partial, pieces, size, 0, size,
                           [&](int64_t at, double sum) { result[at] = static_cast<T>(sum); });
    }
    return Status::ok;
}

}  // namespace

template <class T>
MlpPlan<T> plan(const MlpGradientArgs<T>& args) {
    return plan_for(args.network, args.gradient != nullptr ? args.network.size() : 0, false);
}

template <class T>
MlpPlan<T> plan(const MlpProductArgs<T>& args) {
    return plan_for(args.network, args.network.size(), args.v != nullptr);
}

template <class T>
MlpPlan<T> plan(const MlpJacobianArgs<T>& args) {
    return plan_for(args.network, 0, false);
}

template <class T>
Status run(const MlpPlan<T>& plan, const MlpGradientArgs<T>& args, const Workspace& workspace) {
    const MlpNetwork<T> network = pack(plan, args.network, args.y, plan.packed, workspace);
    return sum_over_rows(plan, args.gradient, args.loss, workspace,
                         [&](int64_t begin, int64_t rows, T* gradient, const WorkMemory<T>& work) {
                             return plan.kernels->gradient(network, begin, rows, gradient, work);
                         });
}

template <class T>
Status run(const MlpPlan<T>& plan, const MlpProductArgs<T>& args, const Workspace& workspace) {
    const MlpNetwork<T> network = pack(plan, args.network, {}, plan.packed, workspace);
    if (args.v == nullptr) {
        return sum_over_rows(plan, args.product, nullptr, workspace,
                             [&](int64_t begin, int64_t rows, T* diagonal, const WorkMemory<T>& work) {
                                 plan.kernels->diagonal(network, begin, rows, diagonal, work);
                                 return 0.0;
                             });
    }
    MlpArgs<T> along = args.network;
    along.parameters = args.v;
    const MlpNetwork<T> direction = pack(plan, along, {}, plan.direction, workspace);
    return sum_over_rows(plan, args.product, nullptr, workspace,
                         [&](int64_t begin, int64_t rows, T* product, const WorkMemory<T>& work) {
                             plan.kernels->product(network, direction, begin, rows, product, work);
                             return 0.0;
                         });
}

template <class T>
Status run(const MlpPlan<T>& plan, const MlpJacobianArgs<T>& args, const Workspace& workspace) {
    const MlpNetwork<T> network = pack(plan, args.network, {}, plan.packed, workspace);
    auto body = [&](int64_t block) {
        const CachedWorkspace own(plan.own_layout);
        const Range rows = plan.blocks[block];
        plan.kernels->jacobian(network, rows.begin, rows.size(), args.scale, args.jacobian, own.work(plan.work));
    };
    return parallel_for(plan.blocks.pieces(), plan.blocks.size * args.network.outputs() * plan.row_nanoseconds, body);
}

template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args) {
    return run_cached(args);
}

template <class T>
Status mlp_product(const MlpProductArgs<T>& args) {
    return run_cached(args);
}

template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                           \
    template MlpPlan<T> plan(const MlpGradientArgs<T>&);                                 \
    template MlpPlan<T> plan(const MlpProductArgs<T>&);                                  \
    template MlpPlan<T> plan(const MlpJacobianArgs<T>&);                                 \
    template Status run(const MlpPlan<T>&, const MlpGradientArgs<T>&, const Workspace&); \
    template Status run(const MlpPlan<T>&, const MlpProductArgs<T>&, const Workspace&);  \
    template Status run(const MlpPlan<T>&, const MlpJacobianArgs<T>&, const Workspace&); \
    template Status mlp_gradient(const MlpGradientArgs<T>&);                             \
    template Status mlp_product(const MlpProductArgs<T>&);                               \
    template Status mlp_jacobian(const MlpJacobianArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
