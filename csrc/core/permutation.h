// Pi of a segment's chunk, (Pi h)[k] = h[pi(k)]: an unbalanced Feistel network of six rounds on the q bits of k, keyed
// by Philox. It gives each pi(k) alone, where a shuffle makes all of them, one after the other. Six rounds are the
// fewest whose linear correlation is that of uniformly random permutations for every q from 6 to 14 (docs/rng.md).
#pragma once

#include "streams.h"

namespace hsaid {

constexpr int kFeistelRounds = 6;

struct PermutationKeys {
  uint32_t key[kFeistelRounds];
};

HSAID_INLINE PermutationKeys permutation_keys(uint64_t seed, uint64_t stream, int chunk) {
  const PhiloxWords a = philox4x32(seed, counter(kPermutation, 0, chunk, stream, 0));
  const PhiloxWords b = philox4x32(seed, counter(kPermutation, 0, chunk, stream, 1));
  return {{a.w[0], a.w[1], a.w[2], a.w[3], b.w[0], b.w[1]}};
}

HSAID_INLINE uint32_t feistel_mix(uint32_t x, uint32_t key) {
  x = (x ^ key) * 0x9E3779B1u;
  return (x ^ x >> 15) * 0x85EBCA77u;
}

// What a round adds to the other half, of `bits` bits. `half` has at most 2^7 values: a table does as well.
HSAID_INLINE uint32_t feistel_round(uint32_t half, uint32_t key, int bits) {
  return feistel_mix(half, key) >> (32 - bits);
}

HSAID_INLINE uint32_t permute(uint32_t k, int q, const PermutationKeys& keys) {
  const int low_bits = q / 2, high_bits = q - q / 2;
  uint32_t low = k & ((1u << low_bits) - 1), high = k >> low_bits;
  for (int r = 0; r < kFeistelRounds; r += 2) {
    high ^= feistel_round(low, keys.key[r], high_bits);
    low ^= feistel_round(high, keys.key[r + 1], low_bits);
  }
  return high << low_bits | low;
}

// Position k of any stream as a number: a normal or a sign of the diagonal, a sign of B, or pi(k).
HSAID_INLINE float stream_value(const Stream& s, int q, bool rademacher, uint32_t k) {
  if (s.purpose == kPermutation) return (float)permute(k, q, permutation_keys(s.seed, s.id, s.chunk));
  if (s.purpose == kDiagonal && !rademacher) return gaussian_at(s, q, k);
  return sign_at(s, k) ? -1.0f : 1.0f;
}

}  // namespace hsaid
