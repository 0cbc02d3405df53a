// The entry linear_cross_entropy. Chunks of rows go through one after the other. Threads share a chunk's blocks of
// classes and panels of rows.
#include "lmhead/lmhead.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "base/parallel.hpp"
#include "base/reduce.hpp"
#include "base/target.hpp"
#include "lmhead/cpu/plan.hpp"

namespace onestep {
namespace {

// A chunk has the rows whose logits take this many bytes (a tangent takes as much again),
constexpr int64_t kLogitBytes = int64_t{32} << 20;
// but at least this many: reading the weights once for each chunk must pay;
constexpr int64_t kLeastRows = 96;
// and at most this many.
constexpr int64_t kMostRows = 480;

// Classes are cut into about this many blocks, so that there is work for every thread.
constexpr int64_t kBlocks = 16;
// A block has at most this many classes.
constexpr int64_t kMostClasses = 128;

// Sums for grad_input of all pieces together take about this much memory.
constexpr int64_t kPieceBytes = int64_t{8} << 20;
// There are at least this many pieces, so that there is work for several threads,
constexpr int64_t kLeastPieces = 4;
// and at most this many.
constexpr int64_t kMostPieces = 16;

// About what the statistics of one row in one block take, most of it two exponentials.
constexpr int64_t kStatisticNanoseconds = 30;

template <class T, class Input>
const HeadKernels<T, Input>& active_kernels() {
    if constexpr (std::is_same_v<Input, BFloat16>) {
        return ONESTEP_AMX_KERNELS(lmhead, bf16);
    } else if constexpr (std::is_same_v<Input, double>) {
        return ONESTEP_KERNELS(lmhead, f64);
    } else {
        return ONESTEP_KERNELS(lmhead, f32);
    }
}

template <class T>
void clear(T* to, int64_t count) {
    if (to != nullptr) {
        std::fill_n(to, count, T(0));
    }
}

// One call: its memory, and the chunks of rows in turn.
template <class T, class Input>
class Call {
 public:
    using Plan = LinearCrossEntropyPlan<T, Input>;

    Call(const Plan& plan, const LinearCrossEntropyArgs<T, Input>& args, const Workspace& workspace)
        : plan_(plan), args_(args), kernels_(*plan.kernels) {
        const auto get = [&](const auto& part) { return part.count > 0 ? workspace.get(part) : nullptr; };
        input_ = get(plan.input);
        input_tangent_ = get(plan.input_tangent);
        values_ = get(plan.values);
        partial_ = get(plan.partial);
        chunk_.args = &args;
        chunk_.block = plan.blocks.size;
        chunk_.padded_classes = plan.padded_classes;
        chunk_.padded_features = plan.padded_features;
        chunk_.input = input_;
        chunk_.input_tangent = input_tangent_;
        chunk_.input_panels = get(plan.input_panels);
        chunk_.tangent_panels = get(plan.tangent_panels);
        chunk_.input_columns = get(plan.input_columns);
        chunk_.tangent_columns = get(plan.tangent_columns);
        chunk_.logits = get(plan.logits);
        chunk_.logits_tangent = get(plan.logits_tangent);
        chunk_.peak = get(plan.peak);
        chunk_.sum = get(plan.sum);
        chunk_.moment = get(plan.moment);
        chunk_.expected = get(plan.expected);
        chunk_.expected_tangent = get(plan.expected_tangent);
        chunk_.target = get(plan.target);
        chunk_.row_weight = get(plan.row_weight);
        chunk_.row_weight_tangent = get(plan.row_weight_tangent);
        chunk_.mean_tangent = get(plan.mean_tangent);
    }

    Status run() {
        double value = 0.0;
        for (int64_t index = 0; index < plan_.chunks.pieces(); ++index) {
            const Range rows = plan_.chunks[index];
            start(rows);
            Status status = pack_and_score();
            if (status == Status::ok) {
                auto statistics = [&](int64_t panel) { reduce_panel(rows.begin, panel); };
                status = parallel_for(chunk_.padded_rows / kernels_.panel,
                                      kernels_.panel * plan_.blocks.pieces() * kStatisticNanoseconds, statistics);
            }
            if (status == Status::ok && plan_.wants_gradient) {
                status = gradient(rows.begin);
            }
            if (status != Status::ok) {
                return status;
            }
            for (int64_t row = 0; row < chunk_.rows; ++row) {
                value += values_[row];
            }
        }
        if (args_.value != nullptr) {
            *args_.value = static_cast<T>(value);
        }
        if (plan_.chunks.count == 0) {
            clear(args_.grad_weight, args_.v * args_.d);
            clear(args_.grad_bias, args_.v);
        }
        return Status::ok;
    }

 private:
    // Gathers what the kernels need of the chunk's rows.
    void start(Range rows) {
        chunk_.rows = rows.size();
        chunk_.padded_rows = round_up(chunk_.rows, kernels_.panel);
        chunk_.first = rows.begin == 0;
        for (int64_t row = 0; row < chunk_.padded_rows; ++row) {
            if (row >= chunk_.rows) {
                chunk_.target[row] = -1;
                chunk_.row_weight[row] = chunk_.row_weight_tangent[row] = T(0);
                continue;
            }
            const int64_t index = rows.begin + row;
            const int64_t target = *args_.target.at(args_.rows, index).data;
            const bool counts = target != args_.ignore_index;
            input_[row] = args_.input.at(args_.rows, index).data;
            chunk_.target[row] = counts ? target : -1;
            chunk_.row_weight[row] = counts ? *args_.row_weight.at(args_.rows, index).data : T(0);
            chunk_.row_weight_tangent[row] =
                counts && args_.row_weight_tangent ? *args_.row_weight_tangent.at(args_.rows, index).data : T(0);
            if (input_tangent_ != nullptr) {
                input_tangent_[row] = args_.input_tangent.at(args_.rows, index).data;
            }
        }
    }

    Status pack_and_score() {
        const int64_t row_panels = chunk_.padded_rows / kernels_.panel;
        const int64_t feature_panels = chunk_.input_columns == nullptr ? 0 : chunk_.padded_features / kernels_.panel;
        auto pack = [&](int64_t index) {
            if (index < row_panels) {
                kernels_.pack_input(chunk_, index);
            } else {
                kernels_.pack_input_columns(chunk_, index - row_panels);
            }
        };
        const Status status =
            parallel_for(row_panels + feature_panels, copy_nanoseconds(plan_.padded_features * kernels_.panel), pack);
        if (status != Status::ok) {
            return status;
        }
        auto score = [&](int64_t block) {
            const CachedWorkspace own(plan_.own_layout);
            kernels_.score_block(chunk_, block, own.get(plan_.work));
        };
        return parallel_for(plan_.blocks.pieces(), product_nanoseconds(plan_.blocks.size), score);
    }

    // The losses of one panel of rows from the blocks' statistics, which turn into what gradient_block reads.
    void reduce_panel(int64_t begin, int64_t panel) {
        const int64_t blocks = plan_.blocks.pieces();
        const int64_t end = std::min((panel + 1) * kernels_.panel, chunk_.rows);
        for (int64_t row = panel * kernels_.panel; row < (panel + 1) * kernels_.panel; ++row) {
            const auto stat = [&](T* table, int64_t block) -> T& { return table[block * chunk_.padded_rows + row]; };
            constexpr double kNone = -std::numeric_limits<double>::infinity();
            double peak = kNone;
            for (int64_t block = 0; block < blocks; ++block) {
                peak = std::max(peak, static_cast<double>(stat(chunk_.peak, block)));
            }
            double sum = 0.0, moment = 0.0, expected = 0.0, expected_tangent = 0.0;
            for (int64_t block = 0; block < blocks; ++block) {
                const double of_block = stat(chunk_.peak, block);
                const double factor = of_block == kNone ? 0.0 : std::exp(of_block - peak);
                sum += factor * static_cast<double>(stat(chunk_.sum, block));
                expected += static_cast<double>(stat(chunk_.expected, block));
                if (args_.tangent) {
                    moment += factor * static_cast<double>(stat(chunk_.moment, block));
                    expected_tangent += static_cast<double>(stat(chunk_.expected_tangent, block));
                }
            }
            const double normalizer = peak + std::log(sum);
            for (int64_t block = 0; block < blocks; ++block) {
                T& of_block = stat(chunk_.peak, block);
                of_block = static_cast<T>(std::exp(static_cast<double>(of_block) - normalizer));
            }
            const double mean = moment / sum;
            if (args_.tangent) {
                chunk_.mean_tangent[row] = static_cast<T>(mean);
            }
            if (row < end) {
                write_loss(begin, row, normalizer - expected, mean - expected_tangent);
            }
        }
    }

    void write_loss(int64_t begin, int64_t row, double loss, double tangent) {
        const bool counts = chunk_.target[row] >= 0;
        const double own = args_.tangent ? tangent : loss;
        if (args_.loss != nullptr) {
            args_.loss[begin + row] = counts ? static_cast<T>(own) : T(0);
        }
        double value = 0.0;
        if (counts) {
            value = static_cast<double>(chunk_.row_weight[row]) * own;
            if (args_.row_weight_tangent) {
                value += static_cast<double>(chunk_.row_weight_tangent[row]) * loss;
            }
        }
        values_[row] = value;
    }

    Status gradient(int64_t begin) {
        auto piece = [&](int64_t index) {
            const CachedWorkspace own(plan_.own_layout);
            char* work = own.get(plan_.work);
            T* to = partial_ == nullptr ? nullptr : partial_ + index * plan_.partial_size();
            const Range blocks = plan_.pieces.spread(index);
            for (int64_t block = blocks.begin; block < blocks.end; ++block) {
                kernels_.gradient_block(chunk_, block, block > blocks.begin, to, work);
            }
        };
        const Status status = parallel_for(plan_.pieces.pieces,
                                           2 * product_nanoseconds(plan_.padded_classes / plan_.pieces.pieces), piece);
        if (status != Status::ok || args_.grad_input == nullptr) {
            return status;
        }
        auto add = [&](int64_t panel) { add_pieces(begin, panel); };
        return parallel_for(chunk_.padded_rows / kernels_.panel,
                            copy_nanoseconds(plan_.pieces.pieces * args_.d * kernels_.panel), add);
    }

    // grad_input of one panel of rows.
    void add_pieces(int64_t begin, int64_t panel) {
        const int64_t size = plan_.padded_features * kernels_.panel;
        const int64_t first_row = panel * kernels_.panel;
        T* to = args_.grad_input + (begin + first_row) * args_.d;
        sum_pieces<T>(partial_, plan_.pieces.pieces, plan_.partial_size(), panel * size,
                      panel * size + args_.d * kernels_.panel, [&](int64_t at, T sum) {
                          const int64_t feature = at % size / kernels_.panel;
                          const int64_t row = at % kernels_.panel;
                          if (first_row + row < chunk_.rows) {
                              to[row * args_.d + feature] = sum;
                          }
                      });
    }

    // The chunk's products with so many classes; a tangent has two or three instead of one.
    int64_t product_nanoseconds(int64_t classes) const {
        return (args_.tangent ? 3 : 1) * nanoseconds_of_products(chunk_.rows * classes * args_.d);
    }
    static int64_t copy_nanoseconds(int64_t elements) {
        return nanoseconds_of_bytes(2 * elements * static_cast<int64_t>(sizeof(T)));
    }

    const Plan& plan_;
    const LinearCrossEntropyArgs<T, Input>& args_;
    const HeadKernels<T, Input>& kernels_;
    HeadChunk<T, Input> chunk_;
    const Input** input_ = nullptr;
    const Input** input_tangent_ = nullptr;
    double* values_ = nullptr;
    T* partial_ = nullptr;
};

}  // namespace

template <class T, class Input>
LinearCrossEntropyPlan<T, Input> plan(const LinearCrossEntropyArgs<T, Input>& args) {
    LinearCrossEntropyPlan<T, Input> plan;
    plan.kernels = &active_kernels<T, Input>();
    const HeadKernels<T, Input>& kernels = *plan.kernels;
    const int64_t n = args.rows.count();
    plan.blocks = {args.v, std::min(round_up(ceil_div(args.v, kBlocks), kernels.tile_rows), kMostClasses)};
    plan.padded_classes = round_up(args.v, kernels.tile_rows);
    plan.padded_features = round_up(args.d, kernels.panel);
    const int64_t affordable = kLogitBytes / (plan.padded_classes * static_cast<int64_t>(sizeof(T)));
    const int64_t most = std::clamp(affordable, kLeastRows, kMostRows);
    // Chunks of about equal size.
    const int64_t chunks = ceil_div(std::max<int64_t>(n, 1), most);
    const int64_t rows = round_up(ceil_div(std::max<int64_t>(n, 1), chunks), kernels.panel);
    plan.chunks = {n, rows};
    const int64_t blocks = plan.blocks.pieces();
    const int64_t piece_bytes = rows * std::max<int64_t>(plan.padded_features, 1) * static_cast<int64_t>(sizeof(T));
    plan.pieces = {blocks, std::min(std::clamp(kPieceBytes / piece_bytes, kLeastPieces, kMostPieces), blocks)};

    HeadChunk<T, Input> chunk;
    chunk.args = &args;
    chunk.block = plan.blocks.size;
    chunk.padded_classes = plan.padded_classes;
    chunk.padded_features = plan.padded_features;
    chunk.rows = chunk.padded_rows = rows;
    plan.wants_gradient = chunk.wants_gradient();
    const bool tangent = args.tangent;
    const bool input_tangent = tangent && static_cast<bool>(args.input_tangent);
    const bool columns = args.grad_weight != nullptr;
    // The product with a tangent of the input enters grad_weight beside g.
    const bool cross_terms = !args.gauss_newton && input_tangent;
    const auto packed = [&](bool wanted) { return wanted ? rows * plan.padded_features * kernels.packed_bytes : 0; };
    const auto of_rows = [&](bool wanted) { return wanted ? rows : 0; };
    Layout& layout = plan.layout;
    plan.input = layout.add<const Input*>("input", rows);
    plan.input_tangent = layout.add<const Input*>("input_tangent", of_rows(input_tangent));
    plan.input_panels = layout.add<char>("input_panels", packed(true));
    plan.tangent_panels = layout.add<char>("tangent_panels", packed(input_tangent));
    plan.input_columns = layout.add<char>("input_columns", packed(columns));
    plan.tangent_columns = layout.add<char>("tangent_columns", packed(columns && cross_terms));
    plan.logits = layout.add<T>("logits", rows * plan.padded_classes);
    plan.logits_tangent = layout.add<T>("logits_tangent", of_rows(tangent) * plan.padded_classes);
    plan.peak = layout.add<T>("peak", rows * blocks);
    plan.sum = layout.add<T>("sum", rows * blocks);
    plan.moment = layout.add<T>("moment", of_rows(tangent) * blocks);
    plan.expected = layout.add<T>("expected", rows * blocks);
    plan.expected_tangent = layout.add<T>("expected_tangent", of_rows(tangent) * blocks);
    plan.target = layout.add<int64_t>("target", rows);
    plan.row_weight = layout.add<T>("row_weight", rows);
    plan.row_weight_tangent = layout.add<T>("row_weight_tangent", rows);
    plan.mean_tangent = layout.add<T>("mean_tangent", of_rows(tangent));
    plan.values = layout.add<double>("values", rows);
    plan.partial = layout.add<T>("partial", args.grad_input != nullptr ? plan.pieces.pieces * plan.partial_size() : 0);
    plan.work = plan.own_layout.template add<char>("work", kernels.work(chunk));
    return plan;
}

template <class T, class Input>
Status run(const LinearCrossEntropyPlan<T, Input>& plan, const LinearCrossEntropyArgs<T, Input>& args,
           const Workspace& workspace) {
    return Call<T, Input>(plan, args, workspace).run();
}

template <class T, class Input>
Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>& args) {
    return run_cached(args);
}

#define ONESTEP_INSTANTIATE(T, Input)                                                                     \
    template LinearCrossEntropyPlan<T, Input> plan(const LinearCrossEntropyArgs<T, Input>&);              \
    template Status run(const LinearCrossEntropyPlan<T, Input>&, const LinearCrossEntropyArgs<T, Input>&, \
                        const Workspace&);                                                                \
    template Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>&);
ONESTEP_INSTANTIATE(float, float)
ONESTEP_INSTANTIATE(double, double)
ONESTEP_INSTANTIATE(float, BFloat16)

}  // namespace onestep
