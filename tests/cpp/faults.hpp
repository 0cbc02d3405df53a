// Memory that runs out: operator new of the test binary fails on request. See attempt in testing.hpp.
#pragma once

#include <cstdint>

namespace onestep::testing {

// The n-th allocation from now on throws std::bad_alloc, those after it succeed; 0: none fails.
void fail_allocation(int64_t n);
// Whether the allocation that was last to fail was asked for.
bool allocation_failed();

// While one lives, allocations of its thread are neither counted nor failed.
class WithoutFaults {
 public:
    WithoutFaults();
    ~WithoutFaults();
    WithoutFaults(const WithoutFaults&) = delete;
    WithoutFaults& operator=(const WithoutFaults&) = delete;
};

}  // namespace onestep::testing
