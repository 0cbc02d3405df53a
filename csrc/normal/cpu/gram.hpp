// Gram matrices on the CPU, whichever way their rows are summed; what gram, moments and solve_normal start from.
#pragma once

#include <algorithm>
#include <cmath>

#include "base/reduce.hpp"
#include "normal/cpu/common.hpp"

namespace onestep {

// With fewer problems than this, one problem's rows are shared among threads.
inline constexpr int64_t kFewProblems = 16;
// All problems together are cut into at most this many pieces of rows.
inline constexpr int64_t kMostPieces = 32;
// The sums of all pieces take at most this much memory; there are fewer pieces if need be.
inline constexpr int64_t kMostPartialBytes = int64_t{32} << 20;
// With too few rows for pieces but many columns, the columns are cut into this many groups.
inline constexpr int64_t kColumnGroups = 8;
// Panels that a group of columns has at least.
inline constexpr int64_t kPanelsPerGroup = 2;

template <class T>
Range GramPlan<T>::panels_of(int64_t group) const {
    const auto first = [&](int64_t index) {
        return static_cast<int64_t>(static_cast<double>(panels) * std::sqrt(static_cast<double>(index) / groups));
    };
    return {first(group), first(group + 1)};
}

// `features` columns of X and k of Y.
template <class T>
GramPlan<T> plan_gram(const NormalKernels<T>& kernels, int64_t problems, int64_t n, int64_t features, int64_t k,
                      bool always_in_double = false) {
    GramPlan<T> plan;
    plan.kernels = &kernels;
    plan.problems = problems;
    plan.features = features;
    plan.columns = features + k;
    plan.rows_padded = round_up(features, kernels.tile_rows);
    plan.ld = leading_dimension(kernels, std::max(plan.columns, plan.rows_padded));
    plan.panels = ceil_div(plan.columns, kernels.panel);
    plan.pieces = {n, 1};
    if (problems < kFewProblems && n >= 2 * kSlabRows) {
        const int64_t bytes = plan.size() * static_cast<int64_t>(sizeof(double)) * problems;
        const int64_t most = std::max<int64_t>(
            1, std::min(kMostPieces / std::max<int64_t>(problems, 1), results_within(kMostPartialBytes, bytes)));
        plan.pieces.pieces = std::min(n / kSlabRows, most);
    }
    if (problems < kFewProblems && plan.pieces.pieces == 1 && plan.panels >= kColumnGroups * kPanelsPerGroup &&
        n > kBlockRows) {
        plan.groups = kColumnGroups;
    }
    const bool in_parts = always_in_double || plan.parts() > 1;
    const bool in_slabs = !in_parts && n > kSlabRows;
    plan.sums = plan.layout.template add<double>("sums", in_parts ? problems * plan.pieces.pieces * plan.size() : 0);
    plan.packed = plan.own_layout.template add<T>("packed", kBlockRows * plan.ld);
    plan.slab = plan.own_layout.template add<T>("slab", in_parts || in_slabs ? plan.size() : 0);
    plan.sum = plan.own_layout.template add<double>("sum", in_slabs ? plan.size() : 0);
    plan.matrix = plan.own_layout.template add<T>("matrix", plan.size());
    return plan;
}

// sum += Gram of the rows in the panels, in double, by slabs that are short enough to be summed in T.
template <class T>
void gram_in_double(const GramPlan<T>& plan, const RowsArgs<T>& args, Range rows, Range panels, const Workspace& own,
                    double* sum) {
    const NormalKernels<T>& kernels = *plan.kernels;
    const int64_t left = panels.begin * kernels.panel;
    const int64_t right = panels.end * kernels.panel;
    const int64_t ld = leading_dimension(kernels, right - left);
    const int64_t height = std::min(plan.rows_padded, round_up(right, kernels.tile_rows));
    T* packed = own.get(plan.packed);
    T* slab = own.get(plan.slab);
    for (int64_t begin = rows.begin; begin < rows.end; begin += kSlabRows) {
        std::fill_n(slab, height * ld, T(0));
        kernels.gram_rows(args, begin, std::min(begin + kSlabRows, rows.end), panels.begin, panels.end, packed, slab,
                          ld);
        for (int64_t i = 0; i < height; ++i) {
            for (int64_t j = 0; j < right - left; ++j) {
                sum[i * plan.ld + left + j] += static_cast<double>(slab[i * ld + j]);
            }
        }
    }
}

// sums = those of all pieces of all problems; rows_of(problem) gives a problem's rows.
template <class T, class RowsOf>
Status gram_parts(const GramPlan<T>& plan, const RowsOf& rows_of, double* sums) {
    std::fill_n(sums, plan.sums.count, 0.0);
    auto body = [&](int64_t index) {
        const CachedWorkspace own(plan.own_layout);
        const int64_t piece = index / plan.groups;
        gram_in_double<T>(plan, rows_of(piece / plan.pieces.pieces),
                          plan.pieces.longer_first(piece % plan.pieces.pieces), plan.panels_of(index % plan.groups),
                          own, sums + piece * plan.size());
    };
    const int64_t rows = ceil_div(plan.pieces.count, plan.pieces.pieces);
    return parallel_for(plan.problems * plan.parts(),
                        nanoseconds_of_products(rows * plan.features * plan.columns / 2 / plan.groups), body);
}

// Calls store(at, sum) for every element of a problem's matrix, its pieces added up in order.
template <class T, class Store>
void sum_gram_pieces(const GramPlan<T>& plan, const double* sums, int64_t problem, const Store& store) {
    sum_pieces<double>(sums + problem * plan.pieces.pieces * plan.size(), plan.pieces.pieces, plan.size(), 0,
                       plan.size(), store);
}

// The Gram matrix of all rows of one problem, rounded to T once; it is part of `own`.
template <class T>
T* gram_of_problem(const GramPlan<T>& plan, const RowsArgs<T>& args, const Workspace& own) {
    T* matrix = own.get(plan.matrix);
    if (plan.pieces.count <= kSlabRows) {
        std::fill_n(matrix, plan.size(), T(0));
        plan.kernels->gram_rows(args, 0, plan.pieces.count, 0, plan.panels, own.get(plan.packed), matrix, plan.ld);
        return matrix;
    }
    double* sum = own.zeroed(plan.sum);
    gram_in_double<T>(plan, args, {0, plan.pieces.count}, {0, plan.panels}, own, sum);
    std::transform(sum, sum + plan.size(), matrix, [](double value) { return static_cast<T>(value); });
    return matrix;
}

template <class T, class Args>
RowsArgs<T> rows_of(const Args& args, int64_t problem) {
    RowsArgs<T> rows;
    rows.d = args.d;
    rows.k = args.k;
    rows.x = args.x.at(args.batch, problem);
    rows.half = args.x_half.type;
    rows.x_half = args.x_half.rows.at(args.batch, problem);
    rows.y = args.y.at(args.batch, problem);
    rows.weight = args.weight.at(args.batch, problem);
    return rows;
}

// Calls finish(problem, c, ld), which returns a Status and takes about `finish_nanoseconds`, with every problem's Gram
// matrix, whichever way it was summed.
template <class T, class Args, class Finish>
Status for_each_gram(const GramPlan<T>& plan, const Args& args, const Workspace& workspace, int64_t finish_nanoseconds,
                     const Finish& finish) {
    if (plan.parts() == 1) {
        auto body = [&](int64_t problem) {
            const CachedWorkspace own(plan.own_layout);
            return finish(problem, gram_of_problem(plan, rows_of<T>(args, problem), own), plan.ld);
        };
        const int64_t products = plan.pieces.count * plan.features * plan.columns;
        return parallel_for(plan.problems, nanoseconds_of_products(products) + finish_nanoseconds, body);
    }
    double* sums = workspace.get(plan.sums);
    const Status status = gram_parts(plan, [&](int64_t problem) { return rows_of<T>(args, problem); }, sums);
    if (status != Status::ok) {
        return status;
    }
    auto body = [&](int64_t problem) {
        const CachedWorkspace own(plan.own_layout);
        T* c = own.get(plan.matrix);
        sum_gram_pieces(plan, sums, problem, [&](int64_t at, double sum) { c[at] = static_cast<T>(sum); });
        return finish(problem, c, plan.ld);
    };
    const int64_t bytes = plan.pieces.pieces * plan.size() * static_cast<int64_t>(sizeof(double));
    return parallel_for(plan.problems, nanoseconds_of_bytes(bytes) + finish_nanoseconds, body);
}

}  // namespace onestep
