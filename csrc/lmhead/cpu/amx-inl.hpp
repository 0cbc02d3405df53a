// The matrix products of linear_cross_entropy for bfloat16 input on AMX tiles: z is one product, ż are two. g and ġ are
// float. Of a gradient, which ends as bfloat16, g enters ∂H and ∂W rounded to one plane of bfloat16, as frameworks
// round it; of a gradient's tangent, where terms cancel, g and ġ enter in two planes each.
#pragma once

#include "base/amx-inl.hpp"
#include "lmhead/cpu/block-inl.hpp"

namespace onestep::lmhead::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

using AmxChunk = HeadChunk<float, BFloat16>;
// Each of classes and rows is the inner dimension of a product, so both are padded to whole steps.
using AmxRange = BlockRange<float, BFloat16, kAmxStep, kAmxPanel>;
static_assert(kAmxStep == kAmxPanel);

// Features whose weights are packed at a time.
inline constexpr int64_t kAmxFeatures = 512;

// Elements between 16 rows of input_panels, and between 16 features of input_columns.
ONESTEP_INLINE int64_t amx_panel_block(const AmxChunk& chunk) { return amx_steps(chunk.args->d) * kAmxTile; }
ONESTEP_INLINE int64_t amx_column_block(const AmxChunk& chunk) { return amx_steps(chunk.padded_rows) * kAmxTile; }

inline void amx_pack_input(const AmxChunk& chunk, int64_t row_panel) {
    const auto& args = *chunk.args;
    const int64_t begin = row_panel * kAmxPanel;
    const int64_t block = amx_panel_block(chunk);
    // Logits are computed of a second block, even if it has no rows.
    const auto pack = [&](const BFloat16* const* rows, int64_t step, void* panels) {
        auto* to = static_cast<BFloat16*>(panels) + 2 * row_panel * block;
        const int64_t count = minimum(kAmxPanel, chunk.rows - begin);
        amx_pack_rows<AmxSide::right>(ListedRows<BFloat16>{rows}, begin, count, step, 0, args.d, {to, block});
        if (count <= kAmxBlock && block > 0) {
            __builtin_memset(static_cast<void*>(to + block), 0, static_cast<size_t>(block) * sizeof(BFloat16));
        }
    };
    pack(chunk.input, args.input.row, chunk.input_panels);
    if (chunk.input_tangent != nullptr) {
        pack(chunk.input_tangent, args.input_tangent.row, chunk.tangent_panels);
    }
}

inline void amx_pack_input_columns(const AmxChunk& chunk, int64_t feature_panel) {
    const auto& args = *chunk.args;
    const int64_t first = feature_panel * kAmxPanel;
    const int64_t block = amx_column_block(chunk);
    const auto pack = [&](const BFloat16* const* rows, int64_t step, void* columns) {
        amx_pack_columns<AmxSide::right>(ListedRows<BFloat16>{rows}, 0, chunk.rows, step, first,
                                         minimum(kAmxPanel, args.d - first),
                                         {static_cast<BFloat16*>(columns) + 2 * feature_panel * block, block});
    };
    pack(chunk.input, args.input.row, chunk.input_columns);
    if (chunk.tangent_columns != nullptr) {
        pack(chunk.input_tangent, args.input_tangent.row, chunk.tangent_columns);
    }
}

// Planes of g or ġ.
ONESTEP_INLINE int64_t amx_planes(const AmxChunk& chunk) { return chunk.args->tangent ? 2 : 1; }

// What a piece of work packs: weights of a block and their tangents, up to kAmxFeatures of them, and both planes of g
// (or ġ) and of g beside ġ.
struct AmxWork {
    int64_t weights;
    int64_t plane;

    explicit AmxWork(const AmxChunk& chunk)
        : weights(amx_size(round_up_to(chunk.block, kAmxStep),
                           minimum(kAmxFeatures, round_up_to(chunk.args->d, kAmxStep)))),
          plane(amx_size(chunk.padded_rows, round_up_to(chunk.block, kAmxStep))) {}

    int64_t bytes(const AmxChunk& chunk) const {
        const int64_t planes = !chunk.wants_gradient() ? 0 : chunk.wants_cross_terms() ? 4 : amx_planes(chunk);
        return (2 * weights + planes * plane) * static_cast<int64_t>(sizeof(BFloat16));
    }
};

inline int64_t amx_block_work(const AmxChunk& chunk) { return AmxWork(chunk).bytes(chunk); }

// z = W Hᵀ and ż = W Ḣᵀ + Ẇ Hᵀ of one block, in steps over the features.
inline void amx_multiply_logits(AmxTiles& tiles, const AmxChunk& chunk, const AmxRange& range, BFloat16* work) {
    const auto& args = *chunk.args;
    const int64_t panel = amx_panel_block(chunk);
    BFloat16* packed = work;
    BFloat16* packed_tangent = work + AmxWork(chunk).weights;
    for (int64_t p = 0; p < maximum(args.d, 1); p += kAmxFeatures) {
        const int64_t depth = minimum(kAmxFeatures, args.d - p);
        const int64_t steps = amx_steps(depth);
        const int64_t left = steps * kAmxTile;
        const int64_t offset = p / kAmxStep * kAmxTile;
        const auto multiply = [&](const AmxTerm* terms, int64_t count, float* to) {
            amx_multiply(tiles, amx_blocks(range.count), 2 * range.row_panels, steps, terms, count, p > 0,
                         range.product(to));
        };
        const auto pack = [&](const Matrix<const BFloat16>& weight, BFloat16* to) {
            amx_pack_rows<AmxSide::left>(StridedRows<BFloat16>{weight.data, weight.row}, range.begin, range.count,
                                         weight.col, p, depth, {to, left});
        };
        pack(args.weight, packed);
        const auto* right = static_cast<const BFloat16*>(chunk.input_panels) + offset;
        const AmxTerm primal{packed, left, right, panel};
        multiply(&primal, 1, chunk.logits);
        if (!args.tangent) {
            continue;
        }
        AmxTerm terms[2];
        int64_t count = 0;
        if (chunk.input_tangent != nullptr) {
            terms[count++] = {packed, left, static_cast<const BFloat16*>(chunk.tangent_panels) + offset, panel};
        }
        if (args.weight_tangent.data != nullptr) {
            pack(args.weight_tangent, packed_tangent);
            terms[count++] = {packed_tangent, left, right, panel};
        }
        multiply(terms, count, chunk.logits_tangent);
    }
}

inline void amx_score_block(const AmxChunk& chunk, int64_t block, void* work) {
    const AmxRange range(chunk, block);
    {
        AmxTiles tiles;
        amx_multiply_logits(tiles, chunk, range, static_cast<BFloat16*>(work));
    }
    score_rows<float, BFloat16>(chunk, range, block);
}

// grad_weight += ġᵀH + gᵀḢ of one block, over the chunk's rows; `cross` is null without the second.
inline void amx_add_weight_gradient(AmxTiles& tiles, const AmxChunk& chunk, const AmxRange& range, const float* main,
                                    const float* cross, BFloat16* planes) {
    const int64_t d = chunk.args->d;
    const int64_t plane = AmxWork(chunk).plane;
    const int64_t block = amx_column_block(chunk);
    AmxTerm terms[4];
    int64_t count = 0;
    const auto add = [&](const float* coefficients, const void* columns) {
        for (int64_t q = 0; q < range.row_panels; ++q) {
            const StridedRows<float> rows{coefficients + q * range.panel_stride, kAmxPanel};
            const AmxPacked to{planes + q * kAmxTile, block, plane};
            if (chunk.args->tangent) {
                amx_pack_rows<AmxSide::left>(rows, 0, range.count, 1, 0, kAmxPanel, to);
            } else {
                amx_pack_rows<AmxSide::left, 1>(rows, 0, range.count, 1, 0, kAmxPanel, to);
            }
        }
        for (int64_t low = 0; low < amx_planes(chunk); ++low) {
            terms[count++] = {planes, block, static_cast<const BFloat16*>(columns), block};
            planes += plane;
        }
    };
    add(main, chunk.input_columns);
    if (cross != nullptr) {
        add(cross, chunk.tangent_columns);
    }
    amx_multiply(tiles, amx_blocks(range.count), amx_blocks(d), amx_steps(chunk.padded_rows), terms, count,
                 !chunk.first, {chunk.args->grad_weight + range.begin * d, d, kAmxPanel, range.count, d});
}

// The transposed grad_input (+)= Wᵀġ + Ẇᵀg, over the block's classes; `cross` is null without the second.
inline void amx_add_input_gradient(AmxTiles& tiles, const AmxChunk& chunk, const AmxRange& range, const float* main,
                                   const float* cross, bool accumulate, float* grad_input, BFloat16* weights,
                                   BFloat16* planes) {
    const auto& args = *chunk.args;
    const AmxWork size(chunk);
    const int64_t steps = amx_steps(range.count);
    const int64_t block = steps * kAmxTile;
    AmxTerm terms[4];
    int64_t count = 0;
    const auto add = [&](const float* coefficients, const BFloat16* left) {
        for (int64_t q = 0; q < range.row_panels; ++q) {
            const StridedRows<float> rows{coefficients + q * range.panel_stride, kAmxPanel};
            const AmxPacked to{planes + 2 * q * block, block, size.plane};
            if (args.tangent) {
                amx_pack_columns<AmxSide::right>(rows, 0, range.count, 1, 0, kAmxPanel, to);
            } else {
                amx_pack_columns<AmxSide::right, 1>(rows, 0, range.count, 1, 0, kAmxPanel, to);
            }
        }
        for (int64_t low = 0; low < amx_planes(chunk); ++low) {
            terms[count++] = {left, block, planes, block};
            planes += size.plane;
        }
    };
    add(main, weights);
    if (cross != nullptr) {
        add(cross, weights + size.weights);
    }
    for (int64_t first = 0; first < args.d; first += kAmxFeatures) {
        const int64_t features = minimum(kAmxFeatures, args.d - first);
        const auto pack = [&](const Matrix<const BFloat16>& weight, BFloat16* to) {
            amx_pack_columns<AmxSide::left>(StridedRows<BFloat16>{weight.data, weight.row}, range.begin, range.count,
                                            weight.col, first, features, {to, block});
        };
        pack(args.weight, weights);
        if (cross != nullptr) {
            pack(args.weight_tangent, weights + size.weights);
        }
        const int64_t blocks = amx_blocks(features);
        amx_multiply(tiles, blocks, 2 * range.row_panels, steps, terms, count, accumulate,
                     {grad_input + first * kAmxPanel, kAmxPanel, chunk.padded_features * kAmxPanel, blocks * kAmxBlock,
                      chunk.padded_rows});
    }
}

inline void amx_gradient_block(const AmxChunk& chunk, int64_t block, bool accumulate, float* grad_input, void* work) {
    const auto& args = *chunk.args;
    const AmxRange range(chunk, block);
    gradient_rows<float, BFloat16>(chunk, range, block);
    const float* g = range.part(chunk.logits);
    const float* main = args.tangent ? range.part(chunk.logits_tangent) : g;
    const bool cross = chunk.wants_cross_terms();
    if (args.grad_bias != nullptr) {
        add_bias_gradient<float, BFloat16>(chunk, range, main);
    }
    auto* weights = static_cast<BFloat16*>(work);
    BFloat16* planes = weights + 2 * AmxWork(chunk).weights;
    AmxTiles tiles;
    if (args.grad_weight != nullptr) {
        amx_add_weight_gradient(tiles, chunk, range, main, cross && chunk.input_tangent != nullptr ? g : nullptr,
                                planes);
    }
    if (args.grad_input != nullptr) {
        amx_add_input_gradient(tiles, chunk, range, main, cross && args.weight_tangent.data != nullptr ? g : nullptr,
                               accumulate, grad_input, weights, planes);
    }
}

}  // namespace onestep::lmhead::ONESTEP_NS
