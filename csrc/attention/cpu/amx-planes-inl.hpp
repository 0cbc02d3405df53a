// The family's kernels for bfloat16 q, k and v on AMX's tile registers, which base/amx-inl.hpp describes. A bfloat16
// operand is multiplied as it is. Scores, P, dS, their tangents and other float operands are split into two bfloat16
// planes, high + low; a low plane of zeros is left out. The scale multiplies scores and gradients, which are float, and
// never q or k, which would need a low plane then. An infinity in v gives NaN: P has low planes of both signs.
//
// In a packed tile register, two neighbours along the inner dimension share a 32-bit word. Scores can be packed without
// a shuffle in two ways: pairs of rows make a right operand, for a product over rows; pairs of lanes make a left
// operand, for a product over lanes. So products over rows come out transposed: Oᵀ (forward), dKᵀ and dVᵀ (backward).
//
// There are three sizes. A tile register holds 16 × 32 elements. Scores are computed in squares of kSquare × kSquare,
// which stay in the first-level cache. Packing is expensive next to the products, so that AttentionHead::tile, of
// queries or keys, is several squares: the operand that the inner loop reads again is packed once for all of it.
#pragma once

#include "attention/cpu/tiles-inl.hpp"
#include "base/amx-inl.hpp"

namespace onestep::attention::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

inline constexpr int64_t kSquare = 64;  // queries and keys of a square

// A packed operand. Null high: the operand is absent. Null low: the low plane is zero.
struct Planes {
    const BFloat16* high = nullptr;
    const BFloat16* low = nullptr;
    int64_t block = 0;  // elements from a block of 16 rows (or columns) to the next

    // The operand from a block, or from a step of the inner dimension, on.
    Planes from_block(int64_t index) const { return shifted(index * block); }
    Planes from_step(int64_t index) const { return shifted(index * kAmxTile); }

    Planes shifted(int64_t by) const {
        return {high != nullptr ? high + by : nullptr, low != nullptr ? low + by : nullptr, block};
    }
};

ONESTEP_INLINE BFloat16* take_bfloat16(int64_t count, Work<float>& work) {
    return reinterpret_cast<BFloat16*>(work.take((count + 1) / 2));
}

// value = high + low; the upper 16 bits of each are its plane, and both planes together are exact to 2⁻¹⁶ of the value.
// It takes a third of the instructions of split_to_bfloat16, and there are many scores; but low is truncated, and an
// infinity becomes NaN.
struct SplitBits {
    AmxWords high, low;
};

ONESTEP_INLINE SplitBits split_bits(Vec<float> value) {
    const AmxWords high = (reinterpret_cast<AmxWords>(value) + 0x8000U) & 0xFFFF0000U;
    return {high, reinterpret_cast<AmxWords>(value - reinterpret_cast<Vec<float>>(high))};
}

// Packs one tile register into two planes. load_pair(line, first, second) gives one of its 16 lines: the first and the
// second elements of the pairs. Transposed: the lines are those of a tile of the other side; see store_tile. Returns
// the low plane's bits, combined by OR.
template <bool Transposed, class Load>
ONESTEP_INLINE AmxWords pack_tile(const Load& load_pair, BFloat16* high, BFloat16* low) {
    Vec<float> lines[2][kAmxBlock];
    AmxWords bits = {};
#pragma GCC unroll 16
    for (int line = 0; line < kAmxBlock; ++line) {
        Vec<float> first;
        Vec<float> second;
        load_pair(line, first, second);
        const SplitBits lower = split_bits(first);
        const SplitBits upper = split_bits(second);
        const AmxWords highs = (lower.high >> 16) | upper.high;
        const AmxWords lows = (lower.low >> 16) | (upper.low & 0xFFFF0000U);
        bits |= lows;
        if constexpr (Transposed) {
            lines[0][line] = reinterpret_cast<Vec<float>>(highs);
            lines[1][line] = reinterpret_cast<Vec<float>>(lows);
        } else {
            *reinterpret_cast<UnalignedAmxWords*>(high + line * kAmxStep) = highs;
            *reinterpret_cast<UnalignedAmxWords*>(low + line * kAmxStep) = lows;
        }
    }
    if constexpr (Transposed) {
        store_tile<true>(lines[0], high);
        store_tile<true>(lines[1], low);
    }
    return bits;
}

ONESTEP_INLINE bool any_bits(AmxWords bits) {
    uint32_t any = 0;
    for (int lane = 0; lane < kLanes<float>; ++lane) {
        any |= bits[lane];
    }
    return any != 0;
}

// Packs a float matrix for a product over its rows. Rows have `ld` elements; the caller has padded the matrix with
// zeros to whole steps of rows and whole blocks of columns. `check_low`: whether to look for a low plane of zeros.
template <AmxSide Side>
inline Planes pack_over_rows(const float* from, int64_t rows, int64_t cols, int64_t ld, bool check_low,
                             Work<float>& work) {
    const int64_t size = amx_size(cols, rows);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), cols, rows);
    AmxWords bits = {};
    for (int64_t s = 0; s < amx_steps(rows); ++s) {
        for (int64_t b = 0; b < amx_blocks(cols); ++b) {
            const float* corner = from + s * kAmxStep * ld + b * kAmxBlock;
            BFloat16* tile = to.data + b * to.block + s * kAmxTile;
            bits |= pack_tile<Side == AmxSide::left>(
                [&](int line, Vec<float>& first, Vec<float>& second) {
                    first = load<float>(corner + 2 * line * ld);
                    second = load<float>(corner + (2 * line + 1) * ld);
                },
                tile, tile + size);
        }
    }
    return {to.data, check_low && !any_bits(bits) ? nullptr : to.data + size, to.block};
}

template <int Odd, int... Lane>
ONESTEP_INLINE Vec<float> every_other(Vec<float> a, Vec<float> b, std::integer_sequence<int, Lane...>) {
    return __builtin_shufflevector(a, b, (2 * Lane + Odd)...);
}

// Packs factor times a float matrix for a product over its columns. The caller has padded the matrix with zeros to
// whole blocks of rows and whole steps of columns.
template <AmxSide Side>
inline Planes pack_over_columns(const float* from, int64_t rows, int64_t cols, int64_t ld, float factor, bool check_low,
                                Work<float>& work) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<float>>{};
    const int64_t size = amx_size(rows, cols);
    const AmxPacked to = AmxPacked::whole(take_bfloat16(2 * size, work), rows, cols);
    AmxWords bits = {};
    for (int64_t b = 0; b < amx_blocks(rows); ++b) {
        for (int64_t s = 0; s < amx_steps(cols); ++s) {
            const float* corner = from + b * kAmxBlock * ld + s * kAmxStep;
            BFloat16* tile = to.data + b * to.block + s * kAmxTile;
            bits |= pack_tile<Side == AmxSide::right>(
                [&](int line, Vec<float>& first, Vec<float>& second) {
                    const Vec<float> a = load<float>(corner + line * ld) * factor;
                    const Vec<float> c = load<float>(corner + line * ld + kAmxBlock) * factor;
                    first = every_other<0>(a, c, lanes);
                    second = every_other<1>(a, c, lanes);
                },
                tile, tile + size);
        }
    }
    return {to.data, check_low && !any_bits(bits) ? nullptr : to.data + size, to.block};
}

ONESTEP_INLINE int64_t whole_steps(int64_t count) { return amx_steps(count) * kAmxStep; }

ONESTEP_INLINE void clear(float* to, int64_t count) {
    __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(float));
}

ONESTEP_INLINE float* take_zeroed(int64_t count, Work<float>& work) {
    float* to = work.take(count);
    clear(to, count);
    return to;
}

// Which dimension of a matrix is the inner one of the product that it is packed for.
enum class Inner { columns, rows };

// Packs rows [row, row + rows) of a slice for a product over its columns, or over those rows.
template <AmxSide Side, Inner Along>
inline Planes packed_planes(const AttentionSlice& slice, int64_t row, int64_t rows, int64_t cols, Work<float>& work) {
    if (slice.data == nullptr) {
        return {};
    }
    if (slice.element != Element::bfloat16) {
        const int64_t ld = whole_steps(cols);
        float* padded = work.take(whole_steps(rows) * ld);
        pack_rows<float>(slice, row, 0, rows, cols, 1.0F, padded, ld);
        clear(padded + rows * ld, (whole_steps(rows) - rows) * ld);
        if constexpr (Along == Inner::columns) {
            return pack_over_columns<Side>(padded, rows, cols, ld, 1.0F, true, work);
        } else {
            return pack_over_rows<Side>(padded, rows, cols, ld, true, work);
        }
    }
    const int64_t count = Along == Inner::columns ? rows : cols;
    const int64_t depth = Along == Inner::columns ? cols : rows;
    const AmxPacked to = AmxPacked::whole(take_bfloat16(amx_size(count, depth), work), count, depth);
    // The packers read along rows. A matrix that is stored by columns is packed as its transpose.
    const bool transposed = slice.row == 1 && slice.col != 1;
    const StridedRows<BFloat16> lines = {element<BFloat16>(slice, row, 0), transposed ? slice.col : slice.row};
    const int64_t step = transposed ? slice.row : slice.col;
    if ((Along == Inner::columns) != transposed) {
        amx_pack_rows<Side>(lines, 0, count, step, 0, depth, to);
    } else {
        amx_pack_columns<Side>(lines, 0, depth, step, 0, count, to);
    }
    return {to.data, nullptr, to.block};
}

// A sum of up to two products of the same depth, as Products. A product of two planes each is three terms: low · low is
// left out, since it is 2⁻¹⁶ of the product. An absent operand is zero.
struct PlaneProducts {
    int64_t depth;
    int count = 0;  // of the terms
    AmxTerm terms[6];

    explicit PlaneProducts(int64_t depth_) : depth(depth_) {}

    void add(const Planes& left, const Planes& right) {
        if (left.high == nullptr || right.high == nullptr) {
            return;
        }
        terms[count++] = {left.high, left.block, right.high, right.block};
        if (left.low != nullptr) {
            terms[count++] = {left.low, left.block, right.high, right.block};
        }
        if (right.low != nullptr) {
            terms[count++] = {left.high, left.block, right.low, right.block};
        }
    }
};

// c = Σ products over `rows` × `cols`, or c += with Add.
template <bool Add>
inline void multiply_planes(AmxTiles& tiles, int64_t rows, int64_t cols, const PlaneProducts& products, float* c,
                            int64_t ldc) {
    if (Add && products.count == 0) {
        return;
    }
    amx_multiply(tiles, amx_blocks(rows), amx_blocks(cols), amx_steps(products.depth), products.terms, products.count,
                 Add, {c, ldc, kAmxPanel, rows, cols});
}

ONESTEP_INLINE int64_t whole_blocks(int64_t count) { return amx_blocks(count) * kAmxBlock; }

ONESTEP_INLINE void scale_tile(int64_t count, float factor, float* to) {
    for (int64_t e = 0; e < count; e += kLanes<float>) {
        store<float>(to + e, load<float>(to + e) * factor);
    }
}

// to (cols × ld) = the transpose of `from` (rows × cols, rows `from_row` apart).
ONESTEP_INLINE void put_transpose(const float* from, int64_t from_row, int64_t rows, int64_t cols, float* to,
                                  int64_t ld) {
    pack_columns_of<float>(from, from_row, 1, rows, cols, 1.0F, to, ld);
}

// Multiplies the columns of `sums` (rows × cols, rows of `ld`) by their decay.
inline void decay_sums(int64_t rows, int64_t cols, const float* decay, float* sums, int64_t ld) {
    for (int64_t c = 0; c < cols; c += kLanes<float>) {
        const Vec<float> factor = load<float>(decay + c);
        if (!any_bits(reinterpret_cast<AmxWords>(factor) ^ reinterpret_cast<AmxWords>(broadcast<float>(1.0F)))) {
            continue;  // as almost always, see kLazyMaximum
        }
        for (int64_t r = 0; r < rows; ++r) {
            float* at = sums + r * ld + c;
            store<float>(at, load<float>(at) * factor);
        }
    }
}

}  // namespace onestep::attention::ONESTEP_NS
