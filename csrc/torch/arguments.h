// Checks of arguments that the CPU's and the CUDA library's ops share.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "../core/plan.h"

namespace {

// q of a width 2^q
inline int checked_width_bits(int64_t width) {
  int q = 0;
  while (((int64_t)1 << q) < width && q < hsaid::kMaxWidthBits) ++q;
  STD_TORCH_CHECK(q >= hsaid::kMinWidthBits && width == (int64_t)1 << q,
                  "width: expected a power of two from 32 to 16384, got ", width);
  return q;
}

inline hsaid::Stream checked_stream(int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk) {
  STD_TORCH_CHECK(purpose >= hsaid::kDiagonal && purpose <= hsaid::kPermutation, "purpose: expected 0, 1 or 2, got ",
                  purpose);
  STD_TORCH_CHECK(block >= 0 && block < 1 << 28, "block: expected 0 to 2**28 - 1, got ", block);
  STD_TORCH_CHECK(chunk >= 0 && chunk < 1 << 16, "chunk: expected 0 to 65535, got ", chunk);
  return {(uint64_t)seed, (uint64_t)stream, (hsaid::Purpose)purpose, block, (int)chunk};
}

}  // namespace
