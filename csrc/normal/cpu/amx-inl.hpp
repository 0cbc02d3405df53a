// Gram matrices of bfloat16 rows on AMX tiles: products of such numbers are exact in float, as those of widened rows
// are, and are summed in float.
#pragma once

#include "base/amx-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Columns on the left side of the products that are multiplied with one panel after another: 128 KB of a second-level
// cache of 2 MB that threads may share.
inline constexpr int64_t kAmxLeftColumns = 512;

// As gram_rows; see HalfGramKernels for what the rows may be.
inline void amx_gram_rows(const RowsArgs<float>& args, int64_t begin, int64_t end, int64_t first, int64_t last,
                          float* packed, float* c, int64_t ld) {
    static_assert(kPanel<float> % kAmxBlock == 0 && kBlockRows % kAmxStep == 0);
    const int64_t edge = first * kPanel<float>;
    const int64_t needed = minimum(args.d, last * kPanel<float>);
    const StridedRows<BFloat16> rows{reinterpret_cast<const BFloat16*>(args.x_half.data), args.x_half.row};
    // Both sides in bfloat16 take no more than one in float.
    auto* left = reinterpret_cast<BFloat16*>(packed);
    auto* right = left + amx_size(needed, kBlockRows);
    AmxTiles tiles;
    for (int64_t block = begin; block < end; block += kBlockRows) {
        const int64_t count = minimum(kBlockRows, end - block);
        const int64_t steps = amx_steps(count);
        const int64_t stride = steps * kAmxTile;
        amx_pack_columns<AmxSide::left>(rows, block, count, args.x_half.col, 0, needed, {left, stride});
        amx_pack_columns<AmxSide::right>(rows, block, count, args.x_half.col, edge, needed - edge, {right, stride});
        for (int64_t top = 0; top < needed; top += kAmxLeftColumns) {
            for (int64_t j = edge + maximum(0, top - edge) / kAmxPanel * kAmxPanel; j < needed; j += kAmxPanel) {
                const int64_t columns = minimum(kAmxPanel, needed - j);
                const int64_t height = minimum(kAmxLeftColumns, j + columns - top);
                const AmxTerm term{left + top / kAmxBlock * stride, stride, right + (j - edge) / kAmxBlock * stride,
                                   stride};
                amx_multiply(tiles, amx_blocks(height), amx_blocks(columns), steps, &term, 1, true,
                             {c + top * ld + (j - edge), ld, kAmxPanel, height, columns});
            }
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
