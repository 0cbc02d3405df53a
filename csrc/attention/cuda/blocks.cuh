// What the attention kernels share: where a block's head lies, which scores are seen, and the sizes of blocks.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention/cuda/attention.hpp"
#include "attention/cuda/tiles.cuh"

namespace onestep::attention::cuda {

inline constexpr double kLog2E = 1.4426950408889634;
inline constexpr double kLn2 = 0.6931471805599453;

__device__ __forceinline__ float power_of_two(float value) { return fast_exp2(value); }
__device__ __forceinline__ double power_of_two(double value) { return exp2(value); }

// Sizes of a kernel's blocks: a warp owns 16 · M rows, a block Warps warps; Inner rows of the other side pass by in
// Stages buffers.
template <class Products_, int M_, int Warps_, int Inner_, int Stages_>
struct BlockSizes {
    using Products = Products_;
    using T = typename Products_::T;
    using Acc = typename Products_::Acc;
    static constexpr int kD = Products_::kD;
    static constexpr int kM = M_;
    static constexpr int kWarps = Warps_;
    static constexpr int kThreads = kWarpSize * Warps_;
    static constexpr int kRows = 16 * M_ * Warps_;
    static constexpr int kInner = Inner_;
    static constexpr int kN = Inner_ / 8;
    static constexpr int kStages = Stages_;
    static constexpr int kOwnTile = kRows * Products_::kRowElements;
    static constexpr int kInnerTile = Inner_ * Products_::kRowElements;
    // Rows of the warps that act together.
    static constexpr int kGroupRows = 16 * M_ * Products_::kWarps;
    static_assert(Warps_ % Products_::kWarps == 0);
};

inline __device__ int64_t offset_of(const int64_t* batch_strides, int64_t head_stride, const BatchShape& batch,
                                    int64_t problem, int64_t head) {
    int64_t offset = head * head_stride;
    for (int dim = batch.dims - 1; dim >= 0; --dim) {
        offset += problem % batch.size[dim] * batch_strides[dim];
        problem /= batch.size[dim];
    }
    return offset;
}

// An operand of one head, null if it is absent. Strides are read from the arguments, in constant memory, which takes no
// registers.
template <class T>
struct HeadRows {
    const HeadedOperand& operand;
    const T* data = nullptr;

    __device__ __forceinline__ HeadRows(const HeadedOperand& operand_, const BatchShape& batch, int64_t problem,
                                        int64_t head)
        : operand(operand_) {
        if (operand.data != nullptr) {
            data = static_cast<const T*>(operand.data) + offset_of(operand.batch, operand.head, batch, problem, head);
        }
    }

    __device__ __forceinline__ explicit operator bool() const { return operand.data != nullptr; }
    // Row `index` of the head that is `member` heads further.
    __device__ __forceinline__ const T* at(int64_t index, int64_t member = 0) const {
        return data + member * operand.head + index * operand.row;
    }
};

// A mask of one head.
template <class T>
struct HeadMask {
    using Acc = Accumulator<T>;
    const HeadedOperand& mask;
    const void* data = nullptr;

    __device__ __forceinline__ HeadMask(const HeadedOperand& mask_, const BatchShape& batch, int64_t problem,
                                        int64_t head)
        : mask(mask_) {
        if (mask.data != nullptr) {
            const int64_t size = mask.element == Element::boolean   ? 1
                                 : mask.element == Element::float32 ? static_cast<int64_t>(sizeof(float))
                                                                    : static_cast<int64_t>(sizeof(T));
            data = static_cast<const char*>(mask.data) + size * offset_of(mask.batch, mask.head, batch, problem, head);
        }
    }

    __device__ __forceinline__ explicit operator bool() const { return mask.data != nullptr; }

    // What is added to the score of query i and key j, `member` heads further; −∞: the key is hidden.
    __device__ __forceinline__ Acc value(int64_t member, int64_t i, int64_t j) const {
        const int64_t at = member * mask.head + i * mask.row + j * mask.col;
        if (mask.element == Element::boolean) {
            return static_cast<const uint8_t*>(data)[at] != 0 ? Acc(0) : -std::numeric_limits<Acc>::infinity();
        }
        return mask.element == Element::float32 ? static_cast<Acc>(static_cast<const float*>(data)[at])
                                                : static_cast<Acc>(to_float(static_cast<const T*>(data)[at]));
    }
};

// Which scores of a head are seen, and what is added to them.
template <class T>
struct HeadScores {
    using Acc = Accumulator<T>;
    Acc scale;
    Acc scale_log2;
    int queries;
    int keys;
    bool causal;
    HeadMask<T> mask;
    HeadMask<T> mask_tangent;

    __device__ __forceinline__ HeadScores(const AttentionProblem& problem, int64_t index, int64_t head)
        : scale(static_cast<Acc>(problem.scale)),
          scale_log2(static_cast<Acc>(problem.scale * kLog2E)),
          queries(static_cast<int>(problem.queries)),
          keys(static_cast<int>(problem.keys)),
          causal(problem.causal),
          mask(problem.primal.mask, problem.batch, index, head),
          mask_tangent(problem.tangent.mask, problem.batch, index, head) {}

    // The number of keys that the queries before `query` see at most.
    __device__ __forceinline__ int keys_before(int query) const { return causal ? min(keys, query) : keys; }

    // Whether all of the keys first_key … first_key + count − 1 exist and are seen by all queries from first_query on.
    __device__ __forceinline__ bool all_seen(int first_query, int first_key, int count) const {
        return !mask && !mask_tangent && first_key + count <= keys && (!causal || first_key + count - 1 <= first_query);
    }

    // log₂ of exp(score), −∞ for a hidden key; `tangent` is the score's. Checked: the key may be hidden.
    template <bool Checked>
    __device__ __forceinline__ Acc exponent(Acc product, int i, int j, Acc subtract, int member = 0) const {
        if constexpr (!Checked) {
            return product * scale_log2 - subtract;
        } else {
            if (i >= queries || j >= keys || (causal && j > i)) {
                return -std::numeric_limits<Acc>::infinity();
            }
            Acc result = product * scale_log2 - subtract;
            if (mask) {
                result += mask.value(member, i, j) * static_cast<Acc>(kLog2E);
            }
            return result;
        }
    }

    template <bool Checked>
    __device__ __forceinline__ Acc tangent(Acc product, int i, int j, int member = 0) const {
        Acc result = product * scale;
        if constexpr (Checked) {
            if (mask_tangent && i < queries && j < keys) {
                result += mask_tangent.value(member, i, j);
            }
        }
        return result;
    }
};

// Rows first_row … of head `head` of problem `index`; `flat` counts the heads of all problems. Blocks of one head
// follow each other, so that they share its keys in the second-level cache; with causal scores the longest come first.
struct BlockPlace {
    int64_t flat;
    int64_t index;
    int64_t head;
    int first_row;

    __device__ __forceinline__ BlockPlace(int64_t heads, int64_t rows, int rows_each, bool last_first) {
        const int64_t blocks = (rows + rows_each - 1) / rows_each;
        const auto block = static_cast<int64_t>(blockIdx.x);
        flat = block / blocks;
        index = flat / heads;
        head = flat % heads;
        const int64_t place = block % blocks;
        first_row = static_cast<int>((last_first ? blocks - 1 - place : place) * rows_each);
    }
};

}  // namespace onestep::attention::cuda
