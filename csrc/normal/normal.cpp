#include "normal/normal.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "base/parallel.hpp"
#include "base/scratch.hpp"
#include "base/target.hpp"
#include "normal/kernels.hpp"

namespace onestep {
namespace {

// Tenfold steps that jitter may take: the last one adds the mean diagonal itself or more.
constexpr int kMostJitterSteps = 20;

// With fewer problems than this, one problem's rows are shared among threads.
constexpr int64_t kFewProblems = 16;
constexpr int64_t kMostPieces = 32;
constexpr int64_t kMostPartialBytes = int64_t{32} << 20;
// Too few rows for that, but many columns: so many groups of columns are shared instead, each of several panels.
constexpr int64_t kColumnGroups = 8;
constexpr int64_t kPanelsPerGroup = 2;

// Matrices from this size on share the wide steps of their factorisation among threads.
constexpr int64_t kParallelFactor = 256;

// Rows and right-hand sides that one unit of parallel work takes.
constexpr int64_t kGradientChunk = 2048;
constexpr int64_t kSolveColumns = 96;

template <class T>
const NormalKernels<T>& kernels() {
    if constexpr (std::is_same_v<T, float>) {
        return ONESTEP_KERNELS(normal_f32);
    } else {
        return ONESTEP_KERNELS(normal_f64);
    }
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Columns of a scratch matrix: whole panels, and one more where rows would fall on the same cache sets.
template <class T>
int64_t leading_dimension(const NormalKernels<T>& kernel, int64_t columns) {
    const int64_t ld = round_up(std::max<int64_t>(columns, 1), kernel.panel);
    return ld * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? ld + kernel.panel : ld;
}

bool packable(int64_t lanes, int64_t problems, int64_t n, int64_t d, int64_t k) {
    const bool small = d <= kPackFeatures && k <= kPackTargets;
    return small && (problems >= lanes / 2 || n * d <= 4096);
}

// Units of work for one thread at a time, so that tiny problems do not pay for scheduling.
int64_t grain_for(int64_t flops_each) { return std::max<int64_t>(1, 100'000 / std::max<int64_t>(flops_each, 1)); }

// Whether any element of the vectors is negative; dimensions that repeat are looked at once.
template <class T>
bool any_negative(const Batched<const T>& vectors, BatchShape batch, int64_t length) {
    if (!vectors || batch.count() == 0) {
        return false;
    }
    for (int dim = 0; dim < batch.dims; ++dim) {
        batch.size[dim] = vectors.batch[dim] == 0 ? 1 : batch.size[dim];
    }
    length = vectors.row == 0 ? std::min<int64_t>(length, 1) : length;
    for (int64_t index = 0; index < batch.count(); ++index) {
        const Matrix<const T> vector = vectors.at(batch, index);
        for (int64_t i = 0; i < length; ++i) {
            if (vector.data[i * vector.row] < T(0)) {
                return true;
            }
        }
    }
    return false;
}

// ---------------------------------------------------------------- Gram: one problem's rows, maybe in several pieces

template <class T>
struct GramShape {
    int64_t n, features, columns, rows_padded, ld, panels, pieces, groups;

    GramShape(const NormalKernels<T>& kernel, int64_t problems, int64_t n_, int64_t features_, int64_t k)
        : n(n_), features(features_), columns(features_ + k) {
        rows_padded = round_up(features, kernel.tile_rows);
        ld = leading_dimension(kernel, std::max(columns, rows_padded));
        panels = (columns + kernel.panel - 1) / kernel.panel;
        pieces = groups = 1;
        if (problems < kFewProblems && n >= 2 * kSlabRows) {
            const int64_t bytes = size() * static_cast<int64_t>(sizeof(double)) * problems;
            const int64_t most = std::max<int64_t>(1, std::min(kMostPieces / std::max<int64_t>(problems, 1),
                                                               kMostPartialBytes / std::max<int64_t>(bytes, 1)));
            pieces = std::min(n / kSlabRows, most);
        }
        if (problems < kFewProblems && pieces == 1 && panels >= kColumnGroups * kPanelsPerGroup && n > kBlockRows) {
            groups = kColumnGroups;
        }
    }

    int64_t size() const { return rows_padded * ld; }
    int64_t units() const { return pieces * groups; }
    int64_t begin(int64_t piece) const { return n / pieces * piece + std::min(piece, n % pieces); }
    // Columns further right have more rows above the diagonal: groups hold equal areas of the triangle.
    int64_t first_panel(int64_t group) const {
        return static_cast<int64_t>(static_cast<double>(panels) * std::sqrt(static_cast<double>(group) / groups));
    }
};

// sum += Gram of rows [begin, end) in the panels [first, last), in double, by slabs that are short enough to be summed
// in T.
template <class T>
void gram_in_double(const NormalKernels<T>& kernel, const GramShape<T>& shape, const RowsArgs<T>& rows, int64_t begin,
                    int64_t end, int64_t first, int64_t last, double* sum) {
    const int64_t left = first * kernel.panel;
    const int64_t right = last * kernel.panel;
    const int64_t ld = leading_dimension(kernel, right - left);
    const int64_t height = std::min(shape.rows_padded, round_up(right, kernel.tile_rows));
    Scratch scratch(Scratch::bytes_for<T>(kBlockRows * shape.ld) + Scratch::bytes_for<T>(height * ld));
    T* packed = scratch.take<T>(kBlockRows * shape.ld);
    T* c = scratch.take<T>(height * ld);
    for (int64_t slab = begin; slab < end; slab += kSlabRows) {
        std::fill_n(c, height * ld, T(0));
        kernel.gram_rows(rows, slab, std::min(slab + kSlabRows, end), first, last, packed, c, ld);
        for (int64_t i = 0; i < height; ++i) {
            for (int64_t j = 0; j < right - left; ++j) {
                sum[i * shape.ld + left + j] += static_cast<double>(c[i * ld + j]);
            }
        }
    }
}

// The partial sums of all pieces of all problems, reduced piece by piece in a fixed order.
template <class T>
class PartialGrams {
 public:
    PartialGrams(const NormalKernels<T>& kernel, const GramShape<T>& shape, int64_t problems)
        : kernel_(kernel), shape_(shape), problems_(problems) {}

    template <class RowsOf>
    Status compute(const RowsOf& rows_of) {
        sums_.reset(new double[static_cast<size_t>(problems_ * shape_.pieces * shape_.size())]());
        auto body = [&](int64_t unit) {
            const int64_t whole = unit / shape_.groups;
            const int64_t group = unit % shape_.groups;
            const int64_t piece = whole % shape_.pieces;
            gram_in_double(kernel_, shape_, rows_of(whole / shape_.pieces), shape_.begin(piece),
                           shape_.begin(piece + 1), shape_.first_panel(group), shape_.first_panel(group + 1),
                           sums_.get() + whole * shape_.size());
        };
        return parallel_for(problems_ * shape_.units(), 1, body);
    }

    // Adds the pieces of one problem up into the first and returns it.
    const double* reduce(int64_t problem) {
        double* total = sums_.get() + problem * shape_.pieces * shape_.size();
        for (int64_t piece = 1; piece < shape_.pieces; ++piece) {
            const double* part = total + piece * shape_.size();
            for (int64_t e = 0; e < shape_.size(); ++e) {
                total[e] += part[e];
            }
        }
        return total;
    }

 private:
    const NormalKernels<T>& kernel_;
    const GramShape<T>& shape_;
    int64_t problems_;
    std::unique_ptr<double[]> sums_;
};

// c = Gram of all rows of one problem, rounded to T once.
template <class T>
void gram_of_problem(const NormalKernels<T>& kernel, const GramShape<T>& shape, const RowsArgs<T>& rows, T* c) {
    if (shape.n <= kSlabRows) {
        Scratch scratch(Scratch::bytes_for<T>(kBlockRows * shape.ld));
        std::fill_n(c, shape.size(), T(0));
        kernel.gram_rows(rows, 0, shape.n, 0, shape.panels, scratch.take<T>(kBlockRows * shape.ld), c, shape.ld);
        return;
    }
    Scratch scratch(Scratch::bytes_for<double>(shape.size()));
    double* sum = scratch.take_zeroed<double>(shape.size());
    gram_in_double(kernel, shape, rows, 0, shape.n, 0, shape.panels, sum);
    std::transform(sum, sum + shape.size(), c, [](double value) { return static_cast<T>(value); });
}

template <class T>
RowsArgs<T> rows_of(const auto& args, int64_t problem) {
    RowsArgs<T> rows;
    rows.d = args.d;
    rows.k = args.k;
    rows.x = args.x.at(args.batch, problem);
    rows.y = args.y.at(args.batch, problem);
    rows.weight = args.weight.at(args.batch, problem);
    return rows;
}

// Calls finish(problem, c, ld), which returns a Status, with every problem's Gram matrix, whichever way it was summed.
template <class T, class Args, class Finish>
Status for_each_gram(const NormalKernels<T>& kernel, const Args& args, int64_t problems, const Finish& finish) {
    const GramShape<T> shape(kernel, problems, args.n, args.d, args.k);
    if (shape.units() == 1) {
        auto body = [&](int64_t problem) {
            Scratch scratch(Scratch::bytes_for<T>(shape.size()));
            T* c = scratch.take<T>(shape.size());
            gram_of_problem(kernel, shape, rows_of<T>(args, problem), c);
            return finish(problem, c, shape.ld);
        };
        return parallel_for(problems, grain_for(args.n * args.d * (args.d + args.k)), body);
    }
    PartialGrams<T> partial(kernel, shape, problems);
    const Status status = partial.compute([&](int64_t problem) { return rows_of<T>(args, problem); });
    if (status != Status::ok) {
        return status;
    }
    auto body = [&](int64_t problem) {
        const double* sum = partial.reduce(problem);
        Scratch scratch(Scratch::bytes_for<T>(shape.size()));
        T* c = scratch.take<T>(shape.size());
        std::transform(sum, sum + shape.size(), c, [](double value) { return static_cast<T>(value); });
        return finish(problem, c, shape.ld);
    };
    return parallel_for(problems, 1, body);
}

// ---------------------------------------------------------------- one matrix: factor, solve, condition

// Upper Cholesky factor of c in place; `failed` is 0 or the order of the failed minor. The wide steps are shared among
// threads when the caller is not itself one of several.
template <class T>
Status factor(const NormalKernels<T>& kernel, T* c, int64_t ld, int64_t d, const T* floor, T* inverse_diagonal,
              int64_t& failed) {
    failed = 0;
    for (int64_t k0 = 0; k0 < d; k0 += kFactorRows) {
        const int64_t k1 = std::min(k0 + kFactorRows, d);
        failed = kernel.factor_diagonal(c, ld, k0, k1, floor, inverse_diagonal);
        if (failed != 0 || k1 == d) {
            return Status::ok;
        }
        const int64_t first = k1 / kernel.panel;  // kFactorRows is a multiple of every panel
        const int64_t last = (d + kernel.panel - 1) / kernel.panel;
        if (d < kParallelFactor) {
            kernel.factor_panel(c, ld, k0, k1, k1, last * kernel.panel, inverse_diagonal);
            kernel.factor_update(c, ld, k0, k1, d, k1, last * kernel.panel);
            continue;
        }
        auto panel = [&](int64_t at) {
            const int64_t c0 = (first + at) * kernel.panel;
            kernel.factor_panel(c, ld, k0, k1, c0, c0 + kernel.panel, inverse_diagonal);
        };
        auto update = [&](int64_t at) {
            // Wide panels on the right have more rows: taking them from both ends evens out the shares.
            const int64_t turned = at % 2 == 0 ? at / 2 : last - first - 1 - at / 2;
            const int64_t c0 = (first + turned) * kernel.panel;
            kernel.factor_update(c, ld, k0, k1, d, c0, c0 + kernel.panel);
        };
        Status status = parallel_for(last - first, 4, panel);
        if (status == Status::ok) {
            status = parallel_for(last - first, 2, update);
        }
        if (status != Status::ok) {
            return status;
        }
    }
    return Status::ok;
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

// ---------------------------------------------------------------- solve_normal

// w += A⁻¹(XᵀD(Y − XW) − diag(ridge) W), `steps` times, with the residual in double: corrected semi-normal equations
// (Björck, "Stability analysis of the method of seminormal equations", 1987).
template <class T>
Status refine(const NormalKernels<T>& kernel, const RowsArgs<T>& rows, int64_t n, const double* ridge, int64_t steps,
              const T* u, int64_t ld, const T* inverse_diagonal, double* w, int64_t ldk) {
    const int64_t d = rows.d;
    const int64_t ldz = round_up(rows.k, kernel.lanes);
    // Pieces as for Gram, so that a long problem is shared among threads and summed in a fixed order.
    const int64_t pieces = std::clamp<int64_t>(n / kSlabRows, 1, kMostPieces);
    std::unique_ptr<double[]> sums(new double[static_cast<size_t>(2 * pieces * d * ldk)]);
    double* high = sums.get();
    double* low = high + d * ldk;
    Scratch scratch(Scratch::bytes_for<T>(d * ldz));
    T* z = scratch.take<T>(d * ldz);
    for (int64_t step = 0; step < steps; ++step) {
        auto body = [&](int64_t piece) {
            double* g = sums.get() + 2 * piece * d * ldk;
            std::fill_n(g, 2 * d * ldk, 0.0);
            Scratch local(Scratch::bytes_for<double>(kBlockRows * (d + ldk)));
            kernel.residual_rows(rows, n / pieces * piece + std::min(piece, n % pieces),
                                 n / pieces * (piece + 1) + std::min(piece + 1, n % pieces), w, g, ldk,
                                 local.take<double>(kBlockRows * (d + ldk)));
        };
        const Status status = parallel_for(pieces, 1, body);
        if (status != Status::ok) {
            return status;
        }
        for (int64_t piece = 1; piece < pieces; ++piece) {
            const double* part = sums.get() + 2 * piece * d * ldk;
            for (int64_t e = 0; e < d * ldk; ++e) {
                // Knuth's two-sum: what the addition rounds off goes to the low part.
                const double total = high[e] + part[e];
                const double shifted = total - high[e];
                low[e] += part[d * ldk + e] + ((high[e] - (total - shifted)) + (part[e] - shifted));
                high[e] = total;
            }
        }
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t c = 0; c < ldz; ++c) {
                const int64_t at = i * ldk + c;
                z[i * ldz + c] = c < rows.k ? static_cast<T>((high[at] - ridge[i] * w[at]) + low[at]) : T(0);
            }
        }
        kernel.solve_transposed(u, ld, d, inverse_diagonal, z, ldz);
        kernel.solve_upper(u, ld, d, inverse_diagonal, z, ldz);
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t c = 0; c < rows.k; ++c) {
                w[i * ldk + c] += static_cast<double>(z[i * ldz + c]);
            }
        }
    }
    return Status::ok;
}

// From one problem's Gram matrix [A | R] in c to everything that is asked for.
template <class T>
Status finish_solve_normal(const NormalKernels<T>& kernel, const SolveNormalArgs<T>& args, int64_t problem, T* c,
                           int64_t ld) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const int64_t ldz = round_up(k, kernel.lanes);
    const int64_t ldk = round_up(k, kernels<double>().lanes);
    const int64_t rows_padded = round_up(d, kernel.tile_rows);
    const bool jitters = args.jitter > 0.0;
    Scratch scratch(Scratch::bytes_for<T>(d * ldz) + 2 * Scratch::bytes_for<T>(d) +
                    Scratch::bytes_for<T>(d * kernel.lanes) + Scratch::bytes_for<double>(d * ldk) +
                    Scratch::bytes_for<double>(d) + (jitters ? Scratch::bytes_for<T>(rows_padded * ld) : 0));
    T* z = scratch.take<T>(d * ldz);
    T* floor = scratch.take<T>(d);
    T* inverse_diagonal = scratch.take<T>(d);
    T* work = scratch.take<T>(d * kernel.lanes);
    double* w = scratch.take<double>(d * ldk);
    double* penalty = scratch.take<double>(d);
    T* saved = jitters ? scratch.take<T>(rows_padded * ld) : nullptr;

    const Matrix<const T> ridge = args.ridge.at(args.batch, problem);
    T mean_diagonal = T(0);
    for (int64_t i = 0; i < d; ++i) {
        const T lambda = ridge.data[i * ridge.row];
        T& diagonal = c[i * ld + i];
        diagonal += lambda;
        penalty[i] = static_cast<double>(lambda);
        mean_diagonal += diagonal / static_cast<T>(d);
    }
    load_rhs<T>({c + d, ld, 1}, d, k, z, ldz);
    if (jitters) {
        std::copy_n(c, rows_padded * ld, saved);
    }

    T added = T(0);
    T norm = T(0);
    int64_t failed = 0;
    for (int attempt = 0;; ++attempt) {
        for (int64_t i = 0; i < d; ++i) {
            floor[i] = std::max(T(0), c[i * ld + i] * (kSingularEpsilons * std::numeric_limits<T>::epsilon()));
        }
        norm = args.rcond != nullptr ? symmetric_norm1(c, ld, d, work) : T(0);
        const Status status = factor(kernel, c, ld, d, floor, inverse_diagonal, failed);
        if (status != Status::ok) {
            return status;
        }
        if (failed == 0 || !jitters || attempt == kMostJitterSteps || !std::isfinite(mean_diagonal) ||
            added >= mean_diagonal) {
            break;
        }
        added = mean_diagonal * static_cast<T>(args.jitter * std::pow(10.0, attempt));
        std::copy_n(saved, rows_padded * ld, c);
        for (int64_t i = 0; i < d; ++i) {
            c[i * ld + i] += added;
        }
    }

    bool good = failed == 0;
    if (good) {
        kernel.solve_transposed(c, ld, d, inverse_diagonal, z, ldz);
        kernel.solve_upper(c, ld, d, inverse_diagonal, z, ldz);
        if (args.refine > 0) {
            for (int64_t i = 0; i < d; ++i) {
                penalty[i] += static_cast<double>(added);
                for (int64_t col = 0; col < ldk; ++col) {
                    w[i * ldk + col] = col < k ? static_cast<double>(z[i * ldz + col]) : 0.0;
                }
            }
            const Status status = refine(kernel, rows_of<T>(args, problem), args.n, penalty, args.refine, c, ld,
                                         inverse_diagonal, w, ldk);
            if (status != Status::ok) {
                return status;
            }
        }
    }
    T* solution = args.solution + problem * d * k;
    good =
        args.refine > 0 ? write_solution(w, ldk, d, k, !good, solution) : write_solution(z, ldz, d, k, !good, solution);
    args.info[problem] = static_cast<int32_t>(failed != 0 ? failed : good ? 0 : d + 1);
    if (args.factor != nullptr) {
        write_factor(c, ld, d, failed != 0, args.factor + problem * d * d);
    }
    if (args.rcond != nullptr) {
        args.rcond[problem] =
            failed != 0 ? T(0) : T(1) / (norm * kernel.inverse_norm1(c, ld, d, inverse_diagonal, work));
    }
    if (args.jittered != nullptr) {
        args.jittered[problem] = failed != 0 ? T(0) : added;
    }
    return Status::ok;
}

// ---------------------------------------------------------------- packs

// Calls fill(pack, lane, problem, real) for every lane of every pack, then run(pack, work), and after(problem), which
// returns a Status, for every problem of it. The lanes after the last
// problem repeat it, with `real` false: they have valid input and must get no output.
template <class T, class Fill, class Run, class After>
Status for_each_pack(const NormalKernels<T>& kernel, int64_t problems, int64_t d, int64_t k, int64_t flops,
                     const Fill& fill, const Run& run, const After& after) {
    const int64_t lanes = kernel.lanes;
    const int64_t work_size = kernel.pack_work(d, k);
    auto body = [&](int64_t index) {
        PackArgs<T> pack;
        const int64_t first = index * lanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const bool real = first + lane < problems;
            pack.clear(lane);
            fill(pack, lane, real ? first + lane : problems - 1, real);
        }
        {
            Scratch scratch(Scratch::bytes_for<T>(work_size));
            run(pack, scratch.take<T>(work_size));
        }
        for (int64_t problem = first; problem < std::min(first + lanes, problems); ++problem) {
            const Status status = after(problem);
            if (status != Status::ok) {
                return status;
            }
        }
        return Status::ok;
    };
    return parallel_for((problems + lanes - 1) / lanes, grain_for(flops * lanes), body);
}

constexpr auto kNothingAfter = [](int64_t) { return Status::ok; };

template <class T>
Status solve_normal_packed(const NormalKernels<T>& kernel, const SolveNormalArgs<T>& args, int64_t problems) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
        pack.n = args.n;
        pack.d = d;
        pack.k = k;
        pack.x.set(lane, args.x.at(args.batch, problem));
        pack.y.set(lane, args.y.at(args.batch, problem));
        pack.weight.set(lane, args.weight.at(args.batch, problem));
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
            const GramShape<T> shape(kernel, kFewProblems, args.n, d, k);
            Scratch scratch(Scratch::bytes_for<T>(shape.size()));
            T* c = scratch.take<T>(shape.size());
            gram_of_problem(kernel, shape, rows_of<T>(args, problem), c);
            return finish_solve_normal(kernel, args, problem, c, shape.ld);
        }
        return Status::ok;
    };
    return for_each_pack<T>(kernel, problems, d, k, args.n * d * (d + k) + d * d * d, fill, kernel.pack_solve_normal,
                            after);
}

// ---------------------------------------------------------------- one SPD matrix

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

}  // namespace

template <class T>
Status gram(const GramArgs<T>& args) {
    return guarded([&] {
        if (any_negative(args.weight, args.batch, args.n)) {
            return Status::negative_weight;
        }
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t d = args.d;
        const int64_t k = args.k;
        return for_each_gram(kernel, args, args.batch.count(), [&](int64_t problem, const T* c, int64_t ld) {
            T* to = args.gram + problem * d * d;
            for (int64_t i = 0; i < d; ++i) {
                for (int64_t j = i; j < d; ++j) {
                    to[i * d + j] = to[j * d + i] = c[i * ld + j];
                }
                std::copy_n(c + i * ld + d, k, args.cross + (problem * d + i) * k);
            }
            return Status::ok;
        });
    });
}

template <class T>
Status moments(const MomentsArgs<T>& args) {
    return guarded([&] {
        const Batched<const T> weight{args.weight.data, args.weight.row, args.weight.col, {}};
        if (any_negative(weight, BatchShape{}, args.n)) {
            return Status::negative_weight;
        }
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t d = args.d;
        const int64_t columns = d + 1 + args.k;
        const GramShape<T> shape(kernel, 1, args.n, d + 1, args.k);
        RowsArgs<T> rows;
        rows.d = d;
        rows.k = args.k;
        rows.ones = true;
        rows.x = args.x;
        rows.y = args.y;
        rows.weight = args.weight;

        // Provisional means, from rows spread over the table; from all of them if those happen to have no weight.
        std::unique_ptr<T[]> shift(new T[static_cast<size_t>(shape.ld)]());
        if (args.center) {
            constexpr int64_t kSampleRows = 1024;
            std::unique_ptr<double[]> sums(new double[static_cast<size_t>(columns)]());
            const auto sample = [&](int64_t step) {
                double total = 0.0;
                for (int64_t row = 0; row < args.n; row += step) {
                    const double weight = args.weight.data != nullptr
                                              ? static_cast<double>(args.weight.data[row * args.weight.row])
                                              : 1.0;
                    total += weight;
                    for (int64_t c = 0; c < columns; ++c) {
                        if (c != d) {
                            const Matrix<const T>& from = c < d ? args.x : args.y;
                            const T z = from.data[row * from.row + (c < d ? c : c - d - 1) * from.col];
                            sums[c] += weight * static_cast<double>(z);
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
            rows.shift = shift.get();
        }

        PartialGrams<T> partial(kernel, shape, 1);
        const Status status = partial.compute([&](int64_t) { return rows; });
        if (status != Status::ok) {
            return status;
        }
        const double* s = partial.reduce(0);
        const double* ones = s + d * shape.ld;  // Σ w z, of which the first is only in column d of the rows above
        const double total = ones[d];
        *args.weight_sum = total;
        // Offsets of the true means from the provisional ones.
        const auto offset = [&](int64_t c) {
            if (!args.center || !(total > 0.0)) {
                return 0.0;
            }
            return (c < d ? s[c * shape.ld + d] : ones[c]) / total;
        };
        for (int64_t i = 0; i < d; ++i) {
            for (int64_t j = i; j < d; ++j) {
                args.gram[i * d + j] = args.gram[j * d + i] = s[i * shape.ld + j] - total * offset(i) * offset(j);
            }
            for (int64_t c = 0; c < args.k; ++c) {
                args.cross[i * args.k + c] = s[i * shape.ld + d + 1 + c] - total * offset(i) * offset(d + 1 + c);
            }
        }
        for (int64_t c = 0; c < columns; ++c) {
            if (c != d) {
                args.mean[c < d ? c : c - 1] = args.center ? static_cast<double>(shift[c]) + offset(c) : 0.0;
            }
        }
        return Status::ok;
    });
}

template <class T>
Status solve_normal(SolveNormalArgs<T> args) {
    return guarded([&] {
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t problems = args.batch.count();
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
        if (problems > 0 && args.refine == 0 && packable(kernel.lanes, problems, args.n, args.d, args.k)) {
            return solve_normal_packed(kernel, args, problems);
        }
        return for_each_gram(kernel, args, problems, [&](int64_t problem, T* c, int64_t ld) {
            return finish_solve_normal(kernel, args, problem, c, ld);
        });
    });
}

template <class T>
Status solve_normal_backward(const SolveNormalBackwardArgs<T>& args) {
    return guarded([&] {
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t problems = args.batch.count();
        const int64_t n = args.n;
        const int64_t d = args.d;
        const int64_t k = args.k;
        std::unique_ptr<T[]> adjoint(new T[static_cast<size_t>(std::max<int64_t>(problems * d * k, 1))]);
        CholeskySolveArgs<T> solve;
        solve.batch = args.batch;
        solve.d = d;
        solve.k = k;
        solve.factor = args.factor;
        solve.b = args.grad;
        solve.solution = adjoint.get();
        const Status status = cholesky_solve(solve);
        if (status != Status::ok) {
            return status;
        }
        const int64_t chunks = std::max<int64_t>(1, (n + kGradientChunk - 1) / kGradientChunk);
        const int64_t work_size = kernel.backward_work(d, k);
        auto body = [&](int64_t unit) {
            const int64_t problem = unit / chunks;
            const int64_t begin = unit % chunks * kGradientChunk;
            const int64_t end = std::min(n, begin + kGradientChunk);
            const Matrix<const T> w = args.solution.at(args.batch, problem);
            const T* v = adjoint.get() + problem * d * k;
            const bool failed = *args.info.at(args.batch, problem).data != 0;
            Scratch scratch(Scratch::bytes_for<T>(work_size) + Scratch::bytes_for<T>(d * k));
            T* packed_w = scratch.take<T>(d * k);
            for (int64_t i = 0; i < d; ++i) {
                T sum = T(0);
                for (int64_t c = 0; c < k; ++c) {
                    packed_w[i * k + c] = w.data[i * w.row + c * w.col];
                    sum += packed_w[i * k + c] * v[i * k + c];
                }
                if (begin == 0) {
                    args.grad_ridge[problem * d + i] = failed ? T(0) : -sum;
                }
            }
            BackwardRowsArgs<T> rows;
            rows.d = d;
            rows.k = k;
            rows.x = args.x.at(args.batch, problem);
            rows.y = args.y.at(args.batch, problem);
            rows.weight = args.weight.at(args.batch, problem);
            rows.solution = packed_w;
            rows.adjoint = v;
            rows.grad_x = args.grad_x != nullptr ? args.grad_x + problem * n * d : nullptr;
            rows.grad_y = args.grad_y != nullptr ? args.grad_y + problem * n * k : nullptr;
            rows.grad_weight = args.grad_weight != nullptr ? args.grad_weight + problem * n : nullptr;
            if (!failed) {
                kernel.backward_rows(rows, begin, end, scratch.take<T>(work_size));
                return;
            }
            const auto clear = [&](T* to, int64_t width) {
                if (to != nullptr) {
                    std::fill_n(to + begin * width, std::max<int64_t>(0, end - begin) * width, T(0));
                }
            };
            clear(rows.grad_x, d);
            clear(rows.grad_y, k);
            clear(rows.grad_weight, 1);
        };
        return parallel_for(problems * chunks, grain_for(std::min(n, kGradientChunk) * d * k), body);
    });
}

template <class T>
Status solve_spd(const SolveSpdArgs<T>& args) {
    return guarded([&] {
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t problems = args.batch.count();
        const int64_t d = args.d;
        const int64_t k = args.k;
        if (problems > 0 && packable(kernel.lanes, problems, d, d, k)) {
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
            return for_each_pack<T>(kernel, problems, d, k, d * d * (d + k), fill, kernel.pack_solve_spd,
                                    kNothingAfter);
        }
        const int64_t rows_padded = round_up(d, kernel.tile_rows);
        const int64_t ld = leading_dimension(kernel, rows_padded);
        const int64_t ldz = round_up(k, kernel.lanes);
        auto body = [&](int64_t problem) {
            Scratch scratch(Scratch::bytes_for<T>(rows_padded * ld) + 2 * Scratch::bytes_for<T>(d) +
                            Scratch::bytes_for<T>(d * ldz));
            T* c = scratch.take<T>(rows_padded * ld);
            T* floor = scratch.take_zeroed<T>(d);
            T* inverse_diagonal = scratch.take<T>(d);
            T* z = scratch.take<T>(d * ldz);
            load_lower(args.a.at(args.batch, problem), d, rows_padded, c, ld);
            int64_t failed = 0;
            const Status status = factor(kernel, c, ld, d, floor, inverse_diagonal, failed);
            if (status != Status::ok) {
                return status;
            }
            bool good = failed == 0;
            if (k > 0) {
                if (good) {
                    load_rhs(args.b.at(args.batch, problem), d, k, z, ldz);
                    kernel.solve_transposed(c, ld, d, inverse_diagonal, z, ldz);
                    kernel.solve_upper(c, ld, d, inverse_diagonal, z, ldz);
                }
                good = write_solution(z, ldz, d, k, !good, args.solution + problem * d * k);
            }
            args.info[problem] = static_cast<int32_t>(failed != 0 ? failed : good ? 0 : d + 1);
            if (args.factor != nullptr) {
                write_factor(c, ld, d, failed != 0, args.factor + problem * d * d);
            }
            return Status::ok;
        };
        return parallel_for(problems, grain_for(d * d * (d + k)), body);
    });
}

template <class T>
Status cholesky(const CholeskyArgs<T>& args) {
    return guarded([&] {
        SolveSpdArgs<T> solve;
        solve.batch = args.batch;
        solve.d = args.d;
        solve.a = args.a;
        solve.factor = args.factor;
        solve.info = args.info;
        return solve_spd(solve);
    });
}

template <class T>
Status cholesky_solve(const CholeskySolveArgs<T>& args) {
    return guarded([&] {
        const NormalKernels<T>& kernel = kernels<T>();
        const int64_t problems = args.batch.count();
        const int64_t d = args.d;
        const int64_t k = args.k;
        if (problems > 0 && packable(kernel.lanes, problems, d, d, k)) {
            const auto fill = [&](PackArgs<T>& pack, int64_t lane, int64_t problem, bool real) {
                pack.d = d;
                pack.k = k;
                pack.a.set(lane, args.factor.at(args.batch, problem));
                pack.b.set(lane, args.b.at(args.batch, problem));
                pack.solution[lane] = real ? args.solution + problem * d * k : nullptr;
            };
            return for_each_pack<T>(kernel, problems, d, k, 2 * d * d * k, fill, kernel.pack_cholesky_solve,
                                    kNothingAfter);
        }
        const bool in_place = args.factor.col == 1;
        const int64_t chunks = (k + kSolveColumns - 1) / kSolveColumns;
        auto body = [&](int64_t unit) {
            const int64_t problem = unit / chunks;
            const int64_t first = unit % chunks * kSolveColumns;
            const int64_t columns = std::min(kSolveColumns, k - first);
            const int64_t ldz = round_up(columns, kernel.lanes);
            Matrix<const T> u = args.factor.at(args.batch, problem);
            Matrix<const T> b = args.b.at(args.batch, problem);
            b.data += first * b.col;
            Scratch scratch(Scratch::bytes_for<T>(d) + Scratch::bytes_for<T>(d * ldz) +
                            (in_place ? 0 : Scratch::bytes_for<T>(d * d)));
            T* inverse_diagonal = scratch.take<T>(d);
            T* z = scratch.take<T>(d * ldz);
            if (!in_place) {
                T* copy = scratch.take<T>(d * d);
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
            load_rhs(b, d, columns, z, ldz);
            kernel.solve_transposed(u.data, u.row, d, inverse_diagonal, z, ldz);
            kernel.solve_upper(u.data, u.row, d, inverse_diagonal, z, ldz);
            T* to = args.solution + problem * d * k + first;
            for (int64_t i = 0; i < d; ++i) {
                std::copy_n(z + i * ldz, columns, to + i * k);
            }
        };
        return parallel_for(problems * chunks, grain_for(2 * d * d * std::min(k, kSolveColumns)), body);
    });
}

#define ONESTEP_INSTANTIATE(T)                                                   \
    template Status gram<T>(const GramArgs<T>&);                                 \
    template Status moments<T>(const MomentsArgs<T>&);                           \
    template Status solve_normal<T>(SolveNormalArgs<T>);                         \
    template Status solve_normal_backward<T>(const SolveNormalBackwardArgs<T>&); \
    template Status solve_spd<T>(const SolveSpdArgs<T>&);                        \
    template Status cholesky<T>(const CholeskyArgs<T>&);                         \
    template Status cholesky_solve<T>(const CholeskySolveArgs<T>&);

ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

#undef ONESTEP_INSTANTIATE

}  // namespace onestep
