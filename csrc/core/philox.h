// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), and the counters of "philox4x32-10.v1" (docs/rng.md).
#pragma once

#include "common.h"

namespace hsaid {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

enum Purpose : uint32_t { kDiagonal = 0, kSigns = 1, kPermutation = 2 };

struct PhiloxWords {
  uint32_t w[4];
};

// Both halves of a product, from one multiplication.
struct WideProduct {
  uint32_t hi, lo;
};
HSAID_INLINE WideProduct mul_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)  // the compiler makes three instructions of the product below
  WideProduct product;
  asm("{ .reg .u64 t; mul.wide.u32 t, %2, %3; mov.b64 {%1, %0}, t; }"
      : "=r"(product.hi), "=r"(product.lo)
      : "r"(a), "r"(b));
  return product;
#else
  const uint64_t product = (uint64_t)a * b;
  return {(uint32_t)(product >> 32), (uint32_t)product};
#endif
}

HSAID_INLINE PhiloxWords philox4x32(uint64_t seed, PhiloxWords c) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const WideProduct a = mul_wide(kPhiloxM0, c.w[0]), b = mul_wide(kPhiloxM1, c.w[2]);
    c = {{b.hi ^ c.w[1] ^ k0, b.lo, a.hi ^ c.w[3] ^ k1, a.lo}};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

// A segment's counter: block and purpose in word 0, position and chunk in word 1, the stream id in words 2 and 3.
HSAID_INLINE PhiloxWords counter(Purpose purpose, int64_t block, int chunk, uint64_t stream, uint32_t ctr) {
  return {{(uint32_t)block | (uint32_t)purpose << 28, ctr | (uint32_t)chunk << 16, (uint32_t)stream,
           (uint32_t)(stream >> 32)}};
}

// Only word 1 of the counter differs between the calls of a block. All that the first four rounds make of the other
// words is in these constants, so that a call needs 16 wide multiplications in place of 20.
struct PhiloxPrefix {
  uint32_t word0;      // xored with word 1 of the counter: word 0 after round 1
  uint32_t round2;     // xored with the high half of M0 * word 0
  uint32_t round3_hi;  // xored with the high half of M1 * word 2
  uint32_t round3_lo;  // xored with the low half of round 2
  uint32_t round4;     // xored with the high half of M0 * word 0
};

HSAID_INLINE PhiloxPrefix philox_prefix(uint64_t seed, PhiloxWords c) {
  const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  const WideProduct a1 = mul_wide(kPhiloxM0, c.w[0]), b1 = mul_wide(kPhiloxM1, c.w[2]);
  const uint32_t c2 = a1.hi ^ c.w[3] ^ k1;  // word 2 after round 1
  const WideProduct b2 = mul_wide(kPhiloxM1, c2);
  const uint32_t c0 = b2.hi ^ b1.lo ^ (k0 + kPhiloxW0);  // word 0 after round 2
  const WideProduct a3 = mul_wide(kPhiloxM0, c0);
  return {b1.hi ^ k0, a1.lo ^ (k1 + kPhiloxW1), b2.lo ^ (k0 + 2 * kPhiloxW0), a3.hi ^ (k1 + 2 * kPhiloxW1),
          a3.lo ^ (k1 + 3 * kPhiloxW1)};
}

// The call whose counter word 1 is `word1`, from the constants of its block.
HSAID_INLINE PhiloxWords philox_from_prefix(const PhiloxPrefix& prefix, uint64_t seed, uint32_t word1) {
  uint32_t k0 = (uint32_t)seed + 3 * kPhiloxW0, k1 = (uint32_t)(seed >> 32) + 3 * kPhiloxW1;
  const WideProduct a2 = mul_wide(kPhiloxM0, prefix.word0 ^ word1), b3 = mul_wide(kPhiloxM1, a2.hi ^ prefix.round2);
  PhiloxWords c = {{b3.hi ^ prefix.round3_hi, b3.lo, a2.lo ^ prefix.round3_lo, 0}};  // after round 3
  const WideProduct a4 = mul_wide(kPhiloxM0, c.w[0]), b4 = mul_wide(kPhiloxM1, c.w[2]);
  c = {{b4.hi ^ c.w[1] ^ k0, b4.lo, a4.hi ^ prefix.round4, a4.lo}};
  for (int round = 4; round < kPhiloxRounds; ++round) {
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
    const WideProduct a = mul_wide(kPhiloxM0, c.w[0]), b = mul_wide(kPhiloxM1, c.w[2]);
    c = {{b.hi ^ c.w[1] ^ k0, b.lo, a.hi ^ c.w[3] ^ k1, a.lo}};
  }
  return c;
}

}  // namespace hsaid
