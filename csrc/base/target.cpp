#include "base/target.hpp"

#include <atomic>
#include <cstring>

#if defined(ONESTEP_AMX_TARGET) && !defined(ONESTEP_EMULATE)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace onestep {
namespace {

constexpr const char* kNames[kTargetCount] = {"generic", "avx2", "avx512", "amx"};

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

#if defined(ONESTEP_X86_TARGETS) && !defined(ONESTEP_EMULATE)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
}
#endif

#if defined(ONESTEP_AMX_TARGET) && !defined(ONESTEP_EMULATE)
bool has_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kBFloat16 = 1U << 22;
    constexpr unsigned kTile = 1U << 24;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kBFloat16) != 0 && (edx & kTile) != 0;
}

// Linux gives tile registers only to a process that asks for them, because they make signal frames 8 KiB larger.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return granted;
#else
    return false;
#endif
}
#endif

}  // namespace

const char* target_name(Target target) { return kNames[static_cast<int>(target)]; }

bool target_supported(Target target) {
    switch (target) {
        case Target::generic:
            return true;
#ifdef ONESTEP_X86_TARGETS
        case Target::avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#ifdef ONESTEP_EMULATE
        case Target::avx512:
        case Target::amx:
            return true;
#else
        case Target::avx512:
            return has_avx512();
#ifdef ONESTEP_AMX_TARGET
        case Target::amx:
            return has_avx512() && has_amx() && tiles_granted();
#endif
#endif
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
