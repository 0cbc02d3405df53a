// The ordered sum of pieces. With cuts that depend on sizes alone, it makes results independent of the threads.
#pragma once

#include <algorithm>
#include <cstdint>

namespace onestep {

// Calls store(at, sum) for every element `at` in [begin, end), where sum = 0 + piece 0 + piece 1 + ..., added up in
// Sum. Piece i has its elements at pieces + i · stride.
template <class Sum, class T, class Store>
void sum_pieces(const T* pieces, int64_t count, int64_t stride, int64_t begin, int64_t end, const Store& store) {
    // The sums of one block stay in the first-level cache while all pieces are added to them.
    constexpr int64_t kBlock = 512;
    Sum sums[kBlock];
    for (int64_t block = begin; block < end; block += kBlock) {
        const int64_t size = std::min(kBlock, end - block);
        std::fill_n(sums, size, Sum(0));
        for (int64_t piece = 0; piece < count; ++piece) {
            const T* from = pieces + piece * stride + block;
            for (int64_t e = 0; e < size; ++e) {
                sums[e] += static_cast<Sum>(from[e]);
            }
        }
        for (int64_t e = 0; e < size; ++e) {
            store(block + e, sums[e]);
        }
    }
}

// The same for one element type and results that lie together: to[0, size) is written directly, which pays for short
// rows.
template <class T>
void sum_pieces_to(T* to, const T* pieces, int64_t count, int64_t stride, int64_t size) {
    for (int64_t e = 0; e < size; ++e) {
        to[e] = count > 0 ? T(0) + pieces[e] : T(0);
    }
    for (int64_t piece = 1; piece < count; ++piece) {
        const T* from = pieces + piece * stride;
        for (int64_t e = 0; e < size; ++e) {
            to[e] += from[e];
        }
    }
}

// high + low += value + value_low. The rounding error of the addition goes to the low part (Knuth's two-sum).
inline void add_compensated(double value, double value_low, double& high, double& low) {
    const double total = high + value;
    const double shifted = total - high;
    low += value_low + ((high - (total - shifted)) + (value - shifted));
    high = total;
}

}  // namespace onestep
