// The entries glm_point and glm_product: for few columns by pieces of rows, for many by chunks.
#include "glm/glm.hpp"

#include <algorithm>
#include <type_traits>

#include "base/checks.hpp"
#include "base/parallel.hpp"
#include "base/reduce.hpp"
#include "base/target.hpp"
#include "glm/cpu/plan.hpp"

namespace onestep {
namespace {

// Few columns. Rows are cut into about this many pieces.
constexpr int64_t kPieces = 64;
// A piece has at least this many rows,
constexpr int64_t kLeastRows = 256;
// and at most this many.
constexpr int64_t kMostRows = 4096;
// Partial results of all pieces take at most this much memory; there are fewer pieces if need be.
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;
// Elements of the result that one piece of the final sum adds up.
constexpr int64_t kSumElements = 4096;

// Many columns. A chunk has the rows whose XV takes this many bytes,
constexpr int64_t kChunkBytes = int64_t{8} << 20;
// but at most this many rows.
constexpr int64_t kMostChunkRows = 1024;
// For XᵀZ, X's columns are cut into about this many blocks.
constexpr int64_t kBlocks = 16;
// A block has at most this many columns.
constexpr int64_t kMostBlockColumns = 96;

template <class X, class T>
const GlmKernels<X, T>& active_kernels() {
    if constexpr (std::is_same_v<X, BFloat16>) {
        return ONESTEP_KERNELS(glm, bf16);
    } else if constexpr (std::is_same_v<X, double>) {
        return ONESTEP_KERNELS(glm, f64);
    } else {
        return ONESTEP_KERNELS(glm, f32);
    }
}

GlmColumns columns_for(int64_t groups, int64_t width, int64_t lanes, int64_t panel) {
    GlmColumns columns;
    columns.groups = groups;
    columns.width = width;
    if (width == 1) {
        columns.ld = groups == 1 ? 1 : round_up(groups, lanes);
    } else {
        columns.stride = round_up(width, lanes);
        columns.ld = groups * columns.stride;
    }
    columns.wide = columns.ld > GlmColumns::kWideVectors * lanes;
    if (columns.wide) {
        columns.ld = round_up(columns.ld, panel);
    }
    return columns;
}

FixedCut cut_rows(int64_t n, int64_t bytes_each) {
    const int64_t rows = std::clamp(ceil_div(n, kPieces), kLeastRows, kMostRows);
    const int64_t most_pieces = results_within(kMostPartialBytes, bytes_each);
    return {n, std::max(rows, ceil_div(n, most_pieces))};
}

// `groups` right-hand sides of data.k columns.
template <class X, class T>
GlmPlan<X, T> plan_for(const GlmData<X, T>& data, int64_t groups, bool wants_result, bool wants_loss) {
    GlmPlan<X, T> plan;
    plan.kernels = &active_kernels<X, T>();
    const GlmKernels<X, T>& kernels = *plan.kernels;
    plan.columns = columns_for(groups, data.k, kernels.lanes, kernels.panel);
    plan.height = data.rows_of_w();
    const int64_t ld = plan.columns.ld;
    // A row is computed with or read, whichever takes longer.
    plan.row_nanoseconds =
        std::max(nanoseconds_of_products(data.d * ld), nanoseconds_of_bytes(data.d * static_cast<int64_t>(sizeof(X))));
    if (plan.columns.wide) {
        const int64_t affordable = kChunkBytes / (ld * static_cast<int64_t>(sizeof(T)));
        const int64_t rows = std::clamp<int64_t>(std::min(affordable, data.n), 1, kMostChunkRows);
        plan.chunks = {data.n, round_up(rows, kWideTileRows)};
        plan.chunk.height = plan.chunks.size;
        plan.chunk.block =
            round_up(std::clamp<int64_t>(ceil_div(data.d, kBlocks), 1, kMostBlockColumns), kernels.lanes);
        plan.packed = plan.layout.template add<T>("packed", (data.d + 1) * ld);
        plan.z = plan.layout.template add<T>("z", plan.chunks.size * ld);
        plan.total = plan.layout.template add<double>("total", wants_result ? plan.result_size() : 0);
        plan.losses = plan.layout.template add<double>("losses", wants_loss ? ceil_div(data.n, kWideTileRows) : 0);
        plan.work = plan.own_layout.template add<T>("work", kernels.wide_work(data, plan.columns, plan.chunk));
    } else {
        plan.pieces = cut_rows(data.n, plan.result_size() * static_cast<int64_t>(sizeof(T)));
        const int64_t partial = wants_result ? plan.pieces.pieces() * plan.result_size() : 0;
        plan.packed = plan.layout.template add<T>(
            "packed", (round_up(data.d, kernels.lanes) + kernels.lanes) * std::max<int64_t>(ld, 1));
        plan.partial = plan.layout.template add<T>("partial", partial);
        plan.losses = plan.layout.template add<double>("losses", wants_loss ? plan.pieces.pieces() : 0);
        plan.work = plan.own_layout.template add<T>("work", kernels.work(data, plan.columns));
    }
    return plan;
}

// result[...] = value for the element `at` of a row-major (d + 1) × ld, unless that is padding.
template <class X, class T>
void store_element(const GlmPlan<X, T>& plan, T* result, int64_t at, double value) {
    const GlmColumns& columns = plan.columns;
    const int64_t row = at / columns.ld;
    const int64_t group = at % columns.ld / columns.stride;
    const int64_t column = at % columns.ld % columns.stride;
    if (group < columns.groups && column < columns.width) {
        result[(group * plan.height + row) * columns.width + column] = static_cast<T>(value);
    }
}

// Few columns: calls rows(range, piece, packed, partial result, work) for every piece of rows and adds up what they
// leave.
template <class X, class T, class Rows>
Status run_pieces(const GlmPlan<X, T>& plan, const T* packed, T* result, const Workspace& workspace, const Rows& rows) {
    T* partial = workspace.get(plan.partial);
    const int64_t size = plan.result_size();
    const int64_t pieces = plan.pieces.pieces();
    auto piece_rows = [&](int64_t piece) {
        const CachedWorkspace own(plan.own_layout);
        T* sum = result != nullptr ? partial + piece * size : nullptr;
        if (sum != nullptr) {
            std::fill_n(sum, size, T(0));
        }
        rows(plan.pieces[piece], piece, packed, sum, own.get(plan.work));
    };
    const Status status = parallel_for(pieces, 2 * plan.pieces.size * plan.row_nanoseconds, piece_rows);
    if (status != Status::ok || result == nullptr) {
        return status;
    }
    const FixedCut elements{size, kSumElements};
    auto add = [&](int64_t piece) {
        const Range range = elements[piece];
        sum_pieces<double>(partial, pieces, size, range.begin, range.end,
                           [&](int64_t at, double sum) { store_element(plan, result, at, sum); });
    };
    return parallel_for(elements.pieces(),
                        nanoseconds_of_bytes(kSumElements * pieces * static_cast<int64_t>(sizeof(T))), add);
}

// Many columns: for every chunk of rows, rows(chunk, first, packed, work) for every kWideTileRows of it, and then
// total += XᵀZ block by block of X's columns.
template <class X, class T, class Rows>
Status run_chunks(const GlmPlan<X, T>& plan, const GlmData<X, T>& data, const T* packed, T* result,
                  const Workspace& workspace, const Rows& rows) {
    GlmChunk<T> chunk = plan.chunk;
    chunk.z = workspace.get(plan.z);
    double* total = workspace.zeroed(plan.total);
    const int64_t blocks = ceil_div(data.d, chunk.block) + (data.intercept ? 1 : 0);
    for (int64_t index = 0; index < plan.chunks.pieces(); ++index) {
        chunk.begin = plan.chunks[index].begin;
        chunk.rows = plan.chunks[index].size();
        auto scores = [&](int64_t tile) {
            const CachedWorkspace own(plan.own_layout);
            rows(chunk, tile * kWideTileRows, packed, own.get(plan.work));
        };
        Status status = parallel_for(ceil_div(chunk.rows, kWideTileRows), kWideTileRows * plan.row_nanoseconds, scores);
        if (status == Status::ok && result != nullptr) {
            auto block = [&](int64_t at) {
                const CachedWorkspace own(plan.own_layout);
                plan.kernels->wide_back(data, plan.columns, chunk, at, total, own.get(plan.work));
            };
            status = parallel_for(blocks, chunk.rows * plan.row_nanoseconds / blocks, block);
        }
        if (status != Status::ok) {
            return status;
        }
    }
    for (int64_t at = 0; result != nullptr && at < plan.result_size(); ++at) {
        store_element(plan, result, at, total[at]);
    }
    return Status::ok;
}

}  // namespace

template <class X, class T>
GlmPlan<X, T> plan(const GlmPointArgs<X, T>& args) {
    return plan_for(args.data, 1, args.gradient != nullptr, true);
}

template <class X, class T>
GlmPlan<X, T> plan(const GlmProductArgs<X, T>& args) {
    return plan_for(args.data, args.m, true, false);
}

template <class X, class T>
Status run(const GlmPlan<X, T>& plan, const GlmPointArgs<X, T>& args, const Workspace& workspace) {
    if (any_negative(args.data.weight, args.data.n)) {
        return Status::negative_weight;
    }
    const GlmKernels<X, T>& kernels = *plan.kernels;
    T* packed = workspace.get(plan.packed);
    kernels.pack(args.data, plan.columns, args.w.data, 0, args.w.row, args.w.col, packed);
    double* losses = workspace.zeroed(plan.losses);
    Status status = Status::ok;
    if (plan.columns.wide) {
        status = run_chunks(plan, args.data, packed, args.gradient, workspace,
                            [&](const GlmChunk<T>& chunk, int64_t first, const T* right, T* work) {
                                losses[(chunk.begin + first) / kWideTileRows] =
                                    kernels.wide_point(args, plan.columns, chunk, first, right, work);
                            });
    } else {
        status = run_pieces(
            plan, packed, args.gradient, workspace, [&](Range rows, int64_t piece, const T* right, T* sum, T* work) {
                losses[piece] = kernels.point_rows(args, plan.columns, rows.begin, rows.end, right, sum, work);
            });
    }
    if (status == Status::ok) {
        sum_pieces<double>(losses, plan.losses.count, 1, 0, 1, [&](int64_t, double sum) { *args.loss = sum; });
    }
    return status;
}

template <class X, class T>
Status run(const GlmPlan<X, T>& plan, const GlmProductArgs<X, T>& args, const Workspace& workspace) {
    const GlmKernels<X, T>& kernels = *plan.kernels;
    T* packed = workspace.get(plan.packed);
    kernels.pack(args.data, plan.columns, args.v.data, args.v.batch[0], args.v.row, args.v.col, packed);
    if (plan.columns.wide) {
        return run_chunks(plan, args.data, packed, args.product, workspace,
                          [&](const GlmChunk<T>& chunk, int64_t first, const T* right, T* work) {
                              kernels.wide_product(args, plan.columns, chunk, first, right, work);
                          });
    }
    return run_pieces(plan, packed, args.product, workspace, [&](Range rows, int64_t, const T* right, T* sum, T* work) {
        kernels.product_rows(args, plan.columns, rows.begin, rows.end, right, sum, work);
    });
}

template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args) {
    return run_cached(args);
}

template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(X, T)                                                             \
    template GlmPlan<X, T> plan(const GlmPointArgs<X, T>&);                                   \
    template GlmPlan<X, T> plan(const GlmProductArgs<X, T>&);                                 \
    template Status run(const GlmPlan<X, T>&, const GlmPointArgs<X, T>&, const Workspace&);   \
    template Status run(const GlmPlan<X, T>&, const GlmProductArgs<X, T>&, const Workspace&); \
    template Status glm_point(const GlmPointArgs<X, T>&);                                     \
    template Status glm_product(const GlmProductArgs<X, T>&);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(BFloat16, float)

}  // namespace onestep
