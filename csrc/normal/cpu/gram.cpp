// The entries gram and moments.
#include "normal/cpu/gram.hpp"

#include "base/checks.hpp"

namespace onestep {
namespace {

// Rows of the sample from which moments takes its provisional means.
constexpr int64_t kSampleRows = 1024;
// From so many features on the tiles of the amx target are filled.
constexpr int64_t kAmxFeatures = 128;

// An element of X.
template <class T>
double x_value(const MomentsArgs<T>& args, int64_t row, int64_t c) {
    if constexpr (std::is_same_v<T, float>) {
        if (args.x_half) {
            const Batched<const uint16_t>& from = args.x_half.rows;
            float value = 0.0F;
            active_normal_kernels<T>().widen_rows(args.x_half.element,
                                                  {from.data + row * from.row + c * from.col, 0, 0}, 1, 1, &value);
            return static_cast<double>(value);
        }
    }
    return static_cast<double>(args.x.data[row * args.x.row + c * args.x.col]);
}

// Provisional means, from rows spread over the table; from all of them if those happen to have no weight.
template <class T>
void provisional_means(const MomentsArgs<T>& args, double* sums, T* shift) {
    const int64_t d = args.d;
    const int64_t columns = d + 1 + args.k;
    std::fill_n(sums, columns, 0.0);
    const auto sample = [&](int64_t step) {
        double total = 0.0;
        for (int64_t row = 0; row < args.n; row += step) {
            const double weight =
                args.weight.data != nullptr ? static_cast<double>(args.weight.data[row * args.weight.row]) : 1.0;
            total += weight;
            for (int64_t c = 0; c < columns; ++c) {
                if (c != d) {
                    sums[c] += weight *
                               (c < d ? x_value(args, row, c)
                                      : static_cast<double>(args.y.data[row * args.y.row + (c - d - 1) * args.y.col]));
                }
            }
        }
        return total;
    };
    double total = sample(std::max<int64_t>(1, args.n / kSampleRows));
    if (!(total > 0.0)) {
        total = sample(1);
    }
    for (int64_t c = 0; c < columns && total > 0.0; ++c) {
        const auto mean = static_cast<T>(sums[c] / total);
        shift[c] = std::isfinite(mean) ? mean : T(0);
    }
}

template <class T>
Status gram_packed(const GramEntryPlan<T>& plan, const GramArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const NormalKernels<T>& kernels = *plan.gram.kernels;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.n = args.n;
        pack.d = d;
        pack.k = k;
        set_lane_rows(kernels, args, problem, lane, pack);
        if (real) {
            pack.gram[lane] = args.gram + problem * d * d;
            pack.cross[lane] = k > 0 ? args.cross + problem * d * k : nullptr;
        }
    };
    return for_each_pack<T>(kernels, plan.pack, args.batch.count(), args.n * d * (d + k), fill,
                            kernels.pack_gram_matrices, kNothingAfter);
}

// Gram matrices of problems that are not packed.
template <class T>
Status gram_of_each(const GramPlan<T>& plan, const GramArgs<T>& args, const Workspace& workspace) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const auto rows = [&](int64_t problem) { return rows_of<T>(args, problem); };
    if (plan.groups > 1) {
        return gram_groups(plan, rows, [&](int64_t problem, const auto& group, const auto* c) {
            write_symmetric_group(group, d, c, args.gram + problem * d * d);
            for (int64_t j = std::max(d, group.left); j < std::min(d + k, group.right); ++j) {
                for (int64_t i = 0; i < d; ++i) {
                    args.cross[(problem * d + i) * k + j - d] = static_cast<T>(c[i * group.ld + j - group.left]);
                }
            }
        });
    }
    // Rows of the results of a problem; read(i, j, count, values) gives elements of [A | R].
    const auto write = [&](int64_t problem, Range some, const auto& read) {
        write_symmetric(some, d, read, args.gram + problem * d * d);
        for (int64_t i = some.begin; i < some.end; ++i) {
            read(i, d, k, args.cross + (problem * d + i) * k);
        }
    };
    const FixedCut blocks{d, kMirrorBlock};
    if (plan.pieces.pieces > 1) {
        double* sums = workspace.get(plan.sums);
        const Status status = gram_parts(plan, rows, sums);
        if (status != Status::ok) {
            return status;
        }
        auto body = [&](int64_t index) {
            const int64_t problem = index / blocks.pieces();
            write(problem, blocks[index % blocks.pieces()], [&](int64_t i, int64_t j, int64_t count, T* values) {
                const int64_t begin = i * plan.ld + j;
                sum_gram_pieces(plan, sums, problem, begin, begin + count,
                                [&](int64_t at, double sum) { values[at - begin] = static_cast<T>(sum); });
            });
        };
        const int64_t bytes = plan.pieces.pieces * plan.size() * static_cast<int64_t>(sizeof(double));
        return parallel_for(plan.problems * blocks.pieces(), nanoseconds_of_bytes(bytes / blocks.pieces()), body);
    }
    return for_each_gram<T>(plan, args, workspace, nullptr,
                            nanoseconds_of_bytes(d * (d + k) * static_cast<int64_t>(sizeof(T))),
                            [&](int64_t problem, const T* c, int64_t ld) {
                                for (int64_t block = 0; block < blocks.pieces(); ++block) {
                                    write(problem, blocks[block], [&](int64_t i, int64_t j, int64_t count, T* values) {
                                        std::copy_n(c + i * ld + j, count, values);
                                    });
                                }
                                return Status::ok;
                            });
}

}  // namespace

// Small problems are summed one in each vector lane, if they fill at least half of the lanes. Both ways give the same
// bits, so that the number of problems does not show in a result.
template <class T>
GramEntryPlan<T> plan(const GramArgs<T>& args) {
    const NormalKernels<T>& kernels = active_normal_kernels<T>();
    const int64_t problems = args.batch.count();
    const bool half = static_cast<bool>(args.x_half);
    GramEntryPlan<T> plan;
    // More rows are summed in double.
    plan.pack.packed = args.n <= kSlabRows && problems >= kernels.lanes / 2 &&
                       fits_pack(kernels, problems, args.n, args.d, args.k, half);
    add_pack_memory(plan.pack, kernels, plan.pack.packed ? kernels.pack_gram_work(args.d, args.k) : 0, args.n, args.d,
                    half);
    plan.gram = plan_gram(kernels, problems, args.n, args.d, args.k);
    plan.layout = plan.gram.layout;
    if constexpr (std::is_same_v<T, float>) {
        const bool plain = args.k == 0 && args.weight.data == nullptr;
        if (args.x_half.element == Element::bfloat16 && plain && args.d >= kAmxFeatures) {
            plan.gram.gram_rows = ONESTEP_AMX_KERNELS(normal, bf16).gram_rows;
        }
    }
    return plan;
}

template <class T>
Status run(const GramEntryPlan<T>& plan, const GramArgs<T>& args, const Workspace& workspace) {
    if (any_negative(args.weight, args.batch, args.n)) {
        return Status::negative_weight;
    }
    return plan.pack.packed ? gram_packed(plan, args) : gram_of_each(plan.gram, args, workspace);
}

template <class T>
MomentsPlan<T> plan(const MomentsArgs<T>& args) {
    MomentsPlan<T> plan;
    plan.gram = plan_gram(active_normal_kernels<T>(), 1, args.n, args.d + 1, args.k, true);
    plan.sums = plan.layout.template add<double>("sums", plan.gram.sums.count);
    plan.shift = plan.layout.template add<T>("shift", plan.gram.ld);
    plan.sample = plan.layout.template add<double>("sample", plan.gram.columns);
    return plan;
}

template <class T>
Status run(const MomentsPlan<T>& plan, const MomentsArgs<T>& args, const Workspace& workspace) {
    if (any_negative(args.weight, args.n)) {
        return Status::negative_weight;
    }
    const int64_t d = args.d;
    const int64_t columns = plan.gram.columns;
    const int64_t ld = plan.gram.ld;
    RowsArgs<T> rows;
    rows.d = d;
    rows.k = args.k;
    rows.ones = true;
    rows.x = args.x;
    rows.element = args.x_half.element;
    rows.x_half = args.x_half.rows.at(BatchShape{}, 0);
    rows.y = args.y;
    rows.weight = args.weight;
    T* shift = workspace.zeroed(plan.shift);
    if (args.center) {
        provisional_means(args, workspace.get(plan.sample), shift);
        rows.shift = shift;
    }
    double* sums = workspace.get(plan.sums);
    Status status = gram_parts(plan.gram, [&](int64_t) { return rows; }, sums);
    if (status != Status::ok) {
        return status;
    }
    double* s = sums;  // the pieces are added up into the first
    const FixedCut blocks{plan.gram.rows_padded, kMirrorBlock};
    const int64_t bytes = kMirrorBlock * ld * static_cast<int64_t>(sizeof(double));
    auto sum_block = [&](int64_t block) {
        sum_gram_pieces(plan.gram, sums, 0, blocks[block].begin * ld, blocks[block].end * ld,
                        [&](int64_t at, double sum) { s[at] = sum; });
    };
    status = parallel_for(blocks.pieces(), nanoseconds_of_bytes(plan.gram.pieces.pieces * bytes), sum_block);
    if (status != Status::ok) {
        return status;
    }
    const double* ones = s + d * ld;  // Σ w z, of which the first is only in column d of the rows above
    const double total = ones[d];
    *args.weight_sum = total;
    // Offsets of the true means from the provisional ones.
    double* offset = workspace.get(plan.sample);
    for (int64_t c = 0; c < columns; ++c) {
        const bool moved = args.center && total > 0.0;
        offset[c] = moved ? (c < d ? s[c * ld + d] : ones[c]) / total : 0.0;
    }
    const FixedCut written{d, kMirrorBlock};
    auto write_block = [&](int64_t block) {
        const auto read = [&](int64_t i, int64_t j, int64_t count, double* values) {
            for (int64_t c = j; c < j + count; ++c) {
                values[c - j] = s[i * ld + c] - total * offset[i] * offset[c];
            }
        };
        write_symmetric(written[block], d, read, args.gram);
        for (int64_t i = written[block].begin; i < written[block].end; ++i) {
            read(i, d + 1, args.k, args.cross + i * args.k);
        }
    };
    status = parallel_for(written.pieces(), nanoseconds_of_bytes(2 * bytes), write_block);
    if (status != Status::ok) {
        return status;
    }
    for (int64_t c = 0; c < columns; ++c) {
        if (c != d) {
            args.mean[c < d ? c : c - 1] = args.center ? static_cast<double>(shift[c]) + offset[c] : 0.0;
        }
    }
    return Status::ok;
}

template <class T>
Status gram(const GramArgs<T>& args) {
    return run_cached(args);
}

template <class T>
Status moments(const MomentsArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                           \
    template GramEntryPlan<T> plan(const GramArgs<T>&);                                  \
    template MomentsPlan<T> plan(const MomentsArgs<T>&);                                 \
    template Status run(const GramEntryPlan<T>&, const GramArgs<T>&, const Workspace&);  \
    template Status run(const MomentsPlan<T>&, const MomentsArgs<T>&, const Workspace&); \
    template Status gram(const GramArgs<T>&);                                            \
    template Status moments(const MomentsArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
