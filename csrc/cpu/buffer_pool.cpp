#include "buffer_pool.h"

#include <cstdlib>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hsaid {

namespace {

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;

// Of a small buffer, rounding up to huge pages would be a large part.
int64_t page_of(int64_t bytes) { return bytes < 8 * kHugePage ? kPage : kHugePage; }
int64_t rounded(int64_t bytes) { return (bytes + page_of(bytes) - 1) / page_of(bytes) * page_of(bytes); }

struct Pool {
  std::mutex mutex;
  void* buffer = nullptr;
  int64_t bytes = 0;

  // The kept buffer, no longer the pool's.
  void* release() {
    void* released = buffer;
    buffer = nullptr;
    bytes = 0;
    return released;
  }
};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* instance = new Pool;
  return *instance;
}

}  // namespace

void* take_buffer(int64_t bytes) {
  bytes = rounded(bytes);
  {
    std::lock_guard<std::mutex> lock(pool().mutex);
    if (pool().bytes == bytes) return pool().release();
    std::free(pool().release());  // of another size: it would only take room
  }
  void* buffer = std::aligned_alloc(page_of(bytes), bytes);
#if defined(__linux__)
  if (buffer && page_of(bytes) == kHugePage) madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
  return buffer;
}

void give_buffer(void* buffer, int64_t bytes) {
  std::lock_guard<std::mutex> lock(pool().mutex);
  std::free(pool().release());
  pool().buffer = buffer;
  pool().bytes = rounded(bytes);
}

int64_t empty_pool() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  const int64_t bytes = pool().bytes;
  std::free(pool().release());
  return bytes;
}

}  // namespace hsaid
