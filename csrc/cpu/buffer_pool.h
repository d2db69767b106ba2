// Memory for the forward's output.  The allocator behind torch's CPU tensors gives hundreds of megabytes back to the
// system when a step is over, and the next step then spends ten times the projection's time on page faults; and in the
// place of a block's weights, freed when the block has run, it puts activations, so that the next block's need a new
// one.  So the last buffers are kept and handed out again.  Huge pages where the system has them.
#pragma once

#include <cstdint>

namespace hsaid {

// A buffer of at least `bytes` bytes, on a page boundary; null where there is no memory.
void* take_buffer(int64_t bytes);
// Back into the pool, which keeps one buffer of each size, and frees the oldest where they take much more than the
// largest.
void give_buffer(void* buffer, int64_t bytes);
// Frees what the pool keeps; returns its bytes.
int64_t empty_pool();

}  // namespace hsaid
