// Keeps subnormal numbers. A process may have switched them off (torch.set_flush_denormal), for some of its threads or
// for all, and the same call would give other bits.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hsaid {

namespace {

// While it lives, this thread keeps subnormals and rounds to nearest.
struct KeepSubnormals {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  KeepSubnormals() { _mm_setcsr(0x1f80); }
  ~KeepSubnormals() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  KeepSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, xzr" ::: "memory");
  }
  ~KeepSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved) : "memory"); }
#endif
};

}  // namespace

}  // namespace hsaid
