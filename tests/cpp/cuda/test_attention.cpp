// The CUDA attention kernels on the emulator against the plain loops: every instance, each mask and layout, grouped
// heads, lengths that differ, rows without keys, absent tangents; and the same bits whatever the order of threads.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/attention.hpp"
#include "attention/cuda/attention.hpp"
#include "base/cuda/numbers.cuh"
#include "simt.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using onestep::testing::check;

enum class Mask { none, causal, boolean, additive, additive_float };
enum class Absent { none, q_and_v, k_and_grad };

struct Case {
    Element element;
    int64_t problems, heads, kv_heads, queries, keys, d, dv;
    Mask mask;
    Absent absent = Absent::none;
    bool warp_groups = false;

    std::string name() const {
        std::string text = "element " + std::to_string(static_cast<int>(element)) + " sizes ";
        for (const int64_t size : {problems, heads, kv_heads, queries, keys, d, dv}) {
            text += std::to_string(size) + " ";
        }
        return text + "mask " + std::to_string(static_cast<int>(mask)) + " absent " +
               std::to_string(static_cast<int>(absent)) + (warp_groups ? " warp groups" : "");
    }
};

double tolerance(Element element) {
    switch (element) {
        case Element::float32:
            return 6e-6;
        case Element::float64:
            return 1e-13;
        case Element::bfloat16:
            return 1.2e-2;
        case Element::float16:
        case Element::boolean:
            break;
    }
    return 1.5e-3;
}

// Numbers of the element type in memory of exactly the size that is reached; `wide` has the same in double.
struct Numbers {
    std::vector<unsigned char> bytes;
    std::vector<double> wide;
    Element element;

    Numbers(Element element_, int64_t count)
        : bytes(static_cast<size_t>(count * size_of(element_))), wide(static_cast<size_t>(count)), element(element_) {}

    // NaN, so that an element that is not written is seen.
    Numbers&& poisoned() && {
        std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(0xFF));
        return std::move(*this);
    }

    void set(int64_t at, double value) {
        const auto put = [&](auto number, double rounded) {
            std::memcpy(bytes.data() + at * static_cast<int64_t>(sizeof(number)), &number, sizeof(number));
            wide[static_cast<size_t>(at)] = rounded;
        };
        switch (element) {
            case Element::float32:
                return put(static_cast<float>(value), static_cast<double>(static_cast<float>(value)));
            case Element::float64:
                return put(value, value);
            case Element::bfloat16: {
                const attention::cuda::bfloat16 number = attention::cuda::to_bfloat16(static_cast<float>(value));
                return put(number, static_cast<double>(attention::cuda::to_float(number)));
            }
            case Element::float16: {
                const attention::cuda::float16 number = attention::cuda::to_float16(static_cast<float>(value));
                return put(number, static_cast<double>(attention::cuda::to_float(number)));
            }
            case Element::boolean:
                break;
        }
    }

    double get(int64_t at) const {
        const auto from = [&](auto number) {
            std::memcpy(&number, bytes.data() + at * static_cast<int64_t>(sizeof(number)), sizeof(number));
            return static_cast<double>(attention::cuda::to_float(number));
        };
        switch (element) {
            case Element::float32:
                return from(float{});
            case Element::float64:
                return from(double{});
            case Element::bfloat16:
                return from(attention::cuda::bfloat16{});
            case Element::float16:
            case Element::boolean:
                break;
        }
        return from(attention::cuda::float16{});
    }

    std::vector<double> all() const {
        std::vector<double> result(wide.size());
        for (size_t i = 0; i < result.size(); ++i) {
            result[i] = get(static_cast<int64_t>(i));
        }
        return result;
    }
};

struct Inputs {
    Case c;
    std::mt19937 random{7};
    std::vector<std::unique_ptr<Numbers>> kept;
    std::vector<uint8_t> bytes;
    std::vector<std::vector<double>> rows;
    AttentionArgs<double> args;
    attention::cuda::AttentionProblem problem;

    // rows × cols for each head; heads between rows, as a projection leaves them.
    void operand(int64_t heads, int64_t count, int64_t cols, HeadedOperand& reference, HeadedOperand& device) {
        const int64_t total = c.problems * heads * count * cols;
        kept.push_back(std::make_unique<Numbers>(c.element, total));
        Numbers& numbers = *kept.back();
        std::uniform_real_distribution<double> uniform(-1.5, 1.5);
        for (int64_t i = 0; i < total; ++i) {
            numbers.set(i, uniform(random));
        }
        reference.data = numbers.wide.data();
        reference.element = Element::float64;
        device.element = c.element;
        reference.col = device.col = 1;
        reference.row = device.row = heads * cols;
        reference.head = device.head = cols;
        reference.batch[0] = device.batch[0] = count * heads * cols;
        device.data = numbers.bytes.data();
    }

    // Of one problem, for all; the middle query sees nothing if that can be.
    void mask(HeadedOperand& reference, HeadedOperand& device, bool tangent) {
        const int64_t count = c.heads * c.queries * c.keys;
        const Element element =
            c.mask == Mask::additive_float && c.element != Element::float64 ? Element::float32 : c.element;
        kept.push_back(std::make_unique<Numbers>(element, count));
        Numbers& numbers = *kept.back();
        std::uniform_real_distribution<double> uniform(-1.5, 1.5);
        const auto blind = [&](int64_t i) { return i / c.keys % c.queries == c.queries / 2; };
        for (int64_t i = 0; i < count; ++i) {
            const bool hidden = blind(i) && !tangent;
            numbers.set(i, hidden ? -std::numeric_limits<double>::infinity() : uniform(random));
        }
        reference.data = numbers.wide.data();
        device.data = numbers.bytes.data();
        reference.element = Element::float64;
        device.element = element;
        if (c.mask == Mask::boolean) {
            bytes.resize(static_cast<size_t>(count));
            for (int64_t i = 0; i < count; ++i) {
                bytes[static_cast<size_t>(i)] = !blind(i) && uniform(random) > -0.5 ? 1 : 0;
            }
            reference.data = device.data = bytes.data();
            reference.element = device.element = Element::boolean;
        }
        reference.col = device.col = 1;
        reference.row = device.row = c.keys;
        reference.head = device.head = c.queries * c.keys;
    }

    const double* row_numbers() {
        std::uniform_real_distribution<double> uniform(-1.0, 1.0);
        rows.emplace_back(static_cast<size_t>(c.problems * c.heads * c.queries));
        for (double& value : rows.back()) {
            value = uniform(random);
        }
        return rows.back().data();
    }

    explicit Inputs(const Case& case_) : c(case_) {
        args.batch.dims = 1;
        args.batch.size[0] = c.problems;
        args.heads = problem.heads = c.heads;
        args.kv_heads = problem.kv_heads = c.kv_heads;
        args.queries = problem.queries = c.queries;
        args.keys = problem.keys = c.keys;
        args.d = c.d;
        args.dv = c.dv;
        problem.d = static_cast<int>(c.d);
        problem.dv = static_cast<int>(c.dv);
        problem.element = c.element;
        problem.warp_groups = c.warp_groups;
        problem.batch = args.batch;
        args.scale = problem.scale = 0.4;
        args.causal = problem.causal = c.mask == Mask::causal;
        rows.reserve(8);
        for (const bool tangent : {false, true}) {
            AttentionInputs& to = tangent ? args.tangent : args.primal;
            attention::cuda::AttentionTensors& device = tangent ? problem.tangent : problem.primal;
            operand(c.heads, c.queries, c.d, to.q, device.q);
            operand(c.kv_heads, c.keys, c.d, to.k, device.k);
            operand(c.kv_heads, c.keys, c.dv, to.v, device.v);
            operand(c.heads, c.queries, c.dv, to.grad, device.grad);
            device.grad_lse = row_numbers();
            to.grad_lse.data = device.grad_lse;
            to.grad_lse.element = Element::float64;
            to.grad_lse.row = 1;
            to.grad_lse.head = c.queries;
            to.grad_lse.batch[0] = c.heads * c.queries;
            const bool added = c.mask == Mask::additive || c.mask == Mask::additive_float;
            if (added || (c.mask == Mask::boolean && !tangent)) {
                mask(to.mask, device.mask, tangent);
            }
        }
        const auto leave_out = [](HeadedOperand& reference, HeadedOperand& device) {
            reference.data = nullptr;
            device.data = nullptr;
        };
        if (c.absent == Absent::q_and_v) {
            leave_out(args.tangent.q, problem.tangent.q);
            leave_out(args.tangent.v, problem.tangent.v);
            args.primal.grad_lse.data = args.tangent.grad_lse.data = nullptr;
            problem.primal.grad_lse = problem.tangent.grad_lse = nullptr;
        } else if (c.absent == Absent::k_and_grad) {
            leave_out(args.tangent.k, problem.tangent.k);
            leave_out(args.tangent.grad, problem.tangent.grad);
        }
    }
};

struct Results {
    std::vector<double> out, lse, out_tangent, lse_tangent;
    std::vector<double> q_grad, k_grad, v_grad, mask_grad, q_tangent, k_tangent, v_tangent, mask_tangent;

    template <class Each>
    void for_each(const Results& other, const Each& each) const {
        each("out", out, other.out);
        each("lse", lse, other.lse);
        each("out_tangent", out_tangent, other.out_tangent);
        each("lse_tangent", lse_tangent, other.lse_tangent);
        each("q_grad", q_grad, other.q_grad);
        each("k_grad", k_grad, other.k_grad);
        each("v_grad", v_grad, other.v_grad);
        each("mask_grad", mask_grad, other.mask_grad);
        each("q_tangent", q_tangent, other.q_tangent);
        each("k_tangent", k_tangent, other.k_tangent);
        each("v_tangent", v_tangent, other.v_tangent);
        each("mask_tangent", mask_tangent, other.mask_tangent);
    }
};

bool wants_mask_grad(const Case& c) { return c.mask == Mask::additive || c.mask == Mask::additive_float; }

Results expected(const Inputs& inputs) {
    const Case& c = inputs.c;
    AttentionArgs<double> args = inputs.args;
    Results results;
    const auto sized = [](std::vector<double>& to, int64_t count) {
        to.assign(static_cast<size_t>(count), 0.0);
        return to.data();
    };
    const int64_t rows = c.problems * c.heads * c.queries;
    const int64_t key_rows = c.problems * c.kv_heads * c.keys;
    args.out = sized(results.out, rows * c.dv);
    args.lse = sized(results.lse, rows);
    check(reference::attention_forward(args) == Status::ok, c.name() + ": reference");
    args.out = sized(results.out_tangent, rows * c.dv);
    args.lse = sized(results.lse_tangent, rows);
    check(reference::attention_jvp(args) == Status::ok, c.name() + ": reference");
    const auto gradients = [&](auto& q, auto& k, auto& v, auto& mask) {
        args.q_grad = sized(q, rows * c.d);
        args.k_grad = sized(k, key_rows * c.d);
        args.v_grad = sized(v, key_rows * c.dv);
        if (wants_mask_grad(c)) {
            args.mask_grad.data = sized(mask, rows * c.keys);
            args.mask_grad.col = 1;
            args.mask_grad.row = c.keys;
            args.mask_grad.head = c.queries * c.keys;
            args.mask_grad.batch[0] = c.heads * c.queries * c.keys;
        }
    };
    gradients(results.q_grad, results.k_grad, results.v_grad, results.mask_grad);
    check(reference::attention_backward(args) == Status::ok, c.name() + ": reference");
    gradients(results.q_tangent, results.k_tangent, results.v_tangent, results.mask_tangent);
    check(reference::attention_backward_jvp(args) == Status::ok, c.name() + ": reference");
    return results;
}

Results computed(const Inputs& inputs) {
    const Case& c = inputs.c;
    attention::cuda::AttentionProblem problem = inputs.problem;
    const int64_t rows = c.problems * c.heads * c.queries;
    const int64_t key_rows = c.problems * c.kv_heads * c.keys;
    const Element wide = c.element == Element::float64 ? Element::float64 : Element::float32;
    const auto run = [&](Status status) {
        check(status == Status::ok, c.name() + ": " + attention::cuda::last_device_error());
    };
    Results results;
    const auto outputs_of = [&](auto kernel, std::vector<double>& out, std::vector<double>& lse, Numbers& numbers) {
        lse.assign(static_cast<size_t>(rows), std::nan(""));
        attention::cuda::AttentionOutputs outputs;
        outputs.out = numbers.bytes.data();
        outputs.lse = lse.data();
        run(kernel(problem, outputs, nullptr));
        out = numbers.all();
    };
    const auto contiguous = [&](const Numbers& numbers) {
        HeadedOperand operand;
        operand.data = numbers.bytes.data();
        operand.element = c.element;
        operand.row = c.dv;
        operand.head = c.queries * c.dv;
        operand.batch[0] = c.heads * operand.head;
        return operand;
    };
    Numbers out = Numbers(c.element, rows * c.dv).poisoned();
    Numbers out_tangent = Numbers(c.element, rows * c.dv).poisoned();
    outputs_of(attention::cuda::attention_forward, results.out, results.lse, out);
    problem.primal.out = contiguous(out);
    problem.primal.lse = results.lse.data();
    outputs_of(attention::cuda::attention_jvp, results.out_tangent, results.lse_tangent, out_tangent);
    problem.tangent.out = contiguous(out_tangent);
    problem.tangent.lse = results.lse_tangent.data();

    std::vector<double> workspace(static_cast<size_t>(attention::cuda::attention_gradients_workspace(problem) / 8 + 4));
    const auto gradients = [&](bool tangents, auto& q, auto& k, auto& v, auto& mask) {
        Numbers q_grad = Numbers(c.element, rows * c.d).poisoned();
        Numbers k_grad = Numbers(c.element, key_rows * c.d).poisoned();
        Numbers v_grad = Numbers(c.element, key_rows * c.dv).poisoned();
        Numbers mask_grad(wide, wants_mask_grad(c) ? rows * c.keys : 0);
        attention::cuda::AttentionOutputs outputs;
        outputs.q_grad = q_grad.bytes.data();
        outputs.k_grad = k_grad.bytes.data();
        outputs.v_grad = v_grad.bytes.data();
        outputs.score_grad = wants_mask_grad(c) ? mask_grad.bytes.data() : nullptr;
        void* at = workspace.data();
        size_t space = workspace.size() * sizeof(double);
        at = std::align(32, 1, at, space);
        run(attention::cuda::attention_gradients(problem, tangents, outputs, at, nullptr));
        q = q_grad.all();
        k = k_grad.all();
        v = v_grad.all();
        mask = wants_mask_grad(c) ? mask_grad.all() : std::vector<double>();
    };
    gradients(false, results.q_grad, results.k_grad, results.v_grad, results.mask_grad);
    gradients(true, results.q_tangent, results.k_tangent, results.v_tangent, results.mask_tangent);
    return results;
}

void test(const Case& c) {
    const Inputs inputs(c);
    const Results right = expected(inputs);
    const Results got = computed(inputs);
    got.for_each(right, [&](const char* name, const std::vector<double>& a, const std::vector<double>& b) {
        double most = 0.0;
        double scale = 1e-30;
        for (size_t i = 0; i < b.size() && i < a.size(); ++i) {
            if (std::isinf(b[i]) && a[i] == b[i]) {
                continue;
            }
            most = std::isfinite(a[i]) ? std::max(most, std::abs(a[i] - b[i])) : 1e300;
            scale = std::max(scale, std::abs(b[i]));
        }
        check(a.size() == b.size() && most <= tolerance(c.element) * scale,
              c.name() + ": " + name + " differs by " + std::to_string(most / scale));
    });
    simt::set_seed(99);
    computed(inputs).for_each(got, [&](const char* name, const std::vector<double>& a, const std::vector<double>& b) {
        check(a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0),
              c.name() + ": " + name + " has other bits in another order of threads");
    });
}

}  // namespace

int main(int count, char** arguments) {
    // A single case of the list, to look into.
    const int only = count > 1 ? std::atoi(arguments[1]) : -1;
    std::vector<Case> cases;
    for (const Element element : {Element::float32, Element::float64, Element::bfloat16, Element::float16}) {
        const int64_t each = 16 / size_of(element);
        // Every class of feature counts, once in full and once not.
        cases.push_back({element, 1, 1, 1, 70, 45, 64, 64, Mask::causal});
        cases.push_back({element, 1, 1, 1, 20, 37, 128 - each, 64 + each, Mask::additive});
        if (element != Element::float64) {
            cases.push_back({element, 1, 1, 1, 20, 19, 256, 192 + each, Mask::causal});
        }
        cases.push_back({element, 2, 4, 2, 19, 35, 16, each, Mask::none, Absent::q_and_v});
        cases.push_back({element, 1, 2, 1, 35, 19, 2 * each, 16, Mask::boolean, Absent::k_and_grad});
        cases.push_back({element, 1, 2, 2, 17, 70, 16, 16, Mask::additive_float});
        cases.push_back({element, 1, 2, 1, 3, 0, 16, 16, Mask::none});
        if (size_of(element) == 2) {
            cases.push_back({element, 1, 1, 1, 150, 76, 64, 64, Mask::causal, Absent::none, true});
            cases.push_back({element, 1, 2, 1, 20, 45, 128, 72, Mask::additive, Absent::none, true});
            cases.push_back({element, 1, 2, 1, 35, 19, 16, 16, Mask::boolean, Absent::k_and_grad, true});
            cases.push_back({element, 2, 1, 1, 19, 35, 16, 128, Mask::none, Absent::q_and_v, true});
            cases.push_back({element, 1, 2, 1, 70, 40, 128, 128, Mask::causal, Absent::none, true});
        }
    }
    for (size_t i = 0; i < cases.size(); ++i) {
        if (only < 0 || only == static_cast<int>(i)) {
            test(cases[i]);
        }
    }
    std::printf("%d checks, %d failed\n", testing::checks, testing::failures);
    return testing::failures == 0 ? 0 : 1;
}
