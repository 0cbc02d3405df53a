// One block of columns of the compensated sweep. A column of some rows lies side by side, a row to a vector lane, so
// that all rows take the same steps.
#pragma once

#include "compensated/cpu/products-inl.hpp"

namespace onestep::compensated::ONESTEP_NS {

// Columns whose changes are gathered before they go to the rest of the block.
inline constexpr int64_t kSweepStep = 16;

template <class T>
inline constexpr T kRoundingShift = std::is_same_v<T, float> ? T(12582912.0) : T(6755399441055744.0);

// The nearest integer, ties to even, of |x| < 2^22: larger ones have no digits behind the point.
template <class T>
ONESTEP_INLINE Vec<T> round_lanes(Vec<T> x) {
    const Vec<T> shift = broadcast<T>(kRoundingShift<T>);
    return opaque(x + shift) - shift;
}

// x within [low, high]; low for NaN.
template <class T>
ONESTEP_INLINE Vec<T> clamp_lanes(Vec<T> x, T low, T high) {
    x = x > broadcast<T>(low) ? x : broadcast<T>(low);
    return x < broadcast<T>(high) ? x : broadcast<T>(high);
}

template <class T>
struct SweepBlock {
    const SweepArgs<T>& args;
    const SweepMatrices<T>& matrices;
    int64_t begin, rows, start, end;
    T* w;            // [column][kSweepRows]
    T* change;       // likewise, of columns that are done −e; with R what they have lost, W as it was before
    T* scale;        // [kSweepRows]
    T* zero;         // [kSweepRows]
    T* gone;         // [column][kSweepRows], 1 where the element is removed
    T* square;       // [kSweepRows], Σ e²
    uint8_t* codes;  // [column][kSweepRows]

    ONESTEP_INLINE T pivot(int64_t j) const { return factor(j)[j - start]; }
    // Row j of the factor from column `start` on.
    ONESTEP_INLINE const T* factor(int64_t j) const { return matrices.diagonal + (j - start) * (end - start); }
    ONESTEP_INLINE T* at(T* from, int64_t j) const { return from + (j - start) * kSweepRows; }
    ONESTEP_INLINE bool removes() const { return args.of > 0 || args.sparsity > 0.0; }
};

template <class T>
inline void load_block(const SweepBlock<T>& block, const T* w, int64_t step, T* to) {
    const int64_t width = block.end - block.start;
    for (int64_t r = 0; r < kSweepRows; r += kLanes<T>) {
        const T* from = w + (block.begin + r) * step + block.start;
        int64_t c = 0;
        for (; r + kLanes<T> <= block.rows && c + kLanes<T> <= width; c += kLanes<T>) {
            Vec<T> square[kLanes<T>];
            for (int i = 0; i < kLanes<T>; ++i) {
                square[i] = load<T>(from + i * step + c);
            }
            transpose<T>(square);
            for (int i = 0; i < kLanes<T>; ++i) {
                store<T>(to + (c + i) * kSweepRows + r, square[i]);
            }
        }
        for (; c < width; ++c) {
            for (int64_t i = 0; i < kLanes<T>; ++i) {
                to[c * kSweepRows + r + i] = r + i < block.rows ? from[i * step + c] : T(0);
            }
        }
    }
}

template <class T>
inline void store_block(const SweepBlock<T>& block) {
    const int64_t width = block.end - block.start;
    const int64_t step = block.args.columns;
    for (int64_t r = 0; r < block.rows; r += kLanes<T>) {
        T* to = block.args.swept + (block.begin + r) * step + block.start;
        int64_t c = 0;
        for (; r + kLanes<T> <= block.rows && c + kLanes<T> <= width; c += kLanes<T>) {
            Vec<T> square[kLanes<T>];
            for (int i = 0; i < kLanes<T>; ++i) {
                square[i] = load<T>(block.w + (c + i) * kSweepRows + r);
            }
            transpose<T>(square);
            for (int i = 0; i < kLanes<T>; ++i) {
                store<T>(to + i * step + c, square[i]);
            }
        }
        for (; c < width; ++c) {
            for (int64_t i = 0; i < minimum(kLanes<T>, block.rows - r); ++i) {
                to[i * step + c] = block.w[c * kSweepRows + r + i];
            }
        }
    }
}

// Row by row: a column's codes lie a row apart.
template <class T>
inline void store_codes(const SweepBlock<T>& block) {
    const int64_t width = block.end - block.start;
    for (int64_t r = 0; r < block.rows; ++r) {
        uint8_t* to = block.args.codes + (block.begin + r) * block.args.columns + block.start;
        for (int64_t c = 0; c < width; ++c) {
            to[c] = block.codes[c * kSweepRows + r];
        }
    }
}

// Grids of the group that starts at column j, from the weights as they are now.
template <class T>
inline void find_grids(const SweepBlock<T>& block, int64_t j, int64_t group) {
    const SweepArgs<T>& args = block.args;
    const int64_t last = minimum(args.columns, j + args.group_size);
    const T most = static_cast<T>((int64_t{1} << args.bits) - 1);
    for (int64_t r = 0; r < block.rows; ++r) {
        T low = T(0);
        T high = T(0);
        const auto widen_range = [&](T value) {
            low = value < low ? value : low;
            high = value > high ? value : high;
        };
        const T* row = block.matrices.w + (block.begin + r) * block.matrices.ld;
        for (int64_t c = j; c < minimum(last, block.end); ++c) {
            widen_range(block.at(block.w, c)[r]);
        }
        int64_t c = minimum(block.end, last);
        Vec<T> lows{};
        Vec<T> highs{};
        for (; c + kLanes<T> <= last; c += kLanes<T>) {
            const Vec<T> values = load<T>(row + c);
            lows = values < lows ? values : lows;
            highs = values > highs ? values : highs;
        }
        for (int i = 0; i < kLanes<T>; ++i) {
            widen_range(lows[i]);
            widen_range(highs[i]);
        }
        for (; c < last; ++c) {
            widen_range(row[c]);
        }
        if (args.symmetric) {
            high = high > -low ? high : -low;
            low = -high;
        }
        if (low == T(0) && high == T(0)) {
            low = T(-1);
            high = T(1);
        }
        const T scale = (high - low) / most;
        T zero = (most + T(1)) / T(2);
        if (!args.symmetric) {
            zero = round_lanes<T>(broadcast<T>(-low / scale))[0];
        }
        args.scale[(block.begin + r) * args.groups + group] = scale;
        args.zero[(block.begin + r) * args.groups + group] = zero;
    }
}

template <class T>
inline void load_grids(const SweepBlock<T>& block, int64_t group) {
    for (int64_t r = 0; r < kSweepRows; ++r) {
        const int64_t at = (block.begin + r) * block.args.groups + group;
        block.scale[r] = r < block.rows ? block.args.scale[at] : T(1);
        block.zero[r] = r < block.rows ? block.args.zero[at] : T(0);
    }
}

// Of the `of` columns from j on, all but the `keep` with the largest scores go; of equal ones the first.
template <class T>
inline void choose_of(const SweepBlock<T>& block, int64_t j) {
    const int64_t of = block.args.of;
    const Vec<T> one = broadcast<T>(T(1));
    const Vec<T> allowed = broadcast<T>(static_cast<T>(of - block.args.keep));
    for (int64_t r = 0; r < kSweepRows; r += kLanes<T>) {
        for (int64_t k = 0; k < of; ++k) {
            const Vec<T> mine = load<T>(block.at(block.w, j + k) + r) / broadcast<T>(block.pivot(j + k));
            const Vec<T> score = mine * mine;
            Vec<T> smaller{};
            for (int64_t l = 0; l < of; ++l) {
                const Vec<T> other = load<T>(block.at(block.w, j + l) + r) / broadcast<T>(block.pivot(j + l));
                const Vec<T> square = other * other;
                smaller += (l < k ? square <= score : square < score) ? one : Vec<T>{};
            }
            store<T>(block.at(block.gone, j + k) + r, smaller < allowed ? one : Vec<T>{});
        }
    }
}

template <class T>
inline void choose_up_to(const SweepBlock<T>& block, T threshold) {
    for (int64_t j = block.start; j < block.end; ++j) {
        for (int64_t r = 0; r < kSweepRows; r += kLanes<T>) {
            const Vec<T> ratio = load<T>(block.at(block.w, j) + r) / broadcast<T>(block.pivot(j));
            store<T>(block.at(block.gone, j) + r,
                     ratio * ratio <= broadcast<T>(threshold) ? broadcast<T>(T(1)) : Vec<T>{});
        }
    }
}

// What column j becomes, its codes, what it hands on, and the error that it leaves.
template <class T>
inline void fix_column(const SweepBlock<T>& block, int64_t j) {
    const SweepArgs<T>& args = block.args;
    T* w = block.at(block.w, j);
    T* change = block.at(block.change, j);
    const Vec<T> pivot = broadcast<T>(block.pivot(j));
    const T most = static_cast<T>((int64_t{1} << args.bits) - 1);
    uint8_t* codes = block.codes + (j - block.start) * kSweepRows;
    for (int64_t r = 0; r < kSweepRows; r += kLanes<T>) {
        const Vec<T> before = load<T>(w + r);
        Vec<T> q = before;
        if (block.removes()) {
            q = load<T>(block.at(block.gone, j) + r) > Vec<T>{} ? Vec<T>{} : q;
        }
        if (args.bits > 0) {
            const Vec<T> scale = load<T>(block.scale + r);
            const Vec<T> zero = load<T>(block.zero + r);
            // Beyond ±1000 every code is at its end.
            const Vec<T> steps = round_lanes<T>(clamp_lanes<T>(q / scale, T(-1000), T(1000)));
            const Vec<T> code = clamp_lanes<T>(steps + zero, T(0), most);
            alignas(ONESTEP_VECTOR_BYTES) T whole[kLanes<T>];
            store<T>(whole, code);
            for (int i = 0; i < kLanes<T>; ++i) {
                codes[r + i] = static_cast<uint8_t>(static_cast<int32_t>(whole[i]));
            }
            q = scale * (code - zero);
        }
        const Vec<T> error = args.unit ? (before - q) * pivot : (before - q) / pivot;
        store<T>(w + r, q);
        store<T>(change + r, args.unit ? load<T>(change + r) - q : -error);
        store<T>(block.square + r, load<T>(block.square + r) + error * error);
    }
}

// Columns [l, l + Columns) of w take what the columns [from, to) hand on.
template <class T, int Columns>
ONESTEP_INLINE void spread_to(const SweepBlock<T>& block, int64_t from, int64_t to, int64_t l) {
    constexpr int kVectors = static_cast<int>(kSweepRows) / kLanes<T>;
    constexpr int kHeld = kVectors < 4 ? kVectors : 4;
    for (int64_t r = 0; r < kSweepRows; r += kHeld * kLanes<T>) {
        Vec<T> sum[Columns][kHeld];
#pragma GCC unroll 2
        for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < kHeld; ++v) {
                sum[c][v] = load<T>(block.at(block.w, l + c) + r + v * kLanes<T>);
            }
        }
        for (int64_t j = from; j < to; ++j) {
            const T* factors = block.factor(j) + l - block.start;
            const T* change = block.at(block.change, j) + r;
            Vec<T> handed[kHeld];
#pragma GCC unroll 4
            for (int v = 0; v < kHeld; ++v) {
                handed[v] = load<T>(change + v * kLanes<T>);
            }
#pragma GCC unroll 2
            for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 4
                for (int v = 0; v < kHeld; ++v) {
                    sum[c][v] += broadcast<T>(factors[c]) * handed[v];
                }
            }
        }
#pragma GCC unroll 2
        for (int c = 0; c < Columns; ++c) {
#pragma GCC unroll 4
            for (int v = 0; v < kHeld; ++v) {
                store<T>(block.at(block.w, l + c) + r + v * kLanes<T>, sum[c][v]);
            }
        }
    }
}

// Columns [first, last) of w take what the columns [from, to) hand on.
template <class T>
inline void spread(const SweepBlock<T>& block, int64_t from, int64_t to, int64_t first, int64_t last) {
    int64_t l = first;
    for (; l + 2 <= last; l += 2) {
        spread_to<T, 2>(block, from, to, l);
    }
    if (l < last) {
        spread_to<T, 1>(block, from, to, l);
    }
}

// The end of the step that starts at a column: columns that are judged together have had the same errors, so that a
// step ends where some begin that it would not hold.
template <class T>
inline int64_t step_end(const SweepArgs<T>& args, int64_t step, int64_t end) {
    const int64_t last = minimum(step + kSweepStep, end);
    for (int64_t j = step + 1; j < last; ++j) {
        const bool starts_run = args.of > 0 && j % args.of == 0 && j + args.of > last;
        const bool starts_group =
            args.bits > 0 && args.group == nullptr && j % args.group_size == 0 && j + args.group_size > last;
        if (starts_run || starts_group) {
            return j;
        }
    }
    return last;
}

// What the block hands on into the run's left operand: tiles side by side in memory, which a product reads once a
// panel.
template <class T>
inline void pack_changes(const SweepBlock<T>& block, const SweepChanges<T>& changes) {
    for (int64_t r = 0; r < kSweepRows; r += kTileRows) {
        T* to = changes.run + r * changes.width + changes.block * kTileRows;
        for (int64_t j = block.start; j < block.end; ++j) {
            __builtin_memcpy(to + (j - block.start) * kTileRows, block.at(block.change, j) + r, sizeof(T) * kTileRows);
        }
    }
}

template <class T>
inline int64_t sweep_work(int64_t block) {
    return (4 * block + 3) * kSweepRows;
}

template <class T>
inline void sweep_block(const SweepArgs<T>& args, int64_t begin, int64_t rows, int64_t start, int64_t end, T threshold,
                        const SweepMatrices<T>& matrices, const SweepChanges<T>& changes, T* work) {
    const int64_t size = (end - start) * kSweepRows;
    T* const grids = work + 3 * size;
    const SweepBlock<T> block{args,
                              matrices,
                              begin,
                              rows,
                              start,
                              end,
                              work,
                              work + 2 * size,
                              grids,
                              grids + kSweepRows,
                              work + size,
                              grids + 2 * kSweepRows,
                              reinterpret_cast<uint8_t*>(grids + 3 * kSweepRows)};
    for (int64_t r = 0; r < kSweepRows; ++r) {
        block.square[r] = T(0);
    }
    load_block(block, matrices.w, matrices.ld, block.w);
    if (args.unit) {
        load_block(block, args.w, args.columns, block.change);
    }
    if (args.sparsity > 0.0) {
        choose_up_to(block, threshold);
    }
    int64_t loaded = -1;
    for (int64_t step = start; step < end;) {
        const int64_t after = step_end(args, step, end);
        for (int64_t j = step; j < after; ++j) {
            if (args.of > 0 && j % args.of == 0) {
                choose_of(block, j);
            }
            if (args.bits > 0) {
                const int64_t group = args.group != nullptr ? args.group[j] : j / args.group_size;
                if (args.group == nullptr && j % args.group_size == 0) {
                    find_grids(block, j, group);
                    loaded = -1;
                }
                if (group != loaded) {
                    load_grids(block, group);
                    loaded = group;
                }
            }
            fix_column(block, j);
            spread(block, j, j + 1, j + 1, after);
        }
        spread(block, step, after, after, end);
        step = after;
    }
    for (int64_t r = 0; r < rows; ++r) {
        args.error[begin + r] += static_cast<double>(block.square[r]);
    }
    store_block(block);
    if (args.bits > 0) {
        store_codes(block);
    }
    if (end < changes.until) {
        pack_changes(block, changes);
        multiply_panels<T>(
            round_up_to(rows, kTileRows) / kTileRows, round_up_to(changes.until - end, kPanel<T>) / kPanel<T>, 1,
            changes.depth,
            LeftTiles<T>{changes.run + changes.first * kTileRows, changes.width * kTileRows, 1, kTileRows, 0},
            {changes.right, kPanel<T> * changes.depth, 0}, true,
            {matrices.w + begin * matrices.ld + end, matrices.ld, kPanel<T>, rows, changes.until - end});
    }
}

}  // namespace onestep::compensated::ONESTEP_NS
