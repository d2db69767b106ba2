// Paley's symmetric Hadamard matrices of order 12, 20 and 28 (his second construction, over the fields of 5, 9 and 13
// elements): C (x) [1 1; 1 -1] + I (x) [1 -1; -1 -1]. C has zeros on its diagonal, ones elsewhere in its first row and
// column, and otherwise 1 where the difference of row's and column's element is a square, else -1.
#pragma once

#include "common.h"

namespace hsaid {

constexpr int kMostOrder = 28;

HSAID_INLINE constexpr bool is_order(int64_t order) {
  return order == 1 || order == 12 || order == 20 || order == kMostOrder;
}

// C_ij, i != j, of order `half`.
HSAID_INLINE constexpr int conference_sign(int half, int i, int j) {
  if (i == 0 || j == 0) return 1;
  const int field = half - 1;
  if (field == 9) {  // a + b i with a, b modulo 3: a square's norm a^2 + b^2 is 1
    const int a = (i - 1) % 3 - (j - 1) % 3, b = (i - 1) / 3 - (j - 1) / 3;
    return (a * a + b * b) % 3 == 1 ? 1 : -1;
  }
  for (int root = 1; root < field; ++root)
    if ((root * root - (i - j)) % field == 0) return 1;
  return -1;
}

// Bit j of plus[i] is set where C_ij is 1.
template <int kHalf>
struct ConferenceSigns {
  uint32_t plus[kHalf] = {};
};
template <int kHalf>
HSAID_INLINE constexpr ConferenceSigns<kHalf> conference_signs() {
  ConferenceSigns<kHalf> signs;
  for (int i = 0; i < kHalf; ++i)
    for (int j = 0; j < kHalf; ++j)
      if (i != j && conference_sign(kHalf, i, j) > 0) signs.plus[i] |= 1u << j;
  return signs;
}

// The product with the matrix of this order, over the columns of x [order, columns], in place. The order of the
// additions is part of the contract.
template <class T>
HSAID_INLINE void paley_stage(T* x, int order, int64_t columns) {
  const int half = order / 2;
  T sum[kMostOrder / 2], difference[kMostOrder / 2];
  for (int64_t k = 0; k < columns; ++k) {
    for (int i = 0; i < half; ++i) {
      const T a = x[2 * i * columns + k], b = x[(2 * i + 1) * columns + k];
      sum[i] = a + b;
      difference[i] = a - b;
    }
    for (int i = 0; i < half; ++i) {
      T even = difference[i], odd = -sum[i];
      for (int step = 1; step < half; ++step) {
        const int j = (i + step) % half;
        const bool plus = conference_sign(half, i, j) > 0;
        even = plus ? even + sum[j] : even - sum[j];
        odd = plus ? odd + difference[j] : odd - difference[j];
      }
      x[2 * i * columns + k] = even;
      x[(2 * i + 1) * columns + k] = odd;
    }
  }
}

}  // namespace hsaid
