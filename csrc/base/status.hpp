// Status codes that every kernel entry returns; bindings turn them into Python exceptions.
#pragma once

#include <new>

namespace onestep {

enum class [[nodiscard]] Status : int {
    ok = 0,
    out_of_memory = 1,
    thread_pool_error = 2,
    negative_weight = 3,
    negative_ridge = 4,
    device_error = 5,  // a CUDA launch; see base/cuda/runtime.hpp for its text
    unexpected_exception = 6,
};

// Calls body(), which returns a Status, and turns an exception into one: nothing is thrown across the C interface of a
// thread pool, nor out of a kernel entry.
template <class Body>
Status guarded(const Body& body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    } catch (...) {
        return Status::unexpected_exception;
    }
}

}  // namespace onestep
