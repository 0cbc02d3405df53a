#include "base/cuda/runtime.hpp"

#include <mutex>

namespace onestep::cuda {
namespace {

std::string& error_text() {
    thread_local std::string text;
    return text;
}

}  // namespace

Status device_error(const std::string& message) {
    error_text() = message;
    return Status::device_error;
}

const std::string& last_device_error() { return error_text(); }

#if defined(ONESTEP_SIMT)

const DeviceLimits& device_limits() {
    // An H100's shared memory. Few multiprocessors, so that grids which follow their number stay small.
    static const DeviceLimits limits{3, 227 * 1024, 90};
    return limits;
}

std::vector<std::string> device_names() { return {"emulator"}; }

DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

#else

const DeviceLimits& device_limits() {
    constexpr int kMostDevices = 64;
    static DeviceLimits limits[kMostDevices];
    static std::once_flag known[kMostDevices];
    static const DeviceLimits none;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) {
        return none;
    }
    std::call_once(known[device], [device] {
        int shared = 0;
        int major = 0;
        int minor = 0;
        cudaDeviceGetAttribute(&limits[device].multiprocessors, cudaDevAttrMultiProcessorCount, device);
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        limits[device].shared_bytes = shared;
        limits[device].capability = major * 10 + minor;
    });
    return limits[device];
}

std::vector<std::string> device_names() {
    std::vector<std::string> names;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess) {
        cudaGetLastError();  // "no device" is an answer, not an error to keep
        return names;
    }
    for (int device = 0; device < count; ++device) {
        cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
            names.emplace_back(properties.name);
        }
    }
    return names;
}

DeviceGuard::DeviceGuard(int device) {
    int current = -1;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) {
        error = cudaSetDevice(device);
        previous_ = current;
    }
    if (error != cudaSuccess) {
        status_ = device_error(std::string("CUDA device ") + std::to_string(device) + ": " + cudaGetErrorString(error));
    }
}

DeviceGuard::~DeviceGuard() {
    if (previous_ >= 0) {
        cudaSetDevice(previous_);
    }
}

#endif

}  // namespace onestep::cuda
