// simd.h's functions for NEON: 4 lanes. Philox has a word in each 32-bit lane, and two unzips part the products into
// high and low halves: a word in each 64-bit lane, as on x86, would leave half of every register empty. 32 floats are
// looked up byte by byte, because NEON's look-ups are of bytes.
#pragma once

#include <arm_neon.h>

#include "../core/normal.h"
#include "vectors.h"

namespace hsaid {

namespace {

#define HSAID_GENERATOR HSAID_INLINE

typedef vu Word;
constexpr int kParts = 1;
struct Product {
  vu hi, lo;
};
HSAID_INLINE vu word(vu x) { return x; }
HSAID_INLINE vu part(vu x, int) { return x; }
HSAID_INLINE Product multiply(vu x, uint32_t m) {
  const uint32x4_t a = (uint32x4_t)x;
  const uint32x4_t low = (uint32x4_t)vmull_n_u32(vget_low_u32(a), m), high = (uint32x4_t)vmull_high_n_u32(a, m);
  return {(vu)vuzp2q_u32(low, high), (vu)vuzp1q_u32(low, high)};
}
HSAID_INLINE vu high(const Product& x) { return x.hi; }
HSAID_INLINE vu low(const Product& x) { return x.lo; }
HSAID_INLINE vu high_halves(const Product* x) { return x->hi; }
HSAID_INLINE vu low_halves(const Product* x) { return x->lo; }
HSAID_INLINE vu low_halves(const vu* x) { return *x; }

HSAID_INLINE void widen_halves(vu words, vu* low, vu* high) {
  const uint16x8_t odd = (uint16x8_t)(words | 0x00010001u), top = vdupq_n_u16(kNormalMagic >> 16);
  *low = (vu)vtrn1q_u16(odd, top);
  *high = (vu)vtrn2q_u16(odd, top);
}

// The lines of four vectors become the 16 bytes of one, which look up a plane of the table for each byte of a float;
// unpacking weaves the planes into floats.
constexpr int kNormalLoops = 1;
constexpr int kGroup = 4;

struct Table {
  uint8x16x2_t plane[4];  // [byte of a float]
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) {
  for (int byte = 0; byte < 4; ++byte)
    table.plane[byte].val[(line & 31) / 16][line % 16] = bits_from_float(x) >> 8 * byte;
}

struct Lines {
  uint8x16_t line;
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  const auto tops = [](vf a, vf b) HSAID_LAMBDA { return vuzp2q_u16((uint16x8_t)a, (uint16x8_t)b); };
  return {vshrn_high_n_u16(vshrn_n_u16(tops(v[0], v[1]), 5), tops(v[2], v[3]), 5) & 31};
}
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  uint8x16_t plane[4];
  unroll<4>([&](auto byte) HSAID_LAMBDA { plane[byte] = vqtbl2q_u8(table.plane[byte], lines.line); });
  const uint16x8_t low01 = (uint16x8_t)vzip1q_u8(plane[0], plane[1]), low23 = (uint16x8_t)vzip1q_u8(plane[2], plane[3]);
  const uint16x8_t high01 = (uint16x8_t)vzip2q_u8(plane[0], plane[1]),
                   high23 = (uint16x8_t)vzip2q_u8(plane[2], plane[3]);
  x[0] = (vf)vzip1q_u16(low01, low23);
  x[1] = (vf)vzip2q_u16(low01, low23);
  x[2] = (vf)vzip1q_u16(high01, high23);
  x[3] = (vf)vzip2q_u16(high01, high23);
}

HSAID_INLINE vf add_signed(vf sum, vf x, vf sign) {
  return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)x, (float32x4_t)sign);
}

HSAID_INLINE vu load_repeated(const uint32_t* p) { return load(p); }

HSAID_INLINE vf load_as_float(const fp16* p) {
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
}
HSAID_INLINE vh narrow(vf x, fp16) { return (vh)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x)); }
HSAID_INLINE bool any_nan(vf a, vf b) {
  const float32x4_t x = (float32x4_t)a, y = (float32x4_t)b;
  return !vminvq_u32(vandq_u32(vceqq_f32(x, x), vceqq_f32(y, y)));
}

constexpr bool kStreams = false;
HSAID_INLINE void stream_out(uint32_t*, vu) {}
HSAID_INLINE void finish_streaming() {}

}  // namespace

}  // namespace hsaid
