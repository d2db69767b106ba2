// What the kernels ask of an instruction set, and what is built on it for all: AVX-512, AVX2, NEON and the portable
// code give the same bits. vectors.h is what they share; each has a file for what vector extensions cannot say:
//
//   Word, Product, kParts       a vector of words in kParts Words, as multiplications want them; a Word times a word
//   part(x, i), word(x)         Word i of the words x; x, which is the same in every place, as a Word
//   multiply(x, m)              64-bit products of a Word and a word; high(p), low(p) are their halves as Words
//   high_halves, low_halves     of kParts Products or Words: one vector again
//   widen_halves(x, low, high)  kNormalMagic | half for both halves of each word of x
//   Table, set_line             32 floats, those of the lines kFirstLine, kFirstLine + 1, ... (core/normal.h)
//   kNormalLoops                whether normals are made in one loop or two
//   Lines, pack_lines, look_up  the lines of kGroup vectors; the floats of a table there
//   add_signed(sum, x, sign)    sum + x * sign for signs +-1, rounded once; the product is exact, so an FMA will do
//   load_repeated(p)            the four words at p in every 128 bits
//   load_as_float, narrow       for fp16, as to_float and from_float of core/half.h
//   any_nan(a, b)               whether there is a NaN in either
//   kStreams, stream_out        whether there are stores past the caches; one, to a multiple of the vector's size
//   finish_streaming()          such stores are not ordered by what other threads synchronise with: this waits for them
//   HSAID_GENERATOR             whether what draws random numbers is inlined
#pragma once

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#elif defined(HSAID_NEON)  // every 64-bit Arm has it: this tells our kernels of it from the portable ones
#include "simd_neon.h"
#else
#include "simd_portable.h"
#endif

namespace hsaid {

namespace {

// Stage `bit` < kLaneBits inside a vector: (a, b) -> (a + b, a - b) between lanes whose index differs in that bit.
template <int kBit>
HSAID_INLINE vf lane_stage(vf x) {
  const vf sign = (vf)((lane_index() >> kBit & 1) << 31 | (vu)broadcast(1.0f));
  return add_signed(shuffle(x, x, [](int i) { return i ^ 1 << kBit; }), x, sign);
}

// Two consecutive vectors as the values at even and at odd places: a 32-bit word of memory holds a bfloat16 of each,
// and the stage at bit 0 is between them. Lanes stay within their 128 bits, which takes one instruction a vector, and
// so come out of order: to_split_order brings words of memory into that order, from_split_order back.
HSAID_INLINE void split(vf a, vf b, vf* even, vf* odd) {
  *even = shuffle(a, b, [](int i) { return i / 4 * 4 + i % 2 * 2 + (i & 2 ? kLanes : 0); });
  *odd = shuffle(a, b, [](int i) { return i / 4 * 4 + i % 2 * 2 + 1 + (i & 2 ? kLanes : 0); });
}
HSAID_INLINE void join(vf even, vf odd, vf* a, vf* b) {
  *a = shuffle(even, odd, [](int i) { return i / 4 * 4 + i % 4 / 2 + (i & 1 ? kLanes : 0); });
  *b = shuffle(even, odd, [](int i) { return i / 4 * 4 + i % 4 / 2 + 2 + (i & 1 ? kLanes : 0); });
}
HSAID_INLINE vu to_split_order(vu words) {
  return (vu)shuffle((vw)words, (vw)words, [](int i) { return i / 2 + i % 2 * (kLanes / 4); });
}
HSAID_INLINE vu from_split_order(vu words) {
  return (vu)shuffle((vw)words, (vw)words, [](int i) { return i / (kLanes / 4) + i % (kLanes / 4) * 2; });
}

HSAID_INLINE vf load_as_float(const float* p) { return load(p); }
HSAID_INLINE void load_split(const float* p, vf* even, vf* odd) { split(load(p), load(p + kLanes), even, odd); }
HSAID_INLINE void load_split(const bf16* p, vf* even, vf* odd) {
  const vu words = to_split_order(load((const uint32_t*)p));
  *even = (vf)(words << 16);
  *odd = (vf)(words & 0xffff0000u);
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
  uint32_t* words = (uint32_t*)p;
  if constexpr (kStreams)
    if (stream) return unroll<kVectors>([&](auto i) HSAID_LAMBDA { stream_out(words + i * kLanes, x[i]); });
  unroll<kVectors>([&](auto i) HSAID_LAMBDA { store(words + i * kLanes, x[i]); });
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
