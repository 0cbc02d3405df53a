#include <pybind11/pybind11.h>

namespace onestep {
void register_runtime(pybind11::module_& module);
void register_lmhead(pybind11::module_& module);
void register_mlp(pybind11::module_& module);
void register_normal(pybind11::module_& module);
void register_glm(pybind11::module_& module);
void register_attention(pybind11::module_& module);
}  // namespace onestep

PYBIND11_MODULE(_native, module) {
    module.doc() = "onestep's compiled kernels; called through onestep.ops.";
    onestep::register_runtime(module);
    onestep::register_lmhead(module);
    onestep::register_mlp(module);
    onestep::register_normal(module);
    onestep::register_glm(module);
    onestep::register_attention(module);
}
