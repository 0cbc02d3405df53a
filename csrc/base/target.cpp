#include "base/target.hpp"

#include <atomic>
#include <cstring>

namespace onestep {
namespace {

constexpr const char* kNames[kTargetCount] = {"generic", "avx2", "avx512"};

Target best_target() {
    for (int candidate = kTargetCount - 1; candidate > 0; --candidate) {
        if (target_supported(static_cast<Target>(candidate))) {
            return static_cast<Target>(candidate);
        }
    }
    return Target::generic;
}

std::atomic<Target>& active() {
    static std::atomic<Target> target{best_target()};
    return target;
}

}  // namespace

const char* target_name(Target target) { return kNames[static_cast<int>(target)]; }

bool target_supported(Target target) {
    switch (target) {
        case Target::generic:
            return true;
#ifdef ONESTEP_X86_TARGETS
        case Target::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        case Target::avx512:
            return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#endif
        default:
            return false;
    }
}

Target active_target() { return active().load(std::memory_order_relaxed); }

SelectResult select_target(const char* name) {
    for (int candidate = 0; candidate < kTargetCount; ++candidate) {
        if (std::strcmp(name, kNames[candidate]) == 0) {
            const auto target = static_cast<Target>(candidate);
            if (!target_supported(target)) {
                return SelectResult::unsupported;
            }
            active().store(target, std::memory_order_relaxed);
            return SelectResult::ok;
        }
    }
    return SelectResult::unknown;
}

}  // namespace onestep
