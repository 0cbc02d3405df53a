// The bfloat16 tile GEMM against plain loops in double: packing from every layout, tile edges, split float operands.
// Without AMX it runs in builds with ONESTEP_EMULATE alone.
#include <array>
#include <cstdint>

#include "amx_kernels.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

double number(BFloat16 value) { return static_cast<double>(float_of(static_cast<uint32_t>(value.bits) << 16)); }
double number(float value) { return static_cast<double>(value); }

enum class Layout { along_depth, along_rows, strided };

// `count` × `depth` of random numbers in memory of exactly the size that the strides reach.
template <class S>
struct Values {
    std::vector<S> data;
    int64_t row;
    int64_t depth;

    Values(std::mt19937& random, int64_t count, int64_t depth_count, Layout layout) {
        const int64_t step = layout == Layout::strided ? 3 : 1;
        row = layout == Layout::along_rows ? 1 : depth_count * step;
        depth = layout == Layout::along_rows ? count : step;
        data.resize(static_cast<size_t>(std::max<int64_t>(count * depth_count * step - (step - 1), 0)));
        std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
        for (S& value : data) {
            const float drawn = uniform(random);
            if constexpr (std::is_same_v<S, float>) {
                value = drawn;
            } else {
                value.bits = static_cast<uint16_t>(bits_of(drawn) >> 16);
            }
        }
    }

    double at(int64_t i, int64_t p) const { return number(data[static_cast<size_t>(i * row + p * depth)]); }
    amx::Operand operand() const {
        if constexpr (std::is_same_v<S, float>) {
            return {nullptr, data.data(), row, depth};
        } else {
            return {data.data(), nullptr, row, depth};
        }
    }
};

// Of exactly the size that it takes, and never zero before.
template <class S>
std::vector<BFloat16> packed(const Values<S>& values, bool left, bool by_rows, int64_t count, int64_t depth) {
    std::vector<BFloat16> to(static_cast<size_t>(amx::packed_size(count, depth, std::is_same_v<S, float>)),
                             BFloat16{0x7FC0});
    amx::pack(values.operand(), left, by_rows, count, depth, to.data());
    return to;
}

// Tiles of [16][32] in [block][step], those of the right operand with rows of pairs; zero outside.
template <class S>
void test_layout(std::mt19937& random, int64_t count, int64_t depth, Layout layout) {
    const Values<S> values(random, count, depth, layout);
    const int64_t steps = (depth + 31) / 32;
    for (int mode = 0; mode < 4; ++mode) {
        const bool left = mode % 2 == 0;
        const auto to = packed(values, left, mode < 2, count, depth);
        bool good = true;
        for (int64_t i = 0; i < (count + 15) / 16 * 16; ++i) {
            for (int64_t p = 0; p < steps * 32; ++p) {
                const int64_t within = left ? i % 16 * 32 + p % 32 : p % 32 / 2 * 32 + i % 16 * 2 + p % 2;
                const auto at = static_cast<size_t>((i / 16 * steps + p / 32) * 512 + within);
                double found = number(to[at]);
                double allowed = 0.0;
                const double expected = i < count && p < depth ? values.at(i, p) : 0.0;
                if (std::is_same_v<S, float>) {
                    const double low = number(to[at + to.size() / 2]);
                    good = good && std::abs(found - expected) <= std::ldexp(std::abs(expected), -8);
                    found += low;
                    allowed = std::ldexp(std::abs(expected), -17);
                }
                good = good && std::abs(found - expected) <= allowed;
            }
        }
        check(good, "packing " + std::to_string(count) + " × " + std::to_string(depth) + " mode " +
                        std::to_string(mode) + " layout " + std::to_string(static_cast<int>(layout)));
    }
}

template <class Left, class Right>
void test_product(std::mt19937& random, int64_t m, int64_t n, int64_t k, Layout layout, bool panels) {
    const Values<Left> a(random, m, k, layout);
    const Values<Right> b(random, n, k, layout);
    const auto left = packed(a, true, m % 2 == 0, m, k);
    const auto right = packed(b, false, n % 2 == 0, n, k);
    constexpr float kUntouched = -7.0F;
    const int64_t row = panels ? 32 : n + 2;
    const int64_t panel = panels ? (m + 1) * 32 : 32;
    const auto index = [&](int64_t i, int64_t j) {
        return static_cast<size_t>(panels ? j / 32 * panel + i * 32 + j % 32 : i * row + j);
    };
    std::vector<float> c(static_cast<size_t>(panels ? (n + 31) / 32 * panel : m * row), kUntouched);
    const std::string name = std::to_string(m) + " × " + std::to_string(n) + " × " + std::to_string(k);
    for (int time = 1; time <= 3; ++time) {
        amx::multiply(m, n, k, left.data(), std::is_same_v<Left, float>, right.data(), std::is_same_v<Right, float>,
                      time > 1, c.data(), row, panel);
        double worst = 0.0;
        for (int64_t i = 0; i < m; ++i) {
            for (int64_t j = 0; j < n; ++j) {
                double expected = 0.0, size = 1e-30;
                for (int64_t p = 0; p < k; ++p) {
                    expected += a.at(i, p) * b.at(j, p);
                    size += std::abs(a.at(i, p) * b.at(j, p));
                }
                const double found = static_cast<double>(c[index(i, j)]);
                worst = std::max(worst, std::abs(found - time * expected) / (time * size));
            }
        }
        const bool split = std::is_same_v<Left, float> || std::is_same_v<Right, float>;
        check(worst <= std::ldexp(1.0, split ? -15 : -19), name + ": " + std::to_string(worst));
    }
    std::vector<bool> inside(c.size(), false);
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            inside[index(i, j)] = true;
        }
    }
    bool untouched = true;
    for (size_t e = 0; e < c.size(); ++e) {
        untouched = untouched && (inside[e] || c[e] == kUntouched);
    }
    check(untouched, name + ": wrote outside of the result");
}

// Rounding to nearest even, and what has no low part.
void test_rounding() {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
    struct Pair {
        float value;
        uint16_t high;
        uint16_t low;
    };
    const Pair pairs[] = {
        {1.0F, 0x3F80, 0},
        {float_of(0x3F808000), 0x3F80, 0x3B80},  // ties to even: down, the rest in the low part
        {float_of(0x3F818000), 0x3F82, 0xBB80},  // up
        {float_of(0xBF808001), 0xBF81, 0x3B80},
        {-0.0F, 0x8000, 0},
        {kInfinity, 0x7F80, 0},
        {-kInfinity, 0xFF80, 0},
        {std::numeric_limits<float>::max(), 0x7F80, 0},
        {kNan, 0x7FC0, 0},
        {float_of(0xFF800001), 0xFFC0, 0},  // a NaN whose upper half alone would be −∞
    };
    for (const Pair& pair : pairs) {
        std::vector<BFloat16> to(static_cast<size_t>(amx::packed_size(1, 1, true)));
        amx::pack({nullptr, &pair.value, 1, 1}, true, true, 1, 1, to.data());
        const uint16_t low = to[to.size() / 2].bits;
        check(to[0].bits == pair.high && low == pair.low,
              "split of " + std::to_string(pair.value) + ": " + std::to_string(to[0].bits) + " " + std::to_string(low));
    }
}

void test_tiles() {
    std::mt19937 random(0);
    for (const auto layout : {Layout::along_depth, Layout::along_rows, Layout::strided}) {
        for (const auto& [count, depth] : {std::array{1, 1}, {15, 31}, {16, 32}, {17, 33}, {33, 16}, {40, 49}}) {
            test_layout<BFloat16>(random, count, depth, layout);
            test_layout<float>(random, count, depth, layout);
        }
    }
    const std::array<int64_t, 3> sizes[] = {{1, 1, 1},    {15, 16, 31}, {16, 15, 32}, {17, 33, 33}, {32, 32, 64},
                                            {33, 31, 65}, {48, 64, 20}, {65, 47, 95}, {64, 48, 0},  {31, 17, 200}};
    int index = 0;
    for (const auto& [m, n, k] : sizes) {
        const auto layout = static_cast<Layout>(index++ % 3);
        for (const bool panels : {false, true}) {
            test_product<BFloat16, BFloat16>(random, m, n, k, layout, panels);
            test_product<float, BFloat16>(random, m, n, k, layout, panels);
            test_product<BFloat16, float>(random, m, n, k, layout, panels);
        }
        test_product<float, float>(random, m, n, k, layout, false);
    }
    test_rounding();
}

}  // namespace

int main() {
    if (!target_supported(Target::amx)) {
        std::printf("amx: not supported by this machine\n");
        return 0;
    }
    check(select_target("amx") == SelectResult::ok, "select_target");
    test_tiles();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
