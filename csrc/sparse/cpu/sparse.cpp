// The entry sparse_multiply. Rows are cut into pieces of about as many elements each.
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

template <class T>
int64_t offset(const SparseMultiplyArgs<T>& args, int64_t row) {
    return args.wide ? static_cast<const int64_t*>(args.offsets)[row] : static_cast<const int32_t*>(args.offsets)[row];
}

// Elements of the rows, which may be a part of a matrix's; offsets that are out of range give any number in range.
template <class T>
Range elements_of(const SparseMultiplyArgs<T>& args) {
    const int64_t begin = std::clamp<int64_t>(offset(args, 0), 0, args.elements);
    return {begin, std::clamp(offset(args, args.n), begin, args.elements)};
}

// The first row that begins at element `target` or later.
template <class Index>
int64_t row_of(const void* offsets, int64_t n, int64_t target) {
    const auto* begin = static_cast<const Index*>(offsets);
    return std::lower_bound(begin, begin + n, target, [](Index offset, int64_t at) { return offset < at; }) - begin;
}

// Where a piece begins: pieces have about as many elements.
template <class T>
int64_t first_row(const SparseMultiplyArgs<T>& args, const EvenCut& elements, int64_t begin, int64_t piece) {
    if (piece == 0 || piece == elements.pieces) {
        return piece == 0 ? 0 : args.n;
    }
    const int64_t target = begin + elements.spread(piece).begin;
    return args.wide ? row_of<int64_t>(args.offsets, args.n, target) : row_of<int32_t>(args.offsets, args.n, target);
}

}  // namespace

template <class T>
SparsePlan<T> plan(const SparseMultiplyArgs<T>& args) {
    SparsePlan<T> plan;
    plan.kernels = &active_kernels<T>();
    const Range elements = elements_of(args);
    plan.first_element = elements.begin;
    plan.elements = {elements.size(), std::clamp<int64_t>(args.n, 1, kMostPieces)};
    const int64_t products = elements.size() * (args.k + kElementProducts) + args.n * args.k;
    plan.piece_nanoseconds = nanoseconds_of_products(products / plan.elements.pieces);
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
        const int64_t begin = first_row(args, plan.elements, plan.first_element, piece);
        const int64_t end = first_row(args, plan.elements, plan.first_element, piece + 1);
        return plan.kernels->multiply(args, v, begin, end) ? Status::ok : Status::bad_index;
    };
    return parallel_for(plan.elements.pieces, plan.piece_nanoseconds, piece_rows);
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
