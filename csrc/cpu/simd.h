// Vectors of kLanes floats for the instruction set this file is compiled for: AVX-512 (16), AVX2 (8) or none (4).
// GCC's and Clang's vector extensions do arithmetic and shuffles; intrinsics only what they cannot say.  Same bits from
// all three.
#pragma once

#include <type_traits>
#include <utility>

#include "../core/half.h"
#include "../core/normal.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace hsaid {

namespace {  // each instruction set its own copy, see fastfood_kernels.cpp

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kLaneBits = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
constexpr int kLineBytes = 64;

typedef float vf __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * kLanes), may_alias));
typedef float vf_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

// f(0), f(1), ..., f(N - 1) with constants for arguments: arrays indexed by them live in registers.
template <int... I, class F>
HSAID_INLINE void unroll_indices(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
HSAID_INLINE void unroll(F&& f) {
  unroll_indices(std::make_integer_sequence<int, N>{}, f);
}
#define HSAID_LAMBDA __attribute__((always_inline))
// For what is called once a tile or less: one copy keeps the code small.
#define HSAID_NOINLINE __attribute__((noinline))

HSAID_INLINE vf broadcast(float x) { return vf{} + x; }
HSAID_INLINE vu broadcast(uint32_t x) { return vu{} + x; }
HSAID_INLINE vf load(const float* p) { return *(const vf_any*)p; }
HSAID_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
HSAID_INLINE void store(uint32_t* p, vu x) { *(vu_any*)p = x; }
HSAID_INLINE vu lane_index() {
  vu lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// a ^ b ^ c
HSAID_INLINE vu xor3(vu a, vu b, vu c) {
#if defined(__AVX512F__)
  return (vu)_mm512_ternarylogic_epi32((__m512i)a, (__m512i)b, (__m512i)c, 0x96);
#else
  return a ^ b ^ c;
#endif
}

// The 64-bit products m * a, as their high and low halves.
HSAID_INLINE void mul_wide(vu a, vu m, vu* high, vu* low) {
#if defined(__AVX512F__)
  const __m512i even = _mm512_mul_epu32((__m512i)a, (__m512i)m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), (__m512i)m);
  *high = (vu)_mm512_mask_shuffle_epi32(odd, 0x5555, even, _MM_PERM_DDBB);
  *low = (vu)_mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
#elif defined(__AVX2__)
  const __m256i even = _mm256_mul_epu32((__m256i)a, (__m256i)m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), (__m256i)m);
  *high = (vu)_mm256_blend_epi32(_mm256_shuffle_epi32(even, 0xF5), odd, 0xAA);
  *low = (vu)_mm256_blend_epi32(even, _mm256_shuffle_epi32(odd, 0xA0), 0xAA);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = (uint64_t)a[i] * m[i];
    (*high)[i] = (uint32_t)(product >> 32);
    (*low)[i] = (uint32_t)product;
  }
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// b where bit 31 of `choice` is set, else a.  GCC puts a comparison with zero before the intrinsic, which needs none.
HSAID_INLINE __m256 select_by_sign(__m256 a, __m256 b, __m256i choice) {
  __m256 selected;
  asm("vblendvps %3, %2, %1, %0" : "=x"(selected) : "x"(a), "x"(b), "x"(choice));
  return selected;
}
#endif

// table[s & 31] of 32 floats
HSAID_INLINE vf lookup32(const float* table, vu s) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutex2var_ps((__m512)load(table), (__m512i)s, (__m512)load(table + 16));
#elif defined(__AVX2__)
  const __m256i i = (__m256i)s;
  const __m256i bit3 = _mm256_slli_epi32(i, 28), bit4 = _mm256_slli_epi32(i, 27);
  const __m256 q0 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), i);
  const __m256 q1 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), i);
  const __m256 q2 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 16), i);
  const __m256 q3 = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 24), i);
  return (vf)select_by_sign(select_by_sign(q0, q1, bit3), select_by_sign(q2, q3, bit3), bit4);
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = table[s[i] & 31];
  return x;
#endif
}

// Stage `bit` < kLaneBits inside a vector: (a, b) -> (a + b, a - b) between lanes whose index differs in that bit.
template <int kBit>
HSAID_INLINE vf lane_stage(vf x) {
  vf swapped;
#if defined(__AVX512F__)
  if constexpr (kBit == 0) swapped = (vf)_mm512_permute_ps((__m512)x, 0xB1);
  if constexpr (kBit == 1) swapped = (vf)_mm512_permute_ps((__m512)x, 0x4E);
  if constexpr (kBit == 2) swapped = (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0xB1);
  if constexpr (kBit == 3) swapped = (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, 0x4E);
#elif defined(__AVX2__)
  if constexpr (kBit == 0) swapped = (vf)_mm256_permute_ps((__m256)x, 0xB1);
  if constexpr (kBit == 1) swapped = (vf)_mm256_permute_ps((__m256)x, 0x4E);
  if constexpr (kBit == 2) swapped = (vf)_mm256_permute2f128_ps((__m256)x, (__m256)x, 0x01);
#else
#if defined(__clang__)
  swapped = __builtin_shufflevector(x, x, 0 ^ (1 << kBit), 1 ^ (1 << kBit), 2 ^ (1 << kBit), 3 ^ (1 << kBit));
#else
  swapped = __builtin_shuffle(x, (vi){0 ^ (1 << kBit), 1 ^ (1 << kBit), 2 ^ (1 << kBit), 3 ^ (1 << kBit)});
#endif
#endif
  const vf sign = (vf)((lane_index() >> kBit & 1) << 31 | (vu)broadcast(1.0f));
  // A factor of +-1 inside an FMA is exact: one rounding, as in a + b and a - b.
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)x, (__m512)sign, (__m512)swapped);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)x, (__m256)sign, (__m256)swapped);
#else
  return swapped + x * sign;
#endif
}

// Non-temporal stores are not ordered by what other threads synchronise with.
HSAID_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// While it lives, this thread keeps subnormals: a process that has switched them off must not change the bits.
struct KeepSubnormals {
#if defined(__SSE2__)
  unsigned saved = _mm_getcsr();
  KeepSubnormals() { _mm_setcsr(0x1f80); }
  ~KeepSubnormals() { _mm_setcsr(saved); }
#endif
};

// Widening and narrowing of one vector, as to_float and from_float of core/half.h.
HSAID_INLINE vf load_as_float(const float* p) { return load(p); }
HSAID_INLINE vf load_as_float(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh_any*)p, vu) << 16); }
HSAID_INLINE vf load_as_float(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

HSAID_INLINE vh narrow(vf x, bf16) {
  const vu bits = (vu)x;
  const vu rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
  const vu nan = (vu)((bits & 0x7fffffffu) > 0x7f800000u);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), vh);
}
HSAID_INLINE vh narrow(vf x, fp16) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  vh half;
  for (int i = 0; i < kLanes; ++i) {
    fp16 h;
    from_float(x[i], &h);
    half[i] = h.bits;
  }
  return half;
#endif
}

// Writes one cache line of T, kLineBytes / sizeof(T) values. `stream`: past the caches; p is then a multiple of 64
// bytes.
template <int kVectors>
HSAID_INLINE void store_line(float* p, const vf (&x)[kVectors], [[maybe_unused]] bool stream) {
  static_assert(kVectors * kLanes * sizeof(float) == kLineBytes);
#if defined(__AVX512F__) || defined(__AVX2__)
  if (stream) {
#if defined(__AVX512F__)
    unroll<kVectors>([&](auto i) HSAID_LAMBDA { _mm512_stream_ps(p + i * kLanes, (__m512)x[i]); });
#else
    unroll<kVectors>([&](auto i) HSAID_LAMBDA { _mm256_stream_ps(p + i * kLanes, (__m256)x[i]); });
#endif
    return;
  }
#endif
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { store(p + i * kLanes, x[i]); });
}
template <class Half, int kVectors>
HSAID_INLINE void store_line(Half* p, const vf (&x)[kVectors], [[maybe_unused]] bool stream) {
  static_assert(kVectors * kLanes * sizeof(Half) == kLineBytes);
#if defined(__AVX512F__)
  if (stream) {
    const __m512i low = _mm512_castsi256_si512((__m256i)narrow(x[0], Half{}));
    _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(low, (__m256i)narrow(x[1], Half{}), 1));
    return;
  }
#elif defined(__AVX2__)
  if (stream) {
    unroll<kVectors / 2>([&](auto i) HSAID_LAMBDA {
      const __m256i low = _mm256_castsi128_si256((__m128i)narrow(x[2 * i], Half{}));
      _mm256_stream_si256((__m256i*)p + i, _mm256_inserti128_si256(low, (__m128i)narrow(x[2 * i + 1], Half{}), 1));
    });
    return;
  }
#endif
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { *(vh_any*)(p + i * kLanes) = narrow(x[i], Half{}); });
}

}  // namespace

}  // namespace hsaid
