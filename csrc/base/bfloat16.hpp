// bfloat16 as the kernels read it: the upper half of a float.
#pragma once

#include <cstdint>

namespace onestep {

struct BFloat16 {
    uint16_t bits = 0;
};

}  // namespace onestep
