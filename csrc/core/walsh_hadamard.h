// The unnormalised Walsh-Hadamard transform of n = 2^q values in place: stages at bits 2, 3, ..., q-1, 0, 1 of the
// position, (a, b) -> (a + b, a - b) with a at the lower one. The order is part of the contract: it fixes the rounding.
#pragma once

#include "common.h"

namespace hsaid {

template <class T>
HSAID_INLINE void butterfly_stage(T* x, int64_t n, int bit) {
  const int64_t half = (int64_t)1 << bit;
  for (int64_t start = 0; start < n; start += 2 * half)
    for (int64_t k = start; k < start + half; ++k) {
      const T a = x[k], b = x[k + half];
      x[k] = a + b;
      x[k + half] = a - b;
    }
}

template <class T>
HSAID_INLINE void walsh_hadamard(T* x, int q) {
  const int64_t n = (int64_t)1 << q;
  for (int bit = 2; bit < q; ++bit) butterfly_stage(x, n, bit);
  for (int bit = 0; bit < (q < 2 ? q : 2); ++bit) butterfly_stage(x, n, bit);
}

}  // namespace hsaid
