// The matrix products of linear_cross_entropy on one block of classes and one chunk of rows; formulas in lmhead.hpp.
#pragma once

#include "lmhead/cpu/block-inl.hpp"

namespace onestep::lmhead::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <class T, class Input>
inline void pack_input(const HeadChunk<T, Input>& chunk, int64_t row_panel) {
    const auto& args = *chunk.args;
    const int64_t begin = row_panel * kPanel<T>;
    const int64_t count = minimum(kPanel<T>, chunk.rows - begin);
    const int64_t at = begin * args.d;
    pack_rows<kPanel<T>, T>(ListedRows<Input>{chunk.input}, begin, count, args.input.row, 0, args.d,
                            static_cast<T*>(chunk.input_panels) + at);
    if (chunk.input_tangent != nullptr) {
        pack_rows<kPanel<T>, T>(ListedRows<Input>{chunk.input_tangent}, begin, count, args.input_tangent.row, 0, args.d,
                                static_cast<T*>(chunk.tangent_panels) + at);
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
    pack_feature_panel<T>(chunk.input, chunk.args->input.row, chunk, first, static_cast<T*>(chunk.input_columns) + at);
    if (chunk.tangent_columns != nullptr) {
        pack_feature_panel<T>(chunk.input_tangent, chunk.args->input_tangent.row, chunk, first,
                              static_cast<T*>(chunk.tangent_columns) + at);
    }
}

template <class T, class Input>
using TileRange = BlockRange<T, Input, kTileRows, kPanel<T>>;

// Packed weights of a block, and as much for their tangents.
template <class T, class Input>
inline int64_t block_work(const HeadChunk<T, Input>& chunk) {
    return 2 * round_up_to(chunk.block, kTileRows) * kGemmDepth<T> * static_cast<int64_t>(sizeof(T));
}

// z = W Hᵀ and ż = W Ḣᵀ + Ẇ Hᵀ of one block, in steps over the features.
template <class T, class Input>
inline void multiply_logits(const HeadChunk<T, Input>& chunk, const TileRange<T, Input>& range, T* work) {
    const auto& args = *chunk.args;
    T* packed = work;
    T* packed_tangent = work + round_up_to(chunk.block, kTileRows) * kGemmDepth<T>;
    const int64_t panel = args.d * kPanel<T>;
    for (int64_t p = 0; p < maximum(args.d, 1); p += kGemmDepth<T>) {
        const int64_t depth = minimum(kGemmDepth<T>, args.d - p);
        const auto left = LeftTiles<T>::packed(packed, depth);
        const RightPanels<T> right{static_cast<const T*>(chunk.input_panels) + p * kPanel<T>, panel, 0};
        pack_rows<kTileRows, T>(StridedRows<Input>{args.weight.data, args.weight.row}, range.begin, range.count,
                                args.weight.col, p, depth, packed);
        multiply_panels<T>(range.tiles, range.row_panels, 1, depth, left, right, p > 0, range.product(chunk.logits));
        if (!args.tangent) {
            continue;
        }
        bool started = p > 0;
        if (chunk.input_tangent != nullptr) {
            multiply_panels<T>(range.tiles, range.row_panels, 1, depth, left,
                               {static_cast<const T*>(chunk.tangent_panels) + p * kPanel<T>, panel, 0}, started,
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
inline void score_block(const HeadChunk<T, Input>& chunk, int64_t block, void* work) {
    const TileRange<T, Input> range(chunk, block);
    multiply_logits<T, Input>(chunk, range, static_cast<T*>(work));
    score_rows<T, Input>(chunk, range, block);
}

// grad_weight += coefficientsᵀ · columns, over the chunk's rows.
template <class T, class Input>
inline void add_weight_gradient(const HeadChunk<T, Input>& chunk, const TileRange<T, Input>& range,
                                const T* coefficients, const void* columns, bool accumulate) {
    const int64_t d = chunk.args->d;
    multiply_panels<T>(range.tiles, chunk.padded_features / kPanel<T>, range.row_panels, kPanel<T>,
                       {coefficients, kTileRows * kPanel<T>, kPanel<T>, 1, range.panel_stride},
                       {static_cast<const T*>(columns), chunk.padded_rows * kPanel<T>, kPanel<T> * kPanel<T>},
                       accumulate, {chunk.args->grad_weight + range.begin * d, d, kPanel<T>, range.count, d});
}

// The transposed grad_input (+)= weightᵀ · coefficients, over the block's classes.
template <class T, class Input>
inline void add_input_gradient(const HeadChunk<T, Input>& chunk, const TileRange<T, Input>& range,
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
inline void gradient_block(const HeadChunk<T, Input>& chunk, int64_t block, bool accumulate, T* grad_input,
                           void* work) {
    const auto& args = *chunk.args;
    const TileRange<T, Input> range(chunk, block);
    gradient_rows<T, Input>(chunk, range, block);
    const T* g = range.part(chunk.logits);
    const T* main = args.tangent ? range.part(chunk.logits_tangent) : g;
    const bool cross = chunk.wants_cross_terms();
    T* packed = static_cast<T*>(work);
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
        add_input_gradient<T, Input>(chunk, range, args.weight, main, accumulate, grad_input, packed);
        if (cross && args.weight_tangent.data != nullptr) {
            add_input_gradient<T, Input>(chunk, range, args.weight_tangent, g, true, grad_input, packed);
        }
    }
}

}  // namespace onestep::lmhead::ONESTEP_NS
