// The entries of attention: how problems, heads and tiles are handed to the kernels of the CPU target, and how the
// gradients of pieces are added up.
#include "attention/attention.hpp"

#include <algorithm>
#include <type_traits>

#include "attention/cpu/mask_dims.hpp"
#include "attention/cpu/plan.hpp"
#include "base/parallel.hpp"
#include "base/reduce.hpp"
#include "base/target.hpp"

namespace onestep {
namespace {

// Where rows of q, k or v, in the type that the kernel computes in, are longer than this, tiles are smaller
// (`wide_tile`), so that work memory still fits the second-level cache.
constexpr int64_t kWideBytes = 512;

// In backward functions a key and value head is work for one thread. Where there are fewer of them than this, the keys
// of each are cut into pieces, so that there is work for about this many threads.
constexpr int64_t kFewHeads = 16;
static_assert(kFewHeads <= AttentionPlan<float>::kMostPieces);
// The sums of the pieces for the gradient of q (`partial`) take at most this much memory for values, and as much for
// tangents: otherwise there are fewer pieces.
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

template <class T>
const AttentionKernels<T>& active_kernels(const AttentionInputs& inputs) {
    if constexpr (std::is_same_v<T, float>) {
        const auto half = [](const HeadedOperand& input) { return input.element == Element::bfloat16; };
        return half(inputs.q) && half(inputs.k) && half(inputs.v) ? ONESTEP_AMX_KERNELS(attention, f32)
                                                                  : ONESTEP_KERNELS(attention, f32);
    } else {
        return ONESTEP_KERNELS(attention, f64);
    }
}

bool is_backward(AttentionFunction function) { return function >= AttentionFunction::backward; }

// Cuts the keys into at most `pieces` pieces of about equal work. The work of a key tile is the number of queries that
// see it: with a causal mask, the first keys have the most. A cut is made where the sum of the work before it reaches
// the next multiple of total / pieces.
template <class T>
void cut_keys(const AttentionArgs<T>& args, int64_t pieces, AttentionPlan<T>& plan) {
    const auto weight = [&](int64_t key_tile) {
        return args.causal ? std::max<int64_t>(args.queries - key_tile * plan.tile, 1) : int64_t{1};
    };
    int64_t total = 0;
    for (int64_t key_tile = 0; key_tile < plan.key_tiles.pieces(); ++key_tile) {
        total += weight(key_tile);
    }
    int64_t cuts = 1;  // plan.cuts[0] is 0
    int64_t sum = 0;
    for (int64_t key_tile = 0; key_tile < plan.key_tiles.pieces(); ++key_tile) {
        if (sum * pieces >= total * cuts) {
            plan.cuts[cuts++] = key_tile * plan.tile;
        }
        sum += weight(key_tile);
    }
    plan.cuts[cuts] = args.keys;
    plan.pieces = cuts;
}

// The matrix of one problem and head.
AttentionSlice slice(const HeadedOperand& input, const BatchShape& batch, int64_t problem, int64_t head) {
    if (!input) {
        return {};
    }
    const int64_t offset = batch.offset(problem, input.batch) + head * input.head;
    return {static_cast<const char*>(input.data) + offset * size_of(input.element), input.element, input.row,
            input.col};
}

template <class T>
AttentionSlices slices(const AttentionArgs<T>& args, const AttentionInputs& inputs, int64_t problem, int64_t head) {
    const int64_t kv_head = head / (args.heads / args.kv_heads);
    const auto at = [&](const HeadedOperand& input, int64_t which) { return slice(input, args.batch, problem, which); };
    AttentionSlices result;
    result.q = at(inputs.q, head);
    result.k = at(inputs.k, kv_head);
    result.v = at(inputs.v, kv_head);
    result.mask = at(inputs.mask, head);
    result.out = at(inputs.out, head);
    result.lse = at(inputs.lse, head);
    result.grad = at(inputs.grad, head);
    result.grad_lse = at(inputs.grad_lse, head);
    return result;
}

// A pass goes over all scores once. What it computes: values, their tangents, or both.
enum class Pass { values, tangents, both };

// The row statistics of the query head whose first row, counted over all heads, is `first_row`.
template <class T>
AttentionDeltas<T> deltas_of(const AttentionDeltas<T>& deltas, int64_t first_row) {
    return {deltas.primal + first_row, deltas.tangent != nullptr ? deltas.tangent + first_row : nullptr};
}

// The passes over one set of arguments. Every loop is over pieces that the plan cuts by sizes alone, and no two
// pieces write to the same element. So results have the same bits for any number of threads.
template <class T>
class Passes {
 public:
    Passes(const AttentionPlan<T>& plan, const AttentionArgs<T>& args, const Workspace& workspace)
        : plan_(plan), args_(args), workspace_(workspace), kernels_(*plan.kernels) {}

    // O and L, or their tangents, or both. A piece is a tile of queries of one head, with all keys.
    Status outputs(Pass pass) const {
        const int64_t tiles = plan_.query_tiles.pieces();
        auto tile_of_queries = [&](int64_t index) {
            const CachedWorkspace own(plan_.own_layout);
            const WorkMemory<T> work = own.work(plan_.work);
            // With a causal mask the last queries see the most keys. They go first, so that no thread is left with a
            // long piece at the end.
            const Range queries = plan_.query_tiles[tiles - 1 - index % tiles];
            const int64_t first_row = index / tiles * args_.queries;
            const auto rows_of = [&](const AttentionResults<T>& results) {
                return AttentionRows<T>{results.out + first_row * args_.dv,
                                        results.lse != nullptr ? results.lse + first_row : nullptr};
            };
            const AttentionHead<T> this_head = head(index / tiles);
            const AttentionRows<T> to = rows_of(args_);
            if (pass == Pass::both) {
                kernels_.forward_and_jvp(this_head, queries.begin, queries.size(), to, rows_of(args_.tangents), work);
            } else {
                const auto kernel = pass == Pass::values ? kernels_.forward : kernels_.jvp;
                kernel(this_head, queries.begin, queries.size(), to.out, to.lse, work);
            }
        };
        return parallel_for(plan_.heads * tiles, nanoseconds(2 * plan_.tile * args_.keys), tile_of_queries);
    }

    // Gradients of q, k, v and the mask, or their tangents, or both: first δ of all queries, then q, k and v, then the
    // mask, for which the scores are computed again.
    Status gradients(Pass pass) const {
        AttentionDeltas<T> deltas;
        deltas.primal = workspace_.get(plan_.deltas);
        deltas.tangent = pass != Pass::values ? workspace_.get(plan_.delta_tangents) : nullptr;
        const int64_t tiles = plan_.query_tiles.pieces();
        auto tile_of_queries = [&](int64_t index) {
            const CachedWorkspace own(plan_.own_layout);
            const Range queries = plan_.query_tiles[index % tiles];
            kernels_.deltas(head(index / tiles), queries.begin, queries.size(),
                            deltas_of(deltas, index / tiles * args_.queries), own.work(plan_.work));
        };
        Status status =
            parallel_for(plan_.heads * tiles, nanoseconds_of_products(plan_.tile * args_.dv * 3), tile_of_queries);
        if (status == Status::ok) {
            status = gradients_by_keys(deltas, pass);
        }
        if (status == Status::ok) {
            status = gradient_of_mask(deltas, args_.mask_grad, pass == Pass::tangents);
        }
        if (status == Status::ok && pass == Pass::both) {
            status = gradient_of_mask(deltas, args_.tangents.mask_grad, true);
        }
        return status;
    }

 private:
    // Query head `index` of all problems.
    AttentionHead<T> head(int64_t index) const {
        AttentionHead<T> result;
        result.queries = args_.queries;
        result.keys = args_.keys;
        result.d = args_.d;
        result.dv = args_.dv;
        result.tile = plan_.tile;
        result.scale = args_.scale;
        result.causal = args_.causal;
        result.primal = slices(args_, args_.primal, index / args_.heads, index % args_.heads);
        result.tangent = slices(args_, args_.tangent, index / args_.heads, index % args_.heads);
        return result;
    }

    // About the nanoseconds of the matrix products with this many scores, with d and with dv columns each.
    int64_t nanoseconds(int64_t scores) const { return nanoseconds_of_products(scores * (args_.d + args_.dv)); }

    // Gradients of q, k and v. A piece is a range of keys of one key and value head, with all query heads that
    // read it, one after the other: it alone writes the k and v gradients of these keys. All pieces add to the gradient
    // of q; so each has its own sums in `partial`, which a second loop adds up in the order of the keys.
    Status gradients_by_keys(const AttentionDeltas<T>& deltas, Pass pass) const {
        // results[0]: where this pass writes. results[1]: where the tangents go, if it computes both.
        const AttentionResults<T>* const results[2] = {&args_, &args_.tangents};
        const int64_t kinds = pass == Pass::both ? 2 : 1;
        const int64_t group = args_.heads / args_.kv_heads;
        const int64_t q_size = args_.queries * plan_.q_row;
        T* partial = plan_.direct ? nullptr : workspace_.get(plan_.partial);
        const auto sums_of = [&](int64_t kind) {
            return plan_.direct ? results[kind]->q_grad : partial + kind * plan_.pieces * plan_.piece_size();
        };
        auto piece_of_keys = [&](int64_t index) {
            const CachedWorkspace own(plan_.own_layout);
            const WorkMemory<T> work = own.work(plan_.work);
            const int64_t kv_head = index / plan_.pieces;
            const int64_t piece = index % plan_.pieces;
            const Range keys{plan_.cuts[piece], plan_.cuts[piece + 1]};
            for (int64_t member = 0; member < group; ++member) {
                const int64_t query_head = kv_head * group + member;
                const int64_t first_row = args_.causal ? std::min(keys.begin, args_.queries) : 0;
                AttentionGrads<T> grads[2];
                for (int64_t kind = 0; kind < kinds; ++kind) {
                    grads[kind].q = sums_of(kind) + piece * plan_.piece_size() + query_head * q_size;
                    grads[kind].q_row = plan_.q_row;
                    grads[kind].k = results[kind]->k_grad + kv_head * args_.keys * args_.d;
                    grads[kind].v = results[kind]->v_grad + kv_head * args_.keys * args_.dv;
                    grads[kind].add = member > 0;
                    std::fill(grads[kind].q + first_row * plan_.q_row, grads[kind].q + q_size, T(0));
                }
                const AttentionDeltas<T> rows = deltas_of(deltas, query_head * args_.queries);
                if (pass == Pass::both) {
                    kernels_.backward_and_jvp(head(query_head), rows, keys.begin, keys.end, grads[0], grads[1], work);
                } else {
                    const auto kernel = pass == Pass::values ? kernels_.backward : kernels_.backward_jvp;
                    kernel(head(query_head), rows, keys.begin, keys.end, grads[0], work);
                }
            }
        };
        const Status status =
            parallel_for(plan_.kv_heads * plan_.pieces,
                         nanoseconds(3 * group * args_.queries * args_.keys / plan_.pieces), piece_of_keys);
        if (status != Status::ok || plan_.direct) {
            return status;
        }
        const int64_t tiles = plan_.query_tiles.pieces();
        auto tile_of_queries = [&](int64_t index) {
            const int64_t kind = index / (plan_.heads * tiles);
            const int64_t query_head = index / tiles % plan_.heads;
            const Range queries = plan_.query_tiles[index % tiles];
            const T* sums = sums_of(kind) + query_head * q_size;
            for (int64_t row = queries.begin; row < queries.end; ++row) {
                // Pieces whose keys the query does not see left its row alone, uninitialised.
                int64_t pieces = 1;
                while (pieces < plan_.pieces && (!args_.causal || row >= plan_.cuts[pieces])) {
                    ++pieces;
                }
                T* to = results[kind]->q_grad + (query_head * args_.queries + row) * args_.d;
                sum_pieces_to(to, sums + row * plan_.q_row, pieces, plan_.piece_size(), args_.d);
            }
        };
        return parallel_for(
            kinds * plan_.heads * tiles,
            nanoseconds_of_bytes(plan_.tile * plan_.q_row * (plan_.pieces + 1) * static_cast<int64_t>(sizeof(T))),
            tile_of_queries);
    }

    // The gradient of the mask: dS, or dṠ, summed over the heads and problems that share it. A piece is what
    // adds to one tile of the gradient: a tile of scores of every head that shares it. If the mask has one column for
    // all keys, one row for all queries, or one element, that is a row of tiles, a column of tiles, or all tiles. They
    // are added up in one tile (`sum`) first, and its columns or rows after that.
    Status gradient_of_mask(const AttentionDeltas<T>& deltas, const AttentionMaskGrad<T>& grad, bool tangent) const {
        if (grad.data == nullptr) {
            return Status::ok;
        }
        const MaskDims dims(args_.batch, args_.heads, grad);
        const bool row_each = grad.row != 0;
        const bool col_each = grad.col != 0;
        const int64_t row_tiles = row_each ? plan_.query_tiles.pieces() : 1;
        const int64_t col_tiles = col_each ? plan_.key_tiles.pieces() : 1;
        auto tile_of_mask = [&](int64_t index) {
            const CachedWorkspace own(plan_.own_layout);
            const WorkMemory<T> work = own.work(plan_.work);
            T* sum = own.zeroed(plan_.mask_sum);
            const int64_t own_index = index / (row_tiles * col_tiles);
            const int64_t row_tile = index / col_tiles % row_tiles;
            const int64_t col_tile = index % col_tiles;
            for (int64_t member = 0; member < dims.shared; ++member) {
                const int64_t query_head = dims.head(own_index, member);
                const AttentionHead<T> this_head = head(query_head);
                const AttentionDeltas<T> rows = deltas_of(deltas, query_head * args_.queries);
                const auto kernel = tangent ? kernels_.score_grad_jvp : kernels_.score_grad;
                for (int64_t i = row_tile; i < (row_each ? row_tile + 1 : plan_.query_tiles.pieces()); ++i) {
                    for (int64_t j = col_tile; j < (col_each ? col_tile + 1 : plan_.key_tiles.pieces()); ++j) {
                        // Tiles of queries and keys are of the same size, so that i and j compare as positions do.
                        if (!args_.causal || j <= i) {
                            kernel(this_head, rows, i * plan_.tile, j * plan_.tile, sum, work);
                        }
                    }
                }
            }
            T* to = grad.data + dims.offset(own_index) + row_tile * plan_.tile * grad.row +
                    col_tile * plan_.tile * grad.col;
            // Of the tile that is written, or, where tiles are added up, of the first, which is the largest.
            const int64_t height = plan_.query_tiles[row_tile].size();
            const int64_t width = plan_.key_tiles[col_tile].size();
            for (int64_t r = 0; r < height; ++r) {
                for (int64_t c = 0; c < width; ++c) {
                    T& at = to[r * grad.row + c * grad.col];
                    const bool adds = (r > 0 && !row_each) || (c > 0 && !col_each);
                    at = adds ? at + sum[r * plan_.tile + c] : sum[r * plan_.tile + c];
                }
            }
        };
        return parallel_for(dims.own * row_tiles * col_tiles, nanoseconds(2 * dims.shared * plan_.tile * plan_.tile),
                            tile_of_mask);
    }

 public:
    // Sets all gradients to zero, for calls without a query, a key, a head or a problem.
    void clear_gradients(const AttentionResults<T>& to) const {
        std::fill_n(to.q_grad, plan_.heads * args_.queries * args_.d, T(0));
        std::fill_n(to.k_grad, plan_.kv_heads * args_.keys * args_.d, T(0));
        std::fill_n(to.v_grad, plan_.kv_heads * args_.keys * args_.dv, T(0));
        const AttentionMaskGrad<T>& mask = to.mask_grad;
        if (mask.data == nullptr) {
            return;
        }
        const MaskDims dims(args_.batch, args_.heads, mask);
        for (int64_t index = 0; index < dims.own; ++index) {
            for (int64_t row = 0; row < (mask.row != 0 ? args_.queries : 1); ++row) {
                for (int64_t col = 0; col < (mask.col != 0 ? args_.keys : 1); ++col) {
                    mask.data[dims.offset(index) + row * mask.row + col * mask.col] = T(0);
                }
            }
        }
    }

 private:
    const AttentionPlan<T>& plan_;
    const AttentionArgs<T>& args_;
    const Workspace& workspace_;
    const AttentionKernels<T>& kernels_;
};

// The arguments of the second pass, which computes tangents only: its results go where `tangents` says.
template <class T>
AttentionArgs<T> for_tangents(const AttentionArgs<T>& args) {
    AttentionArgs<T> result = args;
    static_cast<AttentionResults<T>&>(result) = args.tangents;
    return result;
}

// A result of the first pass as an input of the second: contiguous, (batch…, heads, queries, cols).
template <class T, class Result>
HeadedOperand contiguous(const AttentionArgs<T>& args, const Result* data, int64_t cols) {
    HeadedOperand result;
    result.data = data;
    result.element = kElement<Result>;
    result.col = 1;
    result.row = cols;
    result.head = args.queries * cols;
    int64_t stride = args.heads * result.head;
    for (int dim = args.batch.dims - 1; dim >= 0; --dim) {
        result.batch[dim] = stride;
        stride *= args.batch.size[dim];
    }
    return result;
}

template <class T>
Status run_outputs(const AttentionPlan<T>& plan, const AttentionArgs<T>& args, const Workspace& workspace) {
    const Passes<T> passes(plan, args, workspace);
    if (plan.function != AttentionFunction::forward_and_jvp) {
        return passes.outputs(plan.function == AttentionFunction::forward ? Pass::values : Pass::tangents);
    }
    if (plan.together) {
        return passes.outputs(Pass::both);
    }
    const Status status = passes.outputs(Pass::values);
    AttentionArgs<T> tangents = for_tangents(args);
    tangents.primal.out = contiguous(args, args.out, args.dv);
    tangents.primal.lse = contiguous(args, args.lse, 1);
    return status == Status::ok ? Passes<T>(plan, tangents, workspace).outputs(Pass::tangents) : status;
}

template <class T>
Status run_gradients(const AttentionPlan<T>& plan, const AttentionArgs<T>& args, const Workspace& workspace) {
    const Passes<T> passes(plan, args, workspace);
    const bool both = plan.function == AttentionFunction::backward_and_jvp;
    if (plan.heads * plan.kv_heads * args.queries * args.keys == 0) {
        passes.clear_gradients(args);
        if (both) {
            passes.clear_gradients(args.tangents);
        }
        return Status::ok;
    }
    if (!both) {
        return passes.gradients(plan.function == AttentionFunction::backward ? Pass::values : Pass::tangents);
    }
    if (plan.together) {
        return passes.gradients(Pass::both);
    }
    const Status status = passes.gradients(Pass::values);
    const AttentionArgs<T> tangents = for_tangents(args);
    return status == Status::ok ? Passes<T>(plan, tangents, workspace).gradients(Pass::tangents) : status;
}

}  // namespace

template <class T>
AttentionPlan<T> plan(const AttentionArgs<T>& args, AttentionFunction function) {
    AttentionPlan<T> plan;
    plan.kernels = &active_kernels<T>(args.primal);
    const AttentionKernels<T>& kernels = *plan.kernels;
    plan.function = function;
    plan.together = function == AttentionFunction::forward_and_jvp    ? kernels.forward_and_jvp != nullptr
                    : function == AttentionFunction::backward_and_jvp ? kernels.backward_and_jvp != nullptr
                                                                      : false;
    const int64_t widest = std::max(args.d, args.dv) * static_cast<int64_t>(sizeof(T));
    plan.tile = widest <= kWideBytes ? kernels.tile : kernels.wide_tile;
    plan.heads = args.batch.count() * args.heads;
    plan.kv_heads = args.batch.count() * args.kv_heads;
    plan.query_tiles = {args.queries, plan.tile};
    plan.key_tiles = {args.keys, plan.tile};
    plan.work = plan.own_layout.template add<T>("work", kernels.work(args.d, args.dv, plan.tile));
    if (!is_backward(function)) {
        return plan;
    }
    plan.q_row = round_up(args.d, kernels.lanes);
    const int64_t most = results_within(kMostPartialBytes, plan.piece_size() * static_cast<int64_t>(sizeof(T)));
    const int64_t wanted = ceil_div(kFewHeads, std::max<int64_t>(plan.kv_heads, 1));
    cut_keys(args, std::max<int64_t>(std::min({wanted, most, plan.key_tiles.pieces()}), 1), plan);
    plan.direct = plan.pieces == 1 && plan.q_row == args.d;
    const int64_t rows = plan.heads * args.queries;
    const bool tangents = function != AttentionFunction::backward;
    plan.deltas = plan.layout.template add<T>("deltas", rows);
    plan.delta_tangents = plan.layout.template add<T>("delta_tangents", tangents ? rows : 0);
    plan.partial = plan.layout.template add<T>(
        "partial", plan.direct ? 0 : (plan.together ? 2 : 1) * plan.pieces * plan.piece_size());
    plan.mask_sum = plan.own_layout.template add<T>("mask_sum", plan.tile * plan.tile);
    return plan;
}

template <class T>
Status run(const AttentionPlan<T>& plan, const AttentionArgs<T>& args, const Workspace& workspace) {
    return is_backward(plan.function) ? run_gradients(plan, args, workspace) : run_outputs(plan, args, workspace);
}

template <class T>
Status attention_forward(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::forward);
}

template <class T>
Status attention_jvp(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::jvp);
}

template <class T>
Status attention_forward_and_jvp(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::forward_and_jvp);
}

template <class T>
Status attention_backward(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::backward);
}

template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::backward_jvp);
}

template <class T>
Status attention_backward_and_jvp(const AttentionArgs<T>& args) {
    return run_cached(args, AttentionFunction::backward_and_jvp);
}

#define ONESTEP_INSTANTIATE(T)                                                               \
    template AttentionPlan<T> plan(const AttentionArgs<T>&, AttentionFunction);              \
    template Status run(const AttentionPlan<T>&, const AttentionArgs<T>&, const Workspace&); \
    template Status attention_forward(const AttentionArgs<T>&);                              \
    template Status attention_jvp(const AttentionArgs<T>&);                                  \
    template Status attention_forward_and_jvp(const AttentionArgs<T>&);                      \
    template Status attention_backward(const AttentionArgs<T>&);                             \
    template Status attention_backward_jvp(const AttentionArgs<T>&);                         \
    template Status attention_backward_and_jvp(const AttentionArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
