// The entry solve_segments: ragged problems that gather their rows and share a base matrix.
//
// A problem with many rows is solved as solve_normal does. One with fewer rows than features is cheaper in the dual
// form, if base + ridge = UᵀU is well conditioned: with Z = XU⁻¹ (computed once for all rows) and S = D^½Z of the
// problem's rows, A = Uᵀ(I + SᵀS)U, so that W = U⁻¹Sᵀ(I + SSᵀ)⁻¹D^½Y, where the matrix to factor is n × n.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/checks.hpp"
#include "base/singular.hpp"
#include "normal/cpu/gram.hpp"

namespace onestep {
namespace {

// Problems with so many rows share them among threads.
constexpr int64_t kLongRows = 2 * kSlabRows;
// The others are cut into about so many pieces: enough that the last one to end keeps no thread waiting for long,
constexpr int64_t kSegmentPieces = 512;
// each of no less work than so many problems without rows.
constexpr int64_t kLeastSegments = 8;
// Rows of X that are whitened at a time.
constexpr int64_t kWhitenRows = 256;
// Whitened rows take no more memory than this.
constexpr int64_t kMostWhitenedBytes = int64_t{1} << 29;
// base + ridge is well conditioned if the reciprocal of its condition exceeds this many epsilons.
constexpr int kWhitenEpsilons = 1024;

// Multiply-adds of a problem of n rows: Gram matrix, factor and solves.
double primal_products(double n, double d, double k) { return d * d * (n / 2 + d / 6 + k) + n * d * k; }
double dual_products(double n, double d, double k) { return primal_products(d, n, k) + k * d * d; }

template <class T>
bool shares_ridge(const SolveSegmentsArgs<T>& args) {
    return args.ridge.data == nullptr || args.ridge.row == 0;
}

template <class T>
int64_t rows_in(const SolveSegmentsArgs<T>& args, int64_t segment) {
    return args.offsets[segment + 1] - args.offsets[segment];
}

// Whether what the dual form saves is well above what whitening the rows of X takes.
template <class T>
bool pays_to_whiten(const SolveSegmentsArgs<T>& args, int64_t ldd) {
    const bool positive = args.base.data != nullptr || args.ridge.data != nullptr || args.uniform_ridge > 0.0;
    if (args.factor != nullptr || !shares_ridge(args) || !positive ||
        args.rows * ldd > kMostWhitenedBytes / static_cast<int64_t>(sizeof(T))) {
        return false;
    }
    const auto d = static_cast<double>(args.d);
    const auto k = static_cast<double>(args.k);
    double saved = 0.0;
    for (int64_t segment = 0; segment < args.segments; ++segment) {
        const auto n = static_cast<double>(rows_in(args, segment));
        saved += n < d ? primal_products(n, d, k) - dual_products(n, d, k) : 0.0;
    }
    return saved > 2.0 * static_cast<double>(args.rows) * d * d;
}

template <class T>
class Segments {
 public:
    Segments(const SolveSegmentsPlan<T>& plan, const SolveSegmentsArgs<T>& args, const Workspace& workspace)
        : plan_(plan),
          args_(args),
          workspace_(workspace),
          kernels_(*plan.gram.kernels),
          shared_(workspace.get(plan.shared)) {}

    Status run() {
        share();
        Status status = whiten();
        for (int64_t first = 0; status == Status::ok && first < args_.segments;) {
            status = solve_long(first);
        }
        if (status != Status::ok) {
            return status;
        }
        auto body = [&](int64_t piece) { return solve_piece(piece); };
        const int64_t products = plan_.units * args_.d * (args_.d + args_.k) / 2;
        return parallel_for(plan_.pieces, nanoseconds_of_products(products), body);
    }

 private:
    // ½(base + baseᵀ), and the ridge if all problems have the same, in the layout of a Gram matrix [A | R].
    void share() {
        std::fill_n(shared_, plan_.gram.size(), T(0));
        const int64_t d = args_.d;
        const Matrix<const T>& base = args_.base;
        for (int64_t i = 0; i < d && base.data != nullptr; ++i) {
            for (int64_t j = i; j < d; ++j) {
                shared_[i * plan_.gram.ld + j] =
                    (base.data[i * base.row + j * base.col] / 2) + (base.data[j * base.row + i * base.col] / 2);
            }
        }
        if (shares_ridge(args_)) {
            add_ridge(0, shared_);
        }
    }

    void add_ridge(int64_t segment, T* c) const {
        for (int64_t i = 0; i < args_.d; ++i) {
            c[i * (plan_.gram.ld + 1)] += args_.ridge.data != nullptr
                                              ? args_.ridge.data[segment * args_.ridge.row + i * args_.ridge.col]
                                              : static_cast<T>(args_.uniform_ridge);
        }
    }

    Status factor(T* c, int64_t ld, int64_t order, T* floor, T* inverse_diagonal, int64_t& failed) const {
        for (int64_t i = 0; i < order; ++i) {
            floor[i] = singular_floor(c[i * (ld + 1)]);
        }
        return factor_in_place(kernels_, c, ld, order, floor, inverse_diagonal, failed);
    }

    // Z = XU⁻¹, or no dual form: where base + ridge is not positive definite, or ill conditioned.
    Status whiten() {
        if (!plan_.whitens) {
            return Status::ok;
        }
        const int64_t d = args_.d;
        const int64_t ld = plan_.gram.ld;
        const int64_t ldd = plan_.ldd;
        const CachedWorkspace own(plan_.own_layout);
        T* u = own.get(plan_.matrix);
        T* inverse_diagonal = own.get(plan_.inverse_diagonal);
        std::copy_n(shared_, plan_.gram.size(), u);
        T norm = T(0);
        for (int64_t i = 0; i < d; ++i) {
            T sum = T(0);
            for (int64_t j = 0; j < d; ++j) {
                sum += std::abs(u[std::min(i, j) * ld + std::max(i, j)]);
            }
            norm = std::max(norm, sum);
        }
        int64_t failed = 0;
        const Status status = factor(u, ld, d, own.get(plan_.floor), inverse_diagonal, failed);
        if (status != Status::ok || failed != 0) {
            return status;
        }
        T* inverse = workspace_.zeroed(plan_.inverse);
        T* turned = workspace_.get(plan_.inverse_turned);  // first the memory of the estimate
        const T most = kernels_.inverse_norm1(u, ld, d, inverse_diagonal, turned);
        if (!(norm * most * kWhitenEpsilons * std::numeric_limits<T>::epsilon() < T(1))) {
            return Status::ok;
        }
        for (int64_t i = 0; i < d; ++i) {
            inverse[i * (ldd + 1)] = T(1);
        }
        kernels_.solve_upper(u, ld, d, inverse_diagonal, inverse, ldd);
        std::fill_n(turned, d * ldd, T(0));
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = i; j < d; ++j) {
                turned[j * ldd + i] = inverse[i * ldd + j];
            }
        }
        T* z = workspace_.get(plan_.whitened);
        const FixedCut cut{args_.rows, kWhitenRows};
        auto body = [&](int64_t index) {
            const Range range = cut[index];
            T* to = z + range.begin * ldd;
            std::fill_n(to, range.size() * ldd, T(0));
            kernels_.multiply_rows(range.size(), d,
                                   {args_.x.data + range.begin * args_.x.row, args_.x.row, args_.x.col}, inverse, ldd,
                                   to);
        };
        rows_.data = z;
        rows_.ld = ldd;
        rows_.entries = args_.entries;
        rows_.index = args_.indices;
        return parallel_for(cut.pieces(), nanoseconds_of_products(kWhitenRows * d * d), body);
    }

    RowsArgs<T> rows_of_segment(int64_t segment) const {
        RowsArgs<T> rows;
        rows.d = args_.d;
        rows.k = args_.k;
        const int64_t begin = args_.offsets[segment];
        rows.x = args_.x;
        if (args_.indices != nullptr) {
            rows.index = args_.indices + begin;
        } else {
            rows.x.data += begin * args_.x.row;
        }
        rows.y = args_.y;
        rows.y.data += begin * args_.y.row;
        rows.weight = args_.weight;
        if (rows.weight.data != nullptr) {
            rows.weight.data += begin * args_.weight.row;
        }
        return rows;
    }

    // The next problems from `first` on that have many rows, as many as the memory for their pieces holds; `first`
    // becomes the problem after them.
    Status solve_long(int64_t& first) {
        struct Long {
            int64_t segment, pieces, begin;
        };
        constexpr int64_t kMost = 64;
        Long found[kMost];
        int64_t count = 0;
        int64_t pieces = 0;
        for (; first < args_.segments && count < kMost; ++first) {
            const int64_t n = rows_in(args_, first);
            if (n < kLongRows) {
                continue;
            }
            const int64_t own = std::min({n / kSlabRows, kMostPieces, plan_.buffers});
            if (pieces + own > plan_.buffers) {
                break;
            }
            found[count++] = {first, own, pieces};
            pieces += own;
        }
        if (count == 0) {
            return Status::ok;
        }
        double* sums = workspace_.get(plan_.sums);
        const int64_t size = plan_.gram.size();
        auto part = [&](int64_t index) {
            const Long* of = std::upper_bound(found, found + count, index,
                                              [](int64_t at, const Long& each) { return at < each.begin; }) -
                             1;
            const CachedWorkspace own(plan_.gram.own_layout);
            double* sum = sums + index * size;
            std::fill_n(sum, size, 0.0);
            const EvenCut cut{rows_in(args_, of->segment), of->pieces};
            gram_in_double<T>(plan_.gram, rows_of_segment(of->segment), cut.longer_first(index - of->begin),
                              plan_.gram.group_of(0), own, sum, plan_.gram.ld);
        };
        const int64_t products = kLongRows * args_.d * (args_.d + args_.k) / 2;
        const Status status = parallel_for(pieces, nanoseconds_of_products(products), part);
        if (status != Status::ok) {
            return status;
        }
        auto finish_one = [&](int64_t index) {
            const Long& of = found[index];
            const CachedWorkspace own(plan_.own_layout);
            T* c = own.get(plan_.matrix);
            sum_pieces<double>(sums + of.begin * size, of.pieces, size, 0, size,
                               [&](int64_t at, double sum) { c[at] = shared_[at] + static_cast<T>(sum); });
            return finish(of.segment, c, own);
        };
        return parallel_for(count, nanoseconds_of_products(args_.d * args_.d * args_.d), finish_one);
    }

    // Consecutive problems, those without and with the dual form.
    Status solve_piece(int64_t piece) const {
        const int64_t begin = first_of(piece);
        const int64_t end = first_of(piece + 1);
        if (begin == end) {
            return Status::ok;
        }
        const CachedWorkspace own(plan_.own_layout);
        const CachedWorkspace gram(plan_.gram.own_layout);
        T* v = own.get(plan_.v);
        int64_t* dual = own.get(plan_.dual);
        int64_t count = 0;
        for (int64_t segment = begin; segment < end; ++segment) {
            const int64_t n = rows_in(args_, segment);
            if (n >= kLongRows) {
                continue;
            }
            if (rows_.data != nullptr && n < args_.d) {
                bool good = false;
                const Status status = solve_dual(segment, v + count * args_.k * plan_.ldd, own, gram, good);
                if (status != Status::ok) {
                    return status;
                }
                if (good) {
                    dual[count++] = segment;
                    continue;
                }
            }
            T* c = own.get(plan_.matrix);
            std::copy_n(shared_, plan_.gram.size(), c);
            kernels_.gram_rows(rows_of_segment(segment), 0, n, 0, plan_.gram.panels, gram.get(plan_.gram.packed), c,
                               plan_.gram.ld);
            const Status status = finish(segment, c, own);
            if (status != Status::ok) {
                return status;
            }
        }
        write_dual(count, v, dual, own);
        return Status::ok;
    }

    // The first problem whose units begin at or after those of a piece; see SolveSegmentsPlan::units.
    int64_t first_of(int64_t piece) const {
        int64_t low = 0;
        int64_t high = args_.segments;
        while (low < high) {
            const int64_t middle = low + (high - low) / 2;
            if (args_.offsets[middle] + middle * args_.d < piece * plan_.units) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low;
    }

    // From [A | R] in c, less a ridge of the problem's own, to its results.
    Status finish(int64_t segment, T* c, const CachedWorkspace& own) const {
        const int64_t d = args_.d;
        const int64_t k = args_.k;
        const int64_t ld = plan_.gram.ld;
        T* z = own.get(plan_.z);
        T* inverse_diagonal = own.get(plan_.inverse_diagonal);
        if (!shares_ridge(args_)) {
            add_ridge(segment, c);
        }
        load_rhs<T>({c + d, ld, 1}, d, k, z, plan_.ldz);
        int64_t failed = 0;
        const Status status = factor(c, ld, d, own.get(plan_.floor), inverse_diagonal, failed);
        if (status != Status::ok) {
            return status;
        }
        if (failed == 0) {
            kernels_.solve_transposed(c, ld, d, inverse_diagonal, z, plan_.ldz);
            kernels_.solve_upper(c, ld, d, inverse_diagonal, z, plan_.ldz);
        }
        const bool good = write_solution(z, plan_.ldz, d, k, failed != 0, args_.solution + segment * d * k);
        args_.info[segment] = static_cast<int32_t>(failed != 0 ? failed : good ? 0 : d + 1);
        if (args_.factor != nullptr) {
            write_factor(c, ld, d, failed != 0, args_.factor + segment * d * d);
        }
        return Status::ok;
    }

    // v = Sᵀ(I + SSᵀ)⁻¹D^½Y, a row for each column of Y; `good` is false where numbers are not finite.
    Status solve_dual(int64_t segment, T* v, const CachedWorkspace& own, const CachedWorkspace& gram,
                      bool& good) const {
        const int64_t n = rows_in(args_, segment);
        const int64_t begin = args_.offsets[segment];
        const int64_t ld = leading_dimension(kernels_, round_up(n, kernels_.tile_rows));
        T* c = own.get(plan_.matrix);
        T* z = own.get(plan_.z);
        T* scale = own.get(plan_.scale);
        T* inverse_diagonal = own.get(plan_.inverse_diagonal);
        for (int64_t e = 0; e < n; ++e) {
            scale[e] =
                args_.weight.data != nullptr ? std::sqrt(args_.weight.data[(begin + e) * args_.weight.row]) : T(1);
        }
        std::fill_n(c, round_up(n, kernels_.tile_rows) * ld, T(0));
        for (int64_t e = 0; e < n; ++e) {
            c[e * (ld + 1)] = T(1);
        }
        kernels_.dual_gram(rows_, begin, n, scale, gram.get(plan_.gram.packed), c, ld);
        int64_t failed = 0;
        const Status status = factor(c, ld, n, own.get(plan_.floor), inverse_diagonal, failed);
        if (status != Status::ok || failed != 0) {
            return status;
        }
        load_rhs<T>({args_.y.data + begin * args_.y.row, args_.y.row, args_.y.col}, n, args_.k, z, plan_.ldz);
        for (int64_t e = 0; e < n; ++e) {
            for (int64_t col = 0; col < args_.k; ++col) {
                z[e * plan_.ldz + col] *= scale[e];
            }
        }
        kernels_.solve_transposed(c, ld, n, inverse_diagonal, z, plan_.ldz);
        kernels_.solve_upper(c, ld, n, inverse_diagonal, z, plan_.ldz);
        for (int64_t col = 0; col < args_.k; ++col) {
            kernels_.dual_back(rows_, begin, n, scale, z + col, plan_.ldz, v + col * plan_.ldd);
        }
        good = true;
        return status;
    }

    // W = U⁻¹v of the problems that were solved in the dual form.
    void write_dual(int64_t count, const T* v, const int64_t* segments, const CachedWorkspace& own) const {
        if (count == 0) {
            return;
        }
        const int64_t d = args_.d;
        const int64_t k = args_.k;
        const int64_t ldd = plan_.ldd;
        T* w = own.get(plan_.w);
        std::fill_n(w, count * k * ldd, T(0));
        kernels_.multiply_rows(count * k, d, {v, ldd, 1}, workspace_.get(plan_.inverse_turned), ldd, w);
        for (int64_t index = 0; index < count; ++index) {
            T* to = args_.solution + segments[index] * d * k;
            bool good = true;
            for (int64_t j = 0; j < d; ++j) {
                for (int64_t col = 0; col < k; ++col) {
                    to[j * k + col] = w[(index * k + col) * ldd + j];
                    good = good && std::isfinite(to[j * k + col]);
                }
            }
            if (!good) {
                std::fill_n(to, d * k, std::numeric_limits<T>::quiet_NaN());
            }
            args_.info[segments[index]] = static_cast<int32_t>(good ? 0 : d + 1);
        }
    }

    const SolveSegmentsPlan<T>& plan_;
    const SolveSegmentsArgs<T>& args_;
    const Workspace& workspace_;
    const NormalKernels<T>& kernels_;
    T* const shared_;
    SegmentRows<T> rows_;  // of Z; null: no dual form
};

}  // namespace

template <class T>
SolveSegmentsPlan<T> plan(const SolveSegmentsArgs<T>& args) {
    const NormalKernels<T>& kernels = active_normal_kernels<T>();
    const int64_t d = args.d;
    SolveSegmentsPlan<T> plan;
    // As of many short problems, none of which is cut by itself; long ones are summed in double.
    plan.gram = plan_gram(kernels, kFewProblems, 0, d, args.k, true);
    plan.ldz = round_up(args.k, kernels.lanes);
    plan.ldd = round_up(d, kernels.lanes);
    plan.whitens = pays_to_whiten(args, plan.ldd);
    const int64_t units = args.entries + args.segments * d;
    plan.units = std::max({int64_t{1}, ceil_div(units, kSegmentPieces), kLeastSegments * d});
    plan.pieces = ceil_div(units, plan.units);
    const int64_t most = plan.units / std::max<int64_t>(d, 1) + 1;  // problems of a piece
    int64_t wanted = 0;
    for (int64_t segment = 0; segment < args.segments; ++segment) {
        const int64_t n = rows_in(args, segment);
        wanted += n >= kLongRows ? std::min(n / kSlabRows, kMostPieces) : 0;
    }
    plan.buffers =
        std::min(wanted, results_within(kMostPartialBytes, plan.gram.size() * static_cast<int64_t>(sizeof(double))));
    Layout& layout = plan.layout;
    plan.shared = layout.add<T>("shared", plan.gram.size());
    plan.sums = layout.add<double>("sums", plan.buffers * plan.gram.size());
    plan.inverse = layout.add<T>("inverse", plan.whitens ? d * plan.ldd : 0);
    plan.inverse_turned = layout.add<T>("inverse_turned", plan.whitens ? d * std::max(plan.ldd, kernels.lanes) : 0);
    plan.whitened = layout.add<T>("whitened", plan.whitens ? args.rows * plan.ldd : 0);
    // The dual matrix of fewer rows than features is no larger.
    Layout& own = plan.own_layout;
    plan.matrix = own.add<T>("matrix", plan.gram.size());
    plan.floor = own.add<T>("floor", d);
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", d);
    plan.z = own.add<T>("z", d * plan.ldz);
    plan.scale = own.add<T>("scale", plan.whitens ? d : 0);
    plan.v = own.add<T>("v", plan.whitens ? most * args.k * plan.ldd : 0);
    plan.w = own.add<T>("w", plan.whitens ? most * args.k * plan.ldd : 0);
    plan.dual = own.add<int64_t>("dual", plan.whitens ? most : 0);
    return plan;
}

template <class T>
Status run(const SolveSegmentsPlan<T>& plan, const SolveSegmentsArgs<T>& args, const Workspace& workspace) {
    if (any_negative(args.weight, args.entries)) {
        return Status::negative_weight;
    }
    for (int64_t segment = 0; args.ridge.data != nullptr && segment < args.segments; ++segment) {
        const Matrix<const T> ridge = {args.ridge.data + segment * args.ridge.row, args.ridge.col, 0};
        if (any_negative(ridge, args.d)) {
            return Status::negative_ridge;
        }
        if (args.ridge.row == 0) {
            break;
        }
    }
    return Segments<T>(plan, args, workspace).run();
}

template <class T>
Status solve_segments(const SolveSegmentsArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                                       \
    template SolveSegmentsPlan<T> plan(const SolveSegmentsArgs<T>&);                                 \
    template Status run(const SolveSegmentsPlan<T>&, const SolveSegmentsArgs<T>&, const Workspace&); \
    template Status solve_segments(const SolveSegmentsArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
