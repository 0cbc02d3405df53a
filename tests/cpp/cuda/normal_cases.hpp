// What the tests of the normal-equations kernels on the emulator share: sizes, results, matrices in every layout.
#pragma once

#include <array>
#include <tuple>

#include "base/singular.hpp"
#include "normal/cpu/kernels.hpp"
#include "normal/cuda/middle.cuh"
#include "normal/cuda/normal.hpp"
#include "normal/normal.hpp"
#include "simt.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using testing::check;
using testing::difference;
using testing::identical;
using testing::Table;

template <class T>
double tolerance() {
    return sizeof(T) == 4 ? 2e-4 : 1e-11;
}

// Of Gram sums: products in pieces of fewer bits than T has would miss it.
template <class T>
double gram_tolerance() {
    return sizeof(T) == 4 ? 2e-6 : 1e-13;
}

template <class T>
struct Results {
    std::vector<T> gram, cross, solution, factor, norm;
    std::vector<int32_t> info;

    Results(int64_t problems, int64_t d, int64_t k)
        : gram(static_cast<size_t>(problems * d * d), T(-7)),
          cross(static_cast<size_t>(problems * d * k), T(-7)),
          solution(cross),
          factor(gram),
          norm(static_cast<size_t>(problems), T(-7)),
          info(static_cast<size_t>(problems), -7) {}
};

template <class T>
bool same(const Results<T>& a, const Results<T>& b) {
    return identical(a.solution, b.solution) && identical(a.factor, b.factor) && identical(a.norm, b.norm) &&
           a.info == b.info;
}

struct Size {
    int64_t problems, n, d, k;
    bool weighted;
};

template <class T>
std::string name(const char* what, const Size& size) {
    return std::string(what) + (sizeof(T) == 4 ? " f32" : " f64") + " B=" + std::to_string(size.problems) +
           " n=" + std::to_string(size.n) + " d=" + std::to_string(size.d) + " k=" + std::to_string(size.k) +
           (size.weighted ? " weighted" : "");
}

inline BatchShape batch_of(int64_t problems) {
    BatchShape batch;
    batch.dims = 1;
    batch.size[0] = problems;
    return batch;
}

// Arguments of the reference (GramArgs, SolveNormalArgs) or of a CUDA kernel (SystemArgs) with these rows.
template <class Args, class T>
Args row_args(const Size& size, const Batched<const T>& x, const Batched<const T>& y, const Batched<const T>& weight) {
    Args args;
    args.batch = batch_of(size.problems);
    args.n = size.n;
    args.d = size.d;
    args.k = size.k;
    args.x = x;
    args.y = y;
    if (size.weighted) {
        args.weight = weight;
    }
    return args;
}

// Arguments of the reference (SolveSpdArgs) or of a CUDA kernel (SystemArgs) with these matrices.
template <class Args, class T>
Args matrix_args(const Size& size, const Batched<const T>& a, const Batched<const T>& b) {
    Args args;
    args.batch = batch_of(size.problems);
    args.d = size.d;
    args.k = size.k;
    args.a = a;
    args.b = b;
    return args;
}

// The arguments with the results of a solve, or of a factor alone, where there are no right-hand sides; without norms.
template <class Args, class T>
Args& into(Args& args, Results<T>& to) {
    args.solution = to.solution.empty() ? nullptr : to.solution.data();
    args.factor = to.factor.data();
    args.info = to.info.data();
    return args;
}

// The arguments with the results of a Gram matrix.
template <class Args, class T>
Args& into_gram(Args& args, Results<T>& to) {
    args.gram = to.gram.data();
    args.cross = to.cross.data();
    return args;
}

// to.gram = XᵀX + 1 of random rows: matrices that have a factor.
template <class T>
void positive_matrices(std::mt19937& random, const Size& size, Results<T>& to) {
    const int64_t d = size.d;
    const Table<T> x(random, size.problems, d + 3, d, Table<T>::Layout::rows);
    GramArgs<T> args = row_args<GramArgs<T>, T>({size.problems, d + 3, d, 0, false}, x.view, {}, {});
    check(reference::gram(into_gram(args, to)) == Status::ok, "reference");
    for (int64_t i = 0; i < size.problems * d; ++i) {
        to.gram[static_cast<size_t>(i * d + i % d)] += T(1);
    }
}

// How matrices lie in memory: rows or columns one after another; rows of which none begins at a multiple of 16 bytes;
// with gaps between the elements; from the end to the beginning.
enum class Lies { rows, columns, shifted, strided, reversed };

// Matrices of which the lower triangle is given; NaN above the diagonal and in gaps.
template <class T>
struct LowerTriangles {
    std::vector<T> data;
    Batched<const T> view;

    LowerTriangles(const std::vector<T>& symmetric, int64_t problems, int64_t d, Lies lies) {
        const int64_t step = lies == Lies::strided ? 3 : 1;
        const int64_t used = problems * d * d * step - (step - 1);
        begin_ = lies == Lies::shifted ? 1 : lies == Lies::reversed ? used - 1 : 0;
        view.row = lies == Lies::columns ? 1 : d * step;
        view.col = lies == Lies::columns ? d : step;
        view.batch[0] = d * d * step;
        if (lies == Lies::reversed) {
            view.row = -d;
            view.col = -1;
            view.batch[0] = -d * d;
        }
        data.assign(static_cast<size_t>(used + (lies == Lies::shifted ? 1 : 0)), std::numeric_limits<T>::quiet_NaN());
        view.data = data.data() + begin_;
        for (int64_t at = 0; at < problems * d * d; ++at) {
            if (at % d <= at / d % d) {
                element(at / (d * d), at / d % d, at % d) = symmetric[static_cast<size_t>(at)];
            }
        }
    }
    LowerTriangles(const LowerTriangles&) = delete;
    LowerTriangles& operator=(const LowerTriangles&) = delete;

    T& element(int64_t problem, int64_t row, int64_t col) {
        return data[static_cast<size_t>(begin_ + problem * view.batch[0] + row * view.row + col * view.col)];
    }

 private:
    int64_t begin_ = 0;
};

}  // namespace
