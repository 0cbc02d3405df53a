// The tile GEMM of the amx target: products of bfloat16 matrices, accumulated in float by Intel's tile instructions.
//
// Operands are packed into tiles of 16 rows (of the left one) or columns (of the right one) by 32 of the inner
// dimension, zero-padded: [block of 16][step of 32][tile]. A left tile is row-major; in a right one row r holds the
// pairs (2r, n), (2r + 1, n) of all columns n. A float operand is split into two bfloat16 planes, high + low, each of
// which is multiplied: its product is as exact as one of 16 bits of mantissa.
#pragma once

#include "base/gemm-inl.hpp"

namespace onestep::ONESTEP_NS {

inline constexpr int64_t kAmxBlock = 16;  // rows or columns of a tile
inline constexpr int64_t kAmxStep = 32;   // inner dimension of a tile
inline constexpr int64_t kAmxTile = kAmxBlock * kAmxStep;
inline constexpr int64_t kAmxPanel = 2 * kAmxBlock;  // columns of the result that lie side by side

ONESTEP_INLINE int64_t amx_blocks(int64_t count) { return (count + kAmxBlock - 1) / kAmxBlock; }
ONESTEP_INLINE int64_t amx_steps(int64_t depth) { return (depth + kAmxStep - 1) / kAmxStep; }

// Elements of a packed operand (of one plane).
ONESTEP_INLINE int64_t amx_size(int64_t count, int64_t depth) {
    return amx_blocks(count) * amx_steps(depth) * kAmxTile;
}

#ifdef ONESTEP_EMULATE
// The tile registers as arrays, and TDPBF16PS as Intel's manual has it, but for denormal numbers (which it takes for
// zero): the even and the odd elements of the inner dimension are summed apart, and their sum is added.
class AmxTiles {
 public:
    template <int Tile>
    void zero() {
        __builtin_memset(tiles_[Tile], 0, sizeof(tiles_[Tile]));
    }
    template <int Tile>
    void load(const void* from, int64_t stride) {
        for (int64_t row = 0; row < kAmxBlock; ++row) {
            __builtin_memcpy(tiles_[Tile][row], static_cast<const char*>(from) + row * stride, sizeof(tiles_[Tile][0]));
        }
    }
    template <int Tile>
    void store(void* to, int64_t stride) const {
        for (int64_t row = 0; row < kAmxBlock; ++row) {
            __builtin_memcpy(static_cast<char*>(to) + row * stride, tiles_[Tile][row], sizeof(tiles_[Tile][0]));
        }
    }
    template <int To, int Left, int Right>
    void multiply() {
        for (int row = 0; row < kAmxBlock; ++row) {
            float even[kAmxBlock] = {};
            float odd[kAmxBlock] = {};
            for (int pair = 0; pair < kAmxBlock; ++pair) {
                const uint32_t left = tiles_[Left][row][pair];
                for (int column = 0; column < kAmxBlock; ++column) {
                    const uint32_t right = tiles_[Right][pair][column];
                    even[column] += number(left << 16) * number(right << 16);
                    odd[column] += number(left & kHigh) * number(right & kHigh);
                }
            }
            for (int column = 0; column < kAmxBlock; ++column) {
                uint32_t& at = tiles_[To][row][column];
                at = __builtin_bit_cast(uint32_t, number(at) + (even[column] + odd[column]));
            }
        }
    }

 private:
    static constexpr uint32_t kHigh = 0xFFFF0000U;
    static ONESTEP_INLINE float number(uint32_t bits) { return __builtin_bit_cast(float, bits); }

    uint32_t tiles_[8][kAmxBlock][kAmxBlock];
};
#else
// The calling thread's tile registers, configured as eight tiles of 16 rows of 64 bytes while the object lives. Written
// in assembly: GCC's intrinsics do not tell the compiler which memory they read (GCC 12), so that it may drop or
// postpone the packing before them.
class AmxTiles {
 public:
    AmxTiles() {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config = {};
        static_assert(sizeof(config) == 64);
        config.palette = 1;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = 2 * kAmxStep;
            config.rows[tile] = kAmxBlock;
        }
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    ~AmxTiles() { asm volatile("tilerelease"); }
    AmxTiles(const AmxTiles&) = delete;
    AmxTiles& operator=(const AmxTiles&) = delete;

    template <int Tile>
    ONESTEP_INLINE void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
    }
    // `stride` in bytes, as for store.
    template <int Tile>
    ONESTEP_INLINE void load(const void* from, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
    }
    template <int Tile>
    ONESTEP_INLINE void store(void* to, int64_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
    }
    // to += left · right
    template <int To, int Left, int Right>
    ONESTEP_INLINE void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(Left), "i"(Right));
    }
};
#endif

// Vectors of 16 words of 32 bits.
typedef uint32_t AmxWords __attribute__((vector_size(64)));
typedef uint32_t UnalignedAmxWords __attribute__((vector_size(64), aligned(2), may_alias));

// Float to bfloat16, rounded to nearest even; NaN stays NaN. The result is in the lower 16 bits of each word.
ONESTEP_INLINE AmxWords round_to_bfloat16(Vec<float> value) {
    const auto bits = reinterpret_cast<AmxWords>(value);
    const AmxWords rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
    const AmxWords quiet = (bits >> 16) | 0x40U;
    return value == value ? rounded : quiet;
}

// value = high + low, to 2⁻¹⁷ of value. low is zero where high is not finite.
ONESTEP_INLINE void split_to_bfloat16(Vec<float> value, AmxWords& high, AmxWords& low) {
    high = round_to_bfloat16(value);
    const auto rounded = reinterpret_cast<Vec<float>>(high << 16);
    low = round_to_bfloat16(is_finite_lanes<float>(rounded) ? value - rounded : Vec<float>{});
}

// Where a packed operand goes: its first block, the elements from a block to the next, and from the high plane to the
// low one (float input).
struct AmxPacked {
    BFloat16* data;
    int64_t block;
    int64_t low = 0;

    // All of an operand; the low plane follows the high one.
    static ONESTEP_INLINE AmxPacked whole(BFloat16* data, int64_t count, int64_t depth) {
        return {data, amx_steps(depth) * kAmxTile, amx_size(count, depth)};
    }
};

// 16 elements of a line of a matrix, of which `count` exist, as words with bfloat16 in their lower halves: one plane of
// bfloat16 input, two of float.
ONESTEP_INLINE void load_planes(const BFloat16* from, int64_t step, int64_t count, AmxWords (&planes)[1]) {
    if (step == 1 && count >= kAmxBlock) {
        planes[0] = __builtin_convertvector(*reinterpret_cast<const HalfBits*>(from), AmxWords);
        return;
    }
    planes[0] = AmxWords{};
    for (int64_t e = 0; e < minimum(count, kAmxBlock); ++e) {
        planes[0][e] = from[e * step].bits;
    }
}

ONESTEP_INLINE Vec<float> load_some(const float* from, int64_t step, int64_t count) {
    if (step == 1 && count >= kAmxBlock) {
        return load<float>(from);
    }
    Vec<float> values{};
    for (int64_t e = 0; e < minimum(count, kAmxBlock); ++e) {
        values[e] = from[e * step];
    }
    return values;
}

ONESTEP_INLINE void load_planes(const float* from, int64_t step, int64_t count, AmxWords (&planes)[2]) {
    split_to_bfloat16(load_some(from, step, count), planes[0], planes[1]);
}

// Float rounded to one plane.
ONESTEP_INLINE void load_planes(const float* from, int64_t step, int64_t count, AmxWords (&planes)[1]) {
    planes[0] = round_to_bfloat16(load_some(from, step, count));
}

template <class Pointer>
inline constexpr int kAmxPlanes = sizeof(*Pointer{}) == sizeof(BFloat16) ? 1 : 2;

enum class AmxSide { left, right };

// Stores one tile from its 16 lines: rows of a left tile, or pairs of rows of a right one. Lines of the other side are
// transposed: with pairs of the inner dimension as words, a left tile is the transpose of a right tile.
template <bool Transposed>
ONESTEP_INLINE void store_tile(Vec<float> (&lines)[kAmxBlock], BFloat16* to) {
    if constexpr (Transposed) {
        transpose<float>(lines);
    }
#pragma GCC unroll 16
    for (int line = 0; line < kAmxBlock; ++line) {
        *reinterpret_cast<UnalignedAmxWords*>(to + line * kAmxStep) = reinterpret_cast<AmxWords>(lines[line]);
    }
}

// Packs rows [begin, begin + count) of a matrix as rows (left) or columns (right) of an operand. The inner dimension
// are the rows' elements [first, first + depth), `step` apart.
// Planes: 0 for all that the numbers have.
template <AmxSide Side, int Planes = 0, class Rows>
inline void amx_pack_rows(const Rows& rows, int64_t begin, int64_t count, int64_t step, int64_t first, int64_t depth,
                          AmxPacked to) {
    constexpr bool kHalf = kAmxPlanes<decltype(rows(0))> == 1;
    constexpr int kPlanes = Planes != 0 ? Planes : kAmxPlanes<decltype(rows(0))>;
    for (int64_t b = 0; b < amx_blocks(count); ++b) {
        const int64_t height = minimum(kAmxBlock, count - b * kAmxBlock);
        for (int64_t s = 0; s < amx_steps(depth); ++s) {
            Vec<float> lines[kPlanes][kAmxBlock] = {};
            const int64_t p = s * kAmxStep;
            for (int64_t i = 0; i < height; ++i) {
                const auto* from = rows(begin + b * kAmxBlock + i) + (first + p) * step;
                if constexpr (kHalf) {
                    if (step == 1 && depth - p >= kAmxStep) {  // a line as it is in memory
                        const auto words = *reinterpret_cast<const UnalignedAmxWords*>(from);
                        lines[0][i] = reinterpret_cast<Vec<float>>(words);
                        continue;
                    }
                }
                AmxWords halves[2][kPlanes] = {};
                load_planes(from, step, depth - p, halves[0]);
                if (depth - p > kAmxBlock) {
                    load_planes(from + kAmxBlock * step, step, depth - p - kAmxBlock, halves[1]);
                }
                for (int plane = 0; plane < kPlanes; ++plane) {
                    HalfBits line[2];
                    line[0] = __builtin_convertvector(halves[0][plane], HalfBits);
                    line[1] = __builtin_convertvector(halves[1][plane], HalfBits);
                    __builtin_memcpy(&lines[plane][i], line, sizeof(line));
                }
            }
            for (int plane = 0; plane < kPlanes; ++plane) {
                store_tile<Side == AmxSide::right>(lines[plane],
                                                   to.data + b * to.block + s * kAmxTile + plane * to.low);
            }
        }
    }
}

// Packs rows [begin, begin + depth) of a matrix as the inner dimension of an operand. Its rows (left) or columns
// (right) are the rows' elements [first, first + count), `step` apart.
template <AmxSide Side, int Planes = 0, class Rows>
inline void amx_pack_columns(const Rows& rows, int64_t begin, int64_t depth, int64_t step, int64_t first, int64_t count,
                             AmxPacked to) {
    constexpr int kPlanes = Planes != 0 ? Planes : kAmxPlanes<decltype(rows(0))>;
    for (int64_t s = 0; s < amx_steps(depth); ++s) {
        const int64_t p = s * kAmxStep;
        const int64_t height = minimum(kAmxStep, depth - p);
        for (int64_t b = 0; b < amx_blocks(count); ++b) {
            const int64_t at = (first + b * kAmxBlock) * step;
            const int64_t width = count - b * kAmxBlock;
            Vec<float> lines[kPlanes][kAmxBlock] = {};
            for (int64_t i = 0; i < height; i += 2) {
                AmxWords pair[2][kPlanes] = {};
                load_planes(rows(begin + p + i) + at, step, width, pair[0]);
                if (i + 1 < height) {
                    load_planes(rows(begin + p + i + 1) + at, step, width, pair[1]);
                }
                for (int plane = 0; plane < kPlanes; ++plane) {
                    lines[plane][i / 2] = reinterpret_cast<Vec<float>>(pair[0][plane] | (pair[1][plane] << 16));
                }
            }
            for (int plane = 0; plane < kPlanes; ++plane) {
                store_tile<Side == AmxSide::left>(lines[plane], to.data + b * to.block + s * kAmxTile + plane * to.low);
            }
        }
    }
}

// Two packed operands to multiply: their first blocks, and the elements from a block to the next.
struct AmxTerm {
    const BFloat16* left;
    int64_t left_block;
    const BFloat16* right;
    int64_t right_block;
};

// Writes one tile of the result at row i and column j. Elements outside of `rows` × `columns` are not touched.
struct AmxResult {
    const ProductTiles<float>& product;
    bool accumulate;

    ONESTEP_INLINE float* at(int64_t i, int64_t j) const {
        return product.data + i * product.row + j / kAmxPanel * product.panel + j % kAmxPanel;
    }
    ONESTEP_INLINE bool whole(int64_t i, int64_t j) const {
        return i + kAmxBlock <= product.rows && j + kAmxBlock <= product.columns;
    }

    // Asks for a tile's cache lines to write to: large results lie in memory, where the products would wait for them.
    ONESTEP_INLINE void ask(int64_t i, int64_t j) const {
        if (whole(i, j)) {
            const float* first = at(i, j);
#pragma GCC unroll 16
            for (int64_t row = 0; row < kAmxBlock; ++row) {
                __builtin_prefetch(first + row * product.row, 1);
            }
        }
    }

    template <int Tile>
    ONESTEP_INLINE void start(AmxTiles& tiles, int64_t i, int64_t j) const {
        if (accumulate && whole(i, j)) {
            tiles.template load<Tile>(at(i, j), product.row * static_cast<int64_t>(sizeof(float)));
        } else {
            tiles.template zero<Tile>();
        }
    }
    template <int Tile>
    ONESTEP_INLINE void finish(AmxTiles& tiles, int64_t i, int64_t j) const {
        if (whole(i, j)) {
            tiles.template store<Tile>(at(i, j), product.row * static_cast<int64_t>(sizeof(float)));
            return;
        }
        alignas(64) float edge[kAmxBlock][kAmxBlock];
        tiles.template store<Tile>(edge, sizeof(edge[0]));
        for (int64_t row = 0; row < minimum(kAmxBlock, product.rows - i); ++row) {
            for (int64_t column = 0; column < minimum(kAmxBlock, product.columns - j); ++column) {
                float& to = at(i, j)[row * product.row + column];
                to = accumulate ? to + edge[row][column] : edge[row][column];
            }
        }
    }
};

// R × C tiles of the result, from block `i` of the left and `j` of the right operands: accumulators 0 to 3, left tiles
// 4 and 5, right tiles 6 and 7.
template <int R, int C>
ONESTEP_INLINE void amx_multiply_tiles(AmxTiles& tiles, int64_t i, int64_t j, int64_t steps, const AmxTerm* terms,
                                       int64_t count, AmxResult result) {
    constexpr int64_t kRowBytes = kAmxStep * static_cast<int64_t>(sizeof(BFloat16));
    const int64_t row = i * kAmxBlock;
    const int64_t column = j * kAmxBlock;
    // Tiles that are overwritten are needed at the end of this product, those that are added to at the start of the
    // next one below.
    const int64_t asked = result.accumulate ? row + R * kAmxBlock : row;
    for (int64_t below = 0; below < R; ++below) {
        for (int64_t beside = 0; beside < C; ++beside) {
            result.ask(asked + below * kAmxBlock, column + beside * kAmxBlock);
        }
    }
    result.start<0>(tiles, row, column);
    if constexpr (C == 2) {
        result.start<1>(tiles, row, column + kAmxBlock);
    }
    if constexpr (R == 2) {
        result.start<2>(tiles, row + kAmxBlock, column);
    }
    if constexpr (R == 2 && C == 2) {
        result.start<3>(tiles, row + kAmxBlock, column + kAmxBlock);
    }
    for (const AmxTerm* term = terms; term != terms + count; ++term) {
        const BFloat16* left = term->left + i * term->left_block;
        const BFloat16* right = term->right + j * term->right_block;
        for (int64_t s = 0; s < steps; ++s) {
            tiles.template load<4>(left, kRowBytes);
            tiles.template load<6>(right, kRowBytes);
            tiles.template multiply<0, 4, 6>();
            if constexpr (C == 2) {
                tiles.template load<7>(right + term->right_block, kRowBytes);
                tiles.template multiply<1, 4, 7>();
            }
            if constexpr (R == 2) {
                tiles.template load<5>(left + term->left_block, kRowBytes);
                tiles.template multiply<2, 5, 6>();
            }
            if constexpr (R == 2 && C == 2) {
                tiles.template multiply<3, 5, 7>();
            }
            left += kAmxTile;
            right += kAmxTile;
        }
    }
    result.finish<0>(tiles, row, column);
    if constexpr (C == 2) {
        result.finish<1>(tiles, row, column + kAmxBlock);
    }
    if constexpr (R == 2) {
        result.finish<2>(tiles, row + kAmxBlock, column);
    }
    if constexpr (R == 2 && C == 2) {
        result.finish<3>(tiles, row + kAmxBlock, column + kAmxBlock);
    }
}

// product (+)= Σ left · right over `count` terms. Each has `row_blocks` blocks on the left, `column_blocks` on the
// right, and `steps` steps of the inner dimension. The result is stored in panels of kAmxPanel columns (a row-major
// matrix has `panel` = kAmxPanel); only `rows` × `columns` of it are read or written.
inline void amx_multiply(AmxTiles& tiles, int64_t row_blocks, int64_t column_blocks, int64_t steps,
                         const AmxTerm* terms, int64_t count, bool accumulate, const ProductTiles<float>& product) {
    const AmxResult result{product, accumulate};
    for (int64_t j = 0; j < column_blocks; j += 2) {
        const bool two_columns = j + 1 < column_blocks;
        for (int64_t i = 0; i < row_blocks; i += 2) {
            const bool two_rows = i + 1 < row_blocks;
            if (two_rows && two_columns) {
                amx_multiply_tiles<2, 2>(tiles, i, j, steps, terms, count, result);
            } else if (two_rows) {
                amx_multiply_tiles<2, 1>(tiles, i, j, steps, terms, count, result);
            } else if (two_columns) {
                amx_multiply_tiles<1, 2>(tiles, i, j, steps, terms, count, result);
            } else {
                amx_multiply_tiles<1, 1>(tiles, i, j, steps, terms, count, result);
            }
        }
    }
}

}  // namespace onestep::ONESTEP_NS
