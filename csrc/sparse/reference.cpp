#include "sparse/sparse.hpp"

namespace onestep::reference {
namespace {

template <class T, class Index>
Status multiply(const SparseMultiplyArgs<T>& args) {
    const auto* offsets = static_cast<const Index*>(args.offsets);
    const auto* indices = static_cast<const Index*>(args.indices);
    for (int64_t r = 0; r < args.n; ++r) {
        if (offsets[r] < 0 || offsets[r + 1] < offsets[r] || offsets[r + 1] > args.elements) {
            return Status::bad_index;
        }
        for (int64_t c = 0; c < args.k; ++c) {
            double sum = 0.0;
            for (int64_t e = offsets[r]; e < offsets[r + 1]; ++e) {
                if (indices[e] < 0 || indices[e] >= args.d) {
                    return Status::bad_index;
                }
                sum += static_cast<double>(args.values[e]) * static_cast<double>(args.v[indices[e] * args.k + c]);
            }
            args.out[r * args.k + c] = static_cast<T>(sum);
        }
    }
    return Status::ok;
}

}  // namespace

template <class T>
Status sparse_multiply(const SparseMultiplyArgs<T>& args) {
    return args.wide ? multiply<T, int64_t>(args) : multiply<T, int32_t>(args);
}

template Status sparse_multiply(const SparseMultiplyArgs<float>&);
template Status sparse_multiply(const SparseMultiplyArgs<double>&);

}  // namespace onestep::reference
