// A standard normal from 16 random bits, the same on every machine: five fp32 operations, each rounded by itself, and a
// table of 32 lines fitted to the normal quantile (docs/rng.md). Logarithms and cosines (Box-Muller, the usual way)
// differ between machines. Odd symmetric, variance 1 - 2e-9, largest 3.757.
#pragma once

#include "common.h"

namespace hsaid {

constexpr uint32_t kNormalTableBits[64] = {
#include "normal_table.inc"
};
#if defined(__CUDACC__)
__constant__ static const uint32_t kNormalTableDevice[64] = {
#include "normal_table.inc"
};
#endif

// Entry i of the 32 values A, then 32 values B.
HSAID_INLINE float normal_table(uint32_t i) {
#if defined(__CUDA_ARCH__)
  return float_from_bits(kNormalTableDevice[i]);
#else
  return float_from_bits(kNormalTableBits[i]);
#endif
}

constexpr uint32_t kNormalMagic = 0x4b000001u;  // 2^23 as a float, and the low bit that makes y odd
constexpr float kNormalOffset = 8421376.0f;     // 2^23 + 2^15
constexpr float kNormalTop = 32928.0f;

constexpr uint32_t kFirstLine = 537;  // s of the smallest v

// `magic` is kNormalMagic | half; line_a(s), line_b(s) are entries s & 31 of A and B, s from kFirstLine on.
template <class LineA, class LineB>
HSAID_INLINE float normal_from_magic(uint32_t magic, LineA&& line_a, LineB&& line_b) {
  const float y = float_from_bits(magic) - kNormalOffset;  // odd integers -32767 .. 32767, exact
  const float v = kNormalTop - magnitude(y);               // 161 .. 32927, exact
  const uint32_t s = bits_from_float(v) >> 21;
  const float slope = line_b(s) * v;
  const float line = line_a(s) + slope;
  return y * line;
}

HSAID_INLINE float normal_from_half(uint32_t half) {
  return normal_from_magic(
      kNormalMagic | half, [](uint32_t s) { return normal_table(s & 31); },
      [](uint32_t s) { return normal_table(32 + (s & 31)); });
}

}  // namespace hsaid
