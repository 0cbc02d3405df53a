// What host code needs of the CUDA runtime: streams, the device's limits, and errors as text. The same names exist
// where kernels are compiled for the emulator (ONESTEP_SIMT), so that code above does not ask which it is.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.hpp"

#if defined(ONESTEP_SIMT)
using cudaStream_t = struct SimtStream*;
#else
#include <cuda_runtime_api.h>
#endif

namespace onestep::cuda {

// Elements of operands beside float and double; numbers.cuh computes with them.
struct bfloat16;
struct float16;

// What dispatch depends on.
struct DeviceLimits {
    int multiprocessors = 0;
    int64_t shared_bytes = 0;  // that one block can have, with the opt-in
    int capability = 0;        // major * 10 + minor
};

// Of the calling thread's current device. Never waits for the device.
const DeviceLimits& device_limits();

// Names of the devices that the driver sees; empty without one.
std::vector<std::string> device_names();

// Keeps `message` for the calling thread and returns Status::device_error.
Status device_error(const std::string& message);
const std::string& last_device_error();

// Makes `device` current for the life of the object.
class DeviceGuard {
 public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    Status status() const { return status_; }

 private:
    int previous_ = -1;
    Status status_ = Status::ok;
};

}  // namespace onestep::cuda
