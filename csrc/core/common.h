// What host and device share: every function is inline, has no state, and gives the same bits on both.
#pragma once

#include <cstdint>
#include <cstring>

// Internal linkage, so that copies compiled for different instruction sets never replace each other at link time.
#if defined(__CUDACC__)
#define HSAID_INLINE static __host__ __device__ __forceinline__
#else
#define HSAID_INLINE static inline __attribute__((always_inline))
#endif

namespace hsaid {

HSAID_INLINE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

HSAID_INLINE uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

HSAID_INLINE float magnitude(float value) {
#if defined(__CUDA_ARCH__)
  return fabsf(value);
#else
  return float_from_bits(bits_from_float(value) & 0x7fffffffu);
#endif
}

}  // namespace hsaid
