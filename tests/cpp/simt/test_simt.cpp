// The emulator itself: what it computes is what the hardware would, and each kind of mistake is caught.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "base/cuda/async.cuh"
#include "base/cuda/device.cuh"
#include "base/cuda/mma.cuh"
#include "base/cuda/numbers.cuh"

namespace {

using namespace onestep;
using namespace onestep::cuda;

int checks = 0;
int failures = 0;

void check(bool good, const std::string& what) {
    ++checks;
    if (!good) {
        ++failures;
        std::printf("FAILED: %s\n", what.c_str());
    }
}

// Expects a launch to end with an error whose text has `part`.
void check_caught(Status status, const std::string& part, const std::string& what) {
    const std::string& text = last_device_error();
    check(status == Status::device_error && text.find(part) != std::string::npos,
          what + (status == Status::ok ? ": not noticed" : ": " + text));
}

// ---------------------------------------------------------------- kernels that are right

__global__ void reverse_in_blocks(float* data) {
    ONESTEP_SHARED(float, tile, [64]);
    const unsigned i = threadIdx.x;
    tile[i] = data[blockIdx.x * 64 + i];
    __syncthreads();
    data[blockIdx.x * 64 + i] = tile[63 - i];
}

__global__ void warp_sums(const int* from, int* to, unsigned* votes) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    int value = from[threadIdx.x];
    for (int step = 16; step > 0; step /= 2) {
        value += __shfl_xor_sync(kFullWarp, value, step);
    }
    // Groups of eight with masks of their own, at different times.
    const unsigned group = 0xffu << (lane / 8 * 8);
    int first = from[threadIdx.x];
    for (int round = 0; round <= lane / 8; ++round) {
        first = __shfl_sync(group, first, 0, 8);
    }
    const int up = __shfl_up_sync(kFullWarp, from[threadIdx.x], 3);
    const int down = __shfl_down_sync(kFullWarp, from[threadIdx.x], 3, 16);
    const unsigned vote = __ballot_sync(kFullWarp, lane % 3 == 0);
    __syncwarp();
    to[4 * threadIdx.x] = value;
    to[4 * threadIdx.x + 1] = first;
    to[4 * threadIdx.x + 2] = up;
    to[4 * threadIdx.x + 3] = down;
    votes[threadIdx.x] = vote;
}

__global__ void copy_through_shared(const float* from, float* to, int count) {
    ONESTEP_DYNAMIC_SHARED(float, buffer);
    const int at = static_cast<int>(threadIdx.x) * 4;
    const int left = count - at < 0 ? 0 : count - at < 4 ? count - at : 4;
    cp_async<16>(buffer + at, from + (left > 0 ? at : 0), left * 4);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    const int other = static_cast<int>(blockDim.x) * 4 - 4 - at;
    for (int e = 0; e < 4; ++e) {
        to[other + e] = buffer[other + e];
    }
}

__global__ void count_in_blocks(int* result, unsigned* total) {
    const int odd = __syncthreads_count(threadIdx.x % 2);
    if (threadIdx.x < 64) {
        named_barrier(1, 64);
    }
    atomicAdd(total, 1u);
    result[threadIdx.x] = odd + (__syncthreads_or(threadIdx.x == 70) ? 1000 : 0);
}

template <class Half>
__global__ void multiply_halves(const uint16_t* a, const uint16_t* b, float* d) {
    ONESTEP_SHARED(uint16_t, left, [16 * 16]);
    ONESTEP_SHARED(uint16_t, right, [16 * 8]);
    const int lane = static_cast<int>(threadIdx.x);
    for (int e = lane; e < 256; e += 32) {
        left[e] = a[e];
    }
    for (int e = lane; e < 128; e += 32) {
        right[e] = b[e];
    }
    __syncwarp();
    unsigned a_fragment[4];
    unsigned b_fragment[2];
    // Matrices 0 to 3: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
    ldmatrix(a_fragment, left + (lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8);
    ldmatrix<2, true>(b_fragment, right + lane % 16 * 8);
    float c[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    mma_16x8x16<Half>(c, a_fragment, b_fragment);
    for (int e = 0; e < 4; ++e) {
        d[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = c[e];
    }
}

__global__ void multiply_tf32(const float* a, const float* b, float* d) {
    const int g = static_cast<int>(threadIdx.x) / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
    const unsigned left[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                              to_tf32(a[(g + 8) * 8 + t + 4])};
    const unsigned right[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
    float c[4] = {};
    mma_16x8x8_tf32(c, left, right);
    for (int e = 0; e < 4; ++e) {
        d[(g + e / 2 * 8) * 8 + 2 * t + e % 2] = c[e];
    }
}

__global__ void multiply_doubles(const double* a, const double* b, double* d) {
    const int g = static_cast<int>(threadIdx.x) / 4;
    const int t = static_cast<int>(threadIdx.x) % 4;
    double c[2] = {};
    mma_8x8x4(c, a[g * 4 + t], b[t * 8 + g]);
    d[g * 8 + 2 * t] = c[0];
    d[g * 8 + 2 * t + 1] = c[1];
}

// ---------------------------------------------------------------- kernels with a mistake

__global__ void reverse_without_barrier(float* data) {
    ONESTEP_SHARED(float, tile, [64]);
    tile[threadIdx.x] = data[threadIdx.x];
    data[threadIdx.x] = tile[63 - threadIdx.x];
}

// Races that no order of threads here shows in the results: each value is the right one whoever comes first.
__global__ void overwrites_without_barrier(float* data) {
    ONESTEP_SHARED(float, tile, [64]);
    for (int round = 0; round < 2; ++round) {
        tile[threadIdx.x] = 1.0f;
        __syncthreads();
        data[threadIdx.x] = tile[63 - threadIdx.x];
    }
}

// A shuffle has lanes wait, but does not order their memory.
__global__ void shuffle_for_syncwarp(float* data) {
    ONESTEP_SHARED(float, tile, [32]);
    tile[threadIdx.x] = data[threadIdx.x];
    __shfl_sync(kFullWarp, 0, 0);
    data[threadIdx.x] = tile[31 - threadIdx.x];
}

// The threads that share a named barrier are ordered; the others are not.
__global__ void barrier_of_others(float* data) {
    ONESTEP_SHARED(float, tile, [128]);
    tile[threadIdx.x] = data[threadIdx.x];
    named_barrier(1 + static_cast<int>(threadIdx.x / 64), 64);
    data[threadIdx.x] = tile[127 - threadIdx.x];
}

__global__ void copies_without_barrier(const float* from, float* to) {
    ONESTEP_SHARED(float, tile, [64]);
    cp_async<4>(tile + threadIdx.x, from + threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
    to[threadIdx.x] = tile[threadIdx.x ^ 1u];
}

__global__ void reverse_without_wait(const float* from, float* to) {
    ONESTEP_SHARED(float, tile, [128]);
    cp_async<4>(tile + threadIdx.x, from + threadIdx.x);
    cp_async_commit();
    __syncthreads();
    to[threadIdx.x] = tile[threadIdx.x];
    cp_async_wait<0>();
}

__global__ void never_waits(const float* from) {
    ONESTEP_SHARED(float, tile, [32]);
    cp_async<4>(tile + threadIdx.x, from + threadIdx.x);
}

__global__ void divergent_barrier() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads_count(1);
    }
}

__global__ void early_return() {
    if (threadIdx.x == 5) {
        return;
    }
    __syncthreads();
}

__global__ void missing_lane(int* data) {
    if (threadIdx.x != 7) {
        data[threadIdx.x] = __shfl_xor_sync(kFullWarp, data[threadIdx.x], 1);
    }
}

__global__ void lane_outside_mask(int* data) { data[threadIdx.x] = __shfl_sync(0xffffu, data[threadIdx.x], 0); }

__global__ void wait_for_nobody() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        named_barrier(1, 64);
    }
}

__global__ void past_the_end(int offset) {
    ONESTEP_DYNAMIC_SHARED(float, buffer);
    buffer[threadIdx.x + static_cast<unsigned>(offset)] = 1.0f;
}

__global__ void copies_past_the_end(const float* from) {
    ONESTEP_DYNAMIC_SHARED(float, buffer);
    cp_async<4>(buffer + threadIdx.x + 1, from + threadIdx.x);
    cp_async_commit();
    cp_async_wait<0>();
}

// ---------------------------------------------------------------- tests

void test_right_kernels() {
    std::vector<float> data(64 * 5);
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<float>(i);
    }
    check(launch(reverse_in_blocks, 5, 64, 0, nullptr, data.data()) == Status::ok, "reverse_in_blocks");
    bool good = true;
    for (size_t i = 0; i < data.size(); ++i) {
        good = good && data[i] == static_cast<float>(i / 64 * 64 + 63 - i % 64);
    }
    check(good, "reverse_in_blocks: values");

    std::vector<int> from(64);
    std::vector<int> to(256);
    std::vector<unsigned> votes(64);
    for (int i = 0; i < 64; ++i) {
        from[static_cast<size_t>(i)] = i * i;
    }
    check(launch(warp_sums, 1, 64, 0, nullptr, from.data(), to.data(), votes.data()) == Status::ok, "warp_sums");
    good = true;
    for (int i = 0; i < 64; ++i) {
        const int warp = i / 32 * 32;
        int sum = 0;
        for (int lane = 0; lane < 32; ++lane) {
            sum += (warp + lane) * (warp + lane);
        }
        const int up = i % 32 < 3 ? i : i - 3;
        const int down = i % 16 + 3 > 15 ? i : i + 3;
        const int* own = to.data() + 4 * i;
        good = good && own[0] == sum && own[1] == (i / 8 * 8) * (i / 8 * 8) && own[2] == up * up &&
               own[3] == down * down && votes[static_cast<size_t>(i)] == 0x49249249u;
    }
    check(good, "warp_sums: values");

    std::vector<float> copied(128, -1.0f);
    data.assign(101, 0.0f);
    for (size_t i = 0; i < data.size(); ++i) {
        data[i] = static_cast<float>(i + 1);
    }
    alignas(16) static float aligned[101];
    std::copy(data.begin(), data.end(), aligned);
    check(launch(copy_through_shared, 1, 32, 512, nullptr, aligned, copied.data(), 101) == Status::ok,
          "copy_through_shared");
    good = true;
    for (size_t i = 0; i < copied.size(); ++i) {
        good = good && copied[i] == (i < 101 ? static_cast<float>(i + 1) : 0.0f);
    }
    check(good, "copy_through_shared: values");

    std::vector<int> counts(96);
    unsigned total = 0;
    check(launch(count_in_blocks, 7, 96, 0, nullptr, counts.data(), &total) == Status::ok, "count_in_blocks");
    good = total == 7 * 96;
    for (const int count : counts) {
        good = good && count == 1048;
    }
    check(good, "count_in_blocks: values");
    check(launch(divergent_barrier, 0, 64, 0, nullptr) == Status::ok, "an empty grid is no work");
}

template <class Half>
void test_multiply_halves(const char* name, uint16_t (*encode)(float)) {
    std::vector<uint16_t> a(256);
    std::vector<uint16_t> b(128);
    std::vector<float> d(128);
    const auto value_a = [](size_t i, size_t k) { return static_cast<float>((i * 7 + k * 3) % 11) - 5.0f; };
    const auto value_b = [](size_t k, size_t j) { return static_cast<float>((k * 5 + j * 2) % 13) - 6.0f; };
    for (size_t i = 0; i < 16; ++i) {
        for (size_t k = 0; k < 16; ++k) {
            a[i * 16 + k] = encode(value_a(i, k));
        }
        for (size_t j = 0; j < 8; ++j) {
            b[i * 8 + j] = encode(value_b(i, j));
        }
    }
    check(launch(multiply_halves<Half>, 1, 32, 0, nullptr, a.data(), b.data(), d.data()) == Status::ok, name);
    bool good = true;
    for (size_t i = 0; i < 16; ++i) {
        for (size_t j = 0; j < 8; ++j) {
            float sum = 1.0f;
            for (size_t k = 0; k < 16; ++k) {
                sum += value_a(i, k) * value_b(k, j);
            }
            good = good && d[i * 8 + j] == sum;
        }
    }
    check(good, std::string(name) + ": values");
}

void test_products() {
    test_multiply_halves<bfloat16>("mma bf16", [](float value) { return to_bfloat16(value).bits; });
    test_multiply_halves<float16>("mma fp16", [](float value) { return to_float16(value).bits; });
    std::vector<float> a(128), b(64), d(128);
    std::vector<double> e(32), f(32), g(64);
    for (size_t i = 0; i < 128; ++i) {
        a[i] = static_cast<float>(i % 9) - 4.0f;
        b[i % 64] = static_cast<float>(i % 7) - 3.0f;
        e[i % 32] = static_cast<double>(i % 9) - 4.0;
        f[i % 32] = static_cast<double>(i % 7) - 3.0;
    }
    check(launch(multiply_tf32, 1, 32, 0, nullptr, a.data(), b.data(), d.data()) == Status::ok, "mma tf32");
    check(launch(multiply_doubles, 1, 32, 0, nullptr, e.data(), f.data(), g.data()) == Status::ok, "mma fp64");
    bool good = true;
    for (size_t i = 0; i < 16; ++i) {
        for (size_t j = 0; j < 8; ++j) {
            float sum = 0.0f;
            double wide = 0.0;
            for (size_t k = 0; k < 8; ++k) {
                sum += a[i * 8 + k] * b[k * 8 + j];
                wide += i < 8 && k < 4 ? e[i * 4 + k] * f[k * 8 + j] : 0.0;
            }
            good = good && d[i * 8 + j] == sum && (i >= 8 || g[i * 8 + j] == wide);
        }
    }
    check(good, "mma tf32 and fp64: values");
}

void test_numbers() {
    bool good = true;
    for (unsigned bits = 0; bits < 0x10000u; ++bits) {
        const float wide = to_float(float16{static_cast<uint16_t>(bits)});
        const float brain = to_float(bfloat16{static_cast<uint16_t>(bits)});
        good = good && (wide != wide || to_float16(wide).bits == bits);
        good = good && (brain != brain || to_bfloat16(brain).bits == bits);
    }
    check(good, "16-bit numbers survive the way through fp32");
    const auto half = [](float value) { return to_float(to_float16(value)); };
    check(half(1.0f + 0x1p-11f) == 1.0f && half(1.0f + 0x1.8p-10f) == 1.0f + 0x1p-9f && std::isinf(half(65520.0f)) &&
              half(65519.0f) == 65504.0f && half(0x1.8p-24f) == 0x1p-23f && half(0x1p-25f) == 0.0f,
          "fp16 rounds to nearest even");
    check(to_float(to_bfloat16(1.0f + 0x1p-8f)) == 1.0f && to_float(to_bfloat16(1.0f + 0x1.8p-7f)) == 1.0f + 0x1p-6f,
          "bf16 rounds to nearest even");
    check(std::isnan(half(NAN)) && std::isnan(to_float(to_bfloat16(NAN))), "NaN stays NaN");
    check(low_bfloat16(pack_bfloat16(2.0f, 3.0f)) == 2.0f && high_float16(pack_float16(2.0f, 3.0f)) == 3.0f, "pack");
}

void test_mistakes() {
#if !defined(ONESTEP_SIMT_TSAN)
    // Such a race shows in the results, in any order of the threads.
    for (uint64_t seed = 1; seed <= 8; ++seed) {
        simt::set_seed(seed);
        std::vector<float> data(64, 1.0f);
        check(launch(reverse_without_barrier, 1, 64, 0, nullptr, data.data()) == Status::ok, "runs");
        bool nan = false;
        for (const float value : data) {
            nan = nan || std::isnan(value);
        }
        check(nan, "a missing barrier reads what was not written");
    }
#endif
    std::vector<float> from(128, 1.0f);
    std::vector<float> to(128, 1.0f);
    check(launch(reverse_without_wait, 1, 128, 0, nullptr, from.data(), to.data()) == Status::ok && std::isnan(to[5]),
          "data of cp.async is not there before the wait");
    check_caught(launch(never_waits, 1, 32, 0, nullptr, from.data()), "nobody waited", "cp.async without a wait");
    check_caught(launch(divergent_barrier, 1, 64, 0, nullptr), "divergent barrier", "divergent barrier");
    check_caught(launch(early_return, 2, 64, 0, nullptr), "", "a thread that returns before a barrier");
    std::vector<int> ints(32, 1);
    check_caught(launch(missing_lane, 1, 32, 0, nullptr, ints.data()), "", "a lane that stays away");
    check_caught(launch(lane_outside_mask, 1, 32, 0, nullptr, ints.data()), "not in its own mask", "mask without self");
    check_caught(launch(wait_for_nobody, 1, 64, 0, nullptr), "deadlock", "deadlock");
    check_caught(launch(copies_past_the_end, 1, 32, 128, nullptr, from.data()), "outside", "cp.async past the end");
    check_caught(launch(early_return, 1, 2048, 0, nullptr), "invalid configuration", "2048 threads");
    check_caught(launch(early_return, 1, 32, 1 << 20, nullptr), "shared memory", "a mebibyte of shared memory");
#if !defined(__SANITIZE_ADDRESS__)
    check_caught(launch(past_the_end, 1, 32, 128, nullptr, 1), "past the end", "a store past the end");
#endif
    // The emulator is whole again after all of these.
    test_right_kernels();
}

}  // namespace

// With an argument: one mistake that a sanitizer reports, by its name.
int main(int count, char** words) {
    if (count > 1) {
        const std::string name = words[1];
        std::vector<float> data(128, 1.0f);
        std::vector<float> to(128);
        Status status = Status::ok;
        if (name == "out-of-bounds") {
            status = launch(past_the_end, 1, 32, 128, nullptr, 1);
        } else if (name == "barrier") {
            status = launch(reverse_without_barrier, 1, 64, 0, nullptr, data.data());
        } else if (name == "second-barrier") {
            status = launch(overwrites_without_barrier, 1, 64, 0, nullptr, data.data());
        } else if (name == "syncwarp") {
            status = launch(shuffle_for_syncwarp, 1, 32, 0, nullptr, data.data());
        } else if (name == "named-barrier") {
            status = launch(barrier_of_others, 1, 128, 0, nullptr, data.data());
        } else if (name == "copies") {
            status = launch(copies_without_barrier, 1, 64, 0, nullptr, data.data(), to.data());
        } else {
            std::printf("no mistake of the name %s\n", name.c_str());
            return 2;
        }
        return status == Status::ok ? 0 : 1;
    }
    test_right_kernels();
    test_products();
    test_numbers();
    test_mistakes();
    std::printf("%d checks, %d failed\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
