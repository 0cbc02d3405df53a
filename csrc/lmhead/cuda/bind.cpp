#include "base/cuda/bind.hpp"

#include "lmhead/cuda/lmhead.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::Operand;
using bindings::pointer;
using py::literals::operator""_a;

template <class U>
lmhead::cuda::Strided<U> strided(const Operand& operand) {
    const Batched<const U> vector = bindings::batched<const U>(operand, 1);
    return {vector.data, vector.row};
}

template <class T, class Input>
lmhead::cuda::HeadChunk<T, Input> chunk_of(int64_t rows, int64_t classes, Address logits, Address logits_tangent,
                                           int64_t leading, const Operand& bias, const Operand& bias_tangent,
                                           const Operand& target, const Operand& row_weight,
                                           const Operand& row_weight_tangent, int64_t ignore_index,
                                           double label_smoothing, Address statistics) {
    lmhead::cuda::HeadChunk<T, Input> chunk;
    chunk.rows = rows;
    chunk.classes = classes;
    chunk.logits = pointer<T>(logits);
    chunk.logits_tangent = pointer<T>(logits_tangent);
    chunk.leading = leading;
    chunk.bias = strided<Input>(bias);
    chunk.bias_tangent = strided<Input>(bias_tangent);
    chunk.target = strided<int64_t>(target);
    chunk.row_weight = strided<T>(row_weight);
    chunk.row_weight_tangent = strided<T>(row_weight_tangent);
    chunk.ignore_index = ignore_index;
    chunk.label_smoothing = label_smoothing;
    chunk.statistics = pointer<T>(statistics);
    return chunk;
}

template <class T, class Input>
void register_chunks(py::module_& module, const std::string& suffix) {
    using Chunk = lmhead::cuda::HeadChunk<T, Input>;
    py::class_<Chunk>(module, ("HeadChunk_" + suffix).c_str())
        .def(py::init(&chunk_of<T, Input>), "rows"_a, "classes"_a, "logits"_a, "logits_tangent"_a, "leading"_a,
             "bias"_a, "bias_tangent"_a, "target"_a, "row_weight"_a, "row_weight_tangent"_a, "ignore_index"_a,
             "label_smoothing"_a, "statistics"_a)
        .def(
            "statistics",
            [](const Chunk& chunk, int64_t first, int64_t count, Address losses, Address values, int device,
               Address stream) {
                bindings::run_on_device(device, [&] {
                    return lmhead::cuda::head_statistics(chunk, first, count, pointer<T>(losses),
                                                         pointer<double>(values), bindings::stream_of(stream));
                });
            },
            "first"_a, "count"_a, "losses"_a, "values"_a, "device"_a, "stream"_a)
        .def(
            "bias_gradient",
            [](const Chunk& chunk, Address grad_bias, int device, Address stream) {
                bindings::run_on_device(device, [&] {
                    return lmhead::cuda::head_bias_gradient(chunk, pointer<T>(grad_bias), bindings::stream_of(stream));
                });
            },
            "grad_bias"_a, "device"_a, "stream"_a)
        .def(
            "gradient",
            [](const Chunk& chunk, bool cross, Address scale, int device, Address stream) {
                bindings::run_on_device(device, [&] {
                    return lmhead::cuda::head_gradient(chunk, cross, pointer<const T>(scale),
                                                       bindings::stream_of(stream));
                });
            },
            "cross"_a, "scale"_a, "device"_a, "stream"_a);
}

template <class T>
void bind_value(int64_t count, Address values, Address value, int device, Address stream) {
    bindings::run_on_device(device, [&] {
        return lmhead::cuda::head_value(count, pointer<const double>(values), pointer<T>(value),
                                        bindings::stream_of(stream));
    });
}

}  // namespace

void register_lmhead_cuda(py::module_& module) {
    register_chunks<float, float>(module, "f32");
    register_chunks<double, double>(module, "f64");
    register_chunks<float, lmhead::cuda::bfloat16>(module, "bf16");
    register_chunks<float, lmhead::cuda::float16>(module, "f16");
    module.def("head_value_f32", bind_value<float>, "count"_a, "values"_a, "value"_a, "device"_a, "stream"_a);
    module.def("head_value_f64", bind_value<double>, "count"_a, "values"_a, "value"_a, "device"_a, "stream"_a);
}

}  // namespace onestep
