// G and the signs B of a block, with a Philox call in each lane. Consecutive positions take the same word of
// consecutive calls, a vector as it comes; if they took the four words of one call, vectors would have to be transposed
// (docs/rng.md).
#pragma once

#include "../core/plan.h"
#include "transform.h"

namespace hsaid {

namespace {

// The keys of the ten rounds, as vectors: AVX2 has no operands that are repeated, and too few registers to keep them
// in.
struct PhiloxKeys {
  vu key[kPhiloxRounds][2];
};

HSAID_INLINE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (int r = 0; r < kPhiloxRounds; ++r) {
    keys.key[r][0] = broadcast((uint32_t)seed + r * kPhiloxW0);
    keys.key[r][1] = broadcast((uint32_t)(seed >> 32) + r * kPhiloxW1);
  }
  return keys;
}

// What is the same for all calls of a block (core/philox.h).
struct PhiloxConstants {
  vu word0, round2, round3_hi, round3_lo, round4;

  __attribute__((always_inline)) explicit PhiloxConstants(const PhiloxPrefix& p)
      : word0(broadcast(p.word0)),
        round2(broadcast(p.round2)),
        round3_hi(broadcast(p.round3_hi)),
        round3_lo(broadcast(p.round3_lo)),
        round4(broadcast(p.round4)) {}
};

// kCalls times kLanes calls that differ in word 1 of the counter: w[call][word].
template <int kCalls>
HSAID_GENERATOR void philox_vectors(const PhiloxConstants& constants, const PhiloxKeys& keys, const vu (&word1)[kCalls],
                                    vu (&w)[kCalls][4]) {
  constexpr int parts = kParts * kCalls, last = kPhiloxRounds - 1;
  // Words 0 and 2 of the state, which a round multiplies, and words 1 and 3, which it adds, its key already in them.
  Word multiplied[2][parts], added[2][parts];
  unroll<parts>([&](auto i) HSAID_LAMBDA {
    const Product first = multiply(part(word1[i / kParts] ^ constants.word0, i % kParts), kPhiloxM0);
    const Product second = multiply(high(first) ^ word(constants.round2), kPhiloxM1);
    const Product a = multiply(high(second) ^ word(constants.round3_hi), kPhiloxM0);
    const Product b = multiply(low(first) ^ word(constants.round3_lo), kPhiloxM1);
    multiplied[0][i] = high(b) ^ low(second) ^ word(keys.key[3][0]);
    multiplied[1][i] = high(a) ^ word(constants.round4);
    added[0][i] = low(b) ^ word(keys.key[4][0]);
    added[1][i] = low(a) ^ word(keys.key[4][1]);
  });
  unroll<last - 4>([&](auto r) HSAID_LAMBDA {
    unroll<parts>([&](auto i) HSAID_LAMBDA {
      const Product a = multiply(multiplied[0][i], kPhiloxM0), b = multiply(multiplied[1][i], kPhiloxM1);
      multiplied[0][i] = high(b) ^ added[0][i];
      multiplied[1][i] = high(a) ^ added[1][i];
      added[0][i] = low(b);
      added[1][i] = low(a);
      if constexpr (r + 5 < last) {  // the last round's keys go into its results
        added[0][i] ^= word(keys.key[r + 5][0]);
        added[1][i] ^= word(keys.key[r + 5][1]);
      }
    });
  });
  unroll<kCalls>([&](auto i) HSAID_LAMBDA {
    Product a[kParts], b[kParts];
    unroll<kParts>([&](auto j) HSAID_LAMBDA { a[j] = multiply(multiplied[0][kParts * i + j], kPhiloxM0); });
    unroll<kParts>([&](auto j) HSAID_LAMBDA { b[j] = multiply(multiplied[1][kParts * i + j], kPhiloxM1); });
    w[i][0] = high_halves(b) ^ low_halves(added[0] + kParts * i) ^ keys.key[last][0];
    w[i][1] = low_halves(b);
    w[i][2] = high_halves(a) ^ low_halves(added[1] + kParts * i) ^ keys.key[last][1];
    w[i][3] = low_halves(a);
  });
}

// The table of core/normal.h.
struct NormalTable {
  Table a, b;
};
HSAID_INLINE void fill(NormalTable& table) {
  for (uint32_t line = kFirstLine; line < kFirstLine + 32; ++line) {
    set_line(table.a, line, normal_table(line & 31));
    set_line(table.b, line, normal_table(32 + (line & 31)));
  }
}

// core/normal.h in lanes, in two steps: `magic` is kNormalMagic | half; y and v, and the lines of v.
struct NormalVectors {
  vf y[kGroup], v[kGroup];
  Lines lines;
};
HSAID_INLINE void start_normals(const vu (&magic)[kGroup], NormalVectors& normals) {
  unroll<kGroup>([&](auto i) HSAID_LAMBDA {
    normals.y[i] = (vf)magic[i] - kNormalOffset;
    normals.v[i] = kNormalTop - (vf)((vu)normals.y[i] & 0x7fffffffu);
  });
  normals.lines = pack_lines(normals.v);
}
HSAID_INLINE void finish_normals(const NormalVectors& normals, const NormalTable& table, vf (&g)[kGroup]) {
  vf a[kGroup], b[kGroup];
  look_up(table.b, normals.lines, b);
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { b[i] = b[i] * normals.v[i]; });
  look_up(table.a, normals.lines, a);
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { g[i] = normals.y[i] * (a[i] + b[i]); });
}
HSAID_GENERATOR void normal_vectors(const vu (&magic)[kGroup], const NormalTable& table, vf (&g)[kGroup]) {
  NormalVectors normals;
  start_normals(magic, normals);
  finish_normals(normals, table, g);
}

// The sign bits of a block as Philox words: position k has bit (k >> 2) & 31 of words[k >> 9][k >> 7 & 3][k & 3].
HSAID_INLINE int64_t num_sign_words(int q) { return q > 11 ? (int64_t)1 << (q - 5) : 64; }  // whole vectors of calls
HSAID_NOINLINE void make_sign_words(const Stream& s, const PhiloxKeys& keys, int q, uint32_t* words) {
  const PhiloxConstants prefix(philox_prefix(s.seed, counter(s.purpose, s.block, s.chunk, s.id, 0)));
  const vu position = lane_index() | broadcast((uint32_t)s.chunk << 16);
  const uint32_t calls = q > 9 ? 1u << (q - 7) : 4;
  for (uint32_t first = 0; first < calls; first += kLanes) {
    vu w[1][4];
    philox_vectors<1>(prefix, keys, {position + first}, w);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < kLanes; i += 4) std::memcpy(words + (first + i) * 4 + j * 4, (uint32_t*)&w[0][j] + i, 16);
  }
}

// Calls use(i, sign) for the vectors i of the 2^t values at k: -1 where bit 31 is set, the only one.
template <int t, class Use>
HSAID_INLINE void sign_tile(const uint32_t* words, int64_t k, Use&& use) {
  constexpr int per_quad = 32 * 4 / kLanes < (1 << t) / kLanes ? 32 * 4 / kLanes : (1 << t) / kLanes;
  constexpr int quads = kLanes / 4;  // bits that a vector takes of each word
  unroll<(1 << t) / kLanes / per_quad>([&](auto group) HSAID_LAMBDA {
    const uint32_t at = (uint32_t)k + group * 128;
    vu bits = load_repeated(words + at / 128 * 4);
    if constexpr (1 << t < 128) bits = bits >> at % 128 / 4;  // tiles that share a quad
    const vu lifted = bits << (quads - 1 - (lane_index() >> 2));
    unroll<per_quad>([&](auto i)
                         HSAID_LAMBDA { use(group * per_quad + i, lifted << (32 - quads - quads * i) & 0x80000000u); });
  });
}

// The diagonal of one block after another.
struct Diagonal {
  Params params;
  PhiloxKeys keys;
  NormalTable table;
  PhiloxPrefix* prefix;  // [num_drawn], gaussian
  uint32_t* sign_words;  // [num_drawn, num_sign_words], rademacher
  Segment segment;
  int64_t block;
  int first_chunk;  // of the chunks that the block is made from; the draws below are numbered from it

  Diagonal(const Params& p, PhiloxPrefix* prefix_, uint32_t* words)
      : params(p), keys(philox_keys(p.seed)), prefix(prefix_), sign_words(words), segment{}, block(0), first_chunk(0) {
    fill(table);
  }

  void start(const Segment& s, int64_t b) {
    segment = s;
    block = b;
    first_chunk = chunk_of(params, (uint64_t)s.stream, b);
    for (int i = 0; i < num_drawn(params); ++i) {
      const Stream stream = stream_of(params, s, kDiagonal, b, first_chunk + i);
      if (params.rademacher)
        make_sign_words(stream, keys, params.q, sign_words + i * num_sign_words(params.q));
      else
        prefix[i] = philox_prefix(stream.seed, counter(stream.purpose, b, stream.chunk, stream.id, 0));
    }
  }
};

HSAID_NOINLINE vf small_gaussian(const Diagonal& d, int chunk, uint32_t k) {
  const Stream s = stream_of(d.params, d.segment, kDiagonal, d.block, d.first_chunk + chunk);
  vf g;
  for (int lane = 0; lane < kLanes; ++lane) g[lane] = gaussian_at(s, d.params.q, k + lane);
  return g;
}

// Positions drawn at a time: random words, and what is made of them, stay in the first-level cache.
constexpr int kDrawBits = 10;
HSAID_INLINE int64_t num_draws(int q) { return q > kDrawBits ? (int64_t)1 << (q - kDrawBits) : 1; }

// Philox words of calls [0, calls) of a draw, kSide vectors of calls side by side: one alone is a long chain of
// dependent multiplications. All positions are counted in `beside`.
template <int kSide>
HSAID_INLINE void draw_words(const Diagonal& d, int chunk, int64_t begin, int64_t calls, Beside& beside,
                             uint32_t* words) {
  const PhiloxConstants prefix(d.prefix[chunk]);
  const vu first = lane_index() + ((uint32_t)(begin >> 7 << 4) | (uint32_t)(d.first_chunk + chunk) << 16);
  for (int64_t call = 0; call < calls; call += kSide) {
    vu word1[kSide], w[kSide][4];
    unroll<kSide>([&](auto i) HSAID_LAMBDA { word1[i] = first + (uint32_t)(call + i) * kLanes; });
    philox_vectors<kSide>(prefix, d.keys, word1, w);
    unroll<kSide>([&](auto i) HSAID_LAMBDA {
      unroll<4>([&](auto j) HSAID_LAMBDA { store(words + ((call + i) * 4 + j) * kLanes, w[i][j]); });
    });
    beside.count((calls - call < kSide ? calls - call : kSide) * 8 * kLanes);
  }
}

constexpr int kDrawCounts = kNormalLoops + 1;

// Calls use(k, g) for the vectors of G at the 2^min(q, kDrawBits) positions of a draw. First all words, then all
// normals, in one step or two: short loops, each with its constants in registers. Each of the kDrawCounts loops counts
// all positions in `beside`.
template <class Use>
HSAID_INLINE void draw_gaussian(const Diagonal& d, int chunk, int64_t draw, Beside& beside, Use&& use) {
  constexpr int parts = 16 / kLanes;  // vectors of calls that cover the 16 lowest positions
  constexpr int groups = 8 / kGroup;  // of the vectors of a call
  const int q = d.params.q;
  const int64_t begin = draw << kDrawBits, size = q > kDrawBits ? 1 << kDrawBits : width(d.params);
  if (q < 7) {
    for (int64_t k = 0; k < size; k += kLanes) use(k, small_gaussian(d, chunk, (uint32_t)k));
    beside.count(kDrawCounts * size);
    return;
  }
  alignas(64) uint32_t words[1 << (kDrawBits - 1)];
  const int64_t calls = size / 128 * parts;
  if (kLanes == 16 && calls >= 4)
    draw_words<4>(d, chunk, begin, calls, beside, words);
  else
    draw_words<2>(d, chunk, begin, calls, beside, words);
  const auto magic = [&](int64_t call, int group, vu(&x)[kGroup]) HSAID_LAMBDA {
    unroll<kGroup / 2>([&](auto j) HSAID_LAMBDA {
      const vu word = *(const vu*)(words + (call * 4 + group * kGroup / 2 + j) * kLanes);
      widen_halves(word, &x[2 * j], &x[2 * j + 1]);
    });
  };
  const auto hand_out = [&](int64_t call, int group, const vf(&g)[kGroup]) HSAID_LAMBDA {
    const int64_t k = begin + call / parts * 128 + call % parts * kLanes + group * kGroup * 16;
    unroll<kGroup>([&](auto j) HSAID_LAMBDA { use(k + j * 16, g[j]); });
  };
  const auto each_call = [&](auto&& make) HSAID_LAMBDA {
    for (int64_t call = 0; call < calls; ++call) {
      unroll<groups>([&](auto group) HSAID_LAMBDA { make(call, group); });
      beside.count(8 * kLanes);
    }
  };
  if constexpr (kNormalLoops == 2) {
    NormalVectors normals[(1 << kDrawBits) / (kGroup * kLanes)];
    each_call([&](int64_t call, int group) HSAID_LAMBDA {
      vu x[kGroup];
      magic(call, group, x);
      start_normals(x, normals[call * groups + group]);
    });
    each_call([&](int64_t call, int group) HSAID_LAMBDA {
      vf g[kGroup];
      finish_normals(normals[call * groups + group], d.table, g);
      hand_out(call, group, g);
    });
  } else {
    each_call([&](int64_t call, int group) HSAID_LAMBDA {
      vu x[kGroup];
      vf g[kGroup];
      magic(call, group, x);
      normal_vectors(x, d.table, g);
      hand_out(call, group, g);
    });
  }
}

}  // namespace

}  // namespace hsaid
