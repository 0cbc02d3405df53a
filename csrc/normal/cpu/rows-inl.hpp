// Passes over the rows of one problem: the residual's right-hand side for refinement, and the gradients.
#pragma once

#include "base/tile-inl.hpp"
#include "normal/cpu/half-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T>
ONESTEP_INLINE int64_t whole_vectors(int64_t count) {
    return (count + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// sum + rest += scale · factor with an error of about ε².
ONESTEP_INLINE void add_product_compensated(Vec<double> scale, Vec<double> factor, Vec<double>& sum,
                                            Vec<double>& rest) {
    const Vec<double> product = opaque(scale * factor);
    const Vec<double> product_error = multiply_subtract(scale, factor, product);
    const Vec<double> next = sum + product;
    const Vec<double> part = next - sum;
    const Vec<double> sum_error = (sum - (next - part)) + (product - part);
    sum = next;
    rest += sum_error + product_error;
}

// high + low += Σ_p x[p][j : j + M] e[p][:] with an error of about ε², M rows of one vector of columns:
// Ogita, Rump and Oishi, "Accurate sum and dot product", SIAM J. Sci. Comput. 26 (2005), Algorithm 5.3 (Dot2).
template <int M>
ONESTEP_INLINE void add_products_compensated(int64_t rows, const double* x, int64_t ldx, const double* e, int64_t lde,
                                             double* high, double* low, int64_t ldg) {
    Vec<double> sum[M];
    Vec<double> rest[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
        sum[i] = load<double>(high + i * ldg);
        rest[i] = load<double>(low + i * ldg);
    }
    for (int64_t p = 0; p < rows; ++p) {
        const Vec<double> factor = load<double>(e + p * lde);
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
            add_product_compensated(broadcast<double>(x[p * ldx + i]), factor, sum[i], rest[i]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
        store<double>(high + i * ldg, sum[i]);
        store<double>(low + i * ldg, rest[i]);
    }
}

// One row of X in double.
template <class T>
ONESTEP_INLINE void load_row(const RowsArgs<T>& args, int64_t row, double* to) {
    if constexpr (sizeof(T) == sizeof(float)) {
        if (is_half(args.element)) {
            const uint16_t* from = args.x_half.data + row * args.x_half.row;
            for (int64_t j = 0; j < args.d; j += kLanes<T>) {
                T some[kLanes<T>];
                const int64_t count = minimum(kLanes<T>, args.d - j);
                widen_run(args.element, from + j * args.x_half.col, args.x_half.col, count, some, 1);
                for (int64_t lane = 0; lane < count; ++lane) {
                    to[j + lane] = static_cast<double>(some[lane]);
                }
            }
            return;
        }
    }
    const T* from = args.x.data + row * args.x.row;
    for (int64_t j = 0; j < args.d; ++j) {
        to[j] = static_cast<double>(from[j * args.x.col]);
    }
}

template <class T>
inline void residual_rows(const RowsArgs<T>& args, int64_t begin, int64_t end, const double* w, double* g, int64_t ldk,
                          double* work) {
    double* low = g + args.d * ldk;
    double* x = work;
    double* e = work + kBlockRows * args.d;
    const int64_t vectors = ldk / kLanes<double>;
    for (int64_t block = begin; block < end; block += kBlockRows) {
        const int64_t rows = minimum(kBlockRows, end - block);
        for (int64_t p = 0; p < rows; ++p) {
            load_row<T>(args, block + p, x + p * args.d);
            for (int64_t c = 0; c < ldk; ++c) {
                e[p * ldk + c] =
                    c < args.k ? static_cast<double>(args.y.data[(block + p) * args.y.row + c * args.y.col]) : 0.0;
            }
        }
        update_block<double, -1>(rows, vectors, args.d, {x, args.d, 1}, w, ldk, e, ldk);
        if (args.weight.data != nullptr) {
            for (int64_t p = 0; p < rows; ++p) {
                const auto weight = static_cast<double>(args.weight.data[(block + p) * args.weight.row]);
                for (int64_t c = 0; c < ldk; ++c) {
                    e[p * ldk + c] *= weight;
                }
            }
        }
        if constexpr (sizeof(T) < sizeof(double)) {
            // Products of floats are exact in double: plain sums lose nothing that float could show.
            update_block<double, 1>(args.d, vectors, rows, {x, 1, args.d}, e, ldk, g, ldk);
        } else {
            // The solve amplifies the rounding of g by cond(X)², which is all of double's digits for a large residual.
            for (int64_t v = 0; v < ldk; v += kLanes<double>) {
                int64_t j = 0;
                for (; j + 4 <= args.d; j += 4) {
                    add_products_compensated<4>(rows, x + j, args.d, e + v, ldk, g + j * ldk + v, low + j * ldk + v,
                                                ldk);
                }
                for (; j < args.d; ++j) {
                    add_products_compensated<1>(rows, x + j, args.d, e + v, ldk, g + j * ldk + v, low + j * ldk + v,
                                                ldk);
                }
            }
        }
    }
}

// Rows that the gradient handles at a time.
inline constexpr int64_t kGradientRows = 32;

inline int64_t gradient_width(int64_t k) { return 2 * k; }

template <class T>
inline int64_t backward_work(int64_t d, int64_t k) {
    const int64_t both = gradient_width(k);
    return d * whole_vectors<T>(both) + both * whole_vectors<T>(d) + kGradientRows * whole_vectors<T>(both) +
           kGradientRows * whole_vectors<T>(d);
}

// [XW | XV] by one product of a block of rows with [W | V], then ∂X by one with the transposed [V | −W].
template <class T>
inline void backward_rows(const BackwardRowsArgs<T>& args, int64_t begin, int64_t end, T* work) {
    const int64_t d = args.d;
    const int64_t k = args.k;
    const int64_t both = gradient_width(k);
    const int64_t ldb = whole_vectors<T>(both);
    const int64_t ldd = whole_vectors<T>(d);
    T* right = work;                             // d × ldb: [W | V]
    T* left = right + d * ldb;                   // 2k × ldd: [V | −W]ᵀ
    T* products = left + both * ldd;             // rows × ldb: [XW | XV], then the coefficients of ∂X
    T* padded = products + kGradientRows * ldb;  // rows × ldd, where rows are not whole vectors
    for (int64_t j = 0; j < d; ++j) {
        for (int64_t c = 0; c < ldb; ++c) {
            right[j * ldb + c] = c < k ? args.solution[j * k + c] : c < both ? args.adjoint[j * k + c - k] : T(0);
        }
    }
    for (int64_t c = 0; c < k; ++c) {
        for (int64_t j = 0; j < ldd; ++j) {
            left[c * ldd + j] = j < d ? args.adjoint[j * k + c] : T(0);
            left[(k + c) * ldd + j] = j < d ? -args.solution[j * k + c] : T(0);
        }
    }
    for (int64_t block = begin; block < end; block += kGradientRows) {
        const int64_t rows = minimum(kGradientRows, end - block);
        for (int64_t e = 0; e < rows * ldb; ++e) {
            products[e] = T(0);
        }
        update_block<T, 1>(rows, ldb / kLanes<T>, d, {args.x.data + block * args.x.row, args.x.row, args.x.col}, right,
                           ldb, products, ldb);
        for (int64_t p = 0; p < rows; ++p) {
            const int64_t row = block + p;
            const T weight = args.weight.data != nullptr ? args.weight.data[row * args.weight.row] : T(1);
            T* xw = products + p * ldb;
            T* xv = xw + k;
            T rowsum = T(0);
            for (int64_t c = 0; c < k; ++c) {
                const T residual = args.y.data[row * args.y.row + c * args.y.col] - xw[c];
                rowsum += xv[c] * residual;
                xw[c] = weight * residual;
                xv[c] *= weight;
                if (args.grad_y != nullptr) {
                    args.grad_y[row * k + c] = xv[c];
                }
            }
            if (args.grad_weight != nullptr) {
                args.grad_weight[row] = rowsum;
            }
        }
        if (args.grad_x == nullptr) {
            continue;
        }
        T* to = args.grad_x + block * d;
        T* gradient = ldd == d ? to : padded;
        for (int64_t e = 0; e < rows * ldd; ++e) {
            gradient[e] = T(0);
        }
        update_block<T, 1>(rows, ldd / kLanes<T>, both, {products, ldb, 1}, left, ldd, gradient, ldd);
        for (int64_t p = 0; p < rows && ldd != d; ++p) {
            for (int64_t j = 0; j < d; ++j) {
                to[p * d + j] = padded[p * ldd + j];
            }
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
