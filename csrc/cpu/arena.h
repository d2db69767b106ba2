// Scratch memory for one call of a kernel: one allocation, cut into pieces that begin on cache lines.
#pragma once

#include <cstdlib>

#include "fastfood.h"
#include "simd.h"

namespace hsaid {

namespace {

struct Arena {
  char* memory;
  int64_t used = 0;

  explicit Arena(int64_t bytes) : memory((char*)aligned_alloc(kLineBytes, round(bytes))) {
    if (!memory) out_of_memory(bytes);
  }
  ~Arena() { free(memory); }
  Arena(const Arena&) = delete;

  static int64_t round(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }
  template <class T>
  T* take(int64_t count) {
    T* piece = (T*)(memory + used);
    used += round(count * (int64_t)sizeof(T));
    return piece;
  }
};

}  // namespace

}  // namespace hsaid
