// What the CUDA bindings of all families share. Every entry takes `device` (index) and `stream` (address) beside the
// operands, releases the GIL and never waits for the device.
#pragma once

#include <string>

#include "base/cuda/runtime.hpp"
#include "bindings/arguments.hpp"

namespace onestep::bindings {

inline cudaStream_t stream_of(Address address) { return reinterpret_cast<cudaStream_t>(address); }

// Runs kernel() on a device without the GIL; a status that is not ok becomes an exception.
template <class Kernel>
void run_on_device(int device, const Kernel& kernel) {
    Status status = Status::ok;
    {
        pybind11::gil_scoped_release release;
        const cuda::DeviceGuard guard(device);
        status = guard.status() == Status::ok ? kernel() : guard.status();
    }
    if (status == Status::device_error) {
        throw std::runtime_error("CUDA: " + cuda::last_device_error());
    }
    run([status] { return status; });
}

}  // namespace onestep::bindings
