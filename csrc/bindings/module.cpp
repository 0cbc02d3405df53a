#include <pybind11/pybind11.h>

namespace onestep {
void register_runtime(pybind11::module_& module);
void register_restored(pybind11::module_& module);
void register_compensated(pybind11::module_& module);
void register_lmhead(pybind11::module_& module);
void register_mlp(pybind11::module_& module);
void register_normal(pybind11::module_& module);
void register_polar(pybind11::module_& module);
void register_sparse(pybind11::module_& module);
void register_glm(pybind11::module_& module);
void register_attention(pybind11::module_& module);
}  // namespace onestep

// The kernels share two atomics alone (the chosen target, torch's parallel_for), and keep scratch memory per thread, so
// that free-threaded Python needs no GIL for them.
PYBIND11_MODULE(_native, module, pybind11::mod_gil_not_used()) {
    module.doc() = "onestep's compiled kernels; called through onestep.ops.";
    onestep::register_runtime(module);
    onestep::register_restored(module);
    onestep::register_compensated(module);
    onestep::register_lmhead(module);
    onestep::register_mlp(module);
    onestep::register_normal(module);
    onestep::register_polar(module);
    onestep::register_sparse(module);
    onestep::register_glm(module);
    onestep::register_attention(module);
}
