// Gram matrix of the rows of Z = sqrt(D) [X | 1? | Y], by tiles over packed blocks of rows.
#pragma once

#include "base/tile-inl.hpp"
#include "normal/cpu/half-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

// Rows that are asked for ahead where they do not follow each other.
inline constexpr int64_t kRowsAhead = 8;

// Bytes of a row that are packed at a time. Panels lie a multiple of a page apart, so the lines that they are written
// to share one set of the first-level cache: it keeps those of eight panels.
inline constexpr int64_t kPackedBytes = 768;

// Columns of Z whose panels are multiplied with one panel after another: they fill less than half of a second-level
// cache of 512 KB.
template <class T>
inline constexpr int64_t kLeftColumns = (int64_t{192} << 10) / kBlockRows / static_cast<int64_t>(sizeof(T));

// Copies columns [first, first + count) of Z from `from` into panels: element (p, c) goes to
// packed[c / panel][p][c % panel]. Row p of Z is row begin + p of `from`, or row index[begin + p]. The inner loop runs
// along the stride that is 1, if there is one.
template <class T>
inline void pack_columns(const Matrix<const T>& from, const int64_t* index, int64_t begin, int64_t rows, int64_t first,
                         int64_t count, T* packed) {
    constexpr int64_t panel = kPanel<T>;
    const auto row_of = [&](int64_t p) {
        return from.data + (index != nullptr ? index[begin + p] : begin + p) * from.row;
    };
    if (from.col == 1) {
        const int64_t within = first % panel;
        const int64_t head = within == 0 ? 0 : minimum(panel - within, count);  // up to the first whole panel
        if (head > 0) {
            T* start = packed + first / panel * kBlockRows * panel + within;
            for (int64_t p = 0; p < rows; ++p) {
                const T* row = row_of(p);
                for (int64_t j = 0; j < head; ++j) {
                    start[p * panel + j] = row[j];
                }
            }
        }
        constexpr int64_t group = kPackedBytes / static_cast<int64_t>(sizeof(T)) / panel * panel;
        // Rows that lie anywhere, or of which others' columns come first: the hardware does not look ahead to the next
        // one.
        const bool far = index != nullptr || count > group;
        for (int64_t begin_group = head; begin_group < count; begin_group += group) {
            const int64_t end_group = minimum(begin_group + group, count);
            T* next = packed + (first + begin_group) / panel * kBlockRows * panel;
            for (int64_t p = 0; p < rows; ++p) {
                const T* row = row_of(p);
                if (far) {
                    const auto ahead =
                        reinterpret_cast<const char*>(row_of(minimum(p + kRowsAhead, rows - 1)) + begin_group);
                    const int64_t bytes = (end_group - begin_group) * static_cast<int64_t>(sizeof(T));
                    for (int64_t byte = 0; byte < bytes; byte += 64) {
                        __builtin_prefetch(ahead + byte);
                    }
                }
                T* to = next + p * panel;
                int64_t c = begin_group;
                for (; c + panel <= end_group; c += panel) {
#pragma GCC unroll 3
                    for (int v = 0; v < kTileVectors<T>; ++v) {
                        store<T>(to + v * kLanes<T>, load<T>(row + c + v * kLanes<T>));
                    }
                    to += kBlockRows * panel;
                }
                for (; c + kLanes<T> <= end_group; c += kLanes<T>) {
                    store<T>(to, load<T>(row + c));
                    to += kLanes<T>;
                }
                for (; c < end_group; ++c) {
                    *to++ = row[c];
                }
            }
        }
        return;
    }
    for (int64_t c = first; c < first + count; ++c) {
        T* to = packed + (c / panel) * kBlockRows * panel + c % panel;
        for (int64_t p = 0; p < rows; ++p) {
            to[p * panel] = row_of(p)[(c - first) * from.col];
        }
    }
}

// Subtracts the provisional means and multiplies by sqrt(weight), in place.
template <class T>
inline void shift_and_scale(const RowsArgs<T>& args, int64_t begin, int64_t rows, int64_t panels, T* packed) {
    const int64_t panel = kPanel<T>;
    for (int64_t p = 0; p < rows; ++p) {
        const T scale =
            args.weight.data != nullptr ? square_root(args.weight.data[(begin + p) * args.weight.row]) : T(1);
        for (int64_t q = 0; q < panels; ++q) {
            T* at = packed + (q * kBlockRows + p) * panel;
#pragma GCC unroll 3
            for (int v = 0; v < kTileVectors<T>; ++v) {
                Vec<T> z = load<T>(at + v * kLanes<T>);
                if (args.shift != nullptr) {
                    z -= load<T>(args.shift + q * panel + v * kLanes<T>);
                }
                store<T>(at + v * kLanes<T>, z * scale);
            }
        }
    }
}

// c += the products of the columns [top, bottom) of Z with those of panel q, over a block of packed rows; `top` begins
// a panel. Vectors that lie below the diagonal or past the last column are left out: they stay 0.
template <class T>
inline void gram_panel(const T* packed, int64_t rows, int64_t q, int64_t top, int64_t bottom, int64_t columns, T* c,
                       int64_t ld) {
    constexpr int64_t lanes = kLanes<T>;
    constexpr int64_t panel = kPanel<T>;
    const T* b = packed + q * kBlockRows * panel;
    const int64_t end = minimum(kTileVectors<T>, (columns - q * panel + lanes - 1) / lanes);
    const auto first_vector = [&](int64_t i) { return maximum(0, i - q * panel) / lanes; };
    for (int64_t i = top; i < bottom; i += kTileRows) {
        const int64_t v = first_vector(i);
        const Broadcast<T> a = {packed + (i / panel) * kBlockRows * panel + i % panel, 1, panel};
        T* to = c + i * ld + v * lanes;
        // It is added to when the products are known, and a wide matrix lies outside the first two caches.
        for (int64_t line = 0; line < kTileRows; ++line) {
            __builtin_prefetch(to + line * ld, 1);
            __builtin_prefetch(to + line * ld + (end - v) * lanes - 1, 1);
        }
        if (end - v >= 3) {
            update_tile<T, kTileRows, 3, 1>(rows, a, b + v * lanes, panel, to, ld);
        } else if (end - v == 2) {
            update_tile<T, kTileRows, 2, 1>(rows, a, b + v * lanes, panel, to, ld);
        } else if (i + kTileRows < bottom && (i + kTileRows) % panel != 0 && first_vector(i + kTileRows) == v) {
            // One vector: with twice the rows, since fewer accumulators would not hide the latency of an FMA.
            update_tile<T, 2 * kTileRows, 1, 1>(rows, a, b + v * lanes, panel, to, ld);
            i += kTileRows;
        } else {
            update_tile<T, kTileRows, 1, 1>(rows, a, b + v * lanes, panel, to, ld);
        }
    }
}

template <class T>
inline void gram_rows(const RowsArgs<T>& args, int64_t begin, int64_t end, int64_t first, int64_t last, T* packed, T* c,
                      int64_t ld) {
    const int64_t panel = kPanel<T>;
    const int64_t features = args.d + (args.ones ? 1 : 0);
    const int64_t columns = features + args.k;
    const int64_t needed = minimum(columns, last * panel);
    for (int64_t pad = columns; pad < last * panel; ++pad) {
        for (int64_t p = 0; p < kBlockRows; ++p) {
            packed[((pad / panel) * kBlockRows + p) * panel + pad % panel] = T(0);
        }
    }
    for (int64_t block = begin; block < end; block += kBlockRows) {
        const int64_t rows = minimum(kBlockRows, end - block);
        if (is_half(args.element)) {
            pack_half_columns<T>(args, block, rows, minimum(args.d, needed), packed);
        } else {
            pack_columns<T>(args.x, args.index, block, rows, 0, minimum(args.d, needed), packed);
        }
        if (args.ones && args.d < needed) {
            T* ones = packed + (args.d / panel) * kBlockRows * panel + args.d % panel;
            for (int64_t p = 0; p < rows; ++p) {
                ones[p * panel] = T(1);
            }
        }
        if (features < needed) {
            pack_columns<T>(args.y, nullptr, block, rows, features, needed - features, packed);
        }
        if (args.weight.data != nullptr || args.shift != nullptr) {
            shift_and_scale<T>(args, block, rows, last, packed);
        }
        for (int64_t top = 0; top < minimum(features, last * panel); top += kLeftColumns<T>) {
            for (int64_t q = maximum(first, top / panel); q < last; ++q) {
                const int64_t bottom = minimum(top + kLeftColumns<T>, minimum(features, (q + 1) * panel));
                gram_panel<T>(packed, rows, q, top, bottom, columns, c + (q - first) * panel, ld);
            }
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
