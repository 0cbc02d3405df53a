// The entry polar_factor: a matrix of the batch is a piece of work, whose Gram matrix, factors and inverses stay in the
// cache of the thread that has it.
#include <algorithm>
#include <cmath>
#include <limits>

#include "base/parallel.hpp"
#include "normal/cpu/common.hpp"
#include "polar/cpu/plan.hpp"

namespace onestep {
namespace {

// Elements within these have products that neither overflow nor vanish.
constexpr double kLeastSafe = 0x1p-20;
constexpr double kMostSafe = 0x1p20;
// Panels, and rows, of the long side that are multiplied at a time.
constexpr int64_t kPanels = 4;
constexpr int64_t kRows = 96;
// Rows of a triangle whose Gram matrix is summed at a time: those further up have fewer columns.
constexpr int64_t kTriangleRows = 48;

// One matrix of the batch, n × m with n its short side, and its thread's memory. Names are those of the formulas in
// polar.hpp: a is A = I + cG, b is B = A⁻¹, `product` is P; the other parts are described in PolarPlan (`c` is
// `matrix`, `packed` is `gram`).
template <class T>
struct Iterations {
    const PolarPlan<T>& plan;
    int64_t n, m;
    T* c;
    T* a;
    T* b;
    T* other;
    T* product;
    T* inverse_diagonal;
    T* floor;
    T* packed;
    T* left;
    T* right;
    double norm = 1.0;  // of MMᵀ

    int64_t ld() const { return plan.columns; }
    Matrix<const T> square(const T* matrix) const { return {matrix, ld(), 1}; }

    void clear(T* to) const { std::fill_n(to, plan.rows * ld(), T(0)); }

    // to = ZᵀZ, its upper triangle. `triangular`: row i of Z ends with column i.
    void gram(const Matrix<const T>& z, int64_t rows, bool triangular, T* to) const {
        RowsArgs<T> args;
        args.d = n;
        args.x = z;
        clear(to);
        const int64_t step = triangular ? kTriangleRows : rows;
        for (int64_t begin = 0; begin < rows; begin += step) {
            const int64_t end = std::min(begin + step, rows);
            const int64_t last = ceil_div(triangular ? end : n, plan.kernels->panel);
            plan.factor->gram_rows(args, begin, end, 0, last, packed, to, ld());
        }
    }

    // The lower triangle of a symmetric matrix from its upper one.
    void mirror(T* matrix) const {
        for (int64_t i = 1; i < n; ++i) {
            for (int64_t j = 0; j < i; ++j) {
                matrix[i * ld() + j] = matrix[j * ld() + i];
            }
        }
    }

    // G = XXᵀ times `factor`, plus 1 on the diagonal, in a; the norm of MMᵀ.
    void load(const Matrix<const T>& x, double factor) {
        gram({x.data, x.col, x.row}, m, false, a);
        double sum = 0.0;
        for (int64_t i = 0; i < n; ++i) {
            double row = 0.0;
            for (int64_t j = i + 1; j < n; ++j) {
                const double value = static_cast<double>(a[i * ld() + j]);
                row += value * value;
            }
            const double own = static_cast<double>(a[i * ld() + i]);
            sum += 2.0 * row + own * own;
        }
        norm = std::sqrt(sum);
        const T scale = static_cast<T>(factor / norm);
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = i; j < n; ++j) {
                a[i * ld() + j] *= scale;
            }
            a[i * ld() + i] += T(1);
        }
    }

    // to = A⁻¹. False if a pivot is not positive, which a finite matrix does not have.
    bool invert(T* to, Status& status) const {
        const int64_t width = plan.augmented;
        const int64_t panel = plan.kernels->panel;
        std::fill_n(c, plan.rows * width, T(0));
        for (int64_t i = 0; i < n; ++i) {
            std::copy(a + i * ld() + i, a + i * ld() + n, c + i * width + i);
            c[i * width + ld() + i] = T(1);
        }
        int64_t failed = 0;
        status = factor_in_place(*plan.factor, c, width, n, floor, inverse_diagonal, failed);
        if (status != Status::ok || failed != 0) {
            return false;
        }
        for (int64_t first = 0; first < n; first += panel) {
            plan.factor->factor_panel(c, width, first, n, ld() + first, ld() + first + panel, inverse_diagonal);
        }
        gram({c + ld(), width, 1}, n, true, to);
        mirror(to);
        return true;
    }

    // a = I + c₂G₂ from A = I + c₁G₁ and its inverse b, where ratio = c₂/c₁.
    void advance(const PolarStep& step, double ratio) const {
        const double alpha = step.b / step.c;
        const double beta = step.a - alpha;
        gram(square(b), n, false, other);
        const T of_a = static_cast<T>(ratio * alpha * alpha);
        const T of_one = static_cast<T>(1.0 + ratio * (2.0 * alpha * beta - alpha * alpha));
        const T of_b = static_cast<T>(ratio * (beta * beta - 2.0 * alpha * beta));
        const T of_square = static_cast<T>(-ratio * beta * beta);
        for (int64_t i = 0; i < n; ++i) {
            T* to = a + i * ld();
            const T* inverse = b + i * ld();
            const T* square = other + i * ld();
            for (int64_t j = i; j < n; ++j) {
                to[j] = of_a * to[j] + of_b * inverse[j] + of_square * square[j];
            }
            to[i] += of_one;
        }
    }

    // P = αI + βB, or that times P, which commutes with it.
    void extend(const PolarStep& step, const T* inverse, bool first) const {
        const T alpha = static_cast<T>(step.b / step.c);
        const T beta = static_cast<T>(step.a - step.b / step.c);
        if (first) {
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j < n; ++j) {
                    product[i * ld() + j] = beta * inverse[i * ld() + j] + (i == j ? alpha : T(0));
                }
            }
            return;
        }
        // The product is symmetric: tiles up to its diagonal are enough.
        const int64_t panel = plan.kernels->panel;
        plan.kernels->pack_left(square(product), n, n, left);
        plan.kernels->pack_right(square(inverse), n, n, right);
        for (int64_t begin = 0; begin < n; begin += panel) {
            const int64_t end = std::min(begin + panel, n);
            plan.kernels->multiply(left, right + begin * n, n, end, end - begin, c + begin, ld());
        }
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = i; j < n; ++j) {
                T& to = product[i * ld() + j];
                to = alpha * to + beta * c[i * ld() + j];
            }
        }
        mirror(product);
    }

    // to = PX over the root of the norm, n × m where `wide`, or its transpose.
    void write(const Matrix<const T>& x, bool wide, T* to) const {
        const T scale = static_cast<T>(1.0 / std::sqrt(norm));
        for (int64_t i = 0; i < n; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                product[i * ld() + j] *= scale;
            }
        }
        const PolarKernels<T>& kernels = *plan.kernels;
        if (wide) {
            kernels.pack_left(square(product), n, n, left);
            const FixedCut cut{m, kPanels * kernels.panel};
            for (int64_t piece = 0; piece < cut.pieces(); ++piece) {
                const Range range = cut[piece];
                kernels.pack_right({x.data + range.begin * x.col, x.row, x.col}, n, range.size(), right);
                kernels.multiply(left, right, n, n, range.size(), to + range.begin, m);
            }
            return;
        }
        kernels.pack_right(square(product), n, n, right);
        const FixedCut cut{m, kRows};
        for (int64_t piece = 0; piece < cut.pieces(); ++piece) {
            const Range range = cut[piece];
            kernels.pack_left({x.data + range.begin * x.col, x.col, x.row}, range.size(), n, left);
            kernels.multiply(left, right, n, range.size(), n, to + range.begin * n, n);
        }
    }

    // False where something came out that is not finite.
    bool factor(const PolarArgs<T>& args, const Matrix<const T>& x, T* to, Status& status) {
        load(x, args.step[0].c);
        T* inverse = b;
        for (int step = 0; step < args.steps; ++step) {
            if (!invert(inverse, status)) {
                return false;
            }
            extend(args.step[step], inverse, step == 0);
            if (step + 1 < args.steps) {
                advance(args.step[step], args.step[step + 1].c / args.step[step].c);
            }
        }
        write(x, args.rows <= args.columns, to);
        return true;
    }
};

// The matrix times the power of two that brings its largest element near 1, as short side × long side.
template <class T>
Matrix<const T> scaled(const Matrix<const T>& x, int64_t n, int64_t m, T largest, T* to) {
    int exponent = 0;
    std::frexp(largest, &exponent);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < m; ++j) {
            to[i * m + j] = std::ldexp(x.data[i * x.row + j * x.col], -exponent);
        }
    }
    return {to, m, 1};
}

}  // namespace

template <class T>
PolarPlan<T> plan(const PolarArgs<T>& args) {
    PolarPlan<T> plan;
    plan.kernels = &ONESTEP_KERNELS(polar, f32);
    plan.factor = &active_normal_kernels<T>();
    const int64_t n = plan.short_side = std::min(args.rows, args.columns);
    const int64_t m = plan.long_side = std::max(args.rows, args.columns);
    const int64_t panel = plan.kernels->panel;
    plan.rows = round_up(n, plan.kernels->tile_rows);
    plan.columns = round_up(std::max(n, plan.rows), panel);
    plan.augmented = 2 * plan.columns;
    // Rows that are a multiple of a page apart fall on the same sets of the cache.
    plan.augmented += plan.augmented * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? panel : 0;
    const int64_t order = plan.rows * plan.columns;
    Layout& own = plan.own_layout;
    plan.matrix = own.add<T>("matrix", plan.rows * plan.augmented);
    plan.a = own.add<T>("a", order);
    plan.b = own.add<T>("b", order);
    plan.other = own.add<T>("other", order);
    plan.product = own.add<T>("product", order);
    plan.inverse_diagonal = own.add<T>("inverse_diagonal", plan.rows);
    plan.floor = own.add<T>("floor", plan.rows);
    plan.gram = own.add<T>("gram", kBlockRows * plan.columns);
    plan.left = own.add<T>("left", round_up(std::max(n, std::min(kRows, m)), plan.kernels->tile_rows) * n);
    plan.right = own.add<T>("right", round_up(std::max(n, std::min(kPanels * panel, m)), panel) * n);
    plan.scaled = own.add<T>("scaled", n * m);
    return plan;
}

template <class T>
Status run(const PolarPlan<T>& plan, const PolarArgs<T>& args, const Workspace&) {
    const int64_t n = plan.short_side;
    const int64_t m = plan.long_side;
    const int64_t size = n * m;
    auto body = [&](int64_t problem) {
        const CachedWorkspace own(plan.own_layout);
        Matrix<const T> x = args.m.at(args.batch, problem);
        T* to = args.factor + problem * size;
        int32_t& info = args.info[problem];
        const T largest = plan.kernels->largest(x, args.rows, args.columns);
        info = std::isfinite(largest) ? 0 : 1;
        if (info != 0 || largest == T(0)) {
            std::fill_n(to, size, info != 0 ? std::numeric_limits<T>::quiet_NaN() : T(0));
            return Status::ok;
        }
        if (args.rows > args.columns) {
            std::swap(x.row, x.col);
        }
        if (!(largest > T(kLeastSafe) && largest < T(kMostSafe))) {
            x = scaled(x, n, m, largest, own.get(plan.scaled));
        }
        Iterations<T> matrix{plan,
                             n,
                             m,
                             own.get(plan.matrix),
                             own.get(plan.a),
                             own.get(plan.b),
                             own.get(plan.other),
                             own.get(plan.product),
                             own.get(plan.inverse_diagonal),
                             own.zeroed(plan.floor),
                             own.get(plan.gram),
                             own.get(plan.left),
                             own.get(plan.right)};
        Status status = Status::ok;
        if (!matrix.factor(args, x, to, status) && status == Status::ok) {
            info = 1;
            std::fill_n(to, size, std::numeric_limits<T>::quiet_NaN());
        }
        return status;
    };
    return parallel_for(args.batch.count(), nanoseconds_of_products(n * n * (4 * n + m + m / 2)), body);
}

template <class T>
Status polar_factor(const PolarArgs<T>& args) {
    return run_cached(args);
}

template PolarPlan<float> plan(const PolarArgs<float>&);
template Status run(const PolarPlan<float>&, const PolarArgs<float>&, const Workspace&);
template Status polar_factor(const PolarArgs<float>&);

}  // namespace onestep
