#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "base/parallel.hpp"
#include "base/target.hpp"
#include "base/workspace.hpp"

namespace onestep {
namespace {

std::vector<std::string> supported_targets() {
    std::vector<std::string> names;
    for (int index = 0; index < kTargetCount; ++index) {
        if (target_supported(static_cast<Target>(index))) {
            names.emplace_back(target_name(static_cast<Target>(index)));
        }
    }
    return names;
}

void select_or_throw(const std::string& name) {
    const SelectResult result = select_target(name.c_str());
    if (result == SelectResult::ok) {
        return;
    }
    std::string message = "CPU target '" + name + "' is ";
    message += result == SelectResult::unknown ? "not known to onestep" : "not supported by this machine or build";
    message += "; expected one of:";
    for (const std::string& supported : supported_targets()) {
        message += " " + supported;
    }
    throw std::invalid_argument(message);
}

}  // namespace

void register_runtime(pybind11::module_& module) {
    module.def("active_target", [] { return target_name(active_target()); });
    module.def("supported_targets", supported_targets);
    module.def("select_target", select_or_throw, pybind11::arg("name"));
    module.def(
        "set_thread_count",
        [](std::uintptr_t address) { set_thread_count(reinterpret_cast<ThreadCountFunction>(address)); },
        pybind11::arg("address"));
    module.def("set_own_thread_count", set_own_thread_count, pybind11::arg("threads"));
    // For tests; see base/workspace.hpp and base/parallel.hpp.
    module.def("refuse_workspace", refuse_workspace, pybind11::arg("n"));
    module.def("release_workspaces", release_workspaces);
    module.def("set_least_parallel_nanoseconds", set_least_parallel_nanoseconds, pybind11::arg("nanoseconds"));
    module.def("thread_source", [] {
        switch (thread_source()) {
            case ThreadSource::pool:
                return "pool";
            case ThreadSource::serial_after_fork:
                return "serial (forked child)";
            case ThreadSource::serial:
                break;
        }
        return "serial";
    });
}

}  // namespace onestep
