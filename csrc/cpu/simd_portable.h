// simd.h's functions for any machine: 4 lanes. What vector extensions cannot say goes lane by lane, slowly, but to the
// same bits as everywhere: this serves where nothing else does, and the other instruction sets are compared with it.
#pragma once

#include "simd_wide.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hsaid {

namespace {

// Loops over lanes, inlined everywhere, would be huge.
#define HSAID_GENERATOR HSAID_NOINLINE

HSAID_INLINE vw part(vu x, int i) { return i ? (vw)x >> 32 : (vw)x; }
HSAID_INLINE vw multiply(vw x, uint32_t m) {
#if defined(__SSE2__)  // GCC sees no instruction in the other line, and makes three multiplications of it
  return (vw)_mm_mul_epu32((__m128i)x, (__m128i)broadcast(m));
#else
  return (x & 0xffffffffu) * m;
#endif
}
HSAID_INLINE vu low_halves(const vw* x) { return (vu)((x[0] & 0xffffffffu) | x[1] << 32); }
HSAID_INLINE vu high_halves(const vw* x) { return (vu)(x[0] >> 32 | x[1] >> 32 << 32); }

constexpr int kNormalLoops = 1;
constexpr int kGroup = 2;

struct Table {
  alignas(64) float values[32];
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) { table.values[line & 31] = x; }

struct Lines {
  vu line[kGroup];
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  Lines lines;
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { lines.line[i] = (vu)v[i] >> 21; });
  return lines;
}
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  unroll<kGroup>([&](auto j) HSAID_LAMBDA {
    for (int i = 0; i < kLanes; ++i) x[j][i] = table.values[lines.line[j][i] & 31];
  });
}

HSAID_INLINE vf add_signed(vf sum, vf x, vf sign) { return sum + x * sign; }

HSAID_INLINE vu load_repeated(const uint32_t* p) { return load(p); }

HSAID_INLINE vf load_as_float(const fp16* p) {
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
}
HSAID_INLINE vh narrow(vf x, fp16) {
  vh half;
  for (int i = 0; i < kLanes; ++i) {
    fp16 h;
    from_float(x[i], &h);
    half[i] = h.bits;
  }
  return half;
}
HSAID_INLINE bool any_nan(vf a, vf b) {
  int nans = 0;
  for (int i = 0; i < kLanes; ++i) nans |= a[i] != a[i] || b[i] != b[i];
  return nans;
}

constexpr bool kStreams = false;
HSAID_INLINE void stream_out(uint32_t*, vu) {}
HSAID_INLINE void finish_streaming() {}

}  // namespace

}  // namespace hsaid
