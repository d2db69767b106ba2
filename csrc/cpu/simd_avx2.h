// simd.h's functions for AVX2: 8 lanes. 32 floats are looked up byte by byte: for two tables' values of a vector that
// takes 12.5 instructions and two loads, where permutations of eight floats and blends between them, the obvious way,
// take 16, 8 of them of two micro-operations.
#pragma once

#include <immintrin.h>

#include "simd_wide.h"

namespace hsaid {

namespace {

#define HSAID_GENERATOR HSAID_INLINE

HSAID_INLINE vw multiply(vw x, uint32_t m) { return (vw)_mm256_mul_epu32((__m256i)x, (__m256i)broadcast(m)); }
// Words 0, 1, 4, 5 and 2, 3, 6, 7: one shuffle puts their halves side by side.
HSAID_INLINE vw part(vu x, int i) {
  return (vw)(i ? _mm256_unpackhi_epi32((__m256i)x, (__m256i)x) : _mm256_unpacklo_epi32((__m256i)x, (__m256i)x));
}
HSAID_INLINE vu low_halves(const vw* x) { return (vu)_mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0x88); }
HSAID_INLINE vu high_halves(const vw* x) { return (vu)_mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0xDD); }

// The lines of four vectors become the 32 bytes of one, byte shuffles take them through the table's bytes, a plane for
// each byte of a float, and unpacking weaves the planes into floats. In one loop with what the lines are made of, this
// needs more registers than there are, and is a long chain.
constexpr int kNormalLoops = 2;
constexpr int kGroup = 4;

struct Table {
  alignas(32) uint8_t bytes[4][2][16];  // [byte of a float][half of the table]
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) {
  const uint32_t i = line - kFirstLine;
  for (int byte = 0; byte < 4; ++byte) table.bytes[byte][i / 16][i % 16] = bits_from_float(x) >> 8 * byte & 0xff;
}

struct Lines {
  __m256i packed;
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  const __m256i offset = _mm256_set1_epi16((short)(0x70 - (int)kFirstLine));
  const auto line = [&](int i) HSAID_LAMBDA { return (__m256i)((vu)v[i] >> 21); };
  const __m256i s01 = _mm256_packus_epi32(line(0), line(1)), s23 = _mm256_packus_epi32(line(2), line(3));
  return {_mm256_packus_epi16(_mm256_add_epi16(s01, offset), _mm256_add_epi16(s23, offset))};
}
// A byte shuffle gives 0 where bit 7 of the index is set: each half of the table has such indices for the other.
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  const __m256i in_low = lines.packed, in_high = _mm256_xor_si256(in_low, _mm256_set1_epi8((char)0x80));
  __m256i plane[4];
  unroll<4>([&](auto byte) HSAID_LAMBDA {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.bytes[byte][0]));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.bytes[byte][1]));
    plane[byte] = _mm256_or_si256(_mm256_shuffle_epi8(low, in_low), _mm256_shuffle_epi8(high, in_high));
  });
  const __m256i low01 = _mm256_unpacklo_epi8(plane[0], plane[1]), low23 = _mm256_unpacklo_epi8(plane[2], plane[3]);
  const __m256i high01 = _mm256_unpackhi_epi8(plane[0], plane[1]), high23 = _mm256_unpackhi_epi8(plane[2], plane[3]);
  x[0] = (vf)_mm256_unpacklo_epi16(low01, low23);
  x[1] = (vf)_mm256_unpackhi_epi16(low01, low23);
  x[2] = (vf)_mm256_unpacklo_epi16(high01, high23);
  x[3] = (vf)_mm256_unpackhi_epi16(high01, high23);
}

HSAID_INLINE vf add_signed(vf sum, vf x, vf sign) { return (vf)_mm256_fmadd_ps((__m256)x, (__m256)sign, (__m256)sum); }

HSAID_INLINE vu load_repeated(const uint32_t* p) {
  return (vu)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
}

HSAID_INLINE vf load_as_float(const fp16* p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
HSAID_INLINE vh narrow(vf x, fp16) {
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
HSAID_INLINE bool any_nan(vf a, vf b) { return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q)); }

constexpr bool kStreams = true;
HSAID_INLINE void stream_out(uint32_t* p, vu x) { _mm256_stream_si256((__m256i*)p, (__m256i)x); }
HSAID_INLINE void finish_streaming() { _mm_sfence(); }

}  // namespace

}  // namespace hsaid
