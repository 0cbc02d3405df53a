// Turns exceptions into statuses. Not in status.hpp, because kernel bodies are compiled without exceptions.
#pragma once

#include <new>

#include "base/status.hpp"

namespace onestep {

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
