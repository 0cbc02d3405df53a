#include "attention/attention.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>
#include <vector>

#include "attention/kernels.hpp"
#include "base/parallel.hpp"
#include "base/scratch.hpp"
#include "base/target.hpp"

namespace onestep {
namespace {

// Longer rows take the tile for long rows.
constexpr int64_t kWideBytes = 512;

// With fewer heads than this, the keys of one head are shared among threads; each share then has its own summand of the
// gradient of q, which costs memory.
constexpr int64_t kFewHeads = 16;
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

// Below so many multiplications a unit of work is not worth another thread.
constexpr int64_t kWorthAThread = 200'000;

template <class T>
const AttentionKernels<T>& kernels(const AttentionInputs& inputs) {
    if constexpr (std::is_same_v<T, float>) {
        const bool half = inputs.q.bfloat16 && inputs.k.bfloat16 && inputs.v.bfloat16;
        return half ? ONESTEP_AMX_KERNELS(attention_f32) : ONESTEP_KERNELS(attention_f32);
    } else {
        return ONESTEP_KERNELS(attention_f64);
    }
}

int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// A slice of the input for one problem of the batch and one head; `size` is that of the input's elements.
AttentionSlice slice(const AttentionInput& input, const BatchShape& batch, int64_t index, int64_t head, int64_t size) {
    if (input.data == nullptr) {
        return {};
    }
    int64_t offset = head * input.head;
    for (int dim = batch.dims - 1; dim >= 0; --dim) {
        offset += index % batch.size[dim] * input.batch[dim];
        index /= batch.size[dim];
    }
    return {static_cast<const char*>(input.data) + offset * size, input.bfloat16, input.row, input.col};
}

template <class T>
AttentionSlices slices(const AttentionArgs<T>& args, const AttentionInputs& inputs, bool bytes, int64_t problem,
                       int64_t head) {
    const int64_t kv_head = head / (args.heads / args.kv_heads);
    const auto at = [&](const AttentionInput& input, int64_t which) {
        return slice(input, args.batch, problem, which, input.bfloat16 ? 2 : static_cast<int64_t>(sizeof(T)));
    };
    const auto row = [&](const AttentionInput& input) {
        return slice(input, args.batch, problem, head, static_cast<int64_t>(sizeof(double)));
    };
    AttentionSlices result;
    result.q = at(inputs.q, head);
    result.k = at(inputs.k, kv_head);
    result.v = at(inputs.v, kv_head);
    result.mask = bytes ? slice(inputs.mask, args.batch, problem, head, 1) : at(inputs.mask, head);
    result.out = at(inputs.out, head);
    result.lse = row(inputs.lse);
    result.grad = at(inputs.grad, head);
    result.grad_lse = row(inputs.grad_lse);
    return result;
}

// One call: what all its units of work share.
template <class T>
struct Call {
    const AttentionArgs<T>& args;
    const AttentionKernels<T>& kernel;
    int64_t tile;
    int64_t all_heads;
    int64_t query_tiles;
    int64_t key_tiles;

    explicit Call(const AttentionArgs<T>& args_) : args(args_), kernel(kernels<T>(args_.primal)) {
        const int64_t widest = std::max(args.d, args.dv) * static_cast<int64_t>(sizeof(T));
        tile = widest <= kWideBytes ? kernel.tile : kernel.wide_tile;
        all_heads = args.batch.count() * args.heads;
        query_tiles = ceil_div(args.queries, tile);
        key_tiles = ceil_div(args.keys, tile);
    }

    // Query head `index` of all problems.
    AttentionHead<T> head(int64_t index) const {
        AttentionHead<T> result;
        result.queries = args.queries;
        result.keys = args.keys;
        result.d = args.d;
        result.dv = args.dv;
        result.tile = tile;
        result.scale = args.scale;
        result.causal = args.causal;
        result.boolean_mask = args.boolean_mask;
        result.primal = slices(args, args.primal, args.boolean_mask, index / args.heads, index % args.heads);
        result.tangent = slices(args, args.tangent, false, index / args.heads, index % args.heads);
        return result;
    }

    int64_t rows(int64_t query_tile) const { return std::min(tile, args.queries - query_tile * tile); }

    // unit(i, work) for every i in [0, count), in no fixed order. A body takes units until none is left, so that a
    // thread takes its work memory once.
    template <class Unit>
    Status run(int64_t count, int64_t products_each, const Unit& unit) const {
        const int64_t elements = kernel.work(args.d, args.dv, tile);
        std::atomic<int64_t> next{0};
        auto body = [&](int64_t) {
            int64_t index = next.fetch_add(1, std::memory_order_relaxed);
            if (index >= count) {
                return;
            }
            Scratch scratch(Scratch::bytes_for<T>(elements));
            T* work = scratch.take<T>(elements);
            for (; index < count; index = next.fetch_add(1, std::memory_order_relaxed)) {
                unit(index, work);
            }
        };
        return parallel_for(count, std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(products_each, 1)), body);
    }
};

// What a pass computes: values, their tangents, or both.
enum class Pass { values, tangents, both };

template <class T>
Status by_queries(const Call<T>& call, Pass pass) {
    const AttentionArgs<T>& args = call.args;
    const int64_t tiles = call.query_tiles;
    return call.run(call.all_heads * tiles, call.tile * args.keys * args.d, [&](int64_t index, T* work) {
        // With a causal mask the last queries see the most keys: they go first.
        const int64_t query_tile = tiles - 1 - index % tiles;
        const int64_t at = index / tiles * args.queries;
        const auto rows_of = [&](const AttentionResults<T>& results) {
            return AttentionRows<T>{results.out + at * args.dv, results.lse != nullptr ? results.lse + at : nullptr};
        };
        const AttentionHead<T> head = call.head(index / tiles);
        const int64_t begin = query_tile * call.tile;
        const int64_t rows = call.rows(query_tile);
        const AttentionRows<T> to = rows_of(args);
        if (pass == Pass::both) {
            call.kernel.forward_and_jvp(head, begin, rows, to, rows_of(args.tangents), work);
        } else {
            (pass == Pass::values ? call.kernel.forward : call.kernel.jvp)(head, begin, rows, to.out, to.lse, work);
        }
    });
}

// The pieces into which the keys of a head are cut: a number of tiles each, of about equal work.
template <class T>
std::vector<int64_t> cut_keys(const Call<T>& call, int64_t kv_heads, int64_t partial_bytes) {
    const AttentionArgs<T>& args = call.args;
    int64_t pieces = ceil_div(kFewHeads, std::max<int64_t>(kv_heads, 1));
    pieces = std::min({pieces, kMostPartialBytes / std::max<int64_t>(partial_bytes, 1), call.key_tiles});
    pieces = std::max<int64_t>(pieces, 1);
    const auto weight = [&](int64_t key_tile) {
        return args.causal ? std::max<int64_t>(args.queries - key_tile * call.tile, 1) : int64_t{1};
    };
    int64_t total = 0;
    for (int64_t key_tile = 0; key_tile < call.key_tiles; ++key_tile) {
        total += weight(key_tile);
    }
    std::vector<int64_t> cuts = {0};
    int64_t sum = 0;
    for (int64_t key_tile = 0; key_tile < call.key_tiles; ++key_tile) {
        if (sum * pieces >= total * static_cast<int64_t>(cuts.size())) {
            cuts.push_back(key_tile * call.tile);
        }
        sum += weight(key_tile);
    }
    cuts.push_back(args.keys);
    return cuts;
}

// Row statistics of one query head out of those of all.
template <class T>
AttentionDeltas<T> deltas_of(const AttentionDeltas<T>& deltas, int64_t first_row) {
    return {deltas.primal + first_row, deltas.tangent != nullptr ? deltas.tangent + first_row : nullptr};
}

// q, k and v gradients. The keys of a head are cut into pieces that depend on the problem alone; their summands of the
// gradient of q are added up in the order of the keys.
template <class T>
Status grads_by_keys(const Call<T>& call, const AttentionDeltas<T>& deltas, Pass pass) {
    const AttentionArgs<T>& args = call.args;
    const AttentionResults<T>* const results[2] = {&args, &args.tangents};
    const int64_t kinds = pass == Pass::both ? 2 : 1;
    const int64_t kv_heads = args.batch.count() * args.kv_heads;
    const int64_t group = args.heads / args.kv_heads;
    const int64_t q_row = ceil_div(args.d, call.kernel.lanes) * call.kernel.lanes;
    const int64_t q_size = args.queries * q_row;
    const auto cuts = cut_keys(call, kv_heads, call.all_heads * q_size * static_cast<int64_t>(sizeof(T)));
    const auto pieces = static_cast<int64_t>(cuts.size()) - 1;
    const bool direct = pieces == 1 && q_row == args.d;
    // Plain new: what no piece touches takes no memory.
    const int64_t kind_size = direct ? 0 : pieces * call.all_heads * q_size;
    std::unique_ptr<T[]> partial(direct ? nullptr : new T[static_cast<size_t>(kinds * kind_size)]);
    const auto sums_of = [&](int64_t kind) {
        return direct ? results[kind]->q_grad : partial.get() + kind * kind_size;
    };

    const auto unit = [&](int64_t index, T* work) {
        const int64_t kv_head = index / pieces;
        const int64_t piece = index % pieces;
        const int64_t begin = cuts[static_cast<size_t>(piece)];
        const int64_t end = cuts[static_cast<size_t>(piece) + 1];
        for (int64_t member = 0; member < group; ++member) {
            const int64_t head = kv_head * group + member;
            const int64_t first_row = args.causal ? std::min(begin, args.queries) : 0;
            AttentionGrads<T> grads[2];
            for (int64_t kind = 0; kind < kinds; ++kind) {
                grads[kind].q = sums_of(kind) + (piece * call.all_heads + head) * q_size;
                grads[kind].q_row = q_row;
                grads[kind].k = results[kind]->k_grad + kv_head * args.keys * args.d;
                grads[kind].v = results[kind]->v_grad + kv_head * args.keys * args.dv;
                grads[kind].add = member > 0;
                std::fill(grads[kind].q + first_row * q_row, grads[kind].q + q_size, T(0));
            }
            const AttentionDeltas<T> own = deltas_of(deltas, head * args.queries);
            if (pass == Pass::both) {
                call.kernel.backward_and_jvp(call.head(head), own, begin, end, grads[0], grads[1], work);
            } else {
                const auto kernel = pass == Pass::values ? call.kernel.backward : call.kernel.backward_jvp;
                kernel(call.head(head), own, begin, end, grads[0], work);
            }
        }
    };
    Status status = call.run(kv_heads * pieces, group * args.queries * args.keys * args.d / pieces, unit);
    if (status != Status::ok || direct) {
        return status;
    }
    auto reduce = [&](int64_t index) {
        const int64_t kind = index / (call.all_heads * call.query_tiles);
        const T* sums = sums_of(kind);
        const int64_t head = index / call.query_tiles % call.all_heads;
        const int64_t first = index % call.query_tiles * call.tile;
        for (int64_t row = first; row < std::min(first + call.tile, args.queries); ++row) {
            T* to = results[kind]->q_grad + (head * args.queries + row) * args.d;
            std::copy_n(sums + head * q_size + row * q_row, args.d, to);
            for (int64_t piece = 1; piece < pieces; ++piece) {
                if (args.causal && row < cuts[static_cast<size_t>(piece)]) {
                    break;
                }
                const T* from = sums + (piece * call.all_heads + head) * q_size + row * q_row;
                std::transform(to, to + args.d, from, to, std::plus<T>());
            }
        }
    };
    return parallel_for(kinds * call.all_heads * call.query_tiles, 16, reduce);
}

// The mask's gradient: dS, summed over what the mask is broadcast over. One unit of work is a tile of the mask, or a
// stripe of tiles where a row or a column of the mask serves all.
template <class T>
Status grad_of_mask(const Call<T>& call, const AttentionDeltas<T>& deltas, const AttentionMaskGrad<T>& grad,
                    bool tangent) {
    if (grad.data == nullptr) {
        return Status::ok;
    }
    const AttentionArgs<T>& args = call.args;
    // Batch dimensions and heads that the mask has of its own, and those that it is broadcast over.
    const int dims = args.batch.dims + 1;
    const auto size = [&](int dim) { return dim < args.batch.dims ? args.batch.size[dim] : args.heads; };
    const auto stride = [&](int dim) { return dim < args.batch.dims ? grad.batch[dim] : grad.head; };
    int64_t own = 1;
    int64_t shared = 1;
    for (int dim = 0; dim < dims; ++dim) {
        (stride(dim) != 0 ? own : shared) *= size(dim);
    }
    const bool row_each = grad.row != 0;
    const bool col_each = grad.col != 0;
    const int64_t row_units = row_each ? call.query_tiles : 1;
    const int64_t col_units = col_each ? call.key_tiles : 1;

    const auto unit = [&](int64_t index, T* work) {
        const int64_t own_index = index / (row_units * col_units);
        const int64_t row_unit = index / col_units % row_units;
        const int64_t col_unit = index % col_units;
        T* sum = work;
        work += call.tile * call.tile;
        std::fill_n(sum, call.tile * call.tile, T(0));
        int64_t offset = 0;
        for (int64_t member = 0; member < shared; ++member) {
            int64_t head = 0;
            int64_t unit_stride = 1;
            int64_t own_rest = own_index;
            int64_t shared_rest = member;
            offset = 0;
            for (int dim = dims - 1; dim >= 0; --dim) {
                int64_t& rest = stride(dim) != 0 ? own_rest : shared_rest;
                head += rest % size(dim) * unit_stride;
                offset += rest % size(dim) * stride(dim);
                rest /= size(dim);
                unit_stride *= size(dim);
            }
            const AttentionHead<T> this_head = call.head(head);
            const AttentionDeltas<T> rows = deltas_of(deltas, head * args.queries);
            const auto kernel = tangent ? call.kernel.score_grad_jvp : call.kernel.score_grad;
            for (int64_t i = row_unit; i < (row_each ? row_unit + 1 : call.query_tiles); ++i) {
                for (int64_t j = col_unit; j < (col_each ? col_unit + 1 : call.key_tiles); ++j) {
                    if (!args.causal || j <= i) {
                        kernel(this_head, rows, i * call.tile, j * call.tile, sum, work);
                    }
                }
            }
        }
        T* to = grad.data + offset + row_unit * call.tile * grad.row + col_unit * call.tile * grad.col;
        const int64_t height = std::min(call.tile, args.queries - row_unit * call.tile);
        const int64_t width = std::min(call.tile, args.keys - col_unit * call.tile);
        for (int64_t r = 0; r < height; ++r) {
            for (int64_t c = 0; c < width; ++c) {
                T& at = to[r * grad.row + c * grad.col];
                at =
                    (r > 0 && !row_each) || (c > 0 && !col_each) ? at + sum[r * call.tile + c] : sum[r * call.tile + c];
            }
        }
    };
    return call.run(own * row_units * col_units, shared * call.tile * call.tile * args.d, unit);
}

template <class T>
Status backward(const Call<T>& call, Pass pass) {
    const AttentionArgs<T>& args = call.args;
    const int64_t count = call.all_heads * args.queries;
    const bool tangent = pass != Pass::values;
    std::unique_ptr<T[]> memory(new T[static_cast<size_t>((tangent ? 2 : 1) * count)]);
    const AttentionDeltas<T> deltas = {memory.get(), tangent ? memory.get() + count : nullptr};
    Status status = call.run(call.all_heads * call.query_tiles, call.tile * args.dv * 3, [&](int64_t index, T* work) {
        const int64_t head = index / call.query_tiles;
        const int64_t query_tile = index % call.query_tiles;
        const AttentionDeltas<T> rows = deltas_of(deltas, head * args.queries);
        call.kernel.deltas(call.head(head), query_tile * call.tile, call.rows(query_tile), rows, work);
    });
    if (status == Status::ok) {
        status = grads_by_keys(call, deltas, pass);
    }
    if (status == Status::ok) {
        status = grad_of_mask(call, deltas, args.mask_grad, pass == Pass::tangents);
    }
    if (status == Status::ok && pass == Pass::both) {
        status = grad_of_mask(call, deltas, args.tangents.mask_grad, true);
    }
    return status;
}

// The arguments of the pass that computes tangents alone.
template <class T>
AttentionArgs<T> for_tangents(const AttentionArgs<T>& args) {
    AttentionArgs<T> result = args;
    static_cast<AttentionResults<T>&>(result) = args.tangents;
    return result;
}

// A result as the input of the next pass: contiguous, (batch…, heads, queries, cols).
template <class T>
AttentionInput contiguous(const AttentionArgs<T>& args, const void* data, int64_t cols) {
    AttentionInput result;
    result.data = data;
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

}  // namespace

template <class T>
Status attention_forward(const AttentionArgs<T>& args) {
    return guarded([&] { return by_queries(Call<T>(args), Pass::values); });
}

template <class T>
Status attention_jvp(const AttentionArgs<T>& args) {
    return guarded([&] { return by_queries(Call<T>(args), Pass::tangents); });
}

template <class T>
Status attention_forward_and_jvp(const AttentionArgs<T>& args) {
    return guarded([&] {
        const Call<T> call(args);
        if (call.kernel.forward_and_jvp != nullptr) {
            return by_queries(call, Pass::both);
        }
        const Status status = attention_forward(args);
        AttentionArgs<T> tangents = for_tangents(args);
        tangents.primal.out = contiguous(args, args.out, args.dv);
        tangents.primal.lse = contiguous(args, args.lse, 1);
        return status == Status::ok ? attention_jvp(tangents) : status;
    });
}

template <class T>
Status attention_backward(const AttentionArgs<T>& args) {
    return guarded([&] { return backward(Call<T>(args), Pass::values); });
}

template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args) {
    return guarded([&] { return backward(Call<T>(args), Pass::tangents); });
}

template <class T>
Status attention_backward_and_jvp(const AttentionArgs<T>& args) {
    return guarded([&] {
        const Call<T> call(args);
        if (call.kernel.backward_and_jvp != nullptr) {
            return backward(call, Pass::both);
        }
        const Status status = attention_backward(args);
        return status == Status::ok ? attention_backward_jvp(for_tangents(args)) : status;
    });
}

#define ONESTEP_INSTANTIATE(T)                                          \
    template Status attention_forward(const AttentionArgs<T>&);         \
    template Status attention_jvp(const AttentionArgs<T>&);             \
    template Status attention_forward_and_jvp(const AttentionArgs<T>&); \
    template Status attention_backward(const AttentionArgs<T>&);        \
    template Status attention_backward_jvp(const AttentionArgs<T>&);    \
    template Status attention_backward_and_jvp(const AttentionArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
