// base/amx-inl.hpp behind functions, compiled as the amx target's kernels are.
#include "amx_kernels.hpp"

#include "base/amx-inl.hpp"

namespace onestep::amx {
namespace {

template <AmxSide Side, class S>
void pack_side(const S* data, const Operand& operand, bool by_rows, int64_t count, int64_t depth, BFloat16* to) {
    const auto packed = AmxPacked::whole(to, count, depth);
    if (by_rows) {
        amx_pack_rows<Side>(StridedRows<S>{data, operand.row}, 0, count, operand.depth, 0, depth, packed);
    } else {
        amx_pack_columns<Side>(StridedRows<S>{data, operand.depth}, 0, depth, operand.row, 0, count, packed);
    }
}

}  // namespace

int64_t packed_size(int64_t count, int64_t depth, bool single) { return (single ? 2 : 1) * amx_size(count, depth); }

void pack(const Operand& operand, bool left, bool by_rows, int64_t count, int64_t depth, BFloat16* to) {
    if (operand.half != nullptr) {
        left ? pack_side<AmxSide::left>(operand.half, operand, by_rows, count, depth, to)
             : pack_side<AmxSide::right>(operand.half, operand, by_rows, count, depth, to);
    } else {
        left ? pack_side<AmxSide::left>(operand.single, operand, by_rows, count, depth, to)
             : pack_side<AmxSide::right>(operand.single, operand, by_rows, count, depth, to);
    }
}

void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* left, bool left_single, const BFloat16* right,
              bool right_single, bool accumulate, float* c, int64_t row, int64_t panel) {
    const int64_t block = amx_steps(k) * kAmxTile;
    AmxTerm terms[3];
    int64_t count = 0;
    for (int plane = 0; plane < 3; ++plane) {
        const bool low_left = plane == 1;
        const bool low_right = plane == 2;
        if ((low_left && !left_single) || (low_right && !right_single)) {
            continue;
        }
        terms[count++] = {left + (low_left ? amx_size(m, k) : 0), block, right + (low_right ? amx_size(n, k) : 0),
                          block};
    }
    AmxTiles tiles;
    amx_multiply(tiles, amx_blocks(m), amx_blocks(n), amx_steps(k), terms, count, accumulate, {c, row, panel, m, n});
}

}  // namespace onestep::amx
