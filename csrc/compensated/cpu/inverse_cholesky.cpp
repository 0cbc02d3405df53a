// The entry inverse_cholesky: forward elimination of [Ã | 1], in place. Above the diagonal Ã becomes Lᵀ and below it,
// where Ã is not read, 1 becomes L⁻¹. Each step finishes kStep rows and subtracts their product from the rows below.
// For R, which is L, the part below the diagonal is left out.
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/parallel.hpp"
#include "base/singular.hpp"
#include "compensated/cpu/plan.hpp"
#include "normal/cpu/common.hpp"

namespace onestep {
namespace {

// Rows of a step: a multiple of every panel, so that steps start with one.
constexpr int64_t kStep = 192;
// Rows that a piece of work loads, updates or writes: kStep is a multiple, so that what an update leaves below the
// diagonal stays within the diagonal block of a step, which is written over.
constexpr int64_t kRows = 96;
// Panels of a step's rows that a piece of work finishes.
constexpr int64_t kPanels = 4;
// Rows and columns that are transposed at a time.
constexpr int64_t kSquare = 32;
static_assert(kStep % kRows == 0 && kRows % kSquare == 0);

template <class T>
InverseCholeskyPlan<T> with_tables() {
    InverseCholeskyPlan<T> plan;
    if constexpr (std::is_same_v<T, float>) {
        plan.kernels = &ONESTEP_KERNELS(compensated, f32);
        plan.factor = &ONESTEP_KERNELS(normal, f32);
    } else {
        plan.kernels = &ONESTEP_KERNELS(compensated, f64);
        plan.factor = &ONESTEP_KERNELS(normal, f64);
    }
    return plan;
}

// One matrix of the batch, with the memory that its thread has for it.
template <class T>
struct Elimination {
    const InverseCholeskyPlan<T>& plan;
    int64_t n;
    bool unit;
    T* c;
    T* floor;
    T* inverse_diagonal;
    T* diagonal;
    T* right;
    int32_t* bad;

    int64_t ld() const { return plan.ld; }
    FixedCut blocks() const { return {n, kRows}; }

    // c = Ã above the diagonal, zeros below; the damping is added, and what is not finite noted.
    Status load(const Matrix<const T>& a, T damping) {
        double trace = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            trace += static_cast<double>(a.data[i * (a.row + a.col)]);
        }
        const T added = static_cast<T>(trace / static_cast<double>(n) * static_cast<double>(damping));
        std::fill(c + n * ld(), c + plan.rows_padded * ld(), T(0));
        auto body = [&](int64_t block) {
            const Range range = blocks()[block];
            bool finite = true;
            for (int64_t i = range.begin; i < range.end; ++i) {
                T* row = c + i * ld();
                std::fill_n(row, ld(), T(0));
                const T* from = a.data + (n - 1 - i) * a.row + (n - 1) * a.col;
                for (int64_t j = i; j < n; ++j) {
                    row[j] = from[-j * a.col];
                    finite = finite && std::abs(row[j]) <= std::numeric_limits<T>::max();
                }
                row[i] += added;
                floor[i] = singular_floor(row[i]);
            }
            bad[block] = finite ? 0 : 1;
        };
        return parallel_for(blocks().pieces(), nanoseconds_of_bytes(kRows * n * static_cast<int64_t>(sizeof(T))), body);
    }

    bool finite() const {
        return std::all_of(bad, bad + blocks().pieces(), [](int32_t found) { return found == 0; });
    }

    // Rows [k0, k1), whose part up to the diagonal block is factored: L⁻¹ of the rows from the left, Lᵀ to the right.
    Status finish_rows(int64_t k0, int64_t k1) {
        const NormalKernels<T>& factor = *plan.factor;
        const int64_t panel = plan.kernels->panel;
        const int64_t before = unit ? 0 : k0 / panel;
        const int64_t last = ceil_div(n, panel);
        const int64_t first = std::min(ceil_div(k1, panel), last);
        const FixedCut left{before, kPanels};
        const FixedCut after{last - first, kPanels};
        auto body = [&](int64_t piece) {
            if (piece == 0 && unit) {
                return;
            }
            if (piece == 0) {
                const int64_t size = k1 - k0;
                const int64_t ldz = round_up(size, factor.lanes);
                std::fill_n(diagonal, size * ldz, T(0));
                for (int64_t i = 0; i < size; ++i) {
                    diagonal[i * ldz + i] = T(1);
                }
                factor.solve_transposed(c + k0 * ld() + k0, ld(), size, inverse_diagonal + k0, diagonal, ldz);
            } else if (piece <= left.pieces()) {
                const Range panels = left[piece - 1];
                factor.factor_panel(c, ld(), k0, k1, panels.begin * panel, panels.end * panel, inverse_diagonal);
            } else {
                const Range panels = after[piece - 1 - left.pieces()];
                factor.factor_panel(c, ld(), k0, k1, (first + panels.begin) * panel, (first + panels.end) * panel,
                                    inverse_diagonal);
            }
        };
        const int64_t size = k1 - k0;
        const Status status = parallel_for(1 + left.pieces() + after.pieces(),
                                           nanoseconds_of_products(kPanels * panel * size * size / 2), body);
        // The inverse of the diagonal block takes its place, which the others have read.
        const int64_t ldz = round_up(size, factor.lanes);
        for (int64_t i = 0; i < size && !unit && status == Status::ok; ++i) {
            std::copy_n(diagonal + i * ldz, size, c + (k0 + i) * ld() + k0);
        }
        return status;
    }

    // The rows below k1 take the step's: the columns up to k1, where L⁻¹ grows, and those from their diagonal on.
    Status update_rows(int64_t k0, int64_t k1) {
        const CompensatedKernels<T>& kernels = *plan.kernels;
        const int64_t depth = k1 - k0;
        const int64_t unused = unit ? k1 / kernels.panel : 0;
        const FixedCut packs{ceil_div(n, kernels.panel) - unused, 2 * kPanels};
        auto pack = [&](int64_t piece) {
            const Range columns{(unused + packs[piece].begin) * kernels.panel,
                                std::min(n, (unused + packs[piece].end) * kernels.panel)};
            kernels.pack_right(c + k0 * ld() + columns.begin, ld(), depth, columns.size(),
                               right + columns.begin * depth);
        };
        const Status status = parallel_for(
            packs.pieces(), nanoseconds_of_bytes(2 * kPanels * kernels.panel * depth * static_cast<int64_t>(sizeof(T))),
            pack);
        if (status != Status::ok) {
            return status;
        }
        const FixedCut cut{n - k1, kRows};
        auto body = [&](int64_t piece) {
            const CachedWorkspace own(plan.rows_layout);
            T* left = own.get(plan.left);
            const int64_t begin = k1 + cut[piece].begin;
            const int64_t rows = cut[piece].size();
            kernels.pack_left(lower_factor(k0) + begin, ld(), depth, rows, left);
            T* to = c + begin * ld();
            if (!unit) {
                kernels.multiply_add(left, right, depth, rows, k1, to, ld());
            }
            kernels.multiply_add(left, right + begin * depth, depth, rows, n - begin, to + begin, ld());
        };
        return parallel_for(cut.pieces(), nanoseconds_of_products(kRows * depth * ((unit ? 0 : k1) + (n - k1) / 2)),
                            body);
    }

    // Lᵀ of a step, right of its diagonal block.
    const T* lower_factor(int64_t k0) const { return c + k0 * ld(); }

    // 0, or the order of the minor that is not positive definite.
    Status eliminate(int64_t& failed) {
        failed = 0;
        for (int64_t k0 = 0; k0 < n; k0 += kStep) {
            const int64_t k1 = std::min(k0 + kStep, n);
            failed = plan.factor->factor_diagonal(c, ld(), k0, k1, floor, inverse_diagonal);
            if (failed != 0) {
                return Status::ok;
            }
            Status status = finish_rows(k0, k1);
            if (status == Status::ok && k1 < n) {
                status = update_rows(k0, k1);
            }
            if (status != Status::ok) {
                return status;
            }
        }
        return Status::ok;
    }

    // A square of R from the diagonal on: Lᵀ reversed is transposed by way of memory that stays in cache.
    void write_square(int64_t i0, int64_t j0, T* to) const {
        T square[kSquare][kSquare];
        const int64_t rows = std::min(kSquare, n - i0);
        const int64_t columns = std::min(kSquare, n - j0);
        for (int64_t j = 0; j < columns; ++j) {
            const int64_t row = n - 1 - j0 - j;
            const T* from = c + row * ld() + n - 1 - i0;
            for (int64_t i = 0; i < rows; ++i) {
                square[i][j] = from[-i] * inverse_diagonal[row];
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            const int64_t first = std::max(i0 + i + 1 - j0, int64_t{0});
            for (int64_t j = first; j < columns; ++j) {
                to[(i0 + i) * n + j0 + j] = square[i][j];
            }
            if (first > 0 && first <= columns) {
                to[(i0 + i) * (n + 1)] = c[(n - 1 - i0 - i) * (ld() + 1)];
            }
        }
    }

    // U, which is L⁻¹ reversed, or R; NaN where there is none.
    Status write(bool good, T* to) {
        auto body = [&](int64_t block) {
            const Range range = blocks()[block];
            for (int64_t i = range.begin; i < range.end; ++i) {
                T* row = to + i * n;
                if (!good) {
                    std::fill_n(row, n, std::numeric_limits<T>::quiet_NaN());
                    continue;
                }
                std::fill_n(row, i, T(0));
                if (unit) {
                    continue;
                }
                const T* from = c + (n - 1 - i) * ld() + n - 1;
                for (int64_t j = i; j < n; ++j) {
                    row[j] = from[-j];
                }
            }
            for (int64_t j = range.begin; good && unit && j < n; j += kSquare) {
                for (int64_t i = range.begin; i < std::min(range.end, j + kSquare); i += kSquare) {
                    write_square(i, j, to);
                }
            }
        };
        return parallel_for(blocks().pieces(), nanoseconds_of_bytes(kRows * n * static_cast<int64_t>(sizeof(T))), body);
    }
};

template <class T>
Status inverse_cholesky_packed(const InverseCholeskyPlan<T>& plan, const InverseCholeskyArgs<T>& args) {
    const int64_t n = args.n;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.d = n;
        pack.a.set(lane, args.a.at(args.batch, problem));
        pack.ridge.set(lane, args.damping.at(args.batch, problem));
        if (real) {
            pack.factor[lane] = args.factor + problem * n * n;
            pack.info[lane] = args.info + problem;
        }
    };
    return for_each_pack<T>(*plan.factor, plan.pack, args.batch.count(), n * n * n, fill, plan.factor->pack_inverse,
                            kNothingAfter);
}

}  // namespace

template <class T>
InverseCholeskyPlan<T> plan(const InverseCholeskyArgs<T>& args) {
    const int64_t n = args.n;
    InverseCholeskyPlan<T> plan = with_tables<T>();
    const int64_t panel = plan.kernels->panel;
    if (!args.unit) {
        plan.pack = plan_pack(*plan.factor, args.batch.count(), n, n, 0);
    }
    plan.rows_padded = round_up(n, plan.factor->tile_rows);
    plan.ld = round_up(std::max<int64_t>(plan.rows_padded, 1), panel);
    // Rows that are a multiple of a page apart fall on the same sets of the cache.
    plan.ld += plan.ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? panel : 0;
    const int64_t step = std::min(kStep, plan.rows_padded);
    Layout& own = plan.own_layout;
    plan.matrix = own.add<T>("matrix", plan.rows_padded * plan.ld);
    plan.floor = own.add<T>("floor", plan.rows_padded);
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", plan.rows_padded);
    plan.diagonal = own.add<T>("diagonal", step * round_up(step, plan.factor->lanes));
    plan.right = own.add<T>("right", round_up(n, panel) * step);
    plan.bad = own.add<int32_t>("bad", FixedCut{n, kRows}.pieces());
    plan.left = plan.rows_layout.template add<T>("left", kRows * step);
    return plan;
}

template <class T>
Status run(const InverseCholeskyPlan<T>& plan, const InverseCholeskyArgs<T>& args, const Workspace&) {
    const int64_t n = args.n;
    if (n == 0) {
        std::fill_n(args.info, args.batch.count(), 0);
        return Status::ok;
    }
    if (plan.pack.packed) {
        return inverse_cholesky_packed(plan, args);
    }
    auto body = [&](int64_t problem) {
        const CachedWorkspace own(plan.own_layout);
        Elimination<T> matrix{plan,
                              n,
                              args.unit,
                              own.get(plan.matrix),
                              own.get(plan.floor),
                              own.get(plan.inverse_diagonal),
                              own.get(plan.diagonal),
                              own.get(plan.right),
                              own.get(plan.bad)};
        Status status = matrix.load(args.a.at(args.batch, problem), *args.damping.at(args.batch, problem).data);
        int64_t failed = 0;
        const bool finite = status == Status::ok && matrix.finite();
        if (finite) {
            status = matrix.eliminate(failed);
        }
        if (status == Status::ok) {
            args.info[problem] = finite ? static_cast<int32_t>(failed) : kNotFinite;
            status = matrix.write(args.info[problem] == 0, args.factor + problem * n * n);
        }
        return status;
    };
    return parallel_for(args.batch.count(), nanoseconds_of_products(n * n * (n / 3 + 1)), body);
}

template <class T>
Status inverse_cholesky(const InverseCholeskyArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                                           \
    template InverseCholeskyPlan<T> plan(const InverseCholeskyArgs<T>&);                                 \
    template Status run(const InverseCholeskyPlan<T>&, const InverseCholeskyArgs<T>&, const Workspace&); \
    template Status inverse_cholesky(const InverseCholeskyArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
