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

HSAID_INLINE uint32_t mulhi32(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

HSAID_INLINE PhiloxWords philox4x32(uint64_t seed, PhiloxWords c) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t hi0 = mulhi32(kPhiloxM0, c.w[0]), lo0 = kPhiloxM0 * c.w[0];
    const uint32_t hi1 = mulhi32(kPhiloxM1, c.w[2]), lo1 = kPhiloxM1 * c.w[2];
    c = {{hi1 ^ c.w[1] ^ k0, lo1, hi0 ^ c.w[3] ^ k1, lo0}};
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

// The first three rounds, in which only word 1 of the counter differs between the calls of a block, leave these
// constants: 16 wide multiplications a call are left of 20.
struct PhiloxPrefix {
  uint32_t word0;      // after round 1: word0 ^ counter word 1
  uint32_t round2;     // xor to the high half of M0 * word 0
  uint32_t round3_hi;  // xor to the high half of M1 * word 2
  uint32_t round3_lo;  // xor to the low half of round 2
  uint32_t round4;     // xor to the high half of M0 * word 0
};

HSAID_INLINE PhiloxPrefix philox_prefix(uint64_t seed, PhiloxWords c) {
  const uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  const uint32_t c2 = mulhi32(kPhiloxM0, c.w[0]) ^ c.w[3] ^ k1;                          // word 2 after round 1
  const uint32_t c0 = mulhi32(kPhiloxM1, c2) ^ (kPhiloxM1 * c.w[2]) ^ (k0 + kPhiloxW0);  // word 0 after round 2
  PhiloxPrefix p;
  p.word0 = mulhi32(kPhiloxM1, c.w[2]) ^ k0;
  p.round2 = (kPhiloxM0 * c.w[0]) ^ (k1 + kPhiloxW1);
  p.round3_hi = (kPhiloxM1 * c2) ^ (k0 + 2 * kPhiloxW0);
  p.round3_lo = mulhi32(kPhiloxM0, c0) ^ (k1 + 2 * kPhiloxW1);
  p.round4 = (kPhiloxM0 * c0) ^ (k1 + 3 * kPhiloxW1);
  return p;
}

}  // namespace hsaid
