// What the entries of the family share on the CPU: the table of kernels, packs of problems, one matrix's factor.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/parallel.hpp"
#include "base/target.hpp"
#include "normal/cpu/plan.hpp"

namespace onestep {

template <class T>
const NormalKernels<T>& active_normal_kernels() {
    if constexpr (std::is_same_v<T, float>) {
        return ONESTEP_KERNELS(normal, f32);
    } else {
        return ONESTEP_KERNELS(normal, f64);
    }
}

// Columns of a work matrix: whole panels, and one panel more where all rows would fall on the same cache sets.
template <class T>
int64_t leading_dimension(const NormalKernels<T>& kernels, int64_t columns) {
    const int64_t ld = round_up(std::max<int64_t>(columns, 1), kernels.panel);
    return ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? ld + kernels.panel : ld;
}

// ---------------------------------------------------------------- packs

// The rows of a pack's problems, if they are of 16 bits, are widened first, and stay in the second-level cache.
inline constexpr int64_t kMostWidenedBytes = int64_t{256} << 10;

// Whether problems are small enough to be computed one in each vector lane.
template <class T>
bool fits_pack(const NormalKernels<T>& kernels, int64_t problems, int64_t n, int64_t d, int64_t k, bool half) {
    const int64_t widened = half ? kernels.lanes * n * d : 0;
    return problems > 0 && d > 0 && d <= kPackFeatures && k <= kPackTargets &&
           widened * static_cast<int64_t>(sizeof(T)) <= kMostWidenedBytes;
}

// `work` elements for a pack's kernel, and its rows of 16 bits.
template <class T>
void add_pack_memory(PackPlan<T>& plan, const NormalKernels<T>& kernels, int64_t work, int64_t n, int64_t d,
                     bool half) {
    plan.work = plan.own_layout.template add<T>("work", work);
    plan.widened = plan.own_layout.template add<T>("widened", plan.packed && half ? kernels.lanes * n * d : 0);
}

// Small problems are solved one in each vector lane if there are enough of them, or if each is tiny. Packs that refine
// have no more rows than are summed in T: those of longer problems are shared among threads.
template <class T>
PackPlan<T> plan_pack(const NormalKernels<T>& kernels, int64_t problems, int64_t n, int64_t d, int64_t k,
                      bool half = false, bool refines = false) {
    PackPlan<T> plan;
    plan.packed = fits_pack(kernels, problems, n, d, k, half) && (problems >= kernels.lanes / 2 || n * d <= 4096) &&
                  (!refines || n <= kSlabRows);
    add_pack_memory(plan, kernels, plan.packed ? kernels.pack_work(d, k, refines) : 0, n, d, half);
    return plan;
}

// The same for systems, of whose right-hand sides a pack takes kPackTargets at a time. With more than that, one problem
// fills the vectors, too, and shares its columns among threads: packs are to be whole and many, and the columns few.
template <class T>
PackPlan<T> plan_system_pack(const NormalKernels<T>& kernels, int64_t problems, int64_t d, int64_t k,
                             int64_t most_columns) {
    if (k > kPackTargets && (k > most_columns || problems < 4 * kernels.lanes)) {
        return {};
    }
    return plan_pack(kernels, problems, d, d, std::min(k, kPackTargets));
}

// Lane `lane` of a pack gets the rows of a problem.
template <class T, class Args>
void set_lane_rows(const NormalKernels<T>& kernels, const Args& args, int64_t problem, int64_t lane,
                   PackArgs<T>& pack) {
    if (args.x_half) {
        T* to = pack.widened + lane * args.n * args.d;
        kernels.widen_rows(args.x_half.element, args.x_half.rows.at(args.batch, problem), args.n, args.d, to);
        pack.x.set(lane, {to, args.d, 1});
    } else {
        pack.x.set(lane, args.x.at(args.batch, problem));
    }
    pack.y.set(lane, args.y.at(args.batch, problem));
    pack.weight.set(lane, args.weight.at(args.batch, problem));
}

// For every pack: calls fill(pack, lane, problem, real) for each lane, then solve(pack, work), then after(problem) for
// each of its problems, which returns a Status. Lanes beyond the last problem get that problem again with `real` false:
// their input is valid, and they must write nothing.
template <class T, class Fill, class Solve, class After>
Status for_each_pack(const NormalKernels<T>& kernels, const PackPlan<T>& plan, int64_t problems, int64_t products_each,
                     const Fill& fill, const Solve& solve, const After& after) {
    const FixedCut packs{problems, kernels.lanes};
    auto body = [&](int64_t index) {
        PackArgs<T> pack;
        const CachedWorkspace own(plan.own_layout);
        pack.widened = own.get(plan.widened);
        const Range range = packs[index];
        for (int64_t lane = 0; lane < kernels.lanes; ++lane) {
            const bool real = range.begin + lane < problems;
            pack.clear(lane);
            fill(pack, lane, real ? range.begin + lane : problems - 1, real);
        }
        solve(pack, own.get(plan.work));
        for (int64_t problem = range.begin; problem < range.end; ++problem) {
            const Status status = after(problem);
            if (status != Status::ok) {
                return status;
            }
        }
        return Status::ok;
    };
    return parallel_for(packs.pieces(), nanoseconds_of_products(products_each * kernels.lanes), body);
}

inline constexpr auto kNothingAfter = [](int64_t) { return Status::ok; };

// ---------------------------------------------------------------- one matrix: factor, load, write

// Matrices from this size on share the wide steps of their factorisation among threads.
inline constexpr int64_t kParallelFactor = 256;

// Upper Cholesky factor of c in place; `failed` is 0 or the order of the failed minor. The wide steps are shared among
// threads when the caller is not itself one of several.
template <class T>
Status factor_in_place(const NormalKernels<T>& kernels, T* c, int64_t ld, int64_t d, const T* floor,
                       T* inverse_diagonal, int64_t& failed) {
    failed = 0;
    for (int64_t k0 = 0; k0 < d; k0 += kFactorRows) {
        const int64_t k1 = std::min(k0 + kFactorRows, d);
        failed = kernels.factor_diagonal(c, ld, k0, k1, floor, inverse_diagonal);
        if (failed != 0 || k1 == d) {
            return Status::ok;
        }
        const int64_t first = k1 / kernels.panel;  // kFactorRows is a multiple of every panel
        const int64_t last = ceil_div(d, kernels.panel);
        if (d < kParallelFactor) {
            kernels.factor_panel(c, ld, k0, k1, k1, last * kernels.panel, inverse_diagonal);
            kernels.factor_update(c, ld, k0, k1, d, k1, last * kernels.panel);
            continue;
        }
        auto panel = [&](int64_t at) {
            const int64_t c0 = (first + at) * kernels.panel;
            kernels.factor_panel(c, ld, k0, k1, c0, c0 + kernels.panel, inverse_diagonal);
        };
        auto update = [&](int64_t at) {
            // Panels further right have more rows: taking them from both ends in turn evens out the work.
            const int64_t turned = at % 2 == 0 ? at / 2 : last - first - 1 - at / 2;
            const int64_t c0 = (first + turned) * kernels.panel;
            kernels.factor_update(c, ld, k0, k1, d, c0, c0 + kernels.panel);
        };
        const int64_t block = (k1 - k0) * kernels.panel;
        Status status = parallel_for(last - first, nanoseconds_of_products(block * (k1 - k0) / 2), panel);
        if (status == Status::ok) {
            status = parallel_for(last - first, nanoseconds_of_products(block * (d - k1) / 2), update);
        }
        if (status != Status::ok) {
            return status;
        }
    }
    return Status::ok;
}

template <class T>
void write_factor(const T* c, int64_t ld, int64_t d, bool failed, T* to) {
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t j = 0; j < d; ++j) {
            to[i * d + j] = failed ? std::numeric_limits<T>::quiet_NaN() : j < i ? T(0) : c[i * ld + j];
        }
    }
}

// Loads d × k right-hand sides, zero-padded to whole vectors.
template <class T>
void load_rhs(const Matrix<const T>& from, int64_t d, int64_t k, T* z, int64_t ldz) {
    for (int64_t i = 0; i < d; ++i) {
        for (int64_t c = 0; c < ldz; ++c) {
            z[i * ldz + c] = c < k ? from.data[i * from.row + c * from.col] : T(0);
        }
    }
}

// Writes the solution; false and NaN throughout if any of it is not finite or `failed`.
template <class T, class Source>
bool write_solution(const Source* z, int64_t ldz, int64_t d, int64_t k, bool failed, T* to) {
    bool good = !failed;
    for (int64_t i = 0; i < d && good; ++i) {
        for (int64_t c = 0; c < k; ++c) {
            to[i * k + c] = static_cast<T>(z[i * ldz + c]);
            good = good && std::isfinite(to[i * k + c]);
        }
    }
    if (!good) {
        std::fill_n(to, d * k, std::numeric_limits<T>::quiet_NaN());
    }
    return good;
}

}  // namespace onestep
