#include "glm/glm.hpp"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "base/parallel.hpp"
#include "base/scratch.hpp"
#include "base/target.hpp"
#include "glm/kernels.hpp"

namespace onestep {
namespace {

// Rows are cut into pieces whose results are added up in double, in order. The number depends on the problem alone:
// about kPieces, of kLeastRows to kMostRows rows, as long as the pieces' results stay below kMostPartialBytes.
constexpr int64_t kPieces = 64;
constexpr int64_t kLeastRows = 256;
constexpr int64_t kMostRows = 4096;
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;
// Elements of the result that one unit of parallel work adds up.
constexpr int64_t kSumChunk = 4096;

template <class X, class T>
const GlmKernels<X, T>& pick(const GlmKernels<float, float>& f32, const GlmKernels<double, double>& f64,
                             const GlmKernels<BFloat16, float>& bf16) {
    if constexpr (std::is_same_v<X, BFloat16>) {
        return bf16;
    } else if constexpr (std::is_same_v<X, double>) {
        return f64;
    } else {
        return f32;
    }
}

template <class X, class T>
const GlmKernels<X, T>& kernels() {
    switch (active_target()) {
#ifdef ONESTEP_X86_TARGETS
        case Target::avx2:
            return pick<X, T>(avx2::glm_f32, avx2::glm_f64, avx2::glm_bf16);
        case Target::avx512:
            return pick<X, T>(avx512::glm_f32, avx512::glm_f64, avx512::glm_bf16);
#endif
        default:
            return pick<X, T>(generic::glm_f32, generic::glm_f64, generic::glm_bf16);
    }
}

int64_t whole(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

GlmColumns columns_for(int64_t groups, int64_t width, int64_t lanes) {
    GlmColumns columns;
    columns.groups = groups;
    columns.width = width;
    if (width == 1) {
        columns.ld = groups == 1 ? 1 : whole(groups, lanes);
    } else {
        columns.stride = whole(width, lanes);
        columns.ld = groups * columns.stride;
    }
    return columns;
}

struct Pieces {
    int64_t n, size, count, rows;

    Pieces(int64_t n_, int64_t size_, int64_t bytes) : n(n_), size(size_) {
        rows = std::clamp((n + kPieces - 1) / kPieces, kLeastRows, kMostRows);
        const int64_t most = std::max<int64_t>(1, kMostPartialBytes / std::max<int64_t>(size * bytes, 1));
        rows = std::max(rows, (n + most - 1) / most);
        count = (n + rows - 1) / rows;
    }

    int64_t begin(int64_t piece) const { return piece * rows; }
    int64_t end(int64_t piece) const { return std::min(n, (piece + 1) * rows); }
};

// to(row, group, column) = Σ over pieces of the partial results, each row-major (d + 1) × ld.
template <class T, class Store>
Status add_pieces(const Pieces& pieces, const T* partial, const Store& store) {
    const int64_t chunks = (pieces.size + kSumChunk - 1) / kSumChunk;
    auto add = [&](int64_t chunk) {
        for (int64_t at = chunk * kSumChunk; at < std::min(pieces.size, (chunk + 1) * kSumChunk); ++at) {
            double sum = 0.0;
            for (int64_t piece = 0; piece < pieces.count; ++piece) {
                sum += static_cast<double>(partial[piece * pieces.size + at]);
            }
            store(at, static_cast<T>(sum));
        }
    };
    return parallel_for(chunks, 1, add);
}

// Packs the right-hand sides, calls rows(piece, packed, partial, work) for every piece and adds up what they leave.
template <class X, class T, class Rows>
Status run(const GlmData<X, T>& data, const GlmColumns& columns, const Batched<const T>& right, T* result,
           const Rows& rows) {
    const GlmKernels<X, T>& kernel = kernels<X, T>();
    const int64_t height = data.rows_of_w();
    const Pieces pieces(data.n, height * columns.ld, sizeof(T));
    const int64_t packed_size = (whole(data.d, kernel.lanes) + kernel.lanes) * std::max(columns.ld, int64_t{1});
    const int64_t partial_size = result != nullptr ? pieces.count * pieces.size : 0;
    Scratch scratch(Scratch::bytes_for<T>(packed_size) + Scratch::bytes_for<T>(partial_size));
    T* packed = scratch.take<T>(packed_size);
    T* partial = scratch.take<T>(partial_size);
    kernel.pack(data, columns, right.data, right.batch[0], right.row, right.col, packed);

    auto piece_rows = [&](int64_t piece) {
        const int64_t work_size = kernel.work(data, columns);
        Scratch own(Scratch::bytes_for<T>(work_size));
        T* sum = result != nullptr ? partial + piece * pieces.size : nullptr;
        if (sum != nullptr) {
            std::fill_n(sum, pieces.size, T(0));
        }
        rows(pieces, piece, packed, sum, own.take<T>(work_size));
    };
    const Status status = parallel_for(pieces.count, 1, piece_rows);
    if (status != Status::ok || result == nullptr) {
        return status;
    }
    return add_pieces(pieces, partial, [&](int64_t at, T sum) {
        const int64_t row = at / columns.ld;
        const int64_t group = at % columns.ld / columns.stride;
        const int64_t column = at % columns.ld % columns.stride;
        if (group < columns.groups && column < columns.width) {
            result[(group * height + row) * columns.width + column] = sum;
        }
    });
}

template <class X, class T>
bool any_negative_weight(const GlmData<X, T>& data) {
    for (int64_t i = 0; i < data.n && data.weight.data != nullptr; ++i) {
        if (data.weight.data[i * data.weight.row] < T(0)) {
            return true;
        }
    }
    return false;
}

}  // namespace

template <class X, class T>
Status glm_point(const GlmPointArgs<X, T>& args) {
    if (any_negative_weight(args.data)) {
        return Status::negative_weight;
    }
    const GlmKernels<X, T>& kernel = kernels<X, T>();
    const GlmColumns columns = columns_for(1, args.data.k, kernel.lanes);
    Batched<const T> w;
    w.data = args.w.data;
    w.row = args.w.row;
    w.col = args.w.col;
    // There are never more pieces than for a result of one element.
    std::vector<double> losses(static_cast<size_t>(Pieces(args.data.n, 1, 1).count), 0.0);
    const Status status = run(args.data, columns, w, args.gradient,
                              [&](const Pieces& pieces, int64_t piece, const T* packed, T* sum, T* work) {
                                  losses[static_cast<size_t>(piece)] = kernel.point_rows(
                                      args, columns, pieces.begin(piece), pieces.end(piece), packed, sum, work);
                              });
    *args.loss = 0.0;
    for (const double loss : losses) {
        *args.loss += loss;
    }
    return status;
}

template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args) {
    const GlmKernels<X, T>& kernel = kernels<X, T>();
    const GlmColumns columns = columns_for(args.m, args.data.k, kernel.lanes);
    return run(args.data, columns, args.v, args.product,
               [&](const Pieces& pieces, int64_t piece, const T* packed, T* sum, T* work) {
                   kernel.product_rows(args, columns, pieces.begin(piece), pieces.end(piece), packed, sum, work);
               });
}

#define ONESTEP_INSTANTIATE(X, T)                         \
    template Status glm_point(const GlmPointArgs<X, T>&); \
    template Status glm_product(const GlmProductArgs<X, T>&);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(BFloat16, float)

}  // namespace onestep
