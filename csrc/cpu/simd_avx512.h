// simd.h's functions for AVX-512: 16 lanes. One instruction does what takes the others several, or a loop: it looks up
// 32 floats, and it puts the halves of two vectors side by side, by a shuffle under a mask in place of a shift and a
// blend.
#pragma once

#include <immintrin.h>

#include "simd_wide.h"

namespace hsaid {

namespace {

#define HSAID_GENERATOR HSAID_INLINE

HSAID_INLINE vw part(vu x, int i) { return i ? (vw)x >> 32 : (vw)x; }
HSAID_INLINE vw multiply(vw x, uint32_t m) { return (vw)_mm512_mul_epu32((__m512i)x, (__m512i)broadcast(m)); }
HSAID_INLINE vu low_halves(const vw* x) {
  return (vu)_mm512_mask_shuffle_epi32((__m512i)x[0], 0xAAAA, (__m512i)x[1], (_MM_PERM_ENUM)0xA0);
}
HSAID_INLINE vu high_halves(const vw* x) {
  return (vu)_mm512_mask_shuffle_epi32((__m512i)x[1], 0x5555, (__m512i)x[0], (_MM_PERM_ENUM)0xF5);
}

constexpr int kNormalLoops = 1;
constexpr int kGroup = 4;

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
// The permutation takes the five lowest bits of a line.
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  const __m512 first = (__m512)load(table.values), second = (__m512)load(table.values + 16);
  unroll<kGroup>([&](auto i) HSAID_LAMBDA {  //
    x[i] = (vf)_mm512_permutex2var_ps(first, (__m512i)lines.line[i], second);
  });
}

HSAID_INLINE vf add_signed(vf sum, vf x, vf sign) { return (vf)_mm512_fmadd_ps((__m512)x, (__m512)sign, (__m512)sum); }

HSAID_INLINE vu load_repeated(const uint32_t* p) {
  return (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
}

HSAID_INLINE vf load_as_float(const fp16* p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
HSAID_INLINE vh narrow(vf x, fp16) {
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HSAID_INLINE bool any_nan(vf a, vf b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }

constexpr bool kStreams = true;
HSAID_INLINE void stream_out(uint32_t* p, vu x) { _mm512_stream_si512((__m512i*)p, (__m512i)x); }
HSAID_INLINE void finish_streaming() { _mm_sfence(); }

}  // namespace

}  // namespace hsaid
