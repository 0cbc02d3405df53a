#include "bindings/arguments.hpp"
#include "normal/normal.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;

// X in T, or in 16-bit numbers where T is float.
template <class T, class Args>
void set_x(const Operand& x, int element, Args& args) {
    const auto given = static_cast<Element>(element);
    if (given != kElement<T> && !(is_half(given) && kElement<T> == Element::float32)) {
        throw std::invalid_argument("x_element is " + std::to_string(element));
    }
    args.x_half.element = given;
    if (args.x_half) {
        args.x_half.rows = bindings::batched<const uint16_t>(x, 2);
    } else if constexpr (std::is_same_v<Args, MomentsArgs<T>>) {
        args.x = bindings::batched<const T>(x, 2).at(BatchShape{}, 0);
    } else {
        args.x = bindings::batched<const T>(x, 2);
    }
}

template <class T>
void bind_gram(const Operand& x, int x_element, const Operand& y, const Operand& weight, const bindings::Sizes& batch,
               int64_t n, int64_t d, int64_t k, Address gram_out, Address cross_out) {
    GramArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.n = n;
    args.d = d;
    args.k = k;
    set_x<T>(x, x_element, args);
    args.y = bindings::batched<const T>(y, 2);
    args.weight = bindings::batched<const T>(weight, 1);
    args.gram = bindings::pointer<T>(gram_out);
    args.cross = bindings::pointer<T>(cross_out);
    bindings::run([&] { return gram(args); });
}

template <class T>
void bind_moments(const Operand& x, int x_element, const Operand& y, const Operand& weight, int64_t n, int64_t d,
                  int64_t k, bool center, Address gram_out, Address cross_out, Address mean_out,
                  Address weight_sum_out) {
    const BatchShape single;
    MomentsArgs<T> args;
    args.n = n;
    args.d = d;
    args.k = k;
    set_x<T>(x, x_element, args);
    args.y = bindings::batched<const T>(y, 2).at(single, 0);
    args.weight = bindings::batched<const T>(weight, 1).at(single, 0);
    args.center = center;
    args.gram = bindings::pointer<double>(gram_out);
    args.cross = bindings::pointer<double>(cross_out);
    args.mean = bindings::pointer<double>(mean_out);
    args.weight_sum = bindings::pointer<double>(weight_sum_out);
    bindings::run([&] { return moments(args); });
}

template <class T>
void bind_solve_normal(const Operand& x, int x_element, const Operand& y, const Operand& weight, const Operand& ridge,
                       double uniform_ridge, const bindings::Sizes& batch, int64_t n, int64_t d, int64_t k,
                       int64_t refine, double jitter, Address solution, Address factor, Address info, Address rcond,
                       Address jittered) {
    SolveNormalArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.n = n;
    args.d = d;
    args.k = k;
    set_x<T>(x, x_element, args);
    args.y = bindings::batched<const T>(y, 2);
    args.weight = bindings::batched<const T>(weight, 1);
    args.ridge = bindings::batched<const T>(ridge, 1);
    args.uniform_ridge = uniform_ridge;
    args.refine = refine;
    args.jitter = jitter;
    args.solution = bindings::pointer<T>(solution);
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    args.rcond = bindings::pointer<T>(rcond);
    args.jittered = bindings::pointer<T>(jittered);
    bindings::run([&] { return solve_normal(args); });
}

template <class T>
void bind_solve_segments(const Operand& x, const Operand& y, Address offsets, Address indices, const Operand& weight,
                         const Operand& base, const Operand& ridge, double uniform_ridge, int64_t segments,
                         int64_t entries, int64_t rows, int64_t d, int64_t k, Address solution, Address factor,
                         Address info) {
    const BatchShape single;
    SolveSegmentsArgs<T> args;
    args.segments = segments;
    args.entries = entries;
    args.rows = rows;
    args.d = d;
    args.k = k;
    args.offsets = bindings::pointer<const int64_t>(offsets);
    args.indices = bindings::pointer<const int64_t>(indices);
    args.x = bindings::batched<const T>(x, 2).at(single, 0);
    args.y = bindings::batched<const T>(y, 2).at(single, 0);
    args.weight = bindings::batched<const T>(weight, 1).at(single, 0);
    args.base = bindings::batched<const T>(base, 2).at(single, 0);
    args.ridge = bindings::batched<const T>(ridge, 2).at(single, 0);
    args.uniform_ridge = uniform_ridge;
    args.solution = bindings::pointer<T>(solution);
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run([&] { return solve_segments(args); });
}

template <class T>
void bind_solve_normal_backward(const Operand& grad, const Operand& x, const Operand& y, const Operand& weight,
                                const Operand& solution, const Operand& factor, const Operand& info,
                                const bindings::Sizes& batch, int64_t n, int64_t d, int64_t k, Address grad_x,
                                Address grad_y, Address grad_weight, Address grad_ridge) {
    SolveNormalBackwardArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.n = n;
    args.d = d;
    args.k = k;
    args.grad = bindings::batched<const T>(grad, 2);
    args.x = bindings::batched<const T>(x, 2);
    args.y = bindings::batched<const T>(y, 2);
    args.weight = bindings::batched<const T>(weight, 1);
    args.solution = bindings::batched<const T>(solution, 2);
    args.factor = bindings::batched<const T>(factor, 2);
    args.info = bindings::batched<const int32_t>(info, 0);
    args.grad_x = bindings::pointer<T>(grad_x);
    args.grad_y = bindings::pointer<T>(grad_y);
    args.grad_weight = bindings::pointer<T>(grad_weight);
    args.grad_ridge = bindings::pointer<T>(grad_ridge);
    bindings::run([&] { return solve_normal_backward(args); });
}

template <class T>
void bind_solve_spd(const Operand& a, const Operand& b, const bindings::Sizes& batch, int64_t d, int64_t k,
                    Address solution, Address factor, Address info) {
    SolveSpdArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.d = d;
    args.k = k;
    args.a = bindings::batched<const T>(a, 2);
    args.b = bindings::batched<const T>(b, 2);
    args.solution = bindings::pointer<T>(solution);
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run([&] { return solve_spd(args); });
}

template <class T>
void bind_cholesky(const Operand& a, const bindings::Sizes& batch, int64_t d, Address factor, Address info) {
    CholeskyArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.d = d;
    args.a = bindings::batched<const T>(a, 2);
    args.factor = bindings::pointer<T>(factor);
    args.info = bindings::pointer<int32_t>(info);
    bindings::run([&] { return cholesky(args); });
}

template <class T>
void bind_cholesky_solve(const Operand& factor, const Operand& b, const bindings::Sizes& batch, int64_t d, int64_t k,
                         Address solution) {
    CholeskySolveArgs<T> args;
    args.batch = bindings::batch_shape(batch);
    args.d = d;
    args.k = k;
    args.factor = bindings::batched<const T>(factor, 2);
    args.b = bindings::batched<const T>(b, 2);
    args.solution = bindings::pointer<T>(solution);
    bindings::run([&] { return cholesky_solve(args); });
}

template <class T>
void register_normal_kernels(py::module_& module, const std::string& suffix) {
    module.def(("gram_" + suffix).c_str(), bind_gram<T>, py::arg("x"), py::arg("x_element"), py::arg("y"),
               py::arg("weight"), py::arg("batch"), py::arg("n"), py::arg("d"), py::arg("k"), py::arg("gram"),
               py::arg("cross"));
    module.def(("moments_" + suffix).c_str(), bind_moments<T>, py::arg("x"), py::arg("x_element"), py::arg("y"),
               py::arg("weight"), py::arg("n"), py::arg("d"), py::arg("k"), py::arg("center"), py::arg("gram"),
               py::arg("cross"), py::arg("mean"), py::arg("weight_sum"));
    module.def(("solve_normal_" + suffix).c_str(), bind_solve_normal<T>, py::arg("x"), py::arg("x_element"),
               py::arg("y"), py::arg("weight"), py::arg("ridge"), py::arg("uniform_ridge"), py::arg("batch"),
               py::arg("n"), py::arg("d"), py::arg("k"), py::arg("refine"), py::arg("jitter"), py::arg("solution"),
               py::arg("factor"), py::arg("info"), py::arg("rcond"), py::arg("jittered"));
    module.def(("solve_segments_" + suffix).c_str(), bind_solve_segments<T>, py::arg("x"), py::arg("y"),
               py::arg("offsets"), py::arg("indices"), py::arg("weight"), py::arg("base"), py::arg("ridge"),
               py::arg("uniform_ridge"), py::arg("segments"), py::arg("entries"), py::arg("rows"), py::arg("d"),
               py::arg("k"), py::arg("solution"), py::arg("factor"), py::arg("info"));
    module.def(("solve_normal_backward_" + suffix).c_str(), bind_solve_normal_backward<T>, py::arg("grad"),
               py::arg("x"), py::arg("y"), py::arg("weight"), py::arg("solution"), py::arg("factor"), py::arg("info"),
               py::arg("batch"), py::arg("n"), py::arg("d"), py::arg("k"), py::arg("grad_x"), py::arg("grad_y"),
               py::arg("grad_weight"), py::arg("grad_ridge"));
    module.def(("solve_spd_" + suffix).c_str(), bind_solve_spd<T>, py::arg("a"), py::arg("b"), py::arg("batch"),
               py::arg("d"), py::arg("k"), py::arg("solution"), py::arg("factor"), py::arg("info"));
    module.def(("cholesky_" + suffix).c_str(), bind_cholesky<T>, py::arg("a"), py::arg("batch"), py::arg("d"),
               py::arg("factor"), py::arg("info"));
    module.def(("cholesky_solve_" + suffix).c_str(), bind_cholesky_solve<T>, py::arg("factor"), py::arg("b"),
               py::arg("batch"), py::arg("d"), py::arg("k"), py::arg("solution"));
}

}  // namespace

void register_normal(py::module_& module) {
    register_normal_kernels<float>(module, "f32");
    register_normal_kernels<double>(module, "f64");
}

}  // namespace onestep
