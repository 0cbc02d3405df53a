// How work is cut into pieces: by the problem alone, never by the number of threads. A plan is made once a call, on the
// host, and says everything that depends on sizes: cuts, layouts of memory, and the table of the CPU target in use.
#pragma once

#include <algorithm>
#include <cstdint>

namespace onestep {

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
constexpr int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Indices [0, count) in consecutive ranges.
struct Range {
    int64_t begin = 0, end = 0;

    int64_t size() const { return end - begin; }
};

// Ranges of `size` indices; the last one may be shorter. For chunks and blocks.
struct FixedCut {
    int64_t count = 0, size = 1;

    int64_t pieces() const { return ceil_div(count, size); }
    Range operator[](int64_t piece) const { return {piece * size, std::min(count, (piece + 1) * size)}; }
};

// `pieces` ranges of sizes that differ by one at most: the longer ones first, or spread evenly.
struct EvenCut {
    int64_t count = 0, pieces = 1;

    Range longer_first(int64_t piece) const { return {begin(piece), begin(piece + 1)}; }
    Range spread(int64_t piece) const { return {piece * count / pieces, (piece + 1) * count / pieces}; }

 private:
    int64_t begin(int64_t piece) const { return count / pieces * piece + std::min(piece, count % pieces); }
};

// How many results of `bytes_each` fit into `most_bytes`, but at least one.
constexpr int64_t results_within(int64_t most_bytes, int64_t bytes_each) {
    return std::max<int64_t>(1, most_bytes / std::max<int64_t>(bytes_each, 1));
}

// About how long a thread takes for this many multiply-adds, or to read or write this many bytes. parallel_for decides
// by it whether threads pay. It assumes half the speed that AVX2 reaches in float. Small sizes take longer, so for them
// the estimate errs towards one thread.
constexpr int64_t nanoseconds_of_products(int64_t multiply_adds) { return multiply_adds / 16 + 1; }
constexpr int64_t nanoseconds_of_bytes(int64_t bytes) { return bytes / 8 + 1; }

}  // namespace onestep
