// Vectors of kLanes floats for the instruction set this file is compiled for: AVX-512 (16), AVX2 (8), NEON (4) or none
// (4). GCC's and Clang's vector extensions do arithmetic and shuffles; intrinsics only what they cannot say.  Same bits
// from all four.
#pragma once

#include <type_traits>
#include <utility>

#include "../core/half.h"
#include "../core/normal.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(HSAID_NEON)  // every 64-bit Arm has it: this tells our kernels of it from the portable ones
#include <arm_neon.h>
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

#if defined(HSAID_NEON)
// The halves of the 64-bit products of x and m, which multiplies all lanes.
struct Products {
  vu hi, lo;
};
HSAID_INLINE Products multiply(vu x, uint32_t m) {
  const uint32x4_t a = (uint32x4_t)x;
  const uint32x4_t low = (uint32x4_t)vmull_n_u32(vget_low_u32(a), m), high = (uint32x4_t)vmull_high_n_u32(a, m);
  return {(vu)vuzp2q_u32(low, high), (vu)vuzp1q_u32(low, high)};
}
#endif

// Words in the low halves of 64-bit lanes, where multiplications want them and leave the low halves of products.
typedef uint64_t vw __attribute__((vector_size(4 * kLanes), may_alias));

HSAID_INLINE vw wide(uint32_t x) { return (vw)broadcast(x); }
HSAID_INLINE vw high_half(vw x) { return x >> 32; }
// The 64-bit products of the low halves.
HSAID_INLINE vw multiply(vw a, vw b) {
#if defined(__AVX512F__)
  return (vw)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vw)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (vw)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}
// The low (or the high) halves of two vectors, side by side.
HSAID_INLINE vu low_halves(vw even, vw odd) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)even, 0xAAAA, (__m512i)odd, (_MM_PERM_ENUM)0xA0);
#elif defined(__AVX2__)
  return (vu)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xAA);
#else
  return (vu)((even & 0xffffffffu) | (odd << 32));
#endif
}
HSAID_INLINE vu high_halves(vw even, vw odd) {
#if defined(__AVX512F__)
  return (vu)_mm512_mask_shuffle_epi32((__m512i)odd, 0x5555, (__m512i)even, (_MM_PERM_ENUM)0xF5);
#elif defined(__AVX2__)
  return (vu)_mm256_blend_epi32((__m256i)high_half(even), (__m256i)odd, 0xAA);
#else
  return (vu)(high_half(even) | (odd >> 32 << 32));
#endif
}
// Leaves x in memory, where AVX2 has too few registers for all that is wanted later.
HSAID_INLINE void park([[maybe_unused]] vw& x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  asm("" : "+m"(x));
#endif
}

// kNormalMagic | half for both halves of each word: two vectors.
HSAID_INLINE void widen_halves(vu words, vu* low, vu* high) {
#if defined(HSAID_NEON)
  const uint16x8_t odd = (uint16x8_t)(words | 0x00010001u), top = vdupq_n_u16(kNormalMagic >> 16);
  *low = (vu)vtrn1q_u16(odd, top);
  *high = (vu)vtrn2q_u16(odd, top);
#else
  *low = (words & 0xffffu) | kNormalMagic;
  *high = words >> 16 | kNormalMagic;
#endif
}

// 32 floats, those of the lines kFirstLine, kFirstLine + 1, ..., looked up for kGroup vectors at a time.
// AVX2 has no such look-up.  There the lines of four vectors become the 32 bytes of one, which byte shuffles take
// through the table's bytes, a plane for each byte of a float, before they are woven into floats again; eight vectors
// share the loads of the table.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kGroup = 8, kQuads = kGroup / 4;

struct Table {
  alignas(32) uint8_t bytes[4][2][16];  // [byte of a float][half of the table]
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) {
  const uint32_t i = line - kFirstLine;
  for (int byte = 0; byte < 4; ++byte) table.bytes[byte][i / 16][i % 16] = bits_from_float(x) >> 8 * byte & 0xff;
}

// A byte shuffle gives 0 where bit 7 of the index is set: each half of the table has such indices for the other.
struct Lines {
  __m256i low[kQuads], high[kQuads];
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  const __m256i offset = _mm256_set1_epi16((short)(0x70 - (int)kFirstLine));
  Lines lines;
  unroll<kQuads>([&](auto quad) HSAID_LAMBDA {
    const auto line = [&](int i) HSAID_LAMBDA { return (__m256i)((vu)v[4 * quad + i] >> 21); };
    const __m256i s01 = _mm256_packus_epi32(line(0), line(1)), s23 = _mm256_packus_epi32(line(2), line(3));
    lines.low[quad] = _mm256_packus_epi16(_mm256_add_epi16(s01, offset), _mm256_add_epi16(s23, offset));
    lines.high[quad] = _mm256_xor_si256(lines.low[quad], _mm256_set1_epi8((char)0x80));
  });
  return lines;
}
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  __m256i plane[kQuads][4];
  unroll<4>([&](auto byte) HSAID_LAMBDA {
    const __m256i low = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.bytes[byte][0]));
    const __m256i high = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table.bytes[byte][1]));
    unroll<kQuads>([&](auto quad) HSAID_LAMBDA {
      plane[quad][byte] = _mm256_or_si256(_mm256_shuffle_epi8(low, lines.low[quad]),  //
                                          _mm256_shuffle_epi8(high, lines.high[quad]));
    });
  });
  unroll<kQuads>([&](auto quad) HSAID_LAMBDA {
    const auto& p = plane[quad];
    const __m256i low01 = _mm256_unpacklo_epi8(p[0], p[1]), low23 = _mm256_unpacklo_epi8(p[2], p[3]);
    const __m256i high01 = _mm256_unpackhi_epi8(p[0], p[1]), high23 = _mm256_unpackhi_epi8(p[2], p[3]);
    x[4 * quad] = (vf)_mm256_unpacklo_epi16(low01, low23);
    x[4 * quad + 1] = (vf)_mm256_unpackhi_epi16(low01, low23);
    x[4 * quad + 2] = (vf)_mm256_unpacklo_epi16(high01, high23);
    x[4 * quad + 3] = (vf)_mm256_unpackhi_epi16(high01, high23);
  });
}
#elif defined(HSAID_NEON)
// As with AVX2, but a byte look-up takes all 32 bytes of a plane.
constexpr int kGroup = 4;

struct Table {
  uint8x16x2_t plane[4];  // [byte of a float]
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) {
  for (int byte = 0; byte < 4; ++byte)
    table.plane[byte].val[(line & 31) / 16][line % 16] = bits_from_float(x) >> 8 * byte;
}

struct Lines {
  uint8x16_t line;
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  const auto tops = [](vf a, vf b) HSAID_LAMBDA { return vuzp2q_u16((uint16x8_t)a, (uint16x8_t)b); };
  return {vshrn_high_n_u16(vshrn_n_u16(tops(v[0], v[1]), 5), tops(v[2], v[3]), 5) & 31};
}
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  uint8x16_t plane[4];
  unroll<4>([&](auto byte) HSAID_LAMBDA { plane[byte] = vqtbl2q_u8(table.plane[byte], lines.line); });
  const uint16x8_t low01 = (uint16x8_t)vzip1q_u8(plane[0], plane[1]), low23 = (uint16x8_t)vzip1q_u8(plane[2], plane[3]);
  const uint16x8_t high01 = (uint16x8_t)vzip2q_u8(plane[0], plane[1]),
                   high23 = (uint16x8_t)vzip2q_u8(plane[2], plane[3]);
  x[0] = (vf)vzip1q_u16(low01, low23);
  x[1] = (vf)vzip2q_u16(low01, low23);
  x[2] = (vf)vzip1q_u16(high01, high23);
  x[3] = (vf)vzip2q_u16(high01, high23);
}
#else
constexpr int kGroup = kLanes == 16 ? 4 : 2;

struct Table {
  alignas(64) float values[32];
};
HSAID_INLINE void set_line(Table& table, uint32_t line, float x) { table.values[line & 31] = x; }

struct Lines {
  vu line[kGroup];
};
HSAID_INLINE Lines pack_lines(const vf (&v)[kGroup]) {
  Lines lines;
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { lines.line[i] = (vu)v[i] >> 21; });
  return lines;
}
HSAID_INLINE void look_up(const Table& table, const Lines& lines, vf (&x)[kGroup]) {
  unroll<kGroup>([&](auto j) HSAID_LAMBDA {
#if defined(__AVX512F__)
    x[j] =
        (vf)_mm512_permutex2var_ps((__m512)load(table.values), (__m512i)lines.line[j], (__m512)load(table.values + 16));
#else
    for (int i = 0; i < kLanes; ++i) x[j][i] = table.values[lines.line[j][i] & 31];
#endif
  });
}
#endif

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
#elif defined(HSAID_NEON)
  return (vf)vfmaq_f32((float32x4_t)swapped, (float32x4_t)x, (float32x4_t)sign);
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
#elif defined(__aarch64__)
  uint64_t saved;
  KeepSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved));
    asm volatile("msr fpcr, xzr" ::: "memory");
  }
  ~KeepSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved) : "memory"); }
#endif
};

// Widening and narrowing of one vector, as to_float and from_float of core/half.h; bfloat16 goes in pairs, below.
HSAID_INLINE vf load_as_float(const float* p) { return load(p); }
HSAID_INLINE vf load_as_float(const fp16* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(HSAID_NEON)
  return (vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)p)));
#else
  vf x;
  for (int i = 0; i < kLanes; ++i) x[i] = to_float(p[i]);
  return x;
#endif
}

HSAID_INLINE vh narrow(vf x, fp16) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(HSAID_NEON)
  return (vh)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
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

// Two consecutive vectors as the values at even and at odd places: a 32-bit word of memory holds a bfloat16 of each,
// and the stage at bit 0 is between them. Shuffles within 128 bits leave the words out of order; to_split_order has it.
HSAID_INLINE void split(vf a, vf b, vf* even, vf* odd) {
#if defined(__AVX512F__)
  *even = (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x88);
  *odd = (vf)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xDD);
#elif defined(__AVX2__)
  *even = (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
  *odd = (vf)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xDD);
#elif defined(__clang__)
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#else
  *even = __builtin_shuffle(a, b, (vi){0, 2, 4, 6});
  *odd = __builtin_shuffle(a, b, (vi){1, 3, 5, 7});
#endif
}
HSAID_INLINE void join(vf even, vf odd, vf* a, vf* b) {
#if defined(__AVX512F__)
  *a = (vf)_mm512_unpacklo_ps((__m512)even, (__m512)odd);
  *b = (vf)_mm512_unpackhi_ps((__m512)even, (__m512)odd);
#elif defined(__AVX2__)
  *a = (vf)_mm256_unpacklo_ps((__m256)even, (__m256)odd);
  *b = (vf)_mm256_unpackhi_ps((__m256)even, (__m256)odd);
#elif defined(__clang__)
  *a = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
  *b = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
#else
  *a = __builtin_shuffle(even, odd, (vi){0, 4, 1, 5});
  *b = __builtin_shuffle(even, odd, (vi){2, 6, 3, 7});
#endif
}
// Words of memory in the order of split's lanes, and back.
HSAID_INLINE vu to_split_order(vu words) {
#if defined(__AVX512F__)
  return (vu)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), (__m512i)words);
#elif defined(__AVX2__)
  return (vu)_mm256_permute4x64_epi64((__m256i)words, 0xD8);
#else
  return words;
#endif
}
HSAID_INLINE vu from_split_order(vu words) {
#if defined(__AVX512F__)
  return (vu)_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), (__m512i)words);
#else
  return to_split_order(words);
#endif
}
HSAID_INLINE void load_split(const float* p, vf* even, vf* odd) { split(load(p), load(p + kLanes), even, odd); }
HSAID_INLINE void load_split(const bf16* p, vf* even, vf* odd) {
  const vu words = to_split_order(*(const vu_any*)p);
  *even = (vf)(words << 16);
  *odd = (vf)(words & 0xffff0000u);
}

HSAID_INLINE bool any_nan(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_UNORD_Q));
#elif defined(HSAID_NEON)
  const float32x4_t x = (float32x4_t)a, y = (float32x4_t)b;
  return !vminvq_u32(vandq_u32(vceqq_f32(x, x), vceqq_f32(y, y)));
#else
  int nans = 0;
  for (int i = 0; i < kLanes; ++i) nans |= a[i] != a[i] || b[i] != b[i];
  return nans;
#endif
}
// Rounded to nearest even in the upper half; the lower half is left over.
HSAID_INLINE vu round_to_bf16(vf x) { return (vu)x + 0x7fffu + ((vu)x >> 16 & 1); }
HSAID_NOINLINE vu round_nans_to_bf16(vf x) {
  vu bits;
  for (int i = 0; i < kLanes; ++i) {
    bf16 half;
    from_float(x[i], &half);
    bits[i] = (uint32_t)half.bits << 16;
  }
  return bits;
}
// 2 * kLanes bfloat16 as they lie in memory.
HSAID_INLINE vu narrow_split(vf even, vf odd) {
  vu low = round_to_bf16(even), high = round_to_bf16(odd);
  if (__builtin_expect(any_nan(even, odd), false)) {
    low = round_nans_to_bf16(even);
    high = round_nans_to_bf16(odd);
  }
  return from_split_order(low >> 16 | (high & 0xffff0000u));
}

// One cache line of words. `stream`: past the caches; p is then a multiple of 64 bytes.
template <int kVectors>
HSAID_INLINE void store_words(void* p, const vu (&x)[kVectors], [[maybe_unused]] bool stream) {
  static_assert(kVectors * sizeof(vu) == kLineBytes);
#if defined(__AVX512F__)
  if (stream) return _mm512_stream_si512((__m512i*)p, (__m512i)x[0]);
#elif defined(__AVX2__)
  if (stream) return unroll<2>([&](auto i) HSAID_LAMBDA { _mm256_stream_si256((__m256i*)p + i, (__m256i)x[i]); });
#endif
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { store((uint32_t*)p + i * kLanes, x[i]); });
}

// Writes one cache line of T, kLineBytes / sizeof(T) values; bfloat16 from split vectors.
template <int kVectors>
HSAID_INLINE void store_line(float* p, const vf (&x)[kVectors], bool stream) {
  vu words[kVectors];
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { words[i] = (vu)x[i]; });
  store_words(p, words, stream);
}
template <int kVectors>
HSAID_INLINE void store_line(bf16* p, const vf (&x)[kVectors], bool stream) {
  vu words[kVectors / 2];
  unroll<kVectors / 2>([&](auto i) HSAID_LAMBDA { words[i] = narrow_split(x[2 * i], x[2 * i + 1]); });
  store_words(p, words, stream);
}
template <int kVectors>
HSAID_INLINE void store_line(fp16* p, const vf (&x)[kVectors], bool stream) {
  alignas(kLineBytes) vh halves[kVectors];
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { halves[i] = narrow(x[i], fp16{}); });
  vu words[kVectors / 2];
  unroll<kVectors / 2>([&](auto i) HSAID_LAMBDA { words[i] = *(const vu*)(halves + 2 * i); });
  store_words(p, words, stream);
}

}  // namespace

}  // namespace hsaid
