// What the emulator tells ThreadSanitizer, where it is built with it: what orders the accesses of two threads.
#pragma once

namespace simt {

// What a thread did before release(order) is before what another does after an acquire(order) that comes later.
void release(char* order);
void acquire(char* order);

}  // namespace simt
