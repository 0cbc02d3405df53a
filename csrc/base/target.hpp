// CPU targets: which instruction set the kernels run with.
//
// Every kernel body (`*-inl.hpp`) is compiled once per target in a namespace of its own, and reached only through the
// table of function pointers of the active target, so that no instruction of a higher target is executed on a lower
// CPU.
#pragma once

namespace onestep {

// amx uses avx512's kernels, but has kernels of its own for products of bfloat16 matrices.
enum class Target : int { generic = 0, avx2 = 1, avx512 = 2, amx = 3 };

inline constexpr int kTargetCount = 4;

// "generic", "avx2", "avx512" or "amx".
const char* target_name(Target target);

// Whether this build contains the target and this CPU (and operating system) can run it.
bool target_supported(Target target);

// The target in use. Starts as the best supported one.
Target active_target();

enum class SelectResult : int { ok = 0, unknown = 1, unsupported = 2 };

// Makes the named target the active one; changes nothing unless the result is `ok`.
SelectResult select_target(const char* name);

// Picks the active target's table out of those of all targets.
template <class Table>
const Table& active_table(const Table& generic) {
    return generic;
}
template <class Table>
const Table& active_table(const Table& generic, const Table& avx2, const Table& avx512, const Table& amx) {
    const Table* const tables[kTargetCount] = {&generic, &avx2, &avx512, &amx};
    return *tables[static_cast<int>(active_target())];
}

}  // namespace onestep

// Declares a family's table of kernels in the namespace of every target: onestep::family::target::name. The type comes
// last, since it may hold commas. To be used within namespace onestep.
#define ONESTEP_TABLE_OF(family, target, name, ...) \
    namespace family::target {                      \
    extern const __VA_ARGS__ name;                  \
    }
#ifdef ONESTEP_X86_TARGETS
#define ONESTEP_DECLARE_TABLE(family, name, ...)         \
    ONESTEP_TABLE_OF(family, generic, name, __VA_ARGS__) \
    ONESTEP_TABLE_OF(family, avx2, name, __VA_ARGS__)    \
    ONESTEP_TABLE_OF(family, avx512, name, __VA_ARGS__)
#else
#define ONESTEP_DECLARE_TABLE(family, name, ...) ONESTEP_TABLE_OF(family, generic, name, __VA_ARGS__)
#endif
// Declares a table that the amx target has of its own.
#ifdef ONESTEP_AMX_TARGET
#define ONESTEP_DECLARE_AMX_TABLE(family, name, ...) ONESTEP_TABLE_OF(family, amx, name, __VA_ARGS__)
#else
#define ONESTEP_DECLARE_AMX_TABLE(family, name, ...)
#endif

// The active target's table of this name; _AMX_ for tables that amx has of its own. A plan looks it up once for each
// call.
#ifdef ONESTEP_X86_TARGETS
#define ONESTEP_KERNELS(family, name) \
    active_table(family::generic::name, family::avx2::name, family::avx512::name, family::avx512::name)
#else
#define ONESTEP_KERNELS(family, name) active_table(family::generic::name)
#endif
#ifdef ONESTEP_AMX_TARGET
#define ONESTEP_AMX_KERNELS(family, name) \
    active_table(family::generic::name, family::avx2::name, family::avx512::name, family::amx::name)
#else
#define ONESTEP_AMX_KERNELS(family, name) ONESTEP_KERNELS(family, name)
#endif
