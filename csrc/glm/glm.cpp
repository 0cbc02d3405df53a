#include "glm/glm.hpp"

#include <algorithm>
#include <numeric>
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

// With many columns: bytes and rows of a chunk, and how many blocks X's columns are cut into, of how many at most.
constexpr int64_t kChunkBytes = int64_t{8} << 20;
constexpr int64_t kMostChunkRows = 1024;
constexpr int64_t kBackBlocks = 16;
constexpr int64_t kMostBackColumns = 96;

template <class X, class T>
const GlmKernels<X, T>& kernels() {
    if constexpr (std::is_same_v<X, BFloat16>) {
        return ONESTEP_KERNELS(glm_bf16);
    } else if constexpr (std::is_same_v<X, double>) {
        return ONESTEP_KERNELS(glm_f64);
    } else {
        return ONESTEP_KERNELS(glm_f32);
    }
}

int64_t whole(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

template <class X, class T>
GlmColumns columns_for(int64_t groups, int64_t width) {
    const int64_t lanes = kernels<X, T>().lanes;
    GlmColumns columns;
    columns.groups = groups;
    columns.width = width;
    if (width == 1) {
        columns.ld = groups == 1 ? 1 : whole(groups, lanes);
    } else {
        columns.stride = whole(width, lanes);
        columns.ld = groups * columns.stride;
    }
    columns.wide = columns.ld > GlmColumns::kWideVectors * lanes;
    if (columns.wide) {
        columns.ld = whole(columns.ld, kernels<X, T>().panel);
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

// result = the elements [begin, end) of a row-major (d + 1) × ld of which value(at) gives one each, without padding.
template <class X, class T, class Value>
void store_columns(const GlmData<X, T>& data, const GlmColumns& columns, T* result, int64_t begin, int64_t end,
                   const Value& value) {
    for (int64_t at = begin; at < end; ++at) {
        const int64_t row = at / columns.ld;
        const int64_t group = at % columns.ld / columns.stride;
        const int64_t column = at % columns.ld % columns.stride;
        if (group < columns.groups && column < columns.width) {
            result[(group * data.rows_of_w() + row) * columns.width + column] = static_cast<T>(value(at));
        }
    }
}

// result = Σ over pieces of the partial results, each row-major (d + 1) × ld.
template <class X, class T>
Status add_pieces(const GlmData<X, T>& data, const GlmColumns& columns, const Pieces& pieces, const T* partial,
                  T* result) {
    auto add = [&](int64_t chunk) {
        const int64_t end = std::min(pieces.size, (chunk + 1) * kSumChunk);
        store_columns(data, columns, result, chunk * kSumChunk, end, [&](int64_t at) {
            double sum = 0.0;
            for (int64_t piece = 0; piece < pieces.count; ++piece) {
                sum += static_cast<double>(partial[piece * pieces.size + at]);
            }
            return sum;
        });
    };
    return parallel_for((pieces.size + kSumChunk - 1) / kSumChunk, 1, add);
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
    return add_pieces(data, columns, pieces, partial, result);
}

// The same with many columns, in chunks of rows: calls rows(chunk, first, packed, work) for every kWideTileRows of one.
template <class X, class T, class Rows>
Status run_wide(const GlmData<X, T>& data, const GlmColumns& columns, const Batched<const T>& right, T* result,
                const Rows& rows) {
    const GlmKernels<X, T>& kernel = kernels<X, T>();
    const int64_t size = data.rows_of_w() * columns.ld;
    GlmChunk<T> chunk;
    const int64_t affordable = kChunkBytes / (columns.ld * static_cast<int64_t>(sizeof(T)));
    const int64_t height = whole(std::clamp<int64_t>(std::min(affordable, data.n), 1, kMostChunkRows), kWideTileRows);
    chunk.height = height;
    chunk.block = std::clamp<int64_t>((data.d + kBackBlocks - 1) / kBackBlocks, 1, kMostBackColumns);
    chunk.block = whole(chunk.block, kernel.lanes);
    const int64_t total_size = result != nullptr ? size : 0;
    const int64_t packed_size = (data.d + 1) * columns.ld;
    Scratch scratch(Scratch::bytes_for<T>(packed_size) + Scratch::bytes_for<T>(height * columns.ld) +
                    Scratch::bytes_for<double>(total_size));
    T* packed = scratch.take<T>(packed_size);
    chunk.z = scratch.take<T>(height * columns.ld);
    double* total = scratch.take_zeroed<double>(total_size);
    kernel.pack(data, columns, right.data, right.batch[0], right.row, right.col, packed);

    const int64_t work_size = kernel.wide_work(data, columns, chunk);
    const int64_t blocks = (data.d + chunk.block - 1) / chunk.block + (data.intercept ? 1 : 0);
    for (chunk.begin = 0; chunk.begin < data.n; chunk.begin += height) {
        chunk.rows = std::min(height, data.n - chunk.begin);
        auto there = [&](int64_t tile) {
            Scratch own(Scratch::bytes_for<T>(work_size));
            rows(chunk, tile * kWideTileRows, packed, own.take<T>(work_size));
        };
        Status status = parallel_for((chunk.rows + kWideTileRows - 1) / kWideTileRows, 1, there);
        if (status == Status::ok && result != nullptr) {
            auto back = [&](int64_t unit) {
                Scratch own(Scratch::bytes_for<T>(work_size));
                kernel.wide_back(data, columns, chunk, unit, total, own.take<T>(work_size));
            };
            status = parallel_for(blocks, 1, back);
        }
        if (status != Status::ok) {
            return status;
        }
    }
    if (result != nullptr) {
        store_columns(data, columns, result, 0, size, [&](int64_t at) { return total[at]; });
    }
    return Status::ok;
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
    return guarded([&] {
        if (any_negative_weight(args.data)) {
            return Status::negative_weight;
        }
        const GlmKernels<X, T>& kernel = kernels<X, T>();
        const GlmColumns columns = columns_for<X, T>(1, args.data.k);
        Batched<const T> w;
        w.data = args.w.data;
        w.row = args.w.row;
        w.col = args.w.col;
        // One for each piece or tile of rows.
        std::vector<double> losses(static_cast<size_t>(args.data.n / std::min(kLeastRows, kWideTileRows) + 1), 0.0);
        const auto piece_loss = [&](const Pieces& pieces, int64_t piece, const T* packed, T* sum, T* work) {
            losses[static_cast<size_t>(piece)] =
                kernel.point_rows(args, columns, pieces.begin(piece), pieces.end(piece), packed, sum, work);
        };
        const auto tile_loss = [&](const GlmChunk<T>& chunk, int64_t first, const T* packed, T* work) {
            losses[static_cast<size_t>((chunk.begin + first) / kWideTileRows)] =
                kernel.wide_point(args, columns, chunk, first, packed, work);
        };
        const Status status = columns.wide ? run_wide(args.data, columns, w, args.gradient, tile_loss)
                                           : run(args.data, columns, w, args.gradient, piece_loss);
        *args.loss = std::accumulate(losses.begin(), losses.end(), 0.0);
        return status;
    });
}

template <class X, class T>
Status glm_product(const GlmProductArgs<X, T>& args) {
    return guarded([&] {
        const GlmKernels<X, T>& kernel = kernels<X, T>();
        const GlmColumns columns = columns_for<X, T>(args.m, args.data.k);
        if (columns.wide) {
            return run_wide(args.data, columns, args.v, args.product,
                            [&](const GlmChunk<T>& chunk, int64_t first, const T* packed, T* work) {
                                kernel.wide_product(args, columns, chunk, first, packed, work);
                            });
        }
        return run(args.data, columns, args.v, args.product,
                   [&](const Pieces& pieces, int64_t piece, const T* packed, T* sum, T* work) {
                       kernel.product_rows(args, columns, pieces.begin(piece), pieces.end(piece), packed, sum, work);
                   });
    });
}

#define ONESTEP_INSTANTIATE(X, T)                         \
    template Status glm_point(const GlmPointArgs<X, T>&); \
    template Status glm_product(const GlmProductArgs<X, T>&);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(BFloat16, float)

}  // namespace onestep
