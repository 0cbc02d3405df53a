// The entries gram and moments.
#include "normal/cpu/gram.hpp"

#include "base/checks.hpp"

namespace onestep {
namespace {

// Rows of the sample from which moments takes its provisional means.
constexpr int64_t kSampleRows = 1024;

// An element of X.
template <class T>
double x_value(const MomentsArgs<T>& args, int64_t row, int64_t c) {
    if constexpr (std::is_same_v<T, float>) {
        if (args.x_half.type != HalfType::none) {
            const Batched<const uint16_t>& from = args.x_half.rows;
            float value = 0.0F;
            active_normal_kernels<T>().widen_rows(args.x_half.type, {from.data + row * from.row + c * from.col, 0, 0},
                                                  1, 1, &value);
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

}  // namespace

template <class T>
GramPlan<T> plan(const GramArgs<T>& args) {
    return plan_gram(active_normal_kernels<T>(), args.batch.count(), args.n, args.d, args.k);
}

template <class T>
Status run(const GramPlan<T>& plan, const GramArgs<T>& args, const Workspace& workspace) {
    if (any_negative(args.weight, args.batch, args.n)) {
        return Status::negative_weight;
    }
    const int64_t d = args.d;
    const int64_t k = args.k;
    return for_each_gram(plan, args, workspace, nanoseconds_of_bytes(d * (d + k) * static_cast<int64_t>(sizeof(T))),
                         [&](int64_t problem, const T* c, int64_t ld) {
                             T* to = args.gram + problem * d * d;
                             for (int64_t i = 0; i < d; ++i) {
                                 for (int64_t j = i; j < d; ++j) {
                                     to[i * d + j] = to[j * d + i] = c[i * ld + j];
                                 }
                                 std::copy_n(c + i * ld + d, k, args.cross + (problem * d + i) * k);
                             }
                             return Status::ok;
                         });
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
    rows.half = args.x_half.type;
    rows.x_half = args.x_half.rows.at(BatchShape{}, 0);
    rows.y = args.y;
    rows.weight = args.weight;
    T* shift = workspace.zeroed(plan.shift);
    if (args.center) {
        provisional_means(args, workspace.get(plan.sample), shift);
        rows.shift = shift;
    }
    double* sums = workspace.get(plan.sums);
    const Status status = gram_parts(plan.gram, [&](int64_t) { return rows; }, sums);
    if (status != Status::ok) {
        return status;
    }
    double* s = sums;  // the pieces are added up into the first
    sum_gram_pieces(plan.gram, sums, 0, [&](int64_t at, double sum) { s[at] = sum; });
    const double* ones = s + d * ld;  // Σ w z, of which the first is only in column d of the rows above
    const double total = ones[d];
    *args.weight_sum = total;
    // Offsets of the true means from the provisional ones.
    const auto offset = [&](int64_t c) {
        if (!args.center || !(total > 0.0)) {
            return 0.0;
        }
        return (c < d ? s[c * ld + d] : ones[c]) / total;
    };
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = i; j < d; ++j) {
            args.gram[i * d + j] = args.gram[j * d + i] = s[i * ld + j] - total * offset(i) * offset(j);
        }
        for (int64_t c = 0; c < args.k; ++c) {
            args.cross[i * args.k + c] = s[i * ld + d + 1 + c] - total * offset(i) * offset(d + 1 + c);
        }
    }
    for (int64_t c = 0; c < columns; ++c) {
        if (c != d) {
            args.mean[c < d ? c : c - 1] = args.center ? static_cast<double>(shift[c]) + offset(c) : 0.0;
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
    template GramPlan<T> plan(const GramArgs<T>&);                                       \
    template MomentsPlan<T> plan(const MomentsArgs<T>&);                                 \
    template Status run(const GramPlan<T>&, const GramArgs<T>&, const Workspace&);       \
    template Status run(const MomentsPlan<T>&, const MomentsArgs<T>&, const Workspace&); \
    template Status gram(const GramArgs<T>&);                                            \
    template Status moments(const MomentsArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
