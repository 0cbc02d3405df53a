// What tests/cpp/amx_kernels.cpp makes of base/amx-inl.hpp for test_amx.cpp.
#pragma once

#include <cstdint>

#include "base/bfloat16.hpp"

namespace onestep::amx {

// A product of m × k and k × n matrices. An operand is bfloat16 or float, read through its strides along its own
// dimension (m or n) and along k.
struct Operand {
    const BFloat16* half;
    const float* single;
    int64_t row;
    int64_t depth;
};

// Elements of an operand of `count` rows or columns, with both planes if it is float.
int64_t packed_size(int64_t count, int64_t depth, bool single);

// Packs by rows where `by_rows`, else by columns, of which either may be the contiguous one.
void pack(const Operand& operand, bool left, bool by_rows, int64_t count, int64_t depth, BFloat16* to);

// c (+)= left · right, with all planes of both but low · low.
void multiply(int64_t m, int64_t n, int64_t k, const BFloat16* left, bool left_single, const BFloat16* right,
              bool right_single, bool accumulate, float* c, int64_t row, int64_t panel);

}  // namespace onestep::amx
