// CPU targets: which instruction set the kernels run with.
//
// Every kernel body (`*-inl.hpp`) is compiled once per target in a namespace of its own, and reached only through the
// table of function pointers of the active target, so that no instruction of a higher target is executed on a lower
// CPU.
#pragma once

namespace onestep {

enum class Target : int { generic = 0, avx2 = 1, avx512 = 2 };

inline constexpr int kTargetCount = 3;

// "generic", "avx2" or "avx512".
const char* target_name(Target target);

// Whether this build contains the target and this CPU (and operating system) can run it.
bool target_supported(Target target);

// The target in use. Starts as the best supported one.
Target active_target();

enum class SelectResult : int { ok = 0, unknown = 1, unsupported = 2 };

// Makes the named target the active one; changes nothing unless the result is `ok`.
SelectResult select_target(const char* name);

}  // namespace onestep
