// Memory for the forward's output, kept when its tensor is gone and handed out again; in huge pages where the system
// has them. torch's own allocator gives hundreds of megabytes back to the system when a step is over, and the next step
// spends ten times the projection's time on page faults; and once a block has run, it puts activations where the
// block's weights were, so that the next block's need new memory.
#pragma once

#include <cstdint>

namespace hsaid {

// A buffer of at least `bytes` bytes, on a page boundary; null where there is no memory.
void* take_buffer(int64_t bytes);
// Back into the pool, which keeps one buffer of each size, and frees the oldest where all together take much more than
// the largest.
void give_buffer(void* buffer, int64_t bytes);
// Frees it instead.
void free_buffer(void* buffer);
// Frees what the pool keeps; returns its bytes.
int64_t empty_pool();

}  // namespace hsaid
