#include "races.hpp"

#include "simt.hpp"

#if defined(ONESTEP_SIMT_TSAN)
#include <sanitizer/tsan_interface.h>

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace simt {

void release(char* order) { __tsan_release(order); }
void acquire(char* order) { __tsan_acquire(order); }

Unseen::Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}

Unseen::~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

void read_slot(const unsigned char* slots, int source, void* to, size_t bytes) {
    const Unseen unseen;
    std::memcpy(to, slots + static_cast<size_t>(source) * kSlotBytes, bytes);
}

}  // namespace simt

#else

namespace simt {

void release(char*) {}
void acquire(char*) {}
Unseen::Unseen() = default;
Unseen::~Unseen() = default;

}  // namespace simt

#endif
