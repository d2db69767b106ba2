// Philox's words with a word in the low half of each 64-bit lane, for AVX-512, AVX2 and the portable code: x86
// multiplies what is there, and leaves the low half of the product there. With a word in each 32-bit lane, every
// multiplication would need shuffles.
#pragma once

#include "../core/normal.h"
#include "vectors.h"

namespace hsaid {

namespace {

typedef vw Word, Product;
constexpr int kParts = 2;
HSAID_INLINE vw word(vu x) { return (vw)x; }
HSAID_INLINE vw high(vw x) { return x >> 32; }
HSAID_INLINE vw low(vw x) { return x; }

HSAID_INLINE void widen_halves(vu words, vu* low, vu* high) {
  *low = (words & 0xffffu) | kNormalMagic;
  *high = words >> 16 | kNormalMagic;
}

}  // namespace

}  // namespace hsaid
