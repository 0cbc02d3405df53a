// X in chunks of 16 bytes: how they are loaded, and what is in them.
#pragma once

#include "base/cuda/device.cuh"
#include "base/cuda/numbers.cuh"
#include "glm/glm.hpp"

namespace onestep::glm::cuda {

using namespace onestep::cuda;

template <class X>
struct Chunk;

template <>
struct Chunk<float> {
    static constexpr int size = 4;
    uint4 words = {0, 0, 0, 0};

    template <class T>
    __device__ T at(int e) const {
        return __uint_as_float(e == 0 ? words.x : e == 1 ? words.y : e == 2 ? words.z : words.w);
    }
    __device__ void set(int e, float value) {
        (e == 0 ? words.x : e == 1 ? words.y : e == 2 ? words.z : words.w) = __float_as_uint(value);
    }
};

template <>
struct Chunk<double> {
    static constexpr int size = 2;
    double2 values = {0.0, 0.0};

    template <class T>
    __device__ T at(int e) const {
        return e == 0 ? values.x : values.y;
    }
    __device__ void set(int e, double value) { (e == 0 ? values.x : values.y) = value; }
};

// Two halves of 16 bits a word, the first in the lower half.
template <class X>
struct Chunk16 {
    static constexpr int size = 8;
    uint4 words = {0, 0, 0, 0};

    template <class T>
    __device__ T at(int e) const {
        const unsigned word = e < 2 ? words.x : e < 4 ? words.y : e < 6 ? words.z : words.w;
        if constexpr (std::is_same_v<X, bfloat16>) {
            return e % 2 == 0 ? low_bfloat16(word) : high_bfloat16(word);
        } else {
            return e % 2 == 0 ? low_float16(word) : high_float16(word);
        }
    }
    __device__ void set(int e, X value) {
        unsigned& word = e < 2 ? words.x : e < 4 ? words.y : e < 6 ? words.z : words.w;
        word = e % 2 == 0 ? (word & 0xffff0000u) | value.bits : (word & 0xffffu) | unsigned{value.bits} << 16;
    }
};

template <>
struct Chunk<bfloat16> : Chunk16<bfloat16> {};
template <>
struct Chunk<float16> : Chunk16<float16> {};

// Elements [column, column + size) of a row; zeros from the last row and column on. Needs rows of whole chunks.
template <class X, class T>
__device__ Chunk<X> load_chunk(const GlmData<X, T>& data, int64_t row, int column) {
    static_assert(sizeof(Chunk<X>) == sizeof(uint4));
    if (row >= data.n || column >= data.d) {
        return {};
    }
    return *reinterpret_cast<const Chunk<X>*>(data.x.data + row * data.x.row + column);
}

// The same for any strides.
template <class X, class T>
__device__ Chunk<X> gather_chunk(const GlmData<X, T>& data, int64_t row, int column) {
    Chunk<X> chunk;
    if (row < data.n) {
#pragma unroll
        for (int e = 0; e < Chunk<X>::size; ++e) {
            if (column + e < data.d) {
                chunk.set(e, data.x.data[row * data.x.row + (column + e) * data.x.col]);
            }
        }
    }
    return chunk;
}

// Whether load_chunk can read X.
template <class X, class T>
bool loads_in_chunks(const GlmData<X, T>& data) {
    return data.x.col == 1 && data.d % Chunk<X>::size == 0 && data.x.row % Chunk<X>::size == 0 &&
           reinterpret_cast<uintptr_t>(data.x.data) % sizeof(uint4) == 0;
}

template <class X>
__device__ X one() {
    if constexpr (sizeof(X) != 2) {
        return X(1);
    } else {
        return X{static_cast<uint16_t>(std::is_same_v<X, bfloat16> ? 0x3f80 : 0x3c00)};
    }
}

}  // namespace onestep::glm::cuda
