// What the bindings of the CPU's and of CUDA's kernels share.
#pragma once

#include "bindings/arguments.hpp"
#include "glm/glm.hpp"

namespace onestep::bindings {

// An operand without batch dimensions. Not by Batched::at, which would need the size of T: CUDA's 16-bit types are
// declared here, but not defined.
template <class T>
Matrix<const T> matrix(const Operand& operand, size_t own) {
    const Batched<const T> whole = batched<const T>(operand, own);
    return {whole.data, whole.row, whole.col};
}

template <class X, class T>
GlmData<X, T> glm_data(int family, bool intercept, const Operand& x, const Operand& y, const Operand& labels,
                       const Operand& weight, int64_t n, int64_t d, int64_t k) {
    GlmData<X, T> data;
    data.family = static_cast<GlmFamily>(family);
    data.intercept = intercept;
    data.n = n;
    data.d = d;
    data.k = k;
    data.x = matrix<X>(x, 2);
    data.y = matrix<T>(y, 2);
    data.labels = matrix<int64_t>(labels, 1);
    data.weight = matrix<T>(weight, 1);
    return data;
}

}  // namespace onestep::bindings
