// The tuned attention kernels against the plain loops, for every CPU target of this machine, in fp32, fp64 and
// bfloat16, at tile edges, with each mask and layout, serially and with threads.
#include "attention/attention.hpp"
#include "attention/cpu/kernels.hpp"
#include "base/bfloat16.hpp"
#include "testing.hpp"

namespace {

using namespace onestep;
using namespace onestep::testing;

enum class Layout { rows, columns, strided };
enum class MaskKind { none, causal, boolean, additive, per_key };
// Which inputs are bfloat16: none; q, k, v and their tangents; q, k, v and the cotangent, whose tangent is float but of
// bfloat16's numbers.
enum class Half { none, operands, primal };
// Tangents and cotangents that are left out.
enum class Absent { none, q_and_v, k_and_grad };

struct Case {
    int64_t problems, heads, kv_heads, queries, keys, d, dv;
    MaskKind mask;
    Layout layout;
    Half half = Half::none;
    Absent absent = Absent::none;

    std::string name() const {
        std::string text;
        for (const int64_t size : {problems, heads, kv_heads, queries, keys, d, dv}) {
            text += std::to_string(size) + " ";
        }
        return text + "mask " + std::to_string(static_cast<int>(mask)) + " layout " +
               std::to_string(static_cast<int>(layout)) + " bf16 " + std::to_string(static_cast<int>(half)) +
               " absent " + std::to_string(static_cast<int>(absent));
    }
};

// Memory of exactly the size that the strides reach, so that AddressSanitizer sees the first element too many.
template <class T>
struct Table {
    std::vector<T> wide;
    std::vector<BFloat16> half;
    std::vector<uint8_t> bytes;
    HeadedOperand view;

    void lay_out(int64_t heads, int64_t rows, int64_t cols, Layout layout) {
        const int64_t step = layout == Layout::strided ? 2 : 1;
        view.row = layout == Layout::columns ? 1 : cols * step;
        view.col = layout == Layout::columns ? rows : step;
        view.head = rows * cols * step;
        view.batch[0] = heads * view.head;
    }

    Table(std::mt19937& random, int64_t problems, int64_t heads, int64_t rows, int64_t cols, Layout layout,
          bool bfloat16) {
        lay_out(heads, rows, cols, layout);
        std::uniform_real_distribution<float> uniform(-1.5F, 1.5F);
        const auto count = static_cast<size_t>(problems * view.batch[0]);
        wide.resize(count);
        std::generate(wide.begin(), wide.end(), [&] { return static_cast<T>(uniform(random)); });
        view.data = wide.data();
        view.element = kElement<T>;
        if (bfloat16) {
            half.resize(count);
            for (size_t i = 0; i < count; ++i) {
                uint32_t word = 0;
                const auto value = static_cast<float>(wide[i]);
                std::memcpy(&word, &value, sizeof(word));
                half[i].bits = static_cast<uint16_t>(word >> 16);
            }
            view.data = half.data();
            view.element = Element::bfloat16;
        }
    }

    // bfloat16's numbers in wider elements.
    void widen() {
        for (size_t i = 0; i < half.size(); ++i) {
            const uint32_t word = static_cast<uint32_t>(half[i].bits) << 16;
            float value = 0.0F;
            std::memcpy(&value, &word, sizeof(value));
            wide[i] = static_cast<T>(value);
        }
        view.data = wide.data();
        view.element = kElement<T>;
    }

    // A mask that every problem shares: bytes, of which one row is all hidden, or numbers of one row for all queries.
    static Table mask(std::mt19937& random, const Case& c) {
        Table result(random, 1, c.heads, c.mask == MaskKind::per_key ? 1 : c.queries, c.keys, c.layout, false);
        result.view.batch[0] = 0;
        if (c.mask == MaskKind::per_key) {
            result.view.head = 0;
            result.view.row = 0;
        }
        if (c.mask == MaskKind::boolean) {
            result.bytes.resize(result.wide.size());
            for (size_t i = 0; i < result.wide.size(); ++i) {
                result.bytes[i] = result.wide[i] > T(-0.5) ? 1 : 0;
            }
            for (int64_t j = 0; c.heads > 0 && c.queries > 0 && j < c.keys; ++j) {
                result.bytes[static_cast<size_t>(c.queries / 2 * result.view.row + j * result.view.col)] = 0;
            }
            result.view.data = result.bytes.data();
            result.view.element = Element::boolean;
        }
        return result;
    }
};

template <class T>
struct Inputs {
    Case c;
    std::vector<Table<T>> tables;
    std::vector<Table<double>> double_tables;
    AttentionArgs<T> args;

    Inputs(std::mt19937& random, const Case& case_) : c(case_) {
        const auto rows = [&](int64_t cols, bool bfloat16) {
            return Table<T>(random, c.problems, c.heads, c.queries, cols, c.layout, bfloat16);
        };
        const auto key_rows = [&](int64_t cols, bool bfloat16) {
            return Table<T>(random, c.problems, c.kv_heads, c.keys, cols, c.layout, bfloat16);
        };
        args.batch.dims = 1;
        args.batch.size[0] = c.problems;
        args.heads = c.heads;
        args.kv_heads = c.kv_heads;
        args.queries = c.queries;
        args.keys = c.keys;
        args.d = c.d;
        args.dv = c.dv;
        args.scale = T(0.4);
        args.causal = c.mask == MaskKind::causal;
        const bool masked = c.mask == MaskKind::boolean || c.mask == MaskKind::additive || c.mask == MaskKind::per_key;
        tables.reserve(16);
        const auto keep = [&](Table<T> table) {
            tables.push_back(std::move(table));
            return tables.back().view;
        };
        for (AttentionInputs* inputs : {&args.primal, &args.tangent}) {
            const bool tangent = inputs == &args.tangent;
            const bool half = c.half == Half::operands || (c.half == Half::primal && !tangent);
            inputs->q = keep(rows(c.d, half));
            inputs->k = keep(key_rows(c.d, half));
            inputs->v = keep(key_rows(c.dv, half));
            Table<T> grad = rows(c.dv, c.half == Half::primal);
            if (tangent && c.half == Half::primal) {
                grad.widen();
            }
            inputs->grad = keep(std::move(grad));
            double_tables.emplace_back(random, c.problems, c.heads, c.queries, 1, c.layout, false);
            inputs->grad_lse = double_tables.back().view;
            if (masked && (!tangent || c.mask != MaskKind::boolean)) {
                inputs->mask = keep(Table<T>::mask(random, c));
            }
        }
        if (c.absent == Absent::q_and_v) {
            args.tangent.q = args.tangent.v = {};
        } else if (c.absent == Absent::k_and_grad) {
            args.tangent.k = args.tangent.grad = args.primal.grad = {};
        }
    }
};

template <class T>
struct Results {
    std::vector<T> out, out_tangent;
    std::vector<double> lse, lse_tangent;
    std::vector<T> grads[4], grad_tangents[4];

    std::vector<std::vector<T>*> all() {
        std::vector<std::vector<T>*> list = {&out, &out_tangent};
        for (auto* group : {grads, grad_tangents}) {
            for (int i = 0; i < 4; ++i) {
                list.push_back(group + i);
            }
        }
        return list;
    }
};

template <class T>
HeadedOperand contiguous(const std::vector<T>& data, int64_t heads, int64_t rows, int64_t cols) {
    HeadedOperand view;
    view.data = data.data();
    view.element = kElement<T>;
    view.row = cols;
    view.col = 1;
    view.head = rows * cols;
    view.batch[0] = heads * view.head;
    return view;
}

// Which functions give values and tangents.
enum class Way { reference, apart, together };

// Runs the whole family.
template <Way way, class T>
Results<T> run(const Inputs<T>& in) {
    const Case& c = in.c;
    Results<T> results;
    AttentionArgs<T> args = in.args;
    const auto take = [](auto& to, int64_t count) {
        // What is not written is noticed.
        to.assign(static_cast<size_t>(count), std::numeric_limits<T>::quiet_NaN());
        return to.data();
    };
    const int64_t all_heads = c.problems * c.heads;
    constexpr bool together = way == Way::together;
    const auto call = [&](const char* what, const auto& kernel, const auto& oracle) {
        if constexpr (way == Way::reference) {
            check(oracle() == Status::ok, c.name() + what);
        } else {
            attempt(c.name() + what, kernel);
        }
    };
    args.out = take(results.out, all_heads * c.queries * c.dv);
    args.lse = take(results.lse, all_heads * c.queries);
    args.tangents.out = take(results.out_tangent, all_heads * c.queries * c.dv);
    args.tangents.lse = take(results.lse_tangent, all_heads * c.queries);
    const HeadedOperand out = contiguous(results.out, c.heads, c.queries, c.dv);
    const HeadedOperand lse = contiguous(results.lse, c.heads, c.queries, 1);
    if (together) {
        attempt(c.name() + " forward and jvp", [&] { return attention_forward_and_jvp(args); });
    } else {
        call(" forward", [&] { return attention_forward(args); }, [&] { return reference::attention_forward(args); });
        AttentionArgs<T> moved = args;
        moved.primal.out = out;
        moved.primal.lse = lse;
        moved.out = args.tangents.out;
        moved.lse = args.tangents.lse;
        call(" jvp", [&] { return attention_jvp(moved); }, [&] { return reference::attention_jvp(moved); });
    }
    args.primal.out = out;
    args.primal.lse = lse;
    args.tangent.out = contiguous(results.out_tangent, c.heads, c.queries, c.dv);
    args.tangent.lse = contiguous(results.lse_tangent, c.heads, c.queries, 1);
    const auto take_grads = [&](auto* grads, AttentionResults<T>& to) {
        to.q_grad = take(grads[0], all_heads * c.queries * c.d);
        to.k_grad = take(grads[1], c.problems * c.kv_heads * c.keys * c.d);
        to.v_grad = take(grads[2], c.problems * c.kv_heads * c.keys * c.dv);
        if (c.mask == MaskKind::additive || c.mask == MaskKind::per_key) {
            const bool per_key = c.mask == MaskKind::per_key;
            to.mask_grad.data = take(grads[3], per_key ? c.keys : c.heads * c.queries * c.keys);
            to.mask_grad.col = 1;
            to.mask_grad.row = per_key ? 0 : c.keys;
            to.mask_grad.head = per_key ? 0 : c.queries * c.keys;
        }
    };
    take_grads(results.grads, args);
    take_grads(results.grad_tangents, args.tangents);
    if (together) {
        attempt(c.name() + " backward and jvp", [&] { return attention_backward_and_jvp(args); });
    } else {
        call(
            " backward", [&] { return attention_backward(args); }, [&] { return reference::attention_backward(args); });
        AttentionArgs<T> moved = args;
        static_cast<AttentionResults<T>&>(moved) = args.tangents;
        call(
            " backward jvp", [&] { return attention_backward_jvp(moved); },
            [&] { return reference::attention_backward_jvp(moved); });
    }
    return results;
}

// max |a − b| / max |b|, where `scale` stands for a smaller max |b|; NaN anywhere is infinitely far, equal infinities
// are not.
template <class T>
double difference(const std::vector<T>& a, const std::vector<T>& b, double scale) {
    double most = 0.0;
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isnan(a[i]) || std::isnan(b[i])) {
            return std::numeric_limits<double>::infinity();
        }
        if (a[i] == b[i]) {
            continue;
        }
        most = std::max(most, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
        scale = std::max(scale, std::abs(static_cast<double>(b[i])));
    }
    return most / scale;
}

template <Way way, class T>
void compare_with(const Results<T>& reference, const Inputs<T>& in) {
    const Case& c = in.c;
    Results<T> expected = reference;
    Results<T> got = run<way>(in);
    Results<T> threaded = with_threads([&] { return run<way>(in); });
    const auto wanted = expected.all();
    const auto tuned = got.all();
    const auto shared = threaded.all();
    const std::string name = c.name() + (way == Way::together ? " together" : "");
    // Two planes of bfloat16 are exact to 2⁻¹⁶ of the summands. Where a query sees few keys these cancel: they are
    // about 1, and in tangents 1.5 times the tangents of scores, which reach √d.
    const bool planes = c.half != Half::none && active_target() == Target::amx;
    const auto judge = [&](const auto& result, const auto& oracle, const auto& with_threads, const std::string& what,
                           bool tangent) {
        const double summands = tangent ? std::max(1.0, 1.5 * std::sqrt(static_cast<double>(c.d))) : 1.0;
        const double error = difference(result, oracle, planes ? summands : 1e-3);
        const double bound = planes ? 0x1p-14 : 200.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
        check(error <= bound, name + " " + what + ": error " + std::to_string(error));
        const size_t bytes = result.size() * sizeof(*result.data());
        const bool same = bytes == 0 || std::memcmp(result.data(), with_threads.data(), bytes) == 0;
        check(same, name + " " + what + " with threads: not bitwise the same");
    };
    for (size_t i = 0; i < wanted.size(); ++i) {
        judge(*tuned[i], *wanted[i], *shared[i], "result " + std::to_string(i), i == 1 || i >= 6);
    }
    judge(got.lse, expected.lse, threaded.lse, "lse", false);
    judge(got.lse_tangent, expected.lse_tangent, threaded.lse_tangent, "lse tangent", true);
}

template <class T>
void compare(std::mt19937& random, const Case& c) {
    const Inputs<T> in(random, c);
    const Results<T> expected = run<Way::reference>(in);
    compare_with<Way::apart>(expected, in);
    compare_with<Way::together>(expected, in);
}

template <class T>
void test(Half half) {
    std::mt19937 random(1);
    int64_t turn = 0;
    for (const MaskKind mask :
         {MaskKind::none, MaskKind::causal, MaskKind::boolean, MaskKind::additive, MaskKind::per_key}) {
        for (const Layout layout : {Layout::rows, Layout::columns, Layout::strided}) {
            compare<T>(random, {2, 2, 2, 5, 7, 3, 4, mask, layout, half});
            // Several tiles: every layout and every mask, not each pair of them.
            if (turn++ % 2 == 0) {
                compare<T>(random, {1, 4, 2, 65, 66, 8, 5, mask, layout, half});
            }
        }
        const Layout rows = Layout::rows;
        compare<T>(random, {1, 1, 1, 1, 1, 1, 1, mask, rows, half});
        compare<T>(random, {1, 1, 1, 64, 128, 16, 16, mask, rows, half});
        compare<T>(random, {1, 2, 1, 130, 63, 17, 9, mask, rows, half});
        compare<T>(random, {1, 1, 1, 33, 34, 130, 40, mask, rows, half});  // narrow tiles
        compare<T>(random, {1, 1, 1, 3, 0, 4, 4, mask, rows, half});
        compare<T>(random, {1, 1, 1, 0, 3, 4, 4, mask == MaskKind::per_key ? MaskKind::none : mask, rows, half});
        // Nothing to attend to, nothing that attends: gradients are zeros, that of a mask with rows of its own, too.
        compare<T>(random, {0, 2, 1, 2, 3, 4, 4, mask, rows, half});
        compare<T>(random, {2, 0, 2, 2, 3, 4, 4, mask, rows, half});
        compare<T>(random, {1, 2, 1, 0, 3, 4, 4, mask, rows, half});
    }
    for (const Absent absent : {Absent::q_and_v, Absent::k_and_grad}) {
        compare<T>(random, {1, 2, 1, 35, 37, 5, 18, MaskKind::causal, Layout::rows, half, absent});
    }
}

// Edges of the tiles of the amx target: 16 and 32 of the operands, squares of 64, tiles of 256 (of 128 where rows are
// long).
void test_tiles() {
    std::mt19937 random(2);
    const Layout rows = Layout::rows;
    for (const int64_t d : {1, 15, 16, 17, 31, 32, 33, 64}) {
        compare<float>(random, {1, 1, 1, 33, 17, d, 65 - d, MaskKind::none, rows, Half::operands});
        compare<float>(random, {1, 1, 1, 16, 31, 65 - d, d, MaskKind::causal, rows, Half::primal});
    }
    for (const Layout layout : {rows, Layout::columns, Layout::strided}) {
        compare<float>(random, {2, 2, 1, 35, 37, 17, 33, MaskKind::per_key, layout, Half::primal});
    }
    compare<float>(random, {1, 1, 1, 35, 37, 5, 18, MaskKind::none, rows, Half::primal, Absent::q_and_v});
    compare<float>(random, {1, 1, 1, 20, 70, 128, 64, MaskKind::boolean, rows, Half::operands});
    compare<float>(random, {1, 1, 1, 70, 20, 64, 128, MaskKind::additive, rows, Half::primal});
    compare<float>(random, {1, 1, 1, 66, 65, 256, 129, MaskKind::causal, rows, Half::primal});
    compare<float>(random, {1, 1, 1, 130, 129, 129, 1, MaskKind::causal, rows, Half::operands});
    compare<float>(random, {1, 2, 1, 63, 129, 8, 8, MaskKind::boolean, rows, Half::operands});
    compare<float>(random, {1, 1, 1, 129, 64, 8, 8, MaskKind::additive, rows, Half::primal});
    compare<float>(random, {1, 1, 1, 257, 65, 4, 4, MaskKind::causal, rows, Half::operands});
    compare<float>(random, {1, 1, 1, 63, 321, 4, 4, MaskKind::additive, rows, Half::operands});
    compare<float>(random, {1, 1, 1, 255, 257, 4, 4, MaskKind::causal, rows, Half::primal});
}

// Every allocation fails once, and every parallel loop.
template <class T>
void test_faults(Half half) {
    trial = Trial::faults;
    std::mt19937 random(4);
    compare<T>(random, {1, 4, 2, 65, 66, 8, 5, MaskKind::additive, Layout::rows, half});
    compare<T>(random, {1, 1, 1, 130, 129, 17, 9, MaskKind::causal, Layout::rows, half});
    trial = Trial::plain;
}

// Where a query sees one key, the scores have no gradient: not even one of rounding.
template <class T>
void test_one_key(Half half) {
    std::mt19937 random(3);
    for (const int64_t dv : {1, 7, 33, 64}) {
        Inputs<T> in(random, {1, 2, 1, 37, 1, 5, dv, MaskKind::none, Layout::rows, half});
        in.args.primal.grad_lse = {};
        const Results<T> results = run<Way::together>(in);
        for (const auto& grad : {results.grads[0], results.grads[1]}) {
            const bool zero = std::all_of(grad.begin(), grad.end(), [](T value) { return value == T(0); });
            check(zero, in.c.name() + " one key: scores have a gradient");
        }
    }
}

// Values where the largest score rises from square to square by more than the lazy maximum allows, and where the scale
// turns the order of scores round.
void test_scales() {
    std::mt19937 random(5);
    for (const float scale : {6.0F, -0.7F}) {
        for (const MaskKind mask : {MaskKind::none, MaskKind::additive}) {
            Inputs<float> in(random, {1, 1, 1, 65, 321, 16, 16, mask, Layout::rows, Half::operands});
            in.args.scale = scale;
            Results<float> expected;
            Results<float> got;
            for (Results<float>* results : {&expected, &got}) {
                results->out.resize(65 * 16);
                results->lse.resize(65);
                AttentionArgs<float> args = in.args;
                args.out = results->out.data();
                args.lse = results->lse.data();
                const Status status =
                    results == &expected ? reference::attention_forward(args) : attention_forward(args);
                check(status == Status::ok, in.c.name());
            }
            const std::string name = in.c.name() + " scale " + std::to_string(scale);
            check(difference(got.out, expected.out, 1.0) <= 0x1p-14, name + " out");
            check(difference(got.lse, expected.lse, 1.0) <= 1e-6, name + " lse");
        }
    }
}

// The amx target has kernels of its own for bfloat16 alone.
template <class T>
void test_wide() {
    if (active_target() != Target::amx) {
        test<T>(Half::none);
        test_one_key<T>(Half::none);
    }
}

void test_half() {
    test<float>(Half::operands);
    test_one_key<float>(Half::operands);
    test_scales();
    if (active_target() == Target::amx) {
        test_one_key<float>(Half::primal);
        test_tiles();
    }
}

template <class T>
void test_work_memory() {
    constexpr bool kDouble = sizeof(T) == 8;
    const AttentionKernels<T>& table = []() -> const AttentionKernels<T>& {
        if constexpr (kDouble) {
            return ONESTEP_KERNELS(attention, f64);
        } else {
            return ONESTEP_KERNELS(attention, f32);
        }
    }();
    constexpr int64_t size = 9;
    std::vector<T> numbers(size * size, T(0.25));
    std::vector<double> lse(size, 0.5);
    const AttentionSlice matrix{numbers.data(), kDouble ? Element::float64 : Element::float32, size, 1};
    const AttentionSlice statistics{lse.data(), Element::float64, 1, 1};
    AttentionHead<T> head;
    head.queries = head.keys = head.d = head.dv = size;
    head.tile = table.lanes * 2;
    head.primal = {matrix, matrix, matrix, matrix, matrix, statistics, matrix, {}};
    head.tangent = head.primal;
    const int64_t rows = std::min(size, head.tile);
    std::vector<T> out(static_cast<size_t>(size * size));
    std::vector<T> sums(static_cast<size_t>(std::max(size, head.tile) * (head.tile + size + 16)));
    std::vector<double> out_lse(size);
    std::vector<T> delta(size);
    const AttentionDeltas<T> deltas{delta.data(), delta.data()};
    const int64_t q_row = (size + table.lanes - 1) / table.lanes * table.lanes;
    const AttentionGrads<T> grads{sums.data(), q_row, out.data(), out.data(), false};
    const AttentionRows<T> to{out.data(), out_lse.data()};
    const int64_t wanted = table.work(size, size, head.tile);
    const auto check_kernel = [&](const char* what, const auto& kernel) { check_work_memory<T>(what, wanted, kernel); };
    check_kernel("forward", [&](const auto& work) { table.forward(head, 0, rows, to.out, to.lse, work); });
    check_kernel("jvp", [&](const auto& work) { table.jvp(head, 0, rows, to.out, to.lse, work); });
    check_kernel("both", [&](const auto& work) { table.forward_and_jvp(head, 0, rows, to, to, work); });
    check_kernel("deltas", [&](const auto& work) { table.deltas(head, 0, rows, deltas, work); });
    check_kernel("backward", [&](const auto& work) { table.backward(head, deltas, 0, size, grads, work); });
    check_kernel("backward_jvp", [&](const auto& work) { table.backward_jvp(head, deltas, 0, size, grads, work); });
    check_kernel("score_grad", [&](const auto& work) { table.score_grad(head, deltas, 0, 0, sums.data(), work); });
}

}  // namespace

int main(int argc, char** argv) {
    return run_targets(argc, argv,
                       {{"fp32", test_wide<float>},
                        {"fp64", test_wide<double>},
                        {"bf16", test_half},
                        {"work_memory_fp32", test_work_memory<float>},
                        {"work_memory_fp64", test_work_memory<double>},
                        {"faults_fp64", [] { test_faults<double>(Half::none); }, Where::first_target},
                        {"faults_bf16", [] { test_faults<float>(Half::operands); }}});
}
