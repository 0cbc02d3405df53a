// The entry solve_normal: from a Gram matrix to the solution, its condition, refinement and jitter.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/checks.hpp"
#include "base/singular.hpp"
#include "normal/cpu/gram.hpp"

namespace onestep {
namespace {

// Tenfold steps that jitter may take: the last one adds the mean diagonal itself or more.
constexpr int kMostJitterSteps = 20;

template <class T>
FinishPlan<T> plan_finish(const SolveNormalArgs<T>& args, const GramPlan<T>& gram) {
    const NormalKernels<T>& kernels = *gram.kernels;
    const int64_t d = args.d;
    FinishPlan<T> plan;
    plan.ldz = round_up(args.k, kernels.lanes);
    plan.ldk = round_up(args.k, active_normal_kernels<double>().lanes);
    // Pieces as for Gram, so that a long problem is shared among threads and summed in a fixed order.
    plan.pieces = {args.n, std::clamp<int64_t>(args.n / kSlabRows, 1, kMostPieces)};
    const bool refines = args.refine > 0;
    Layout& own = plan.own_layout;
    plan.z = own.add<T>("z", d * plan.ldz);
    plan.floor = own.add<T>("floor", d);
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", d);
    plan.work = own.add<T>("work", d * kernels.lanes);
    plan.solution = own.add<double>("solution", refines ? d * plan.ldk : 0);
    plan.penalty = own.add<double>("penalty", d);
    plan.saved = own.add<T>("saved", args.jitter > 0.0 ? gram.size() : 0);
    plan.sums = own.add<double>("sums", refines ? 2 * plan.pieces.pieces * d * plan.ldk : 0);
    plan.piece_work = plan.piece_layout.template add<double>("work", kBlockRows * (d + plan.ldk));
    return plan;
}

template <class T>
T symmetric_norm1(const T* upper, int64_t ld, int64_t d, T* sums) {
    std::fill_n(sums, d, T(0));
    for (int64_t i = 0; i < d; ++i) {
        sums[i] += std::abs(upper[i * ld + i]);
        for (int64_t j = i + 1; j < d; ++j) {
            const T size = std::abs(upper[i * ld + j]);
            sums[i] += size;
            sums[j] += size;
        }
    }
    T norm = T(0);
    for (int64_t i = 0; i < d; ++i) {
        norm = std::max(norm, sums[i]);
    }
    return norm;
}

// One problem, from its Gram matrix [A | R] in c to everything that is asked for.
template <class T>
class Finish {
 public:
    Finish(const SolveNormalPlan<T>& plan, const SolveNormalArgs<T>& args, int64_t problem, T* c, int64_t ld,
           const Workspace& own)
        : plan_(plan.finish),
          kernels_(*plan.gram.kernels),
          args_(args),
          problem_(problem),
          c_(c),
          ld_(ld),
          size_(plan.gram.size()),
          own_(own),
          z_(own.get(plan.finish.z)),
          inverse_diagonal_(own.get(plan.finish.inverse_diagonal)),
          penalty_(own.get(plan.finish.penalty)) {}

    Status run() {
        const int64_t d = args_.d;
        const int64_t k = args_.k;
        add_ridge();
        Status status = factor();
        if (status != Status::ok) {
            return status;
        }
        bool good = failed_ == 0;
        if (good) {
            solve();
            if (args_.refine > 0) {
                status = refine();
                if (status != Status::ok) {
                    return status;
                }
            }
        }
        T* solution = args_.solution + problem_ * d * k;
        good = args_.refine > 0 ? write_solution(own_.get(plan_.solution), plan_.ldk, d, k, !good, solution)
                                : write_solution(z_, plan_.ldz, d, k, !good, solution);
        args_.info[problem_] = static_cast<int32_t>(failed_ != 0 ? failed_ : good ? 0 : d + 1);
        if (args_.factor != nullptr) {
            write_factor(c_, ld_, d, failed_ != 0, args_.factor + problem_ * d * d);
        }
        if (args_.rcond != nullptr) {
            const T inverse_norm =
                failed_ != 0 ? T(0) : kernels_.inverse_norm1(c_, ld_, d, inverse_diagonal_, own_.get(plan_.work));
            args_.rcond[problem_] = failed_ != 0 ? T(0) : T(1) / (norm_ * inverse_norm);
        }
        if (args_.jittered != nullptr) {
            args_.jittered[problem_] = failed_ != 0 ? T(0) : added_;
        }
        return Status::ok;
    }

 private:
    void add_ridge() {
        const int64_t d = args_.d;
        const Matrix<const T> ridge = args_.ridge.at(args_.batch, problem_);
        for (int64_t i = 0; i < d; ++i) {
            const T lambda = ridge.data[i * ridge.row];
            T& diagonal = c_[i * ld_ + i];
            diagonal += lambda;
            penalty_[i] = static_cast<double>(lambda);
            mean_diagonal_ += diagonal / static_cast<T>(d);
        }
        load_rhs<T>({c_ + d, ld_, 1}, d, args_.k, z_, plan_.ldz);
    }

    // The factor of A + diag(ridge), with jitter where that fails and jitter is asked for.
    Status factor() {
        const int64_t d = args_.d;
        const bool jitters = args_.jitter > 0.0;
        T* saved = own_.get(plan_.saved);
        T* floor = own_.get(plan_.floor);
        if (jitters) {
            std::copy_n(c_, size_, saved);
        }
        for (int attempt = 0;; ++attempt) {
            for (int64_t i = 0; i < d; ++i) {
                floor[i] = singular_floor(c_[i * ld_ + i]);
            }
            norm_ = args_.rcond != nullptr ? symmetric_norm1(c_, ld_, d, own_.get(plan_.work)) : T(0);
            const Status status = factor_in_place(kernels_, c_, ld_, d, floor, inverse_diagonal_, failed_);
            if (status != Status::ok || failed_ == 0 || !jitters || attempt == kMostJitterSteps ||
                !std::isfinite(mean_diagonal_) || added_ >= mean_diagonal_) {
                return status;
            }
            added_ = mean_diagonal_ * static_cast<T>(args_.jitter * std::pow(10.0, attempt));
            std::copy_n(saved, size_, c_);
            for (int64_t i = 0; i < d; ++i) {
                c_[i * ld_ + i] += added_;
            }
        }
    }

    // z = A⁻¹z.
    void solve() {
        kernels_.solve_transposed(c_, ld_, args_.d, inverse_diagonal_, z_, plan_.ldz);
        kernels_.solve_upper(c_, ld_, args_.d, inverse_diagonal_, z_, plan_.ldz);
    }

    // w += A⁻¹(XᵀD(Y − XW) − diag(ridge) W), `refine` times, with the residual in double: corrected semi-normal
    // equations (Björck, "Stability analysis of the method of seminormal equations", 1987).
    Status refine() {
        const int64_t d = args_.d;
        const int64_t k = args_.k;
        const int64_t ldk = plan_.ldk;
        const RowsArgs<T> rows = rows_of<T>(args_, problem_);
        double* w = own_.get(plan_.solution);
        double* sums = own_.get(plan_.sums);
        double* high = sums;
        double* low = high + d * ldk;
        for (int64_t i = 0; i < d; ++i) {
            penalty_[i] += static_cast<double>(added_);
            for (int64_t col = 0; col < ldk; ++col) {
                w[i * ldk + col] = col < k ? static_cast<double>(z_[i * plan_.ldz + col]) : 0.0;
            }
        }
        const int64_t products = 2 * ceil_div(args_.n, plan_.pieces.pieces) * d * ldk;
        for (int64_t step = 0; step < args_.refine; ++step) {
            auto body = [&](int64_t piece) {
                const CachedWorkspace own(plan_.piece_layout);
                double* g = sums + 2 * piece * d * ldk;
                std::fill_n(g, 2 * d * ldk, 0.0);
                const Range range = plan_.pieces.longer_first(piece);
                kernels_.residual_rows(rows, range.begin, range.end, w, g, ldk, own.get(plan_.piece_work));
            };
            const Status status = parallel_for(plan_.pieces.pieces, nanoseconds_of_products(2 * products), body);
            if (status != Status::ok) {
                return status;
            }
            for (int64_t piece = 1; piece < plan_.pieces.pieces; ++piece) {
                const double* part = sums + 2 * piece * d * ldk;
                for (int64_t e = 0; e < d * ldk; ++e) {
                    add_compensated(part[e], part[d * ldk + e], high[e], low[e]);
                }
            }
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t c = 0; c < plan_.ldz; ++c) {
                    const int64_t at = i * ldk + c;
                    z_[i * plan_.ldz + c] = c < k ? static_cast<T>((high[at] - penalty_[i] * w[at]) + low[at]) : T(0);
                }
            }
            solve();
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t c = 0; c < k; ++c) {
                    w[i * ldk + c] += static_cast<double>(z_[i * plan_.ldz + c]);
                }
            }
        }
        return Status::ok;
    }

    const FinishPlan<T>& plan_;
    const NormalKernels<T>& kernels_;
    const SolveNormalArgs<T>& args_;
    const int64_t problem_;
    T* const c_;
    const int64_t ld_;
    const int64_t size_;  // of the matrix
    const Workspace& own_;
    T* const z_;
    T* const inverse_diagonal_;
    double* const penalty_;
    T mean_diagonal_ = T(0);
    T added_ = T(0);  // jitter
    T norm_ = T(0);
    int64_t failed_ = 0;
};

template <class T>
Status finish(const SolveNormalPlan<T>& plan, const SolveNormalArgs<T>& args, int64_t problem, T* c, int64_t ld) {
    const CachedWorkspace own(plan.finish.own_layout);
    const Workspace view = own;
    return Finish<T>(plan, args, problem, c, ld, view).run();
}

template <class T>
Status solve_packed(const SolveNormalPlan<T>& plan, const SolveNormalArgs<T>& args) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const NormalKernels<T>& kernels = *plan.gram.kernels;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.n = args.n;
        pack.d = d;
        pack.k = k;
        pack.refine = args.refine;
        set_lane_rows(kernels, args, problem, lane, pack);
        pack.ridge.set(lane, args.ridge.at(args.batch, problem));
        if (real) {
            pack.solution[lane] = args.solution + problem * d * k;
            pack.factor[lane] = args.factor != nullptr ? args.factor + problem * d * d : nullptr;
            pack.rcond[lane] = args.rcond != nullptr ? args.rcond + problem : nullptr;
            pack.info[lane] = args.info + problem;
        }
    };
    const auto after = [&](int64_t problem) {
        if (args.jittered != nullptr) {
            args.jittered[problem] = T(0);
        }
        if (args.jitter > 0.0 && args.info[problem] > 0 && args.info[problem] <= d) {
            const CachedWorkspace own(plan.gram.own_layout);
            return finish(plan, args, problem, gram_of_problem(plan.gram, rows_of<T>(args, problem), own),
                          plan.gram.ld);
        }
        return Status::ok;
    };
    return for_each_pack<T>(kernels, plan.pack, args.batch.count(),
                            args.n * d * (d + k * (1 + 4 * args.refine)) + d * d * d, fill, kernels.pack_solve_normal,
                            after);
}

}  // namespace

template <class T>
SolveNormalPlan<T> plan(const SolveNormalArgs<T>& args) {
    const NormalKernels<T>& kernels = active_normal_kernels<T>();
    const int64_t problems = args.batch.count();
    SolveNormalPlan<T> plan;
    plan.pack = plan_pack(kernels, problems, args.n, args.d, args.k, static_cast<bool>(args.x_half), args.refine > 0);
    // A problem of a pack that gets jitter goes on alone, its rows in one piece.
    const int64_t together = plan.pack.packed ? std::max(problems, kFewProblems) : problems;
    plan.gram = plan_gram(kernels, together, args.n, args.d, args.k);
    plan.finish = plan_finish(args, plan.gram);
    plan.layout = plan.gram.layout;
    plan.matrices = plan.layout.template add<T>("matrices", plan.gram.groups > 1 ? together * plan.gram.size() : 0);
    return plan;
}

template <class T>
Status run(const SolveNormalPlan<T>& plan, const SolveNormalArgs<T>& given, const Workspace& workspace) {
    SolveNormalArgs<T> args = given;
    const auto uniform = static_cast<T>(args.uniform_ridge);
    if (!args.ridge) {
        args.ridge.data = &uniform;  // all strides 0
    }
    if (any_negative(args.weight, args.batch, args.n)) {
        return Status::negative_weight;
    }
    if (any_negative(args.ridge, args.batch, args.d)) {
        return Status::negative_ridge;
    }
    if (plan.pack.packed) {
        return solve_packed(plan, args);
    }
    return for_each_gram(plan.gram, args, workspace, workspace.get(plan.matrices),
                         nanoseconds_of_products(args.d * args.d * (args.d / 3 + 2 * args.k)),
                         [&](int64_t problem, T* c, int64_t ld) { return finish(plan, args, problem, c, ld); });
}

template <class T>
Status solve_normal(SolveNormalArgs<T> args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                                   \
    template SolveNormalPlan<T> plan(const SolveNormalArgs<T>&);                                 \
    template Status run(const SolveNormalPlan<T>&, const SolveNormalArgs<T>&, const Workspace&); \
    template Status solve_normal(SolveNormalArgs<T>);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
