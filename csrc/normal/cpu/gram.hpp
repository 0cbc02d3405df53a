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

template <class T>
typename GramPlan<T>::Group GramPlan<T>::group_of(int64_t index) const {
    const Range of = panels_of(index);
    const int64_t left_column = of.begin * kernels->panel;
    const int64_t right_column = of.end * kernels->panel;
    return {of, left_column, right_column, std::min(rows_padded, round_up(right_column, kernels->tile_rows)),
            leading_dimension(*kernels, right_column - left_column)};
}

// `features` columns of X and k of Y. `in_double`: all sums are wanted in double.
template <class T>
GramPlan<T> plan_gram(const NormalKernels<T>& kernels, int64_t problems, int64_t n, int64_t features, int64_t k,
                      bool in_double = false) {
    GramPlan<T> plan;
    plan.kernels = &kernels;
    plan.gram_rows = kernels.gram_rows;
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
    int64_t most = plan.size();  // elements that a thread sums at a time
    if (plan.groups > 1) {
        most = 0;
        for (int64_t group = 0; group < plan.groups; ++group) {
            const auto of = plan.group_of(group);
            most = std::max(most, of.height * of.ld);
        }
    }
    const bool in_sums = in_double || plan.pieces.pieces > 1;
    const bool in_slabs = !in_sums && n > kSlabRows;
    const bool in_slab = in_sums || in_slabs || plan.groups > 1;
    plan.sums = plan.layout.template add<double>("sums", in_sums ? problems * plan.pieces.pieces * plan.size() : 0);
    plan.packed = plan.own_layout.template add<T>("packed", kBlockRows * plan.ld);
    plan.slab = plan.own_layout.template add<T>("slab", in_slab ? most : 0);
    plan.sum = plan.own_layout.template add<double>("sum", in_slabs ? most : 0);
    plan.matrix = plan.own_layout.template add<T>("matrix", plan.groups == 1 ? plan.size() : 0);
    return plan;
}

// slab = Gram of the rows [begin, end), few enough to be summed in T, in the columns of a group.
template <class T>
void gram_of_slab(const GramPlan<T>& plan, const RowsArgs<T>& args, int64_t begin, int64_t end,
                  const typename GramPlan<T>::Group& group, const Workspace& own, T* slab) {
    std::fill_n(slab, group.height * group.ld, T(0));
    plan.gram_rows(args, begin, end, group.panels.begin, group.panels.end, own.get(plan.packed), slab, group.ld);
}

// sum (rows of `ld` elements) += Gram of the rows in the columns of a group, in double.
template <class T>
void gram_in_double(const GramPlan<T>& plan, const RowsArgs<T>& args, Range rows,
                    const typename GramPlan<T>::Group& group, const Workspace& own, double* sum, int64_t ld) {
    T* slab = own.get(plan.slab);
    for (int64_t begin = rows.begin; begin < rows.end; begin += kSlabRows) {
        gram_of_slab<T>(plan, args, begin, std::min(begin + kSlabRows, rows.end), group, own, slab);
        for (int64_t i = 0; i < group.height; ++i) {
            for (int64_t j = 0; j < group.right - group.left; ++j) {
                sum[i * ld + j] += static_cast<double>(slab[i * group.ld + j]);
            }
        }
    }
}

// sums = those of all pieces of all problems; rows_of(problem) gives a problem's rows.
template <class T, class RowsOf>
Status gram_parts(const GramPlan<T>& plan, const RowsOf& rows_of, double* sums) {
    auto body = [&](int64_t index) {
        const CachedWorkspace own(plan.own_layout);
        const int64_t piece = index / plan.groups;
        const auto group = plan.group_of(index % plan.groups);
        const bool last = index % plan.groups + 1 == plan.groups;
        double* sum = sums + piece * plan.size() + group.left;
        for (int64_t i = 0; i < plan.rows_padded; ++i) {
            std::fill_n(sum + i * plan.ld, (last ? plan.ld : group.right) - group.left, 0.0);
        }
        gram_in_double<T>(plan, rows_of(piece / plan.pieces.pieces),
                          plan.pieces.longer_first(piece % plan.pieces.pieces), group, own, sum, plan.ld);
    };
    const int64_t rows = ceil_div(plan.pieces.count, plan.pieces.pieces);
    return parallel_for(plan.problems * plan.parts(),
                        nanoseconds_of_products(rows * plan.features * plan.columns / 2 / plan.groups), body);
}

// Calls store(problem, group, c) for every group of every problem, where c is its part of the Gram matrix of all rows,
// in T or in double.
template <class T, class RowsOf, class Store>
Status gram_groups(const GramPlan<T>& plan, const RowsOf& rows_of, const Store& store) {
    const int64_t n = plan.pieces.count;
    auto body = [&](int64_t index) {
        const CachedWorkspace own(plan.own_layout);
        const int64_t problem = index / plan.groups;
        const auto group = plan.group_of(index % plan.groups);
        if (n <= kSlabRows) {
            T* slab = own.get(plan.slab);
            gram_of_slab<T>(plan, rows_of(problem), 0, n, group, own, slab);
            store(problem, group, slab);
        } else {
            double* sum = own.get(plan.sum);
            std::fill_n(sum, group.height * group.ld, 0.0);
            gram_in_double<T>(plan, rows_of(problem), {0, n}, group, own, sum, group.ld);
            store(problem, group, sum);
        }
    };
    return parallel_for(plan.problems * plan.groups,
                        nanoseconds_of_products(n * plan.features * plan.columns / 2 / plan.groups), body);
}

// Calls store(at, sum) for the elements [begin, end) of a problem's matrix, its pieces added up in order.
template <class T, class Store>
void sum_gram_pieces(const GramPlan<T>& plan, const double* sums, int64_t problem, int64_t begin, int64_t end,
                     const Store& store) {
    sum_pieces<double>(sums + problem * plan.pieces.pieces * plan.size(), plan.pieces.pieces, plan.size(), begin, end,
                       store);
}

// Rows and columns of a finished matrix that are written at a time, with their mirror image below the diagonal: memory
// is then written line by line on both sides.
inline constexpr int64_t kMirrorBlock = 64;

// A symmetric d × d matrix from the elements above its diagonal: read(i, j, count, values) gives those at (i, j) and
// after it.
template <class T, class Read>
void write_symmetric(Range rows, int64_t d, const Read& read, T* to) {
    T block[kMirrorBlock][kMirrorBlock];
    for (int64_t left = rows.begin; left < d; left += kMirrorBlock) {
        const int64_t right = std::min(left + kMirrorBlock, d);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const int64_t from = std::max(i, left);
            T* values = block[i - rows.begin];
            read(i, from, right - from, values + from - left);
            std::copy(values + from - left, values + right - left, to + i * d + from);
        }
        for (int64_t j = left; j < right; ++j) {
            for (int64_t i = rows.begin; i < std::min(rows.end, j); ++i) {
                to[j * d + i] = block[i - rows.begin][j - left];
            }
        }
    }
}

// The same from a group's part of the matrix.
template <class T, class Group, class Sum>
void write_symmetric_group(const Group& group, int64_t d, const Sum* c, T* to) {
    const int64_t right = std::min(group.right, d);
    for (int64_t top = 0; top < right; top += kMirrorBlock) {
        const int64_t bottom = std::min(top + kMirrorBlock, right);
        for (int64_t first = std::max(group.left, top); first < right; first += kMirrorBlock) {
            const int64_t last = std::min(first + kMirrorBlock, right);
            for (int64_t i = top; i < bottom; ++i) {
                for (int64_t j = std::max(i, first); j < last; ++j) {
                    to[i * d + j] = static_cast<T>(c[i * group.ld + j - group.left]);
                }
            }
            for (int64_t j = first; j < last; ++j) {
                for (int64_t i = top; i < std::min(bottom, j); ++i) {
                    to[j * d + i] = static_cast<T>(c[i * group.ld + j - group.left]);
                }
            }
        }
    }
}

// The Gram matrix of all rows of one problem, rounded to T once; it is part of `own`.
template <class T>
T* gram_of_problem(const GramPlan<T>& plan, const RowsArgs<T>& args, const Workspace& own) {
    T* matrix = own.get(plan.matrix);
    if (plan.pieces.count <= kSlabRows) {
        std::fill_n(matrix, plan.size(), T(0));
        plan.gram_rows(args, 0, plan.pieces.count, 0, plan.panels, own.get(plan.packed), matrix, plan.ld);
        return matrix;
    }
    double* sum = own.zeroed(plan.sum);
    gram_in_double<T>(plan, args, {0, plan.pieces.count}, plan.group_of(0), own, sum, plan.ld);
    std::transform(sum, sum + plan.size(), matrix, [](double value) { return static_cast<T>(value); });
    return matrix;
}

template <class T, class Args>
RowsArgs<T> rows_of(const Args& args, int64_t problem) {
    RowsArgs<T> rows;
    rows.d = args.d;
    rows.k = args.k;
    rows.x = args.x.at(args.batch, problem);
    rows.element = args.x_half.element;
    rows.x_half = args.x_half.rows.at(args.batch, problem);
    rows.y = args.y.at(args.batch, problem);
    rows.weight = args.weight.at(args.batch, problem);
    return rows;
}

// Calls finish(problem, c, ld), which returns a Status and takes about `finish_nanoseconds`, with every problem's Gram
// matrix, whichever way it was summed. Groups of columns fill `matrices`.
template <class T, class Args, class Finish>
Status for_each_gram(const GramPlan<T>& plan, const Args& args, const Workspace& workspace, T* matrices,
                     int64_t finish_nanoseconds, const Finish& finish) {
    if (plan.parts() == 1) {
        auto body = [&](int64_t problem) {
            const CachedWorkspace own(plan.own_layout);
            return finish(problem, gram_of_problem(plan, rows_of<T>(args, problem), own), plan.ld);
        };
        const int64_t products = plan.pieces.count * plan.features * plan.columns;
        return parallel_for(plan.problems, nanoseconds_of_products(products) + finish_nanoseconds, body);
    }
    const auto rows = [&](int64_t problem) { return rows_of<T>(args, problem); };
    if (plan.groups > 1) {
        const auto store = [&](int64_t problem, const auto& group, const auto* c) {
            const int64_t width = (group.panels.end == plan.panels ? plan.ld : group.right) - group.left;
            for (int64_t i = 0; i < plan.rows_padded; ++i) {
                T* to = matrices + problem * plan.size() + i * plan.ld + group.left;
                const int64_t given = i < group.height ? group.right - group.left : 0;
                std::transform(c + i * group.ld, c + i * group.ld + given, to,
                               [](auto value) { return static_cast<T>(value); });
                std::fill(to + given, to + width, T(0));
            }
        };
        const Status status = gram_groups(plan, rows, store);
        if (status != Status::ok) {
            return status;
        }
        auto body = [&](int64_t problem) { return finish(problem, matrices + problem * plan.size(), plan.ld); };
        return parallel_for(plan.problems, finish_nanoseconds, body);
    }
    double* sums = workspace.get(plan.sums);
    const Status status = gram_parts(plan, rows, sums);
    if (status != Status::ok) {
        return status;
    }
    auto body = [&](int64_t problem) {
        const CachedWorkspace own(plan.own_layout);
        T* c = own.get(plan.matrix);
        sum_gram_pieces(plan, sums, problem, 0, plan.size(),
                        [&](int64_t at, double sum) { c[at] = static_cast<T>(sum); });
        return finish(problem, c, plan.ld);
    };
    const int64_t bytes = plan.pieces.pieces * plan.size() * static_cast<int64_t>(sizeof(double));
    return parallel_for(plan.problems, nanoseconds_of_bytes(bytes) + finish_nanoseconds, body);
}

}  // namespace onestep
