// The attention family as plain loops in double, in the order of the formulas of attention.hpp: the oracle of
// tests/cpp/test_attention.cpp. O, L and their tangents are computed anew; those that are passed are not read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "attention/attention.hpp"

namespace onestep::reference {
namespace {

using Dense = std::vector<double>;  // row-major

double widened(const void* data, int64_t offset, Element element) {
    const char* at = static_cast<const char*>(data) + offset * size_of(element);
    if (element == Element::bfloat16) {
        uint16_t bits = 0;
        std::memcpy(&bits, at, sizeof(bits));
        const uint32_t word = static_cast<uint32_t>(bits) << 16;
        float value = 0.0F;
        std::memcpy(&value, &word, sizeof(value));
        return static_cast<double>(value);
    }
    if (element == Element::float32) {
        float value = 0.0F;
        std::memcpy(&value, at, sizeof(value));
        return static_cast<double>(value);
    }
    double value = 0.0;
    std::memcpy(&value, at, sizeof(value));
    return value;
}

int64_t offset_of(const int64_t* strides, int64_t head_stride, const BatchShape& batch, int64_t problem, int64_t head) {
    int64_t offset = head * head_stride;
    for (int dim = batch.dims - 1; dim >= 0; --dim) {
        offset += problem % batch.size[dim] * strides[dim];
        problem /= batch.size[dim];
    }
    return offset;
}

// All of one head's matrix; zeros where the input is absent.
template <class T>
Dense matrix(const AttentionArgs<T>& args, const HeadedOperand& input, int64_t problem, int64_t head, int64_t rows,
             int64_t cols) {
    Dense result(static_cast<size_t>(rows * cols), 0.0);
    if (input.data == nullptr) {
        return result;
    }
    const int64_t first = offset_of(input.batch, input.head, args.batch, problem, head);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < cols; ++c) {
            result[static_cast<size_t>(r * cols + c)] =
                widened(input.data, first + r * input.row + c * input.col, input.element);
        }
    }
    return result;
}

// to (rows × cols) += factor · A B, A(i, p) = a[i * a_row + p * a_depth], B(p, j) likewise.
void add_product(int64_t rows, int64_t cols, int64_t depth, double factor, const Dense& a, int64_t a_row,
                 int64_t a_depth, const Dense& b, int64_t b_depth, int64_t b_col, Dense& to) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
            double sum = 0.0;
            for (int64_t p = 0; p < depth; ++p) {
                sum +=
                    a[static_cast<size_t>(i * a_row + p * a_depth)] * b[static_cast<size_t>(p * b_depth + j * b_col)];
            }
            to[static_cast<size_t>(i * cols + j)] += factor * sum;
        }
    }
}

// One head's operands, or their tangents.
struct Operands {
    Dense q, k, v, mask, grad, grad_lse;
};

template <class T>
Operands operands(const AttentionArgs<T>& args, const AttentionInputs& inputs, int64_t problem, int64_t head) {
    const int64_t kv_head = head / (args.heads / args.kv_heads);
    const auto rows = [&](const HeadedOperand& input, int64_t cols) {
        return matrix(args, input, problem, head, args.queries, cols);
    };
    return {rows(inputs.q, args.d),
            matrix(args, inputs.k, problem, kv_head, args.keys, args.d),
            matrix(args, inputs.v, problem, kv_head, args.keys, args.dv),
            inputs.mask.element == Element::boolean ? Dense(static_cast<size_t>(args.queries * args.keys), 0.0)
                                                    : rows(inputs.mask, args.keys),
            rows(inputs.grad, args.dv),
            matrix(args, inputs.grad_lse, problem, head, args.queries, 1)};
}

template <class T>
bool hidden(const AttentionArgs<T>& args, int64_t problem, int64_t head, int64_t i, int64_t j) {
    if (args.causal && j > i) {
        return true;
    }
    const HeadedOperand& mask = args.primal.mask;
    if (mask.data == nullptr || mask.element != Element::boolean) {
        return false;
    }
    const int64_t first = offset_of(mask.batch, mask.head, args.batch, problem, head);
    return static_cast<const uint8_t*>(mask.data)[first + i * mask.row + j * mask.col] == 0;
}

// One head: S, L, P, and the tangents Ṡ and L̇.
template <class T>
struct Head {
    const AttentionArgs<T>& args;
    Operands primal, tangent;
    Dense scores, lse, p, scores_tangent, lse_tangent;

    Head(const AttentionArgs<T>& args_, int64_t problem, int64_t head)
        : args(args_),
          primal(operands(args_, args_.primal, problem, head)),
          tangent(operands(args_, args_.tangent, problem, head)) {
        const int64_t n = args.queries;
        const int64_t m = args.keys;
        const int64_t d = args.d;
        const double infinity = std::numeric_limits<double>::infinity();
        const auto scale = static_cast<double>(args.scale);
        scores = primal.mask;
        add_product(n, m, d, scale, primal.q, d, 1, primal.k, 1, d, scores);
        scores_tangent = tangent.mask;
        add_product(n, m, d, scale, tangent.q, d, 1, primal.k, 1, d, scores_tangent);
        add_product(n, m, d, scale, primal.q, d, 1, tangent.k, 1, d, scores_tangent);
        p.assign(static_cast<size_t>(n * m), 0.0);
        lse.assign(static_cast<size_t>(n), -infinity);
        lse_tangent.assign(static_cast<size_t>(n), 0.0);
        for (int64_t i = 0; i < n; ++i) {
            double* row = scores.data() + i * m;
            double most = -infinity;
            for (int64_t j = 0; j < m; ++j) {
                row[j] = hidden(args, problem, head, i, j) ? -infinity : row[j];
                most = std::max(most, row[j]);
            }
            if (most == -infinity) {
                continue;
            }
            double sum = 0.0;
            for (int64_t j = 0; j < m; ++j) {
                sum += std::exp(row[j] - most);
            }
            lse[static_cast<size_t>(i)] = most + std::log(sum);
            for (int64_t j = 0; j < m; ++j) {
                const auto at = static_cast<size_t>(i * m + j);
                p[at] = std::exp(row[j] - lse[static_cast<size_t>(i)]);
                lse_tangent[static_cast<size_t>(i)] += p[at] * scores_tangent[at];
            }
        }
    }

    Dense out() const {
        Dense result(static_cast<size_t>(args.queries * args.dv), 0.0);
        add_product(args.queries, args.dv, args.keys, 1.0, p, args.keys, 1, primal.v, args.dv, 1, result);
        return result;
    }

    Dense out_tangent() const {
        Dense weighed(p.size());
        for (size_t at = 0; at < p.size(); ++at) {
            weighed[at] = p[at] * scores_tangent[at];
        }
        Dense result = out();
        for (int64_t i = 0; i < args.queries; ++i) {
            for (int64_t c = 0; c < args.dv; ++c) {
                result[static_cast<size_t>(i * args.dv + c)] *= -lse_tangent[static_cast<size_t>(i)];
            }
        }
        add_product(args.queries, args.dv, args.keys, 1.0, weighed, args.keys, 1, primal.v, args.dv, 1, result);
        add_product(args.queries, args.dv, args.keys, 1.0, p, args.keys, 1, tangent.v, args.dv, 1, result);
        return result;
    }
};

double row_dot(const Dense& a, const Dense& b, int64_t row, int64_t cols) {
    double sum = 0.0;
    for (int64_t c = 0; c < cols; ++c) {
        sum += a[static_cast<size_t>(row * cols + c)] * b[static_cast<size_t>(row * cols + c)];
    }
    return sum;
}

template <class T>
void put(const Dense& from, T* to) {
    for (size_t at = 0; at < from.size(); ++at) {
        to[at] = static_cast<T>(from[at]);
    }
}

template <class T>
void add(const Dense& from, T* to) {
    for (size_t at = 0; at < from.size(); ++at) {
        to[at] = static_cast<T>(static_cast<double>(to[at]) + from[at]);
    }
}

template <class T>
Status outputs(const AttentionArgs<T>& args, bool tangent) {
    for (int64_t index = 0; index < args.batch.count() * args.heads; ++index) {
        const Head<T> head(args, index / args.heads, index % args.heads);
        put(tangent ? head.out_tangent() : head.out(), args.out + index * args.queries * args.dv);
        if (args.lse != nullptr) {
            put(tangent ? head.lse_tangent : head.lse, args.lse + index * args.queries);
        }
    }
    return Status::ok;
}

template <class T>
void zero_grads(const AttentionArgs<T>& args) {
    const int64_t problems = args.batch.count();
    std::fill_n(args.q_grad, problems * args.heads * args.queries * args.d, T(0));
    std::fill_n(args.k_grad, problems * args.kv_heads * args.keys * args.d, T(0));
    std::fill_n(args.v_grad, problems * args.kv_heads * args.keys * args.dv, T(0));
    if (args.mask_grad.data == nullptr) {
        return;
    }
    // Each element of the gradient once: dimensions of stride 0, over which the mask is broadcast, are left out.
    const AttentionMaskGrad<T>& mask = args.mask_grad;
    std::vector<std::pair<int64_t, int64_t>> dims;  // sizes and strides
    for (int dim = 0; dim < args.batch.dims; ++dim) {
        dims.emplace_back(args.batch.size[dim], mask.batch[dim]);
    }
    dims.emplace_back(args.heads, mask.head);
    dims.emplace_back(args.queries, mask.row);
    dims.emplace_back(args.keys, mask.col);
    int64_t count = 1;
    for (const auto& [size, stride] : dims) {
        count *= stride != 0 ? size : 1;
    }
    for (int64_t index = 0; index < count; ++index) {
        int64_t offset = 0;
        int64_t rest = index;
        for (const auto& [size, stride] : dims) {
            if (stride != 0) {
                offset += rest % size * stride;
                rest /= size;
            }
        }
        mask.data[offset] = T(0);
    }
}

template <class T>
Status gradients(const AttentionArgs<T>& args, bool tangent) {
    const int64_t n = args.queries;
    const int64_t m = args.keys;
    const int64_t d = args.d;
    const int64_t dv = args.dv;
    const auto scale = static_cast<double>(args.scale);
    zero_grads(args);
    for (int64_t index = 0; index < args.batch.count() * args.heads; ++index) {
        const Head<T> head(args, index / args.heads, index % args.heads);
        const Operands& x = head.primal;
        const Operands& x_tangent = head.tangent;
        const Dense out = head.out();
        const Dense out_tangent = head.out_tangent();
        const auto zeros = [](int64_t count) { return Dense(static_cast<size_t>(count), 0.0); };
        Dense dp = zeros(n * m);
        Dense dp_tangent = zeros(n * m);
        add_product(n, m, dv, 1.0, x.grad, dv, 1, x.v, 1, dv, dp);
        add_product(n, m, dv, 1.0, x_tangent.grad, dv, 1, x.v, 1, dv, dp_tangent);
        add_product(n, m, dv, 1.0, x.grad, dv, 1, x_tangent.v, 1, dv, dp_tangent);
        Dense ds = zeros(n * m);
        Dense ds_tangent = zeros(n * m);
        Dense p_tangent = zeros(n * m);
        for (int64_t i = 0; i < n; ++i) {
            const auto row = static_cast<size_t>(i);
            const double delta = row_dot(x.grad, out, i, dv) - x.grad_lse[row];
            const double delta_tangent =
                row_dot(x_tangent.grad, out, i, dv) + row_dot(x.grad, out_tangent, i, dv) - x_tangent.grad_lse[row];
            for (int64_t j = 0; j < m; ++j) {
                const auto at = static_cast<size_t>(i * m + j);
                p_tangent[at] = head.p[at] * (head.scores_tangent[at] - head.lse_tangent[row]);
                ds[at] = head.p[at] * (dp[at] - delta);
                ds_tangent[at] = p_tangent[at] * (dp[at] - delta) + head.p[at] * (dp_tangent[at] - delta_tangent);
            }
        }
        Dense q_grad = zeros(n * d);
        Dense k_grad = zeros(m * d);
        Dense v_grad = zeros(m * dv);
        if (tangent) {
            add_product(n, d, m, scale, ds_tangent, m, 1, x.k, d, 1, q_grad);
            add_product(n, d, m, scale, ds, m, 1, x_tangent.k, d, 1, q_grad);
            add_product(m, d, n, scale, ds_tangent, 1, m, x.q, d, 1, k_grad);
            add_product(m, d, n, scale, ds, 1, m, x_tangent.q, d, 1, k_grad);
            add_product(m, dv, n, 1.0, p_tangent, 1, m, x.grad, dv, 1, v_grad);
            add_product(m, dv, n, 1.0, head.p, 1, m, x_tangent.grad, dv, 1, v_grad);
        } else {
            add_product(n, d, m, scale, ds, m, 1, x.k, d, 1, q_grad);
            add_product(m, d, n, scale, ds, 1, m, x.q, d, 1, k_grad);
            add_product(m, dv, n, 1.0, head.p, 1, m, x.grad, dv, 1, v_grad);
        }
        const int64_t kv_head = index / (args.heads / args.kv_heads);
        put(q_grad, args.q_grad + index * n * d);
        add(k_grad, args.k_grad + kv_head * m * d);
        add(v_grad, args.v_grad + kv_head * m * dv);
        if (args.mask_grad.data != nullptr) {
            const AttentionMaskGrad<T>& grad = args.mask_grad;
            T* to = grad.data + offset_of(grad.batch, grad.head, args.batch, index / args.heads, index % args.heads);
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j < m; ++j) {
                    const auto at = static_cast<size_t>(i * m + j);
                    to[i * grad.row + j * grad.col] += static_cast<T>(tangent ? ds_tangent[at] : ds[at]);
                }
            }
        }
    }
    return Status::ok;
}

}  // namespace

template <class T>
Status attention_forward(const AttentionArgs<T>& args) {
    return outputs(args, false);
}

template <class T>
Status attention_jvp(const AttentionArgs<T>& args) {
    return outputs(args, true);
}

template <class T>
Status attention_backward(const AttentionArgs<T>& args) {
    return gradients(args, false);
}

template <class T>
Status attention_backward_jvp(const AttentionArgs<T>& args) {
    return gradients(args, true);
}

template Status attention_forward(const AttentionArgs<float>&);
template Status attention_forward(const AttentionArgs<double>&);
template Status attention_jvp(const AttentionArgs<float>&);
template Status attention_jvp(const AttentionArgs<double>&);
template Status attention_backward(const AttentionArgs<float>&);
template Status attention_backward(const AttentionArgs<double>&);
template Status attention_backward_jvp(const AttentionArgs<float>&);
template Status attention_backward_jvp(const AttentionArgs<double>&);

}  // namespace onestep::reference
