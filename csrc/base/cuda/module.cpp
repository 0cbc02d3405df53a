// The extension module _native_cuda, or _native_cuda_emulated where kernels run on the emulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "base/cuda/runtime.hpp"

namespace onestep {
#define ONESTEP_CUDA_FAMILY(name) void register_##name##_cuda(pybind11::module_& module);
#include "cuda_families.inc"
#undef ONESTEP_CUDA_FAMILY
}  // namespace onestep

namespace {

void fill(pybind11::module_& module) {
    module.def("device_names", onestep::cuda::device_names);
    module.def("capability", [](int device) {
        const onestep::cuda::DeviceGuard guard(device);
        return onestep::cuda::device_limits().capability;
    });
#define ONESTEP_CUDA_FAMILY(name) onestep::register_##name##_cuda(module);
#include "cuda_families.inc"
#undef ONESTEP_CUDA_FAMILY
}

}  // namespace

#if defined(ONESTEP_SIMT)
PYBIND11_MODULE(_native_cuda_emulated, module) {
    module.doc() = "onestep's CUDA kernels on an emulator of the GPU, for tests.";
    module.attr("architectures") = "emulated";
    fill(module);
}
#else
PYBIND11_MODULE(_native_cuda, module) {
    module.doc() = "onestep's CUDA kernels; called through onestep.ops.";
    module.attr("architectures") = ONESTEP_CUDA_ARCHITECTURES;
    fill(module);
}
#endif
