// The one rule by which a symmetric matrix is singular: a pivot is rounding noise of its diagonal element.
#pragma once

#include <limits>

namespace onestep {

// A pivot of at most so many epsilons of its diagonal element. The same number as in python/onestep/ops/singular.py.
inline constexpr int kSingularEpsilons = 8;

// What a pivot must exceed. Kernel bodies, which are compiled once per target, take the number alone.
template <class T>
T singular_floor(T diagonal) {
    const T noise = diagonal * (kSingularEpsilons * std::numeric_limits<T>::epsilon());
    return noise > T(0) ? noise : T(0);
}

}  // namespace onestep
