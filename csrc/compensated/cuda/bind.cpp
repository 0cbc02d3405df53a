#include "base/cuda/bind.hpp"

#include "compensated/cuda/compensated.hpp"

namespace onestep {
namespace {

namespace py = pybind11;
using bindings::Address;
using bindings::pointer;
using py::literals::operator""_a;

template <class T>
void bind_sweep_block(int64_t start, int64_t width, Address w, Address swept, Address factor, bool unit, int64_t rows,
                      int64_t columns, int64_t bits, bool symmetric, int64_t group_size, Address group, int64_t groups,
                      Address scale, Address zero, Address codes, Address removed, int64_t removed_row, int64_t keep,
                      int64_t of, Address error, Address change, int device, Address stream) {
    compensated::cuda::SweepBlockArgs<T> args;
    args.sweep.rows = rows;
    args.sweep.columns = columns;
    args.sweep.w = pointer<const T>(w);
    args.sweep.swept = pointer<T>(swept);
    args.sweep.factor = pointer<const T>(factor);
    args.sweep.unit = unit;
    args.sweep.bits = bits;
    args.sweep.symmetric = symmetric;
    args.sweep.group_size = group_size;
    args.sweep.group = pointer<const int64_t>(group);
    args.sweep.groups = groups;
    args.sweep.scale = pointer<T>(scale);
    args.sweep.zero = pointer<T>(zero);
    args.sweep.codes = pointer<uint8_t>(codes);
    args.sweep.keep = keep;
    args.sweep.of = of;
    args.sweep.error = pointer<double>(error);
    args.start = start;
    args.width = width;
    args.removed = pointer<const uint8_t>(removed);
    args.removed_row = removed_row;
    args.change = pointer<T>(change);
    bindings::run_on_device(device, [&] { return compensated::cuda::sweep_block(args, bindings::stream_of(stream)); });
}

template <class T>
void register_sweep_block(py::module_& module, const char* name) {
    module.def(name, bind_sweep_block<T>, "start"_a, "width"_a, "w"_a, "swept"_a, "factor"_a, "unit"_a, "rows"_a,
               "columns"_a, "bits"_a, "symmetric"_a, "group_size"_a, "group"_a, "groups"_a, "scale"_a, "zero"_a,
               "codes"_a, "removed"_a, "removed_row"_a, "keep"_a, "of"_a, "error"_a, "change"_a, "device"_a,
               "stream"_a);
}

// Where the CPU ends the block that starts at a column, too.
int64_t block_end(int64_t start, int64_t columns, int64_t bits, int64_t group_size, bool given, int64_t of) {
    const int64_t group = 0;
    SweepArgs<float> args;
    args.columns = columns;
    args.bits = bits;
    args.group_size = group_size;
    args.group = given ? &group : nullptr;
    args.of = of;
    return sweep_block_end(args, start);
}

}  // namespace

void register_compensated_cuda(py::module_& module) {
    register_sweep_block<float>(module, "sweep_block_f32");
    register_sweep_block<double>(module, "sweep_block_f64");
    module.def("sweep_block_end", block_end, "start"_a, "columns"_a, "bits"_a, "group_size"_a, "given"_a, "of"_a);
    module.def("sweep_removed", sweep_removed, "elements"_a, "sparsity"_a);
    module.attr("most_sweep_columns") = compensated::cuda::kMostBlockColumns;
}

}  // namespace onestep
