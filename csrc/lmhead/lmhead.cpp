#include "lmhead/lmhead.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "base/parallel.hpp"
#include "base/scratch.hpp"
#include "base/target.hpp"
#include "lmhead/kernels.hpp"

namespace onestep {
namespace {

// Logits of one chunk of rows, and as much again for their tangent; but no fewer rows than pay for reading the weights.
constexpr int64_t kLogitBytes = int64_t{32} << 20;
constexpr int64_t kLeastRows = 96;
constexpr int64_t kMostRows = 480;

// Classes that one unit of work takes: fewer where there are few, for the threads' sake.
constexpr int64_t kMostClasses = 128;
constexpr int64_t kBlocks = 16;

// The blocks' contributions to grad_input are added up in several places, and these in order: as many as fit, for the
// threads' sake, within limits.
constexpr int64_t kPieceBytes = int64_t{8} << 20;
constexpr int64_t kLeastPieces = 4;
constexpr int64_t kMostPieces = 16;

template <class T, class Input>
const HeadKernels<T, Input>& kernels() {
    if constexpr (std::is_same_v<Input, BFloat16>) {
        return ONESTEP_AMX_KERNELS(head_bf16);
    } else if constexpr (std::is_same_v<Input, double>) {
        return ONESTEP_KERNELS(head_f64);
    } else {
        return ONESTEP_KERNELS(head_f32);
    }
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// One call: its buffers, and the chunks of rows in turn.
template <class T, class Input>
class Head {
 public:
    explicit Head(const LinearCrossEntropyArgs<T, Input>& args)
        : args_(args), kernel_(kernels<T, Input>()), rows_(args.rows.count()) {
        const int64_t per_block = (args.v + kBlocks - 1) / kBlocks;
        chunk_.args = &args_;
        chunk_.block = std::min(round_up(per_block, kernel_.tile_rows), kMostClasses);
        blocks_ = (args.v + chunk_.block - 1) / chunk_.block;
        chunk_.padded_classes = round_up(args.v, kernel_.tile_rows);
        chunk_.padded_features = round_up(args.d, kernel_.panel);
        const int64_t affordable = kLogitBytes / (chunk_.padded_classes * static_cast<int64_t>(sizeof(T)));
        const int64_t most = std::clamp(affordable, kLeastRows, kMostRows);
        const int64_t rows = std::max<int64_t>(rows_, 1);
        const int64_t chunks = (rows + most - 1) / most;
        chunk_rows_ = round_up((rows + chunks - 1) / chunks, kernel_.panel);
        allocate();
    }

    Status run() {
        double value = 0.0;
        for (int64_t begin = 0; begin < rows_; begin += chunk_rows_) {
            start(begin);
            Status status = pack_and_score();
            if (status == Status::ok) {
                auto statistics = [&](int64_t panel) { reduce_panel(begin, panel); };
                status = parallel_for(chunk_.padded_rows / kernel_.panel, 1, statistics);
            }
            if (status == Status::ok && chunk_.wants_gradient()) {
                status = gradient(begin);
            }
            if (status != Status::ok) {
                return status;
            }
            for (int64_t row = 0; row < chunk_.rows; ++row) {
                value += values_[static_cast<size_t>(row)];
            }
        }
        if (args_.value != nullptr) {
            *args_.value = static_cast<T>(value);
        }
        if (rows_ == 0) {
            clear(args_.grad_weight, args_.v * args_.d);
            clear(args_.grad_bias, args_.v);
        }
        return Status::ok;
    }

 private:
    static void clear(T* to, int64_t count) {
        if (to != nullptr) {
            std::fill_n(to, count, T(0));
        }
    }

    // Uninitialised memory that goes back to the system afterwards.
    template <class U>
    U* take(int64_t count) {
        const int64_t bytes = std::max<int64_t>(count * static_cast<int64_t>(sizeof(U)), 1);
        buffers_.emplace_back(
            static_cast<char*>(::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment})));
        return reinterpret_cast<U*>(buffers_.back().get());
    }

    void* take_packed() { return take<char>(chunk_rows_ * chunk_.padded_features * kernel_.packed_bytes); }

    void allocate() {
        const int64_t rows = chunk_rows_;
        const bool gradient = chunk_.wants_gradient();
        chunk_.logits = take<T>(rows * chunk_.padded_classes);
        chunk_.input_panels = take_packed();
        chunk_.peak = take<T>(rows * blocks_);
        chunk_.sum = take<T>(rows * blocks_);
        chunk_.expected = take<T>(rows * blocks_);
        chunk_.target = take<int64_t>(rows);
        chunk_.row_weight = take<T>(rows);
        chunk_.row_weight_tangent = take<T>(rows);
        input_.resize(static_cast<size_t>(rows));
        values_.resize(static_cast<size_t>(rows));
        if (args_.tangent) {
            chunk_.logits_tangent = take<T>(rows * chunk_.padded_classes);
            chunk_.moment = take<T>(rows * blocks_);
            chunk_.expected_tangent = take<T>(rows * blocks_);
            chunk_.mean_tangent = take<T>(rows);
            if (args_.input_tangent) {
                chunk_.tangent_panels = take_packed();
                input_tangent_.resize(static_cast<size_t>(rows));
                chunk_.input_tangent = input_tangent_.data();
            }
        }
        if (gradient && args_.grad_weight != nullptr) {
            chunk_.input_columns = take_packed();
            if (chunk_.input_tangent != nullptr && chunk_.wants_cross_terms()) {
                chunk_.tangent_columns = take_packed();
            }
        }
        const int64_t piece = rows * std::max<int64_t>(chunk_.padded_features, 1) * static_cast<int64_t>(sizeof(T));
        pieces_ = std::min(std::clamp(kPieceBytes / piece, kLeastPieces, kMostPieces), blocks_);
        if (args_.grad_input != nullptr) {
            partial_ = take<T>(pieces_ * rows * chunk_.padded_features);
        }
    }

    void start(int64_t begin) {
        chunk_.rows = std::min(chunk_rows_, rows_ - begin);
        chunk_.padded_rows = round_up(chunk_.rows, kernel_.panel);
        chunk_.first = begin == 0;
        chunk_.input = input_.data();
        for (int64_t row = 0; row < chunk_.padded_rows; ++row) {
            const auto at = static_cast<size_t>(row);
            if (row >= chunk_.rows) {
                chunk_.target[at] = -1;
                chunk_.row_weight[at] = chunk_.row_weight_tangent[at] = T(0);
                continue;
            }
            const int64_t target = *args_.target.at(args_.rows, begin + row).data;
            const bool counts = target != args_.ignore_index;
            input_[at] = args_.input.at(args_.rows, begin + row).data;
            chunk_.target[at] = counts ? target : -1;
            chunk_.row_weight[at] = counts ? *args_.row_weight.at(args_.rows, begin + row).data : T(0);
            chunk_.row_weight_tangent[at] =
                counts && args_.row_weight_tangent ? *args_.row_weight_tangent.at(args_.rows, begin + row).data : T(0);
            if (chunk_.input_tangent != nullptr) {
                input_tangent_[at] = args_.input_tangent.at(args_.rows, begin + row).data;
            }
        }
    }

    Status pack_and_score() {
        const int64_t row_panels = chunk_.padded_rows / kernel_.panel;
        const int64_t feature_panels = chunk_.input_columns == nullptr ? 0 : chunk_.padded_features / kernel_.panel;
        auto pack = [&](int64_t index) {
            if (index < row_panels) {
                kernel_.pack_input(chunk_, index);
            } else {
                kernel_.pack_input_columns(chunk_, index - row_panels);
            }
        };
        const Status status = parallel_for(row_panels + feature_panels, 1, pack);
        if (status != Status::ok) {
            return status;
        }
        auto score = [&](int64_t block) {
            const int64_t bytes = kernel_.work(chunk_);
            Scratch scratch(Scratch::bytes_for<char>(bytes));
            kernel_.score_block(chunk_, block, scratch.take<char>(bytes));
        };
        return parallel_for(blocks_, 1, score);
    }

    // The losses of one panel of rows from the blocks' statistics, which turn into what gradient_block reads.
    void reduce_panel(int64_t begin, int64_t panel) {
        const int64_t end = std::min((panel + 1) * kernel_.panel, chunk_.rows);
        for (int64_t row = panel * kernel_.panel; row < (panel + 1) * kernel_.panel; ++row) {
            const auto stat = [&](T* table, int64_t block) -> T& { return table[block * chunk_.padded_rows + row]; };
            constexpr double kNone = -std::numeric_limits<double>::infinity();
            double peak = kNone;
            for (int64_t block = 0; block < blocks_; ++block) {
                peak = std::max(peak, static_cast<double>(stat(chunk_.peak, block)));
            }
            double sum = 0.0, moment = 0.0, expected = 0.0, expected_tangent = 0.0;
            for (int64_t block = 0; block < blocks_; ++block) {
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
            for (int64_t block = 0; block < blocks_; ++block) {
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
        values_[static_cast<size_t>(row)] = value;
    }

    Status gradient(int64_t begin) {
        const int64_t size = chunk_rows_ * chunk_.padded_features;
        auto piece = [&](int64_t index) {
            const int64_t bytes = kernel_.work(chunk_);
            Scratch scratch(Scratch::bytes_for<char>(bytes));
            char* work = scratch.take<char>(bytes);
            T* to = partial_ == nullptr ? nullptr : partial_ + index * size;
            const int64_t first = index * blocks_ / pieces_;
            for (int64_t block = first; block < (index + 1) * blocks_ / pieces_; ++block) {
                kernel_.gradient_block(chunk_, block, block > first, to, work);
            }
        };
        const Status status = parallel_for(pieces_, 1, piece);
        if (status != Status::ok || args_.grad_input == nullptr) {
            return status;
        }
        auto reduce = [&](int64_t panel) { add_pieces(begin, panel); };
        return parallel_for(chunk_.padded_rows / kernel_.panel, 1, reduce);
    }

    // grad_input of one panel of rows.
    void add_pieces(int64_t begin, int64_t panel) {
        const int64_t first = panel * kernel_.panel;
        const int64_t rows = std::min(kernel_.panel, chunk_.rows - first);
        for (int64_t j = 0; j < args_.d; ++j) {
            const T* from = partial_ + (panel * chunk_.padded_features + j) * kernel_.panel;
            for (int64_t row = 0; row < rows; ++row) {
                T sum = T(0);
                for (int64_t index = 0; index < pieces_; ++index) {
                    sum += from[index * chunk_rows_ * chunk_.padded_features + row];
                }
                args_.grad_input[(begin + first + row) * args_.d + j] = sum;
            }
        }
    }

    struct Release {
        void operator()(char* block) const { ::operator delete(block, std::align_val_t{kAlignment}); }
    };

    const LinearCrossEntropyArgs<T, Input>& args_;
    const HeadKernels<T, Input>& kernel_;
    int64_t rows_;
    int64_t chunk_rows_ = 0;
    int64_t blocks_ = 0;
    int64_t pieces_ = 0;
    HeadChunk<T, Input> chunk_;
    std::vector<const Input*> input_;
    std::vector<const Input*> input_tangent_;
    std::vector<double> values_;
    std::vector<std::unique_ptr<char, Release>> buffers_;
    T* partial_ = nullptr;
};

}  // namespace

template <class T, class Input>
Status linear_cross_entropy(const LinearCrossEntropyArgs<T, Input>& args) {
    return guarded([&] { return Head<T, Input>(args).run(); });
}

template Status linear_cross_entropy<float, float>(const LinearCrossEntropyArgs<float, float>&);
template Status linear_cross_entropy<double, double>(const LinearCrossEntropyArgs<double, double>&);
template Status linear_cross_entropy<float, BFloat16>(const LinearCrossEntropyArgs<float, BFloat16>&);

}  // namespace onestep
