#include "buffer_pool.h"

#include <cstdlib>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hsaid {

namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

int64_t rounded(int64_t bytes) { return (bytes + kHugePage - 1) / kHugePage * kHugePage; }

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
  void* buffer = std::aligned_alloc(kHugePage, bytes);
#if defined(__linux__)
  if (buffer) madvise(buffer, bytes, MADV_HUGEPAGE);
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
