// The entries solve_spd, cholesky and cholesky_solve, and solve_normal_backward, which stands on the last.
#include <algorithm>

#include "normal/cpu/common.hpp"

namespace onestep {
namespace {

// Right-hand sides that one piece of work of cholesky_solve takes.
constexpr int64_t kSolveColumns = 96;
// The most right-hand sides of small problems, one in each vector lane. With more, the columns of one problem fill the
// vectors at no greater cost. Of solve_spd's a lane has the factor, too, at a fraction of what it costs alone: see
// decision 325.
constexpr int64_t kMostPackedVectors = 16;
constexpr int64_t kMostPackedBytes = 3072;
// Rows that one piece of work of solve_normal_backward takes.
constexpr int64_t kGradientRows = 2048;

// c = the upper triangle from A's lower one, zeros elsewhere.
template <class T>
void load_lower(const Matrix<const T>& a, int64_t d, int64_t rows_padded, T* c, int64_t ld) {
    std::fill_n(c, rows_padded * ld, T(0));
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            c[j * ld + i] = a.data[i * a.row + j * a.col];
        }
    }
}

template <class T>
Status solve_spd_packed(const SolveSpdPlan<T>& plan, const SolveSpdArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.d = d;
        pack.k = k;
        pack.a.set(lane, args.a.at(args.batch, problem));
        pack.b.set(lane, args.b.at(args.batch, problem));
        if (real) {
            pack.solution[lane] = k > 0 ? args.solution + problem * d * k : nullptr;
            pack.factor[lane] = args.factor != nullptr ? args.factor + problem * d * d : nullptr;
            pack.info[lane] = args.info + problem;
        }
    };
    return for_each_pack<T>(*plan.kernels, plan.pack, args.batch.count(), d * d * (d + k), fill,
                            plan.kernels->pack_solve_spd, kNothingAfter);
}

template <class T>
Status cholesky_solve_packed(const CholeskySolvePlan<T>& plan, const CholeskySolveArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.d = d;
        pack.k = k;
        pack.a.set(lane, args.factor.at(args.batch, problem));
        pack.b.set(lane, args.b.at(args.batch, problem));
        pack.solution[lane] = real ? args.solution + problem * d * k : nullptr;
    };
    return for_each_pack<T>(*plan.kernels, plan.pack, args.batch.count(), 2 * d * d * k, fill,
                            plan.kernels->pack_cholesky_solve, kNothingAfter);
}

// V = A⁻¹ grad.
template <class T>
CholeskySolveArgs<T> adjoint_of(const SolveNormalBackwardArgs<T>& args, T* adjoint) {
    CholeskySolveArgs<T> solve;
    solve.batch = args.batch;
    solve.d = args.d;
    solve.k = args.k;
    solve.factor = args.factor;
    solve.b = args.grad;
    solve.solution = adjoint;
    return solve;
}

}  // namespace

template <class T>
SolveSpdPlan<T> plan(const SolveSpdArgs<T>& args) {
    const int64_t d = args.d;
    SolveSpdPlan<T> plan;
    plan.kernels = &active_normal_kernels<T>();
    const NormalKernels<T>& kernels = *plan.kernels;
    plan.pack = plan_system_pack(kernels, args.batch.count(), d, args.k, kMostPackedVectors * kernels.lanes);
    plan.rows_padded = round_up(d, kernels.tile_rows);
    plan.ld = leading_dimension(kernels, plan.rows_padded);
    plan.ldz = round_up(args.k, kernels.lanes);
    Layout& own = plan.own_layout;
    plan.matrix = own.add<T>("matrix", plan.rows_padded * plan.ld);
    plan.floor = own.add<T>("floor", d);
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", d);
    plan.z = own.add<T>("z", d * plan.ldz);
    return plan;
}

template <class T>
Status run(const SolveSpdPlan<T>& plan, const SolveSpdArgs<T>& args, const Workspace&) {
    if (plan.pack.packed) {
        return solve_spd_packed(plan, args);
    }
    const NormalKernels<T>& kernels = *plan.kernels;
    const int64_t d = args.d;
    const int64_t k = args.k;
    auto body = [&](int64_t problem) {
        const CachedWorkspace own(plan.own_layout);
        T* c = own.get(plan.matrix);
        T* floor = own.zeroed(plan.floor);
        T* inverse_diagonal = own.get(plan.inverse_diagonal);
        T* z = own.get(plan.z);
        load_lower(args.a.at(args.batch, problem), d, plan.rows_padded, c, plan.ld);
        int64_t failed = 0;
        const Status status = factor_in_place(kernels, c, plan.ld, d, floor, inverse_diagonal, failed);
        if (status != Status::ok) {
            return status;
        }
        bool good = failed == 0;
        if (k > 0) {
            if (good) {
                load_rhs(args.b.at(args.batch, problem), d, k, z, plan.ldz);
                kernels.solve_transposed(c, plan.ld, d, inverse_diagonal, z, plan.ldz);
                kernels.solve_upper(c, plan.ld, d, inverse_diagonal, z, plan.ldz);
            }
            good = write_solution(z, plan.ldz, d, k, !good, args.solution + problem * d * k);
        }
        args.info[problem] = static_cast<int32_t>(failed != 0 ? failed : good ? 0 : d + 1);
        if (args.factor != nullptr) {
            write_factor(c, plan.ld, d, failed != 0, args.factor + problem * d * d);
        }
        return Status::ok;
    };
    return parallel_for(args.batch.count(), nanoseconds_of_products(d * d * (d / 3 + 2 * k)), body);
}

template <class T>
CholeskySolvePlan<T> plan(const CholeskySolveArgs<T>& args) {
    const int64_t d = args.d;
    CholeskySolvePlan<T> plan;
    plan.kernels = &active_normal_kernels<T>();
    const int64_t most = kMostPackedBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(d, 1);
    plan.pack = plan_system_pack(*plan.kernels, args.batch.count(), d, args.k, most);
    plan.columns = {args.k, kSolveColumns};
    Layout& own = plan.own_layout;
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", d);
    plan.z = own.add<T>("z", d * round_up(std::min(kSolveColumns, args.k), plan.kernels->lanes));
    plan.copy = own.add<T>("copy", args.factor.col == 1 ? 0 : d * d);
    return plan;
}

template <class T>
Status run(const CholeskySolvePlan<T>& plan, const CholeskySolveArgs<T>& args, const Workspace&) {
    if (plan.pack.packed) {
        return cholesky_solve_packed(plan, args);
    }
    const NormalKernels<T>& kernels = *plan.kernels;
    const int64_t d = args.d;
    const int64_t k = args.k;
    const int64_t pieces = plan.columns.pieces();
    auto body = [&](int64_t index) {
        const int64_t problem = index / pieces;
        const Range columns = plan.columns[index % pieces];
        const int64_t ldz = round_up(columns.size(), kernels.lanes);
        Matrix<const T> u = args.factor.at(args.batch, problem);
        Matrix<const T> b = args.b.at(args.batch, problem);
        b.data += columns.begin * b.col;
        const CachedWorkspace own(plan.own_layout);
        T* inverse_diagonal = own.get(plan.inverse_diagonal);
        T* z = own.get(plan.z);
        if (plan.copy.count > 0) {
            T* copy = own.get(plan.copy);
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t j = 0; j < d; ++j) {
                    copy[i * d + j] = u.data[i * u.row + j * u.col];
                }
            }
            u = {copy, d, 1};
        }
        for (int64_t i = 0; i < d; ++i) {
            inverse_diagonal[i] = T(1) / u.data[i * (u.row + 1)];
        }
        load_rhs(b, d, columns.size(), z, ldz);
        kernels.solve_transposed(u.data, u.row, d, inverse_diagonal, z, ldz);
        kernels.solve_upper(u.data, u.row, d, inverse_diagonal, z, ldz);
        T* to = args.solution + problem * d * k + columns.begin;
        for (int64_t i = 0; i < d; ++i) {
            std::copy_n(z + i * ldz, columns.size(), to + i * k);
        }
    };
    return parallel_for(args.batch.count() * pieces, nanoseconds_of_products(d * d * std::min(k, kSolveColumns)), body);
}

// The gradients from V, a problem in each vector lane.
template <class T>
Status gradients_packed(const SolveNormalBackwardPlan<T>& plan, const SolveNormalBackwardArgs<T>& args,
                        const T* adjoint) {
    const NormalKernels<T>& kernels = *plan.solve.kernels;
    const int64_t problems = args.batch.count();
    const int64_t n = args.n;
    const int64_t d = args.d;
    const int64_t k = args.k;
    const FixedCut packs{problems, kernels.lanes};
    auto body = [&](int64_t index) {
        const CachedWorkspace own(plan.own_layout);
        const Range range = packs[index];
        PackGradientArgs<T> pack;
        pack.n = n;
        pack.d = d;
        pack.k = k;
        for (int64_t lane = 0; lane < kernels.lanes; ++lane) {
            const bool real = range.begin + lane < problems;
            const int64_t problem = real ? range.begin + lane : problems - 1;
            pack.x.set(lane, args.x.at(args.batch, problem));
            pack.y.set(lane, args.y.at(args.batch, problem));
            pack.weight.set(lane, args.weight.at(args.batch, problem));
            pack.solution.set(lane, args.solution.at(args.batch, problem));
            pack.adjoint.set(lane, {adjoint + problem * d * k, k, 1});
            pack.failed[lane] = *args.info.at(args.batch, problem).data != 0;
            const auto of = [&](T* gradient, int64_t size) {
                return real && gradient != nullptr ? gradient + problem * size : nullptr;
            };
            pack.grad_x[lane] = of(args.grad_x, n * d);
            pack.grad_y[lane] = of(args.grad_y, n * k);
            pack.grad_weight[lane] = of(args.grad_weight, n);
            pack.grad_ridge[lane] = of(args.grad_ridge, d);
        }
        kernels.pack_gradient(pack, own.get(plan.work));
    };
    return parallel_for(packs.pieces(), nanoseconds_of_products(4 * n * d * k * kernels.lanes), body);
}

template <class T>
SolveNormalBackwardPlan<T> plan(const SolveNormalBackwardArgs<T>& args) {
    SolveNormalBackwardPlan<T> plan;
    plan.adjoint = plan.layout.template add<T>("adjoint", args.batch.count() * args.d * args.k);
    plan.solve = onestep::plan(adjoint_of(args, static_cast<T*>(nullptr)));
    const NormalKernels<T>& kernels = *plan.solve.kernels;
    plan.packed =
        args.k > 0 && args.k <= kPackGradients && plan_pack(kernels, args.batch.count(), args.n, args.d, args.k).packed;
    if (plan.packed) {
        plan.work = plan.own_layout.template add<T>("work", kernels.pack_gradient_work(args.d, args.k));
        return plan;
    }
    plan.rows = {args.n, kGradientRows};
    plan.solution = plan.own_layout.template add<T>("solution", args.d * args.k);
    plan.work = plan.own_layout.template add<T>("work", kernels.backward_work(args.d, args.k));
    return plan;
}

template <class T>
Status run(const SolveNormalBackwardPlan<T>& plan, const SolveNormalBackwardArgs<T>& args, const Workspace& workspace) {
    const NormalKernels<T>& kernels = *plan.solve.kernels;
    const int64_t n = args.n;
    const int64_t d = args.d;
    const int64_t k = args.k;
    T* adjoint = workspace.get(plan.adjoint);
    const Status status = run(plan.solve, adjoint_of(args, adjoint), workspace);
    if (status != Status::ok) {
        return status;
    }
    if (plan.packed) {
        return gradients_packed(plan, args, adjoint);
    }
    // A problem has at least one piece, even without rows: its first piece writes the gradient of ridge.
    const int64_t pieces = std::max<int64_t>(1, plan.rows.pieces());
    auto body = [&](int64_t index) {
        const int64_t problem = index / pieces;
        const Range range = plan.rows[index % pieces];
        const Matrix<const T> w = args.solution.at(args.batch, problem);
        const T* v = adjoint + problem * d * k;
        const bool failed = *args.info.at(args.batch, problem).data != 0;
        const CachedWorkspace own(plan.own_layout);
        T* solution = own.get(plan.solution);
        for (int64_t i = 0; i < d; ++i) {
            T sum = T(0);
            for (int64_t c = 0; c < k; ++c) {
                solution[i * k + c] = w.data[i * w.row + c * w.col];
                sum += solution[i * k + c] * v[i * k + c];
            }
            if (range.begin == 0) {
                args.grad_ridge[problem * d + i] = failed ? T(0) : -sum;
            }
        }
        BackwardRowsArgs<T> rows;
        rows.d = d;
        rows.k = k;
        rows.x = args.x.at(args.batch, problem);
        rows.y = args.y.at(args.batch, problem);
        rows.weight = args.weight.at(args.batch, problem);
        rows.solution = solution;
        rows.adjoint = v;
        rows.grad_x = args.grad_x != nullptr ? args.grad_x + problem * n * d : nullptr;
        rows.grad_y = args.grad_y != nullptr ? args.grad_y + problem * n * k : nullptr;
        rows.grad_weight = args.grad_weight != nullptr ? args.grad_weight + problem * n : nullptr;
        if (!failed) {
            kernels.backward_rows(rows, range.begin, range.end, own.get(plan.work));
            return;
        }
        const auto clear = [&](T* to, int64_t width) {
            if (to != nullptr) {
                std::fill_n(to + range.begin * width, std::max<int64_t>(0, range.size()) * width, T(0));
            }
        };
        clear(rows.grad_x, d);
        clear(rows.grad_y, k);
        clear(rows.grad_weight, 1);
    };
    return parallel_for(args.batch.count() * pieces, nanoseconds_of_products(4 * std::min(n, kGradientRows) * d * k),
                        body);
}

template <class T>
Status solve_spd(const SolveSpdArgs<T>& args) {
    return run_cached(args);
}

template <class T>
Status cholesky(const CholeskyArgs<T>& args) {
    SolveSpdArgs<T> solve;
    solve.batch = args.batch;
    solve.d = args.d;
    solve.a = args.a;
    solve.factor = args.factor;
    solve.info = args.info;
    return run_cached(solve);
}

template <class T>
Status cholesky_solve(const CholeskySolveArgs<T>& args) {
    return run_cached(args);
}

template <class T>
Status solve_normal_backward(const SolveNormalBackwardArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                                                   \
    template SolveSpdPlan<T> plan(const SolveSpdArgs<T>&);                                                       \
    template CholeskySolvePlan<T> plan(const CholeskySolveArgs<T>&);                                             \
    template SolveNormalBackwardPlan<T> plan(const SolveNormalBackwardArgs<T>&);                                 \
    template Status run(const SolveSpdPlan<T>&, const SolveSpdArgs<T>&, const Workspace&);                       \
    template Status run(const CholeskySolvePlan<T>&, const CholeskySolveArgs<T>&, const Workspace&);             \
    template Status run(const SolveNormalBackwardPlan<T>&, const SolveNormalBackwardArgs<T>&, const Workspace&); \
    template Status solve_spd(const SolveSpdArgs<T>&);                                                           \
    template Status cholesky(const CholeskyArgs<T>&);                                                            \
    template Status cholesky_solve(const CholeskySolveArgs<T>&);                                                 \
    template Status solve_normal_backward(const SolveNormalBackwardArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
