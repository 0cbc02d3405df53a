// The steps of linear_cross_entropy on one block of classes and one chunk of rows; formulas in lmhead.hpp.
#pragma once

#include "base/gemm-inl.hpp"
#include "lmhead/kernels.hpp"

namespace onestep::ONESTEP_NS {

template <class T, class Input>
inline void pack_input(const HeadChunk<T, Input>& chunk, int64_t row_panel) {
    const auto& args = *chunk.args;
    const int64_t begin = row_panel * kPanel<T>;
    const int64_t count = minimum(kPanel<T>, chunk.rows - begin);
    const int64_t at = begin * args.d;
    pack_rows<kPanel<T>, T>(ListedRows<Input>{chunk.input}, begin, count, args.input.row, 0, args.d,
                            chunk.input_panels + at);
    if (chunk.input_tangent != nullptr) {
        pack_rows<kPanel<T>, T>(ListedRows<Input>{chunk.input_tangent}, begin, count, args.input_tangent.row, 0, args.d,
                                chunk.tangent_panels + at);
    }
}

template <class T, class Input>
inline void pack_feature_panel(const Input* const* rows, int64_t step, const HeadChunk<T, Input>& chunk, int64_t first,
                               T* to) {
    pack_columns_of_rows<kPanel<T>, T>(ListedRows<Input>{rows}, 0, chunk.rows, step, first,
                                       minimum(kPanel<T>, chunk.args->d - first), to);
    for (int64_t e = chunk.rows * kPanel<T>; e < chunk.padded_rows * kPanel<T>; ++e) {
        to[e] = T(0);
    }
}

template <class T, class Input>
inline void pack_input_columns(const HeadChunk<T, Input>& chunk, int64_t feature_panel) {
    const int64_t first = feature_panel * kPanel<T>;
    const int64_t at = first * chunk.padded_rows;
    pack_feature_panel<T>(chunk.input, chunk.args->input.row, chunk, first, chunk.input_columns + at);
    if (chunk.tangent_columns != nullptr) {
        pack_feature_panel<T>(chunk.input_tangent, chunk.args->input_tangent.row, chunk, first,
                              chunk.tangent_columns + at);
    }
}

// Classes [begin, begin + count) of a block.
template <class T, class Input>
struct BlockRange {
    int64_t begin;
    int64_t count;
    int64_t tiles;
    int64_t row_panels;
    int64_t panel_stride;  // of a matrix over the chunk, whose tile rows are kPanel apart

    BlockRange(const HeadChunk<T, Input>& chunk, int64_t block)
        : begin(block * chunk.block),
          count(minimum(chunk.block, chunk.args->v - begin)),
          tiles((count + kTileRows - 1) / kTileRows),
          row_panels(chunk.padded_rows / kPanel<T>),
          panel_stride(chunk.padded_classes * kPanel<T>) {}

    // The block's part of a matrix over classes and the chunk's rows.
    T* part(T* matrix) const { return matrix + begin * kPanel<T>; }
    ProductTiles<T> product(T* matrix) const {
        return {part(matrix), kPanel<T>, panel_stride, tiles * kTileRows, row_panels * kPanel<T>};
    }
};

template <class T>
inline int64_t block_work(int64_t block) {
    return 2 * round_up_to(block, kTileRows) * kGemmDepth<T>;
}

// z = W Hᵀ and ż = W Ḣᵀ + Ẇ Hᵀ of one block, in steps over the features.
template <class T, class Input>
inline void multiply_logits(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range, T* work) {
    const auto& args = *chunk.args;
    T* packed = work;
    T* packed_tangent = work + block_work<T>(chunk.block) / 2;
    const int64_t panel = args.d * kPanel<T>;
    for (int64_t p = 0; p < maximum(args.d, 1); p += kGemmDepth<T>) {
        const int64_t depth = minimum(kGemmDepth<T>, args.d - p);
        const auto left = LeftTiles<T>::packed(packed, depth);
        const RightPanels<T> right{chunk.input_panels + p * kPanel<T>, panel, 0};
        pack_rows<kTileRows, T>(StridedRows<Input>{args.weight.data, args.weight.row}, range.begin, range.count,
                                args.weight.col, p, depth, packed);
        multiply_panels<T>(range.tiles, range.row_panels, 1, depth, left, right, p > 0, range.product(chunk.logits));
        if (!args.tangent) {
            continue;
        }
        bool started = p > 0;
        if (chunk.input_tangent != nullptr) {
            multiply_panels<T>(range.tiles, range.row_panels, 1, depth, left,
                               {chunk.tangent_panels + p * kPanel<T>, panel, 0}, started,
                               range.product(chunk.logits_tangent));
            started = true;
        }
        if (args.weight_tangent.data != nullptr) {
            pack_rows<kTileRows, T>(StridedRows<Input>{args.weight_tangent.data, args.weight_tangent.row}, range.begin,
                                    range.count, args.weight_tangent.col, p, depth, packed_tangent);
            multiply_panels<T>(range.tiles, range.row_panels, 1, depth, LeftTiles<T>::packed(packed_tangent, depth),
                               right, started, range.product(chunk.logits_tangent));
            started = true;
        }
        if (!started) {
            multiply_panels<T>(range.tiles, range.row_panels, 0, 0, left, right, false,
                               range.product(chunk.logits_tangent));
        }
    }
}

template <class T, class Input>
ONESTEP_INLINE T bias_at(const Matrix<const Input>& bias, int64_t index) {
    return bias.data == nullptr ? T(0) : T(widen(bias.data[index * bias.row]));
}

// One vector of rows of a block: adds the bias, leaves exp(z − peak) and ż, and sums.
template <class T, class Input>
inline void score_vector(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range, T* z, T* dz, int64_t row,
                         int64_t stat) {
    const auto& args = *chunk.args;
    const T smoothing = static_cast<T>(args.label_smoothing / static_cast<double>(args.v));
    Vec<T> peak = broadcast<T>(static_cast<T>(-__builtin_inf()));
    Vec<T> total{};
    for (int64_t v = 0; v < range.count; ++v) {
        const Vec<T> value = load<T>(z + v * kPanel<T>) + bias_at<T>(args.bias, range.begin + v);
        peak = maximum_lanes<T>(peak, value);
        total += value;
        store<T>(z + v * kPanel<T>, value);
    }
    store<T>(chunk.peak + stat, peak);
    // Without smoothing Σ z must not enter at all: a class may be masked by a bias of −∞.
    store<T>(chunk.expected + stat, smoothing > T(0) ? smoothing * total : Vec<T>{});
    const T weight = static_cast<T>(1.0 - args.label_smoothing);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            chunk.expected[stat + lane] += weight * z[at * kPanel<T> + lane];
        }
    }
    const Vec<T> shift = peak == broadcast<T>(static_cast<T>(-__builtin_inf())) ? Vec<T>{} : peak;
    Vec<T> sum{};
    if (!args.tangent) {
        for (int64_t v = 0; v < range.count; ++v) {
            const Vec<T> value = exp_lanes<T>(load<T>(z + v * kPanel<T>) - shift);
            sum += value;
            store<T>(z + v * kPanel<T>, value);
        }
        store<T>(chunk.sum + stat, sum);
        return;
    }
    Vec<T> moment{};
    Vec<T> total_tangent{};
    for (int64_t v = 0; v < range.count; ++v) {
        const Vec<T> value = exp_lanes<T>(load<T>(z + v * kPanel<T>) - shift);
        const Vec<T> tangent = load<T>(dz + v * kPanel<T>) + bias_at<T>(args.bias_tangent, range.begin + v);
        sum += value;
        moment += value * tangent;
        total_tangent += tangent;
        store<T>(z + v * kPanel<T>, value);
        store<T>(dz + v * kPanel<T>, tangent);
    }
    store<T>(chunk.sum + stat, sum);
    store<T>(chunk.moment + stat, moment);
    store<T>(chunk.expected_tangent + stat, smoothing * total_tangent);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            chunk.expected_tangent[stat + lane] += weight * dz[at * kPanel<T> + lane];
        }
    }
}

template <class T, class Input>
inline void score_block(const HeadChunk<T, Input>& chunk, int64_t block, T* work) {
    const BlockRange<T, Input> range(chunk, block);
    multiply_logits<T, Input>(chunk, range, work);
    for (int64_t q = 0; q < range.row_panels; ++q) {
        for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes<T>) {
            const int64_t at = q * range.panel_stride + lane;
            const int64_t row = q * kPanel<T> + lane;
            T* dz = chunk.args->tangent ? range.part(chunk.logits_tangent) + at : nullptr;
            score_vector<T, Input>(chunk, range, range.part(chunk.logits) + at, dz, row,
                                   block * chunk.padded_rows + row);
        }
    }
}

// One vector of rows of a block: exp(z − peak) becomes g, and ż becomes ġ.
template <class T, class Input>
inline void gradient_vector(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range, T* z, T* dz,
                            int64_t row, int64_t stat) {
    const auto& args = *chunk.args;
    const Vec<T> scale = load<T>(chunk.peak + stat);
    const Vec<T> weight = load<T>(chunk.row_weight + row);
    const T smoothing = static_cast<T>(args.label_smoothing / static_cast<double>(args.v));
    if (args.tangent) {
        const Vec<T> mean = load<T>(chunk.mean_tangent + row);
        const Vec<T> change = load<T>(chunk.row_weight_tangent + row);
        for (int64_t v = 0; v < range.count; ++v) {
            const Vec<T> p = load<T>(z + v * kPanel<T>) * scale;
            const Vec<T> centred = load<T>(dz + v * kPanel<T>) - mean;
            store<T>(dz + v * kPanel<T>, weight * (p * centred) + change * (p - smoothing));
            store<T>(z + v * kPanel<T>, weight * (p - smoothing));
        }
    } else {
        for (int64_t v = 0; v < range.count; ++v) {
            store<T>(z + v * kPanel<T>, weight * (load<T>(z + v * kPanel<T>) * scale - smoothing));
        }
    }
    const T of_target = static_cast<T>(1.0 - args.label_smoothing);
    for (int lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t at = chunk.target[row + lane] - range.begin;
        if (at >= 0 && at < range.count) {
            z[at * kPanel<T> + lane] -= of_target * chunk.row_weight[row + lane];
            if (args.tangent) {
                dz[at * kPanel<T> + lane] -= of_target * chunk.row_weight_tangent[row + lane];
            }
        }
    }
    for (int64_t v = range.count; v < range.tiles * kTileRows; ++v) {
        store<T>(z + v * kPanel<T>, Vec<T>{});
        if (args.tangent) {
            store<T>(dz + v * kPanel<T>, Vec<T>{});
        }
    }
}

// grad_bias of a block: the sums of `main` over the chunk's rows.
template <class T, class Input>
inline void add_bias_gradient(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range, const T* main) {
    for (int64_t v = 0; v < range.count; ++v) {
        Vec<T> sum{};
        for (int64_t q = 0; q < range.row_panels; ++q) {
            for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes<T>) {
                sum += load<T>(main + q * range.panel_stride + v * kPanel<T> + lane);
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

// grad_weight += coefficientsᵀ · columns, over the chunk's rows.
template <class T, class Input>
inline void add_weight_gradient(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range,
                                const T* coefficients, const T* columns, bool accumulate) {
    const int64_t d = chunk.args->d;
    multiply_panels<T>(range.tiles, chunk.padded_features / kPanel<T>, range.row_panels, kPanel<T>,
                       {coefficients, kTileRows * kPanel<T>, kPanel<T>, 1, range.panel_stride},
                       {columns, chunk.padded_rows * kPanel<T>, kPanel<T> * kPanel<T>}, accumulate,
                       {chunk.args->grad_weight + range.begin * d, d, kPanel<T>, range.count, d});
}

// The transposed grad_input (+)= weightᵀ · coefficients, over the block's classes.
template <class T, class Input>
inline void add_input_gradient(const HeadChunk<T, Input>& chunk, const BlockRange<T, Input>& range,
                               const Matrix<const Input>& weight, const T* coefficients, bool accumulate, T* grad_input,
                               T* packed) {
    for (int64_t first = 0; first < chunk.args->d; first += kGemmDepth<T>) {
        const int64_t features = minimum(kGemmDepth<T>, chunk.args->d - first);
        pack_columns_of_rows<kTileRows, T>(StridedRows<Input>{weight.data, weight.row}, range.begin, range.count,
                                           weight.col, first, features, packed);
        const int64_t tiles = (features + kTileRows - 1) / kTileRows;
        multiply_panels<T>(tiles, range.row_panels, 1, range.count, LeftTiles<T>::packed(packed, range.count),
                           {coefficients, range.panel_stride, 0}, accumulate,
                           {grad_input + first * kPanel<T>, kPanel<T>, chunk.padded_features * kPanel<T>,
                            tiles * kTileRows, chunk.padded_rows});
    }
}

template <class T, class Input>
inline void gradient_block(const HeadChunk<T, Input>& chunk, int64_t block, bool accumulate, T* grad_input, T* work) {
    const auto& args = *chunk.args;
    const BlockRange<T, Input> range(chunk, block);
    T* g = range.part(chunk.logits);
    T* dg = args.tangent ? range.part(chunk.logits_tangent) : nullptr;
    for (int64_t q = 0; q < range.row_panels; ++q) {
        for (int64_t lane = 0; lane < kPanel<T>; lane += kLanes<T>) {
            const int64_t at = q * range.panel_stride + lane;
            const int64_t row = q * kPanel<T> + lane;
            gradient_vector<T, Input>(chunk, range, g + at, args.tangent ? dg + at : nullptr, row,
                                      block * chunk.padded_rows + row);
        }
    }
    const T* main = args.tangent ? dg : g;
    const bool cross = chunk.wants_cross_terms();
    if (args.grad_bias != nullptr) {
        add_bias_gradient<T, Input>(chunk, range, main);
    }
    if (args.grad_weight != nullptr) {
        add_weight_gradient<T, Input>(chunk, range, main, chunk.input_columns, !chunk.first);
        if (cross && chunk.input_tangent != nullptr) {
            add_weight_gradient<T, Input>(chunk, range, g, chunk.tangent_columns, true);
        }
    }
    if (args.grad_input != nullptr) {
        add_input_gradient<T, Input>(chunk, range, args.weight, main, accumulate, grad_input, work);
        if (cross && args.weight_tangent.data != nullptr) {
            add_input_gradient<T, Input>(chunk, range, args.weight_tangent, g, true, grad_input, work);
        }
    }
}

}  // namespace onestep::ONESTEP_NS
