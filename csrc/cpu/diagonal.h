// G and the signs B of a block, a tile at a time: Philox in the lanes, whose words fall to consecutive positions
// without any transposing (docs/rng.md).
#pragma once

#include "../core/plan.h"
#include "transform.h"

namespace hsaid {

namespace {

// The keys of the ten rounds.
struct PhiloxKeys {
  uint32_t key[kPhiloxRounds][2];
};

HSAID_INLINE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (int r = 0; r < kPhiloxRounds; ++r) {
    keys.key[r][0] = (uint32_t)seed + r * kPhiloxW0;
    keys.key[r][1] = (uint32_t)(seed >> 32) + r * kPhiloxW1;
  }
  return keys;
}

// The portable code is compiled lane by lane: inlined everywhere it would be huge.
#if defined(__AVX2__)
#define HSAID_GENERATOR HSAID_INLINE
#else
#define HSAID_GENERATOR HSAID_NOINLINE
#endif

// kCalls times kLanes calls that differ in word 1 of the counter: w[call][word]. Several side by side, because one
// alone is a long chain of dependent multiplications.
template <int kCalls>
HSAID_GENERATOR void philox_vectors(const PhiloxPrefix& prefix, const PhiloxKeys& keys, const vu (&word1)[kCalls],
                                    vu (&w)[kCalls][4]) {
  const vu m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
  vu hi0[kCalls], lo0[kCalls], hi1[kCalls], lo1[kCalls];
  unroll<kCalls>([&](auto i) HSAID_LAMBDA {
    mul_wide(broadcast(prefix.word0) ^ word1[i], m0, &hi0[i], &lo0[i]);
    mul_wide(hi0[i] ^ broadcast(prefix.round2), m1, &hi1[i], &lo1[i]);
    w[i][0] = hi1[i] ^ broadcast(prefix.round3_hi);
    w[i][1] = lo1[i];
    w[i][2] = lo0[i] ^ broadcast(prefix.round3_lo);
    mul_wide(w[i][0], m0, &hi0[i], &lo0[i]);
    mul_wide(w[i][2], m1, &hi1[i], &lo1[i]);
    w[i][0] = xor3(hi1[i], w[i][1], broadcast(keys.key[3][0]));
    w[i][1] = lo1[i];
    w[i][2] = hi0[i] ^ broadcast(prefix.round4);
    w[i][3] = lo0[i];
  });
  unroll<kPhiloxRounds - 4>([&](auto r) HSAID_LAMBDA {
    unroll<kCalls>([&](auto i) HSAID_LAMBDA {
      mul_wide(w[i][0], m0, &hi0[i], &lo0[i]);
      mul_wide(w[i][2], m1, &hi1[i], &lo1[i]);
      w[i][0] = xor3(hi1[i], w[i][1], broadcast(keys.key[r + 4][0]));
      w[i][1] = lo1[i];
      w[i][2] = xor3(hi0[i], w[i][3], broadcast(keys.key[r + 4][1]));
      w[i][3] = lo0[i];
    });
  });
}

// core/normal.h in lanes: `magic` is kNormalMagic | half.
HSAID_GENERATOR vf normal_vector(vu magic, const float* table) {
  const vf y = (vf)magic - kNormalOffset;
  const vf v = kNormalTop - (vf)((vu)y & 0x7fffffffu);
  const vu s = (vu)v >> 21;
  return y * (lookup32(table, s) + lookup32(table + 32, s) * v);
}

// A line of the diagonal: what multiplies a vector.
struct GaussianVector {
  vf g;
  HSAID_INLINE vf times(const GaussianVector& d, vf x) { return d.g * x; }
};
struct SignVector {
  vu sign;  // bit 31
  HSAID_INLINE vf times(const SignVector& d, vf x) { return (vf)((vu)x ^ d.sign); }
};

// The sign bits of a block as Philox words: words[k >> 9][k >> 7 & 3][k & 3], whose bit (k >> 2) & 31 is position k's.
HSAID_INLINE int64_t num_sign_words(int q) { return q > 11 ? (int64_t)1 << (q - 5) : 64; }  // whole vectors of calls
HSAID_NOINLINE void make_sign_words(const Stream& s, const PhiloxKeys& keys, int q, uint32_t* words) {
  const PhiloxPrefix prefix = philox_prefix(s.seed, counter(s.purpose, s.block, s.chunk, s.id, 0));
  const vu position = lane_index() | broadcast((uint32_t)s.chunk << 16);
  const uint32_t calls = q > 9 ? 1u << (q - 7) : 4;
  for (uint32_t first = 0; first < calls; first += kLanes) {
    vu w[1][4];
    philox_vectors<1>(prefix, keys, {position + first}, w);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; ++i) words[((first + i) >> 2) * 16 + j * 4 + (i & 3)] = w[0][j][i];
  }
}

// use(i, d) for the vectors i of the 2^t values at k.
template <int t, class Use>
HSAID_INLINE void sign_tile(const uint32_t* words, int64_t k, Use&& use) {
  constexpr int per_quad = 32 * 4 / kLanes < (1 << t) / kLanes ? 32 * 4 / kLanes : (1 << t) / kLanes;
  constexpr int quads = kLanes / 4;  // bits that a vector takes of each word
  unroll<(1 << t) / kLanes / per_quad>([&](auto group) HSAID_LAMBDA {
    const int64_t at = k + group * 128;
    const uint32_t* quad = words + (at >> 9) * 16 + (at >> 7 & 3) * 4;
    vu bits;
#if defined(__AVX512F__)
    bits = (vu)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)quad));
#elif defined(__AVX2__)
    bits = (vu)_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)quad));
#else
    bits = *(const vu_any*)quad;
#endif
    const vu lifted = bits << (quads - 1 - (lane_index() >> 2));
    unroll<per_quad>([&](auto i) HSAID_LAMBDA {
      use(group * per_quad + i, SignVector{lifted << (32 - quads - quads * i) & 0x80000000u});
    });
  });
}

// The diagonal of one block after another.
struct Diagonal {
  Params params;
  PhiloxKeys keys;
  alignas(64) float table[64];
  PhiloxPrefix* prefix;  // [chunks], gaussian
  uint32_t* sign_words;  // [chunks, num_sign_words], rademacher
  Segment segment;
  int64_t block;

  Diagonal(const Params& p, PhiloxPrefix* prefix_, uint32_t* words)
      : params(p), keys(philox_keys(p.seed)), prefix(prefix_), sign_words(words), segment{}, block(0) {
    for (int i = 0; i < 64; ++i) table[i] = normal_table(i);
  }

  void start(const Segment& s, int64_t b) {
    segment = s;
    block = b;
    for (int chunk = 0; chunk < params.chunks; ++chunk) {
      const Stream stream = stream_of(params, s, kDiagonal, b, chunk);
      if (params.rademacher)
        make_sign_words(stream, keys, params.q, sign_words + chunk * num_sign_words(params.q));
      else
        prefix[chunk] = philox_prefix(stream.seed, counter(stream.purpose, b, chunk, stream.id, 0));
    }
  }
};

HSAID_NOINLINE vf small_gaussian(const Diagonal& d, int chunk, uint32_t k) {
  const Stream s = stream_of(d.params, d.segment, kDiagonal, d.block, chunk);
  vf g;
  for (int lane = 0; lane < kLanes; ++lane) g[lane] = gaussian_at(s, d.params.q, k + lane);
  return g;
}

// use(i, d) for the vectors i of the 2^t values at k.
template <int t, bool kRademacher, class Use>
HSAID_INLINE void diagonal_tile(const Diagonal& d, int chunk, int64_t k, Use&& use) {
  if constexpr (kRademacher) {
    sign_tile<t>(d.sign_words + chunk * num_sign_words(d.params.q), k, use);
  } else if constexpr (t < 7) {
    unroll<(1 << t) / kLanes>(
        [&](auto i) HSAID_LAMBDA { use(i, GaussianVector{small_gaussian(d, chunk, (uint32_t)k + i * kLanes)}); });
  } else {
    constexpr int parts = 16 / kLanes;  // vectors of calls that cover the 16 lowest positions
    constexpr int calls = (1 << t) / 128 * parts, side = calls < 2 ? calls : 2;
    unroll<calls / side>([&](auto pair) HSAID_LAMBDA {
      vu word1[side], w[side][4];
      unroll<side>([&](auto i) HSAID_LAMBDA {
        constexpr int call = pair * side + i;
        const uint32_t first = (uint32_t)((k >> 7) + call / parts) << 4 | call % parts * kLanes | (uint32_t)chunk << 16;
        word1[i] = lane_index() + first;
      });
      philox_vectors<side>(d.prefix[chunk], d.keys, word1, w);
      unroll<side>([&](auto i) HSAID_LAMBDA {
        constexpr int call = pair * side + i;
        unroll<8>([&](auto slot) HSAID_LAMBDA {
          const vu word = w[i][slot / 2];
          const vu magic = slot % 2 ? word >> 16 | kNormalMagic : (word & 0xffffu) | kNormalMagic;
          constexpr int vector = (call / parts * 128 + slot * 16 + call % parts * kLanes) / kLanes;
          use(std::integral_constant<int, vector>{}, GaussianVector{normal_vector(magic, d.table)});
        });
      });
    });
  }
}

}  // namespace

}  // namespace hsaid
