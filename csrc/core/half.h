// bfloat16 and IEEE half as storage types: widening is exact, narrowing rounds to nearest even, NaN stays a NaN.
#pragma once

#include "common.h"

namespace hsaid {

enum class Dtype { kFloat, kBfloat16, kHalf };

HSAID_INLINE int64_t item_size(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

HSAID_INLINE float to_float(float x) { return x; }
HSAID_INLINE float to_float(bf16 x) { return float_from_bits((uint32_t)x.bits << 16); }
HSAID_INLINE float to_float(fp16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Exact, and without subnormal floats, which a process may have switched off.
  const float magnitude =
      rest < 0x400u ? float_from_bits(0x3f000000u | rest) - 0.5f : float_from_bits((rest << 13) + 0x38000000u);
  return float_from_bits(sign | bits_from_float(magnitude));
}

HSAID_INLINE void from_float(float x, float* out) { *out = x; }
HSAID_INLINE void from_float(float x, bf16* out) {
  const uint32_t bits = bits_from_float(x);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? 0x7fc0u : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
HSAID_INLINE void from_float(float x, fp16* out) {
  const uint32_t bits = bits_from_float(x), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  uint32_t half;
  if (rest > 0x7f800000u) {
    half = 0x7e00u;
  } else if (rest >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    half = bits_from_float(float_from_bits(rest) + 0.5f) - 0x3f000000u;
  } else {
    half = (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1)) >> 13;
  }
  out->bits = (uint16_t)(sign | half);
}

}  // namespace hsaid
