// Which random word falls to which position k of a block of n = 2^q (docs/rng.md), one position at a time: what small
// blocks use, and what the vectorised generators are tested against.
#pragma once

#include "normal.h"
#include "philox.h"

namespace hsaid {

// The calls of one block: all that is in their counters but the position.
struct Stream {
  uint64_t seed;
  uint64_t id;
  Purpose purpose;
  int64_t block;
  int chunk;
};

HSAID_INLINE PhiloxWords stream_words(const Stream& s, uint32_t ctr) {
  return philox4x32(s.seed, counter(s.purpose, s.block, s.chunk, s.id, ctr));
}

// Word i & 3, by selection: a GPU cannot index its registers.
HSAID_INLINE uint32_t word_at(const PhiloxWords& words, uint32_t i) {
  const uint32_t even = i & 2 ? words.w[2] : words.w[0], odd = i & 2 ? words.w[3] : words.w[1];
  return i & 1 ? odd : even;
}

// A call gives eight 16-bit halves, for positions that are 2^shift apart.
HSAID_INLINE float gaussian_at(const Stream& s, int q, uint32_t k) {
  const int shift = q - 3 < 4 ? q - 3 : 4;
  const uint32_t slot = k >> shift & 7;
  const uint32_t ctr = (k & ((1u << shift) - 1)) | k >> (shift + 3) << shift;
  return normal_from_half(word_at(stream_words(s, ctr), slot >> 1) >> (16 * (slot & 1)) & 0xffffu);
}

// The sign bit of position k, in bit 31.
HSAID_INLINE uint32_t sign_at(const Stream& s, uint32_t k) {
  const uint32_t b = k >> 2 & 127;
  return word_at(stream_words(s, (k & 3) | k >> 9 << 2), b >> 5) << (31 - (b & 31)) & 0x80000000u;
}

}  // namespace hsaid
