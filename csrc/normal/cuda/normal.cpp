// The choice of the size class.
#include "normal/cuda/normal.hpp"

namespace onestep::normal::cuda {

template <class T>
int64_t most_columns(int64_t d) {
    return d <= kSmallFeatures ? 4 : middle_columns<T>(d);
}

template <class T>
Status system(const SystemArgs<T>& args, cudaStream_t stream) {
    if (args.batch.count() == 0 || args.d == 0) {
        return Status::ok;
    }
    if (args.d > kMostFeatures || args.k > most_columns<T>(args.d)) {
        return onestep::cuda::device_error("d = " + std::to_string(args.d) + ", k = " + std::to_string(args.k) +
                                           " in one call; expected d up to " + std::to_string(kMostFeatures) +
                                           ", k up to " + std::to_string(most_columns<T>(args.d)));
    }
    return args.d <= kSmallFeatures ? small_system(args, stream) : middle_system(args, stream);
}

template <class T>
Status factor_solve(const FactorSolveArgs<T>& args, cudaStream_t stream) {
    if (args.batch.count() == 0 || args.d == 0 || args.k == 0) {
        return Status::ok;
    }
    if (args.d > kMostFeatures) {
        return onestep::cuda::device_error("d = " + std::to_string(args.d) + " in one call; expected up to " +
                                           std::to_string(kMostFeatures));
    }
    return args.d <= kSmallFeatures ? small_factor_solve(args, stream) : middle_factor_solve(args, stream);
}

template <class T>
Status condition(const ConditionArgs<T>& args, cudaStream_t stream) {
    if (args.count == 0 || args.d == 0) {
        return Status::ok;
    }
    if (args.d > kSmallFeatures) {
        return onestep::cuda::device_error("d = " + std::to_string(args.d) + "; expected up to " +
                                           std::to_string(kSmallFeatures));
    }
    return small_condition(args, stream);
}

#define ONESTEP_INSTANTIATE(T)                                             \
    template int64_t most_columns<T>(int64_t);                             \
    template Status system(const SystemArgs<T>&, cudaStream_t);            \
    template Status factor_solve(const FactorSolveArgs<T>&, cudaStream_t); \
    template Status condition(const ConditionArgs<T>&, cudaStream_t);

ONESTEP_INSTANTIATE(float)
ONESTEP_INSTANTIATE(double)

#undef ONESTEP_INSTANTIATE

}  // namespace onestep::normal::cuda
