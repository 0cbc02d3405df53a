#include "sparse/sparse.hpp"

#include <algorithm>
#include <type_traits>

#include "base/parallel.hpp"
#include "base/target.hpp"
#include "sparse/cpu/plan.hpp"

namespace onestep {
namespace {

// The most pieces: enough for threads to share rows that take unlike times. A row is summed by one thread, so that
// their number changes no bit.
constexpr int64_t kMostPieces = 64;
// What an element costs beside its products, in multiply-adds: a row of V that is in no near cache.
constexpr int64_t kElementProducts = 32;

template <class T>
const SparseKernels<T>& active_kernels() {
    if constexpr (std::is_same_v<T, double>) {
        return ONESTEP_KERNELS(sparse, f64);
    } else {
        return ONESTEP_KERNELS(sparse, f32);
    }
}

// The first row that begins at element `target` or later.
template <class Index>
int64_t row_of(const void* offsets, int64_t n, int64_t target) {
    const auto* begin = static_cast<const Index*>(offsets);
    return std::lower_bound(begin, begin + n, target, [](Index offset, int64_t at) { return offset < at; }) - begin;
}

// Where a piece begins: pieces have about as many elements and rows.
template <class T>
int64_t first_row(const SparseMultiplyArgs<T>& args, int64_t piece, int64_t pieces) {
    if (piece == 0 || piece == pieces) {
        return piece == 0 ? 0 : args.n;
    }
    const int64_t target = args.elements / pieces * piece;
    return args.wide ? row_of<int64_t>(args.offsets, args.n, target) : row_of<int32_t>(args.offsets, args.n, target);
}

}  // namespace

template <class T>
SparsePlan<T> plan(const SparseMultiplyArgs<T>& args) {
    SparsePlan<T> plan;
    plan.kernels = &active_kernels<T>();
    plan.pieces = std::clamp<int64_t>(args.n, 1, kMostPieces);
    const int64_t products = args.elements * (args.k + kElementProducts) + args.n * args.k;
    plan.piece_nanoseconds = nanoseconds_of_products(products / plan.pieces);
    plan.row_length = plan.kernels->row_length(args.k);
    plan.padded = plan.layout.template add<T>("padded", plan.row_length > args.k ? args.d * plan.row_length : 0);
    return plan;
}

template <class T>
Status run(const SparsePlan<T>& plan, const SparseMultiplyArgs<T>& args, const Workspace& workspace) {
    const T* v = args.v;
    if (plan.row_length > args.k) {
        T* padded = workspace.get(plan.padded);
        for (int64_t r = 0; r < args.d; ++r) {
            T* row = padded + r * plan.row_length;
            std::copy_n(args.v + r * args.k, args.k, row);
            std::fill_n(row + args.k, plan.row_length - args.k, T(0));
        }
        v = padded;
    }
    auto piece_rows = [&](int64_t piece) {
        const int64_t begin = first_row(args, piece, plan.pieces);
        const int64_t end = first_row(args, piece + 1, plan.pieces);
        return plan.kernels->multiply(args, v, begin, end) ? Status::ok : Status::bad_index;
    };
    return parallel_for(plan.pieces, plan.piece_nanoseconds, piece_rows);
}

template <class T>
Status sparse_multiply(const SparseMultiplyArgs<T>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T)                                                                 \
    template SparsePlan<T> plan(const SparseMultiplyArgs<T>&);                                 \
    template Status run(const SparsePlan<T>&, const SparseMultiplyArgs<T>&, const Workspace&); \
    template Status sparse_multiply(const SparseMultiplyArgs<T>&);
ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

}  // namespace onestep
