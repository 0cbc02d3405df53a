// What is done to one block of classes of one chunk of rows between the matrix products, in any layout; formulas in
// lmhead.hpp.
#pragma once

#include "base/gemm-inl.hpp"
#include "lmhead/cpu/kernels.hpp"

namespace onestep::lmhead::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Classes [begin, begin + count) of a block, in matrices over the chunk with panels of Panel rows and tiles of TileRows
// classes.
template <class T, class Input, int64_t TileRows, int64_t Panel>
struct BlockRange {
    static constexpr int64_t kWidth = Panel;

    int64_t begin;
    int64_t count;
    int64_t tiles;
    int64_t padded_count;
    int64_t row_panels;
    int64_t panel_stride;  // of a matrix over the chunk

    BlockRange(const HeadChunk<T, Input>& chunk, int64_t block)
        : begin(block * chunk.block),
          count(minimum(chunk.block, chunk.args->v - begin)),
          tiles((count + TileRows - 1) / TileRows),
          padded_count(tiles * TileRows),
          row_panels(chunk.padded_rows / Panel),
          panel_stride(chunk.padded_classes * Panel) {}

    // The block's part of a matrix over classes and the chunk's rows.
    T* part(T* matrix) const { return matrix + begin * Panel; }
    ProductTiles<T> product(T* matrix) const {
        return {part(matrix), Panel, panel_stride, padded_count, row_panels * Panel};
    }
};

template <class T, class Input>
ONESTEP_INLINE T bias_at(const Matrix<const Input>& bias, int64_t index) {
    return bias.data == nullptr ? T(0) : T(widen(bias.data[index * bias.row]));
}

// One vector of rows of a block: adds the bias, leaves exp(z − peak) and ż, and sums.
template <class T, class Input, class Range>
inline void score_vector(const HeadChunk<T, Input>& chunk, const Range& range, T* z, T* dz, int64_t row, int64_t stat) {
    const auto& args = *chunk.args;
    const T smoothing = static_cast<T>(args.label_smoothing / static_cast<double>(args.v));
    Vec<T> peak = broadcast<T>(static_cast<T>(-__builtin_inf()));
    Vec<T> total{};
    for (int64_t v = 0; v < range.count; ++v) {
        const Vec<T> value = load<T>(z + v * Range::kWidth) + bias_at<T>(args.bias, range.begin + v);
        peak = maximum_lanes<T>(peak, value);
        total += value;
        store<T>(z + v * Range::kWidth, value);
    }
    store<T>(chunk.peak + stat, peak);
    // Without smoothing Σ z must not enter at all: a class may be masked by a bias of −∞.
    store<T>(chunk.expected + stat, smoothing > T(0) ? smoothing * total : Vec<T>{});
    const T weight = static_cast<T>(1.0 - args.label_smoothing);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            chunk.expected[stat + lane] += weight * z[at * Range::kWidth + lane];
        }
    }
    const Vec<T> shift = peak == broadcast<T>(static_cast<T>(-__builtin_inf())) ? Vec<T>{} : peak;
    Vec<T> sum{};
    if (!args.tangent) {
        for (int64_t v = 0; v < range.count; ++v) {
            const Vec<T> value = exp_lanes<T>(load<T>(z + v * Range::kWidth) - shift);
            sum += value;
            store<T>(z + v * Range::kWidth, value);
        }
        store<T>(chunk.sum + stat, sum);
        return;
    }
    Vec<T> moment{};
    Vec<T> total_tangent{};
    for (int64_t v = 0; v < range.count; ++v) {
        const Vec<T> value = exp_lanes<T>(load<T>(z + v * Range::kWidth) - shift);
        const Vec<T> tangent = load<T>(dz + v * Range::kWidth) + bias_at<T>(args.bias_tangent, range.begin + v);
        sum += value;
        moment += value * tangent;
        total_tangent += tangent;
        store<T>(z + v * Range::kWidth, value);
        store<T>(dz + v * Range::kWidth, tangent);
    }
    store<T>(chunk.sum + stat, sum);
    store<T>(chunk.moment + stat, moment);
    store<T>(chunk.expected_tangent + stat, smoothing * total_tangent);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            chunk.expected_tangent[stat + lane] += weight * dz[at * Range::kWidth + lane];
        }
    }
}

// Row statistics of a block whose z and ż are multiplied out.
template <class T, class Input, class Range>
inline void score_rows(const HeadChunk<T, Input>& chunk, const Range& range, int64_t block) {
    for (int64_t q = 0; q < range.row_panels; ++q) {
        for (int64_t lane = 0; lane < Range::kWidth; lane += kLanes<T>) {
            const int64_t at = q * range.panel_stride + lane;
            const int64_t row = q * Range::kWidth + lane;
            T* dz = chunk.args->tangent ? range.part(chunk.logits_tangent) + at : nullptr;
            score_vector<T, Input>(chunk, range, range.part(chunk.logits) + at, dz, row,
                                   block * chunk.padded_rows + row);
        }
    }
}

// One vector of rows of a block: exp(z − peak) becomes g, and ż becomes ġ.
template <class T, class Input, class Range>
inline void gradient_vector(const HeadChunk<T, Input>& chunk, const Range& range, T* z, T* dz, int64_t row,
                            int64_t stat) {
    const auto& args = *chunk.args;
    const Vec<T> scale = load<T>(chunk.peak + stat);
    const Vec<T> weight = load<T>(chunk.row_weight + row);
    const T smoothing = static_cast<T>(args.label_smoothing / static_cast<double>(args.v));
    if (args.tangent) {
        const Vec<T> mean = load<T>(chunk.mean_tangent + row);
        const Vec<T> change = load<T>(chunk.row_weight_tangent + row);
        for (int64_t v = 0; v < range.count; ++v) {
            const Vec<T> p = load<T>(z + v * Range::kWidth) * scale;
            const Vec<T> centred = load<T>(dz + v * Range::kWidth) - mean;
            store<T>(dz + v * Range::kWidth, weight * (p * centred) + change * (p - smoothing));
            store<T>(z + v * Range::kWidth, weight * (p - smoothing));
        }
    } else {
        for (int64_t v = 0; v < range.count; ++v) {
            store<T>(z + v * Range::kWidth, weight * (load<T>(z + v * Range::kWidth) * scale - smoothing));
        }
    }
    const T of_target = static_cast<T>(1.0 - args.label_smoothing);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            z[at * Range::kWidth + lane] -= of_target * chunk.row_weight[row + lane];
            if (args.tangent) {
                dz[at * Range::kWidth + lane] -= of_target * chunk.row_weight_tangent[row + lane];
            }
        }
    }
    for (int64_t v = range.count; v < range.padded_count; ++v) {
        store<T>(z + v * Range::kWidth, Vec<T>{});
        if (args.tangent) {
            store<T>(dz + v * Range::kWidth, Vec<T>{});
        }
    }
}

// g and ġ of a block in place of exp(z − peak) and ż.
template <class T, class Input, class Range>
inline void gradient_rows(const HeadChunk<T, Input>& chunk, const Range& range, int64_t block) {
    for (int64_t q = 0; q < range.row_panels; ++q) {
        for (int64_t lane = 0; lane < Range::kWidth; lane += kLanes<T>) {
            const int64_t at = q * range.panel_stride + lane;
            const int64_t row = q * Range::kWidth + lane;
            T* dz = chunk.args->tangent ? range.part(chunk.logits_tangent) + at : nullptr;
            gradient_vector<T, Input>(chunk, range, range.part(chunk.logits) + at, dz, row,
                                      block * chunk.padded_rows + row);
        }
    }
}

// grad_bias of a block: the sums of `main` over the chunk's rows.
template <class T, class Input, class Range>
inline void add_bias_gradient(const HeadChunk<T, Input>& chunk, const Range& range, const T* main) {
    for (int64_t v = 0; v < range.count; ++v) {
        Vec<T> sum{};
        for (int64_t q = 0; q < range.row_panels; ++q) {
            for (int64_t lane = 0; lane < Range::kWidth; lane += kLanes<T>) {
                sum += load<T>(main + q * range.panel_stride + v * Range::kWidth + lane);
            }
        }
        T total = T(0);
        for (int lane = 0; lane < kLanes<T>; ++lane) {
            total += sum[lane];
        }
        T& at = chunk.args->grad_bias[range.begin + v];
        at = chunk.first ? total : at + total;
    }
}

}  // namespace onestep::lmhead::ONESTEP_NS
