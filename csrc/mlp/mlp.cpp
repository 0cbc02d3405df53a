#include "mlp/mlp.hpp"

#include <algorithm>
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

    int64_t rows_of(int64_t block) const { return std::min(rows, args.n - block * rows); }
    int64_t work_bytes() const { return Scratch::bytes_for<T>(work); }
};

}  // namespace

template <class T>
Status mlp_gradient(const MlpGradientArgs<T>& args) {
    const Call<T> call(args.network, args.y);
    const int64_t size = args.gradient == nullptr ? 0 : args.network.size();
    const int64_t affordable = kMostPartialBytes / std::max<int64_t>(size * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t pieces = std::min({kPieces, std::max<int64_t>(affordable, 1), call.blocks});
    std::vector<T> partial(static_cast<size_t>(pieces * size));
    std::vector<double> losses(static_cast<size_t>(pieces));
    auto body = [&](int64_t piece) {
        Scratch scratch(call.work_bytes());
        T* work = scratch.take<T>(call.work);
        T* gradient = size == 0 ? nullptr : partial.data() + piece * size;
        for (int64_t block = piece * call.blocks / pieces; block < (piece + 1) * call.blocks / pieces; ++block) {
            losses[static_cast<size_t>(piece)] +=
                call.kernel.gradient(call.network, block * call.rows, call.rows_of(block), gradient, work);
        }
    };
    const Status status = parallel_for(pieces, 1, body);
    *args.loss = 0.0;
    for (const double loss : losses) {
        *args.loss += loss;
    }
    for (int64_t at = 0; at < size; ++at) {
        double sum = 0.0;
        for (int64_t piece = 0; piece < pieces; ++piece) {
            sum += static_cast<double>(partial[static_cast<size_t>(piece * size + at)]);
        }
        args.gradient[at] = static_cast<T>(sum);
    }
    return status;
}

template <class T>
Status mlp_jacobian(const MlpJacobianArgs<T>& args) {
    const Call<T> call(args.network, {});
    auto body = [&](int64_t block) {
        Scratch scratch(call.work_bytes());
        call.kernel.jacobian(call.network, block * call.rows, call.rows_of(block), args.scale, args.jacobian,
                             scratch.take<T>(call.work));
    };
    return parallel_for(call.blocks, 1, body);
}

template Status mlp_gradient<float>(const MlpGradientArgs<float>&);
template Status mlp_gradient<double>(const MlpGradientArgs<double>&);
template Status mlp_jacobian<float>(const MlpJacobianArgs<float>&);
template Status mlp_jacobian<double>(const MlpJacobianArgs<double>&);

}  // namespace onestep
