// The compensated sweep's columns on the emulator, with the products behind each block as plain loops in the order of
// the columns: every bit is that of the reference, for all that the op can be asked for.
#include <functional>

#include "compensated/cuda/compensated.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;
using compensated::cuda::kMostBlockColumns;

struct Sweep {
    const char* name;
    int64_t rows, columns;
    int64_t bits = 0;
    bool symmetric = false;
    int64_t group_size = 1;
    // Grids that are given: 0: none; 1: each column's is one of two; 2: each weight has its own.
    int grids = 0;
    double sparsity = 0.0;
    int64_t keep = 0, of = 0;
    bool unit = false;
};

template <class T>
struct Layer {
    std::vector<T> w, factor;
    std::vector<int64_t> group;
};

template <class T>
struct Swept {
    std::vector<T> w, scale, zero;
    std::vector<uint8_t> codes;
    std::vector<double> error;
};

// A triangular factor such as a Gram matrix has: large on the diagonal. With a row of zeros in W, and one of ties.
template <class T>
Layer<T> layer_of(const Sweep& sizes) {
    std::mt19937 random(static_cast<unsigned>(sizes.rows * 1000 + sizes.columns));
    std::uniform_real_distribution<double> uniform(-1.0, 1.0);
    const int64_t n = sizes.columns;
    Layer<T> layer{std::vector<T>(static_cast<size_t>(sizes.rows * n)), std::vector<T>(static_cast<size_t>(n * n)),
                   std::vector<int64_t>(static_cast<size_t>(n))};
    for (T& value : layer.w) {
        value = static_cast<T>(uniform(random));
    }
    std::fill_n(layer.w.begin(), sizes.rows > 2 ? n : 0, T(0));
    std::fill_n(layer.w.begin() + (sizes.rows > 2 ? n : 0), sizes.rows > 2 ? n : 0, T(0.5));
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = i; j < n; ++j) {
            layer.factor[static_cast<size_t>(i * n + j)] =
                static_cast<T>(i == j ? 1.5 + uniform(random) : 0.2 * uniform(random));
        }
        layer.group[static_cast<size_t>(i)] = sizes.grids == 2 ? i : i % 2;
    }
    return layer;
}

template <class T>
Swept<T> results_of(const Sweep& sizes) {
    const auto rows = static_cast<size_t>(sizes.rows);
    const auto columns = static_cast<size_t>(sizes.columns);
    const auto size = static_cast<size_t>(sizes.group_size);
    const size_t groups = sizes.bits == 0    ? 0
                          : sizes.grids == 2 ? columns
                          : sizes.grids == 1 ? 2
                                             : (columns + size - 1) / size;
    return {std::vector<T>(rows * columns, std::numeric_limits<T>::quiet_NaN()), std::vector<T>(rows * groups, T(0.07)),
            std::vector<T>(rows * groups, T(5)), std::vector<uint8_t>(rows * columns, 99),
            std::vector<double>(rows, 7.0)};
}

template <class T>
SweepArgs<T> arguments(const Sweep& sizes, const Layer<T>& layer, Swept<T>& out) {
    SweepArgs<T> args;
    args.rows = sizes.rows;
    args.columns = sizes.columns;
    args.w = layer.w.data();
    args.swept = out.w.data();
    args.factor = layer.factor.data();
    args.unit = sizes.unit;
    args.bits = sizes.bits;
    args.symmetric = sizes.symmetric;
    args.group_size = sizes.group_size;
    args.group = sizes.grids != 0 ? layer.group.data() : nullptr;
    args.groups = sizes.rows == 0 ? 0 : static_cast<int64_t>(out.scale.size()) / sizes.rows;
    args.scale = out.scale.data();
    args.zero = out.zero.data();
    args.codes = out.codes.data();
    args.sparsity = sizes.sparsity;
    args.keep = sizes.keep;
    args.of = sizes.of;
    args.error = out.error.data();
    return args;
}

// Which elements of a block go, where the kernel does not tell: what ops/compensated/cuda.py has torch compute.
template <class T>
std::vector<uint8_t> removed(const SweepArgs<T>& args, int64_t start, int64_t end) {
    const int64_t width = end - start;
    std::vector<T> scores;
    for (int64_t row = 0; row < args.rows; ++row) {
        for (int64_t j = start; j < end; ++j) {
            const T ratio = args.swept[row * args.columns + j] / args.factor[j * (args.columns + 1)];
            scores.push_back(ratio * ratio);
        }
    }
    std::vector<uint8_t> gone(scores.size());
    if (args.of > 0) {
        for (int64_t run = 0; run < args.rows * width; run += args.of) {
            for (int64_t k = run; k < run + args.of; ++k) {
                int64_t smaller = 0;
                for (int64_t l = run; l < run + args.of; ++l) {
                    const T mine = scores[static_cast<size_t>(k)];
                    const T other = scores[static_cast<size_t>(l)];
                    smaller += other < mine || (other == mine && l < k) ? 1 : 0;
                }
                gone[static_cast<size_t>(k)] = smaller < args.of - args.keep ? 1 : 0;
            }
        }
        return gone;
    }
    const int64_t count = sweep_removed(args.rows * width, args.sparsity);
    std::vector<T> sorted = scores;
    std::sort(sorted.begin(), sorted.end());
    for (size_t i = 0; count > 0 && i < scores.size(); ++i) {
        gone[i] = scores[i] <= sorted[static_cast<size_t>(count - 1)] ? 1 : 0;
    }
    return gone;
}

// What ops/compensated/cuda.py does, with loops for torch's ops.
template <class T>
Swept<T> sweep(const Sweep& sizes, const Layer<T>& layer) {
    Swept<T> out = results_of<T>(sizes);
    out.w = layer.w;
    std::fill(out.error.begin(), out.error.end(), 0.0);
    compensated::cuda::SweepBlockArgs<T> block;
    block.sweep = arguments(sizes, layer, out);
    const int64_t n = sizes.columns;
    std::vector<T> change(static_cast<size_t>(sizes.rows * kMostBlockColumns));
    block.change = change.data();
    for (int64_t start = 0; start < n;) {
        const int64_t end = sweep_block_end(block.sweep, start);
        const bool by_block = sizes.of > kMostBlockColumns || (sizes.of == 0 && sizes.sparsity > 0.0);
        const std::vector<uint8_t> gone = by_block ? removed(block.sweep, start, end) : std::vector<uint8_t>();
        for (int64_t first = start; first < end; first += kMostBlockColumns) {
            block.start = first;
            block.width = std::min(kMostBlockColumns, end - first);
            block.removed = by_block ? gone.data() + first - start : nullptr;
            block.removed_row = end - start;
            check(compensated::cuda::sweep_block(block, nullptr) == Status::ok, cuda::last_device_error());
            for (int64_t row = 0; row < sizes.rows; ++row) {
                for (int64_t l = first + block.width; l < n; ++l) {
                    for (int64_t j = 0; j < block.width; ++j) {
                        out.w[static_cast<size_t>(row * n + l)] +=
                            change[static_cast<size_t>(row * kMostBlockColumns + j)] *
                            layer.factor[static_cast<size_t>((first + j) * n + l)];
                    }
                }
            }
        }
        start = end;
    }
    return out;
}

template <class T>
void test_case(const Sweep& sizes) {
    const std::string label = std::string(sizes.name) + (sizeof(T) == 4 ? " f32" : " f64");
    const Layer<T> layer = layer_of<T>(sizes);
    Swept<T> expected = results_of<T>(sizes);
    check(reference::compensated_sweep(arguments(sizes, layer, expected)) == Status::ok, "reference");
    const Swept<T> found = sweep(sizes, layer);
    check(identical(found.w, expected.w), "weights, " + label);
    check(identical(found.scale, expected.scale) && identical(found.zero, expected.zero), "grids, " + label);
    check(found.codes == expected.codes, "codes, " + label);
    check(identical(found.error, expected.error), "errors, " + label);
    check(sizes.sparsity == 0.0 && sizes.of == 0
              ? true
              : std::count(found.w.begin(), found.w.end(), T(0)) * 4 >= static_cast<int64_t>(found.w.size()),
          "weights are removed, " + label);
}

const Sweep kSweeps[] = {
    {"one weight", 1, 1, 4, true, 1},
    {"no rows", 0, 5, 4, true, 5},
    {"nothing to do", 17, 140},
    {"2 bits in groups of 24", 18, 150, 2, false, 24},
    {"3 bits in groups of 32, symmetric", 17, 131, 3, true, 32},
    {"4 bits in groups of 200", 9, 460, 4, false, 200},
    {"5 bits in groups of 5", 33, 137, 5, false, 5},
    {"8 bits, a grid a row", 16, 129, 8, true, 129},
    {"1 bit, a grid a row", 7, 128, 1, false, 128},
    {"groups of more than a row", 5, 40, 4, false, 300},
    {"groups of more than a row, symmetric", 5, 40, 3, true, 64},
    {"grids given, 100 of 200", 5, 400, 3, false, 1, 1, 0.0, 100, 200},
    {"4 bits, grids given", 3, 140, 4, false, 1, 1},
    {"4 bits, a grid a weight, R", 9, 140, 4, false, 1, 2, 0.0, 0, 0, true},
    {"4 bits, a grid a row, R", 17, 300, 4, false, 300, 0, 0.0, 0, 0, true},
    {"4 bits, grids given, R", 8, 257, 4, true, 1, 1, 0.0, 0, 0, true},
    {"half", 18, 131, 0, false, 1, 0, 0.5},
    {"so few that none is removed from a block", 1, 130, 0, false, 1, 0, 0.001},
    {"all", 5, 131, 0, false, 1, 0, 1.0},
    {"2 of 4", 17, 260, 0, false, 1, 0, 0.0, 2, 4},
    {"0 of 2", 3, 30, 0, false, 1, 0, 0.0, 0, 2},
    {"1 of 3", 5, 150, 0, false, 1, 0, 0.0, 1, 3},
    {"20 of 50", 9, 150, 0, false, 1, 0, 0.0, 20, 50},
    {"64 of 128", 4, 256, 0, false, 1, 0, 0.0, 64, 128},
    {"100 of 150, more than a call takes", 5, 450, 0, false, 1, 0, 0.0, 100, 150},
    {"150 of 300, 4 bits in groups of 600", 4, 900, 4, false, 600, 0, 0.0, 150, 300},
    {"16 of 32, 4 bits in groups of 64", 9, 160, 4, true, 64, 0, 0.0, 16, 32},
    {"2 of 4, grids given", 9, 132, 3, false, 1, 1, 0.0, 2, 4},
    {"half, 4 bits in groups of 16", 18, 131, 4, true, 16, 0, 0.5},
};

template <class T>
void test_sweeps() {
    for (const Sweep& sizes : kSweeps) {
        if (sizes.sparsity != 0.001) {
            test_case<T>(sizes);
            continue;
        }
        const Layer<T> layer = layer_of<T>(sizes);
        check(identical(sweep(sizes, layer).w, layer.w), "none is removed");
    }
}

// Numbers that are not finite stay in their rows, and a group that there is no grid of gives NaN.
template <class T>
void test_bad_values() {
    Sweep sizes{"bad values", 19, 140, 4, false, 32};
    Layer<T> layer = layer_of<T>(sizes);
    const Swept<T> good = sweep(sizes, layer);
    layer.w[static_cast<size_t>(5 * 140 + 30)] = std::numeric_limits<T>::quiet_NaN();
    layer.w[static_cast<size_t>(7 * 140 + 30)] = std::numeric_limits<T>::infinity();
    const Swept<T> bad = sweep(sizes, layer);
    for (int64_t row = 0; row < sizes.rows; ++row) {
        const auto at = static_cast<size_t>(row * 140);
        const bool same = std::memcmp(&good.w[at], &bad.w[at], 140 * sizeof(T)) == 0;
        check(same == (row != 5 && row != 7), "row " + std::to_string(row) + " beside one that is not finite");
    }
    check(!std::isfinite(bad.error[5]) && !std::isfinite(bad.error[7]), "errors that are not finite");
    sizes.grids = 1;
    layer = layer_of<T>(sizes);
    layer.group[60] = 2;
    layer.group[61] = -1;
    const Swept<T> outside = sweep(sizes, layer);
    for (int64_t row = 0; row < sizes.rows; ++row) {
        const auto at = static_cast<size_t>(row * 140);
        check(std::isfinite(outside.w[at + 59]) && std::isnan(outside.w[at + 60]) && std::isnan(outside.w[at + 61]),
              "a group that there is none of");
        check(std::isnan(outside.error[static_cast<size_t>(row)]), "its error");
    }
}

void test_refused() {
    compensated::cuda::SweepBlockArgs<float> block;
    block.width = kMostBlockColumns + 1;
    check(compensated::cuda::sweep_block(block, nullptr) == Status::device_error, "too many columns");
    block.width = 6;
    block.sweep.of = 4;
    check(compensated::cuda::sweep_block(block, nullptr) == Status::device_error, "a run is cut");
    block.width = 0;
    check(compensated::cuda::sweep_block(block, nullptr) == Status::ok, "no columns");
}

}  // namespace

int main() {
    test_sweeps<float>();
    test_sweeps<double>();
    test_bad_values<float>();
    test_bad_values<double>();
    test_refused();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
