#include "base/cuda/bind.hpp"

#include "polar/cuda/polar.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::pointer;
using py::literals::operator""_a;

template <class T>
void bind_inverse(int64_t batch, int64_t n, Address a, int64_t a_matrix, int64_t a_row, Address inverse,
                  int64_t inverse_matrix, int64_t inverse_row, Address info, int offset, int device, Address stream) {
    polar::cuda::SpdInverseArgs<T> args;
    args.batch = batch;
    args.n = n;
    args.a = pointer<T>(a);
    args.a_matrix = a_matrix;
    args.a_row = a_row;
    args.inverse = pointer<T>(inverse);
    args.inverse_matrix = inverse_matrix;
    args.inverse_row = inverse_row;
    args.info = pointer<int>(info);
    args.offset = offset;
    bindings::run_on_device(device, [&] { return polar::cuda::spd_inverse(args, bindings::stream_of(stream)); });
}

template <class T>
void register_inverse(py::module_& module, const char* name) {
    module.def(name, bind_inverse<T>, "batch"_a, "n"_a, "a"_a, "a_matrix"_a, "a_row"_a, "inverse"_a, "inverse_matrix"_a,
               "inverse_row"_a, "info"_a, "offset"_a, "device"_a, "stream"_a);
}

}  // namespace

void register_polar_cuda(py::module_& module) {
    register_inverse<float>(module, "spd_inverse_f32");
    register_inverse<double>(module, "spd_inverse_f64");
    module.attr("most_inverse_order") = polar::cuda::kMostInverseOrder;
}

}  // namespace onestep
