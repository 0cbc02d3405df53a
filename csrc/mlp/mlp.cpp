#include "mlp/mlp.hpp"

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "base/parallel.hpp"
#include "base/scratch.hpp"
#include "base/target.hpp"
#include "mlp/kernels.hpp"

namespace onestep {
namespace {

// What a block of rows works on stays within the second-level cache.
constexpr int64_t kBlockBytes = int64_t{192} << 10;
constexpr int64_t kMostBlockRows = 1024;
// Rows are cut into pieces whose gradients are added up in double, in order. The number depends on the problem alone.
constexpr int64_t kPieces = 16;
constexpr int64_t kMostPartialBytes = int64_t{64} << 20;

template <class T>
const MlpKernels<T>& kernels() {
    if constexpr (std::is_same_v<T, double>) {
        return ONESTEP_KERNELS(mlp_f64);
    } else {
        return ONESTEP_KERNELS(mlp_f32);
    }
}

// One call: the network with its weights packed, and how its rows are cut into blocks.
template <class T>
struct Call {
    const MlpArgs<T>& args;
    const MlpKernels<T>& kernel = kernels<T>();
    std::vector<T> packed;
    MlpNetwork<T> network;
    int64_t rows;  // of a block
    int64_t blocks;
    int64_t work;

    Call(const MlpArgs<T>& args_, const Matrix<const T>& y) : args(args_) {
        const MlpLayer* layers = args.layers;
        const int64_t count = args.count;
        network = {layers, count, args.x, y, args.parameters, nullptr};
        packed.resize(static_cast<size_t>(kernel.packed_size(layers, count)));
        kernel.pack(network, packed.data());
        network.packed = packed.data();
        const int64_t panel_bytes = kernel.work(layers, count, kernel.panel) * static_cast<int64_t>(sizeof(T));
        rows = std::clamp(kBlockBytes / panel_bytes, int64_t{1}, kMostBlockRows / kernel.panel) * kernel.panel;
        blocks = (args.n + rows - 1) / rows;
        work = kernel.work(layers, count, rows);
    }

    // result (or nothing, if null) = Σ rows(begin, count, partial result, work) over all blocks; returns the sum of
    // what those return. `size` elements.
    template <class Rows>
    Status sum(int64_t size, T* result, double* returned, const Rows& add_rows) const {
        const int64_t affordable = kMostPartialBytes / std::max<int64_t>(size * static_cast<int64_t>(sizeof(T)), 1);
        const int64_t pieces = std::min({kPieces, std::max<int64_t>(affordable, 1), blocks});
        std::vector<T> partial(static_cast<size_t>(result == nullptr ? 0 : pieces * size));
        std::vector<double> sums(static_cast<size_t>(pieces));
        auto body = [&](int64_t piece) {
            Scratch scratch(work_bytes());
            T* memory = scratch.take<T>(work);
            T* to = result == nullptr ? nullptr : partial.data() + piece * size;
            for (int64_t block = piece * blocks / pieces; block < (piece + 1) * blocks / pieces; ++block) {
                sums[static_cast<size_t>(piece)] += add_rows(block * rows, rows_of(block), to, memory);
            }
        };
        const Status status = parallel_for(pieces, 1, body);
        *returned = std::accumulate(sums.begin(), sums.end(), 0.0);
        for (int64_t at = 0; result != nullptr && at < size; ++at) {
            double total = 0.0;
            for (int64_t piece = 0; piece < pieces; ++piece) {
                total += static_cast<double>(partial[static_cast<size_t>(piece * size + at)]);
            }
            result[at] = static_cast<T>(total);
        }
        return status;
    }

    int64_t rows_of(int64_t block) const { return std::min(rows, args.n - block * rows); }
    int64_t work_bytes() const { return Scratch::bytes_for<T>(work); }
};

}  // namespace

template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args) {
    return guarded([&] {
        const Call<T> call(args.network, args.y);
        return call.sum(args.network.size(), args.gradient, args.loss,
                        [&](int64_t begin, int64_t rows, T* gradient, T* work) {
                            return call.kernel.gradient(call.network, begin, rows, gradient, work);
                        });
    });
}

template <class T>
Status mlp_product(const MlpProductArgs<T>& args) {
    return guarded([&] {
        const Call<T> call(args.network, {});
        double unused = 0.0;
        if (args.v == nullptr) {
            return call.sum(args.network.size(), args.product, &unused,
                            [&](int64_t begin, int64_t rows, T* diagonal, T* work) {
                                call.kernel.diagonal(call.network, begin, rows, diagonal, work);
                                return 0.0;
                            });
        }
        MlpArgs<T> along = args.network;
        along.parameters = args.v;
        const Call<T> direction(along, {});
        return call.sum(args.network.size(), args.product, &unused,
                        [&](int64_t begin, int64_t rows, T* product, T* work) {
                            call.kernel.product(call.network, direction.network, begin, rows, product, work);
                            return 0.0;
                        });
    });
}

template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args) {
    return guarded([&] {
        const Call<T> call(args.network, {});
        auto body = [&](int64_t block) {
            Scratch scratch(call.work_bytes());
            call.kernel.jacobian(call.network, block * call.rows, call.rows_of(block), args.scale, args.jacobian,
                                 scratch.take<T>(call.work));
        };
        return parallel_for(call.blocks, 1, body);
    });
}

template Status mlp_gradient<float>(const MlpGradientArgs<float>&);
template Status mlp_gradient<double>(const MlpGradientArgs<double>&);
template Status mlp_product<float>(const MlpProductArgs<float>&);
template Status mlp_product<double>(const MlpProductArgs<double>&);
template Status mlp_jacobian<float>(const MlpJacobianArgs<float>&);
template Status mlp_jacobian<double>(const MlpJacobianArgs<double>&);

}  // namespace onestep
