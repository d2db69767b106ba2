#include "buffer_pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hsaid {

namespace {

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;

// Rounded up to huge pages, a small buffer would be much larger.
int64_t page_of(int64_t bytes) { return bytes < 8 * kHugePage ? kPage : kHugePage; }
int64_t rounded(int64_t bytes) { return (bytes + page_of(bytes) - 1) / page_of(bytes) * page_of(bytes); }

// Bytes kept beside the largest buffer: the blocks of a model have several sizes, which alternate in every step.
constexpr int64_t kBeside = int64_t{64} << 20;

struct Buffer {
  void* memory;
  int64_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Buffer> kept;  // one of each size, the oldest first

  // The kept buffer of this size, no longer the pool's; null if there is none.
  void* release(int64_t bytes) {
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].bytes == bytes) {
        void* memory = kept[i].memory;
        kept.erase(kept.begin() + i);
        return memory;
      }
    return nullptr;
  }

  // Frees the oldest buffers until, with one of `bytes` bytes more, all but the largest take at most kBeside.
  void make_room(int64_t bytes) {
    for (;;) {
      int64_t largest = bytes, total = bytes;
      for (const Buffer& buffer : kept) {
        largest = std::max(largest, buffer.bytes);
        total += buffer.bytes;
      }
      if (kept.empty() || total <= largest + kBeside) return;
      std::free(kept.front().memory);
      kept.erase(kept.begin());
    }
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
    if (void* memory = pool().release(bytes)) return memory;
    pool().make_room(bytes);
  }
  void* buffer = std::aligned_alloc(page_of(bytes), bytes);
#if defined(__linux__)
  if (buffer && page_of(bytes) == kHugePage) madvise(buffer, bytes, MADV_HUGEPAGE);
#endif
  return buffer;
}

void give_buffer(void* buffer, int64_t bytes) {
  bytes = rounded(bytes);
  std::lock_guard<std::mutex> lock(pool().mutex);
  std::free(pool().release(bytes));
  pool().make_room(bytes);
  pool().kept.push_back({buffer, bytes});
}

void free_buffer(void* buffer) { std::free(buffer); }

int64_t empty_pool() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  int64_t bytes = 0;
  for (const Buffer& buffer : pool().kept) {
    bytes += buffer.bytes;
    std::free(buffer.memory);
  }
  pool().kept.clear();
  return bytes;
}

}  // namespace hsaid
