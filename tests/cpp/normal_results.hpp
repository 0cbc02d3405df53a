// What the tests of the normal-equations family compare.
#pragma once

#include "normal/normal.hpp"
#include "testing.hpp"

namespace onestep::testing {

template <class T>
struct Size {
    int64_t problems, n, d, k;
};

template <class T>
double tolerance(double condition) {
    return 200.0 * condition * static_cast<double>(std::numeric_limits<T>::epsilon());
}

template <class T>
struct Results {
    std::vector<T> gram, cross, solution, factor, rcond, jittered, grad_x, grad_y, grad_weight, grad_ridge, spd, packed;
    std::vector<double> moments, means;
    std::vector<int32_t> info, spd_info;
};

}  // namespace onestep::testing
