// Rows of bfloat16 or IEEE binary16 as floats. Binary16 by integer operations, which every target has.
#pragma once

#include "base/math-inl.hpp"
#include "base/tile-inl.hpp"
#include "normal/cpu/kernels.hpp"

namespace onestep::normal::ONESTEP_NS {

using namespace onestep::ONESTEP_NS;

template <Element Type>
ONESTEP_INLINE Vec<float> widen_words(WordBits words) {
    if constexpr (Type == Element::bfloat16) {
        return reinterpret_cast<Vec<float>>(words << 16);
    } else {
        // The exponent's 5 bits are biased by 15, those of float by 127; 31 stays the largest. A number without
        // exponent is a multiple of 2⁻²⁴: as the fraction of 2⁻¹⁴, which is taken off again.
        const WordBits magnitude = (words & 0x7FFFU) << 13;
        const WordBits exponent = magnitude & (31U << 23);
        const Vec<float> small = reinterpret_cast<Vec<float>>(magnitude + (113U << 23)) - 0x1p-14F;
        const WordBits finite = exponent == 0 ? reinterpret_cast<WordBits>(small) : magnitude + (112U << 23);
        const WordBits value = exponent == (31U << 23) ? magnitude + (224U << 23) : finite;
        return reinterpret_cast<Vec<float>>(value | ((words & 0x8000U) << 16));
    }
}

// to[e · to_step] = from[e · step], e in [0, count).
template <Element Type>
ONESTEP_INLINE void widen_run(const uint16_t* from, int64_t step, int64_t count, float* to, int64_t to_step) {
    constexpr int64_t lanes = kLanes<float>;
    int64_t e = 0;
    if (step == 1 && to_step == 1) {
        for (; e + lanes <= count; e += lanes) {
            store<float>(to + e, widen_words<Type>(
                                     __builtin_convertvector(*reinterpret_cast<const HalfBits*>(from + e), WordBits)));
        }
    }
    for (; e < count; e += lanes) {
        const int64_t some = minimum(lanes, count - e);
        uint16_t bits[lanes] = {};
        for (int64_t lane = 0; lane < some; ++lane) {
            bits[lane] = from[(e + lane) * step];
        }
        const Vec<float> values =
            widen_words<Type>(__builtin_convertvector(*reinterpret_cast<const HalfBits*>(bits), WordBits));
        for (int64_t lane = 0; lane < some; ++lane) {
            to[(e + lane) * to_step] = values[lane];
        }
    }
}

ONESTEP_INLINE void widen_run(Element element, const uint16_t* from, int64_t step, int64_t count, float* to,
                              int64_t to_step) {
    if (element == Element::bfloat16) {
        widen_run<Element::bfloat16>(from, step, count, to, to_step);
    } else {
        widen_run<Element::float16>(from, step, count, to, to_step);
    }
}

template <class T>
inline void widen_rows(Element element, const Matrix<const uint16_t>& from, int64_t rows, int64_t cols, T* to) {
    if constexpr (sizeof(T) == sizeof(float)) {
        for (int64_t i = 0; i < rows; ++i) {
            widen_run(element, from.data + i * from.row, from.col, cols, to + i * cols, 1);
        }
    }
}

// As pack_columns, from the first column on.
template <class T>
inline void pack_half_columns(const RowsArgs<T>& args, int64_t begin, int64_t rows, int64_t count, T* packed) {
    if constexpr (sizeof(T) == sizeof(float)) {
        constexpr int64_t panel = kPanel<T>;
        const Matrix<const uint16_t>& from = args.x_half;
        const uint16_t* source = from.data + begin * from.row;
        for (int64_t c = 0; c < count; c += panel) {
            const int64_t width = minimum(panel, count - c);
            T* to = packed + c * kBlockRows;
            if (from.row == 1 && from.col != 1) {
                for (int64_t j = 0; j < width; ++j) {
                    widen_run(args.element, source + (c + j) * from.col, 1, rows, to + j, panel);
                }
                continue;
            }
            for (int64_t p = 0; p < rows; ++p) {
                widen_run(args.element, source + p * from.row + c * from.col, from.col, width, to + p * panel, 1);
            }
        }
    }
}

}  // namespace onestep::normal::ONESTEP_NS
