// Status codes that every kernel entry returns; bindings turn them into Python exceptions.
#pragma once

namespace onestep {

enum class [[nodiscard]] Status : int {
    ok = 0,
    out_of_memory = 1,
    thread_pool_error = 2,
    negative_weight = 3,
    negative_ridge = 4,
    device_error = 5,  // a CUDA launch; see base/cuda/runtime.hpp for its text
    unexpected_exception = 6,
    bad_index = 7,  // of a sparse matrix
};

}  // namespace onestep
