// G and the signs B of a block, with a Philox call in each lane. Consecutive positions take the same word of
// consecutive calls, a vector as it comes; if they took the four words of one call, vectors would have to be transposed
// (docs/rng.md).
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

// kCalls times kLanes calls that differ in word 1 of the counter: w[call][word].
template <int kCalls>
HSAID_GENERATOR void philox_vectors(const PhiloxPrefix& prefix, const PhiloxKeys& keys, const vu (&word1)[kCalls],
                                    vu (&w)[kCalls][4]) {
  constexpr int parts = kParts * kCalls, last = kPhiloxRounds - 1;
  // Words 0 and 2 of the state, which a round multiplies, and words 1 and 3, which it adds, its key already in them.
  Word multiplied[2][parts], added[2][parts];
  // From the low halves of products a of word 0 and b of word 2 comes what the round with these keys adds.
  const auto add_later = [&](int i, const Product& a, const Product& b, const uint32_t (&key)[2]) HSAID_LAMBDA {
    park(added[0][i] = low(b) ^ word(key[0]));
    park(added[1][i] = low(a) ^ word(key[1]));
  };
  unroll<parts>([&](auto i) HSAID_LAMBDA {
    const Product first = multiply(part(word1[i / kParts] ^ prefix.word0, i % kParts), kPhiloxM0);
    const Product second = multiply(high(first) ^ word(prefix.round2), kPhiloxM1);
    const Product a = multiply(high(second) ^ word(prefix.round3_hi), kPhiloxM0);
    const Product b = multiply(low(first) ^ word(prefix.round3_lo), kPhiloxM1);
    multiplied[0][i] = high(b) ^ low(second) ^ word(keys.key[3][0]);
    multiplied[1][i] = high(a) ^ word(prefix.round4);
    add_later(i, a, b, keys.key[4]);
  });
  unroll<last - 4>([&](auto r) HSAID_LAMBDA {
    unroll<parts>([&](auto i) HSAID_LAMBDA {
      const Product a = multiply(multiplied[0][i], kPhiloxM0), b = multiply(multiplied[1][i], kPhiloxM1);
      multiplied[0][i] = high(b) ^ added[0][i];
      multiplied[1][i] = high(a) ^ added[1][i];
      add_later(i, a, b, keys.key[r + 5]);
    });
  });
  unroll<kCalls>([&](auto i) HSAID_LAMBDA {
    Product a[kParts], b[kParts];
    unroll<kParts>([&](auto j) HSAID_LAMBDA { a[j] = multiply(multiplied[0][kParts * i + j], kPhiloxM0); });
    unroll<kParts>([&](auto j) HSAID_LAMBDA { b[j] = multiply(multiplied[1][kParts * i + j], kPhiloxM1); });
    w[i][0] = high_halves(b) ^ low_halves(added[0] + kParts * i);
    w[i][1] = low_halves(b);
    w[i][2] = high_halves(a) ^ low_halves(added[1] + kParts * i);
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

// core/normal.h in lanes: `magic` is kNormalMagic | half.
HSAID_GENERATOR void normal_vectors(const vu (&magic)[kGroup], const NormalTable& table, vf (&g)[kGroup]) {
  vf y[kGroup], v[kGroup], a[kGroup], b[kGroup];
  unroll<kGroup>([&](auto i) HSAID_LAMBDA {
    y[i] = (vf)magic[i] - kNormalOffset;
    v[i] = kNormalTop - (vf)((vu)y[i] & 0x7fffffffu);
  });
  const Lines lines = pack_lines(v);
  look_up(table.b, lines, b);
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { b[i] = b[i] * v[i]; });
  look_up(table.a, lines, a);
  unroll<kGroup>([&](auto i) HSAID_LAMBDA { g[i] = y[i] * (a[i] + b[i]); });
}

// A vector of the diagonal, and how it multiplies one.
struct GaussianVector {
  vf g;
  HSAID_INLINE vf times(const GaussianVector& d, vf x) { return d.g * x; }
};
struct SignVector {
  vu sign;  // bit 31
  HSAID_INLINE vf times(const SignVector& d, vf x) { return (vf)((vu)x ^ d.sign); }
};

// The sign bits of a block as Philox words: position k has bit (k >> 2) & 31 of words[k >> 9][k >> 7 & 3][k & 3].
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

// Calls use(i, d) for the vectors i of the 2^t values at k.
template <int t, class Use>
HSAID_INLINE void sign_tile(const uint32_t* words, int64_t k, Use&& use) {
  constexpr int per_quad = 32 * 4 / kLanes < (1 << t) / kLanes ? 32 * 4 / kLanes : (1 << t) / kLanes;
  constexpr int quads = kLanes / 4;  // bits that a vector takes of each word
  unroll<(1 << t) / kLanes / per_quad>([&](auto group) HSAID_LAMBDA {
    const int64_t at = k + group * 128;
    const uint32_t* quad = words + (at >> 9) * 16 + (at >> 7 & 3) * 4;
    vu bits = load_repeated(quad);
    if constexpr (1 << t < 128) bits = bits >> (uint32_t)(at % 128 / 4);  // tiles that share a quad
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
  constexpr int parts = 16 / kLanes;  // vectors of calls that cover the 16 lowest positions
  const PhiloxPrefix prefix = d.prefix[chunk];
  const uint32_t top = (uint32_t)(d.first_chunk + chunk) << 16;
  for (int64_t call = 0; call < calls; call += kSide) {
    vu word1[kSide], w[kSide][4];
    unroll<kSide>([&](auto i) HSAID_LAMBDA {
      const uint32_t at = (uint32_t)(call + i);
      word1[i] = lane_index() + (((uint32_t)(begin >> 7) + at / parts) << 4 | at % parts * kLanes | top);
    });
    philox_vectors<kSide>(prefix, d.keys, word1, w);
    unroll<kSide>([&](auto i) HSAID_LAMBDA {
      unroll<4>([&](auto j) HSAID_LAMBDA { store(words + ((call + i) * 4 + j) * kLanes, w[i][j]); });
    });
    beside.count((calls - call < kSide ? calls - call : kSide) * 8 * kLanes);
  }
}

// Calls use(k, g) for the vectors of G at the positions of a draw, n >= 128. First all words, then all normals: two
// short loops, each with its constants in registers. Both count all positions in `beside`.
template <class Use>
HSAID_INLINE void draw_gaussian(const Diagonal& d, int chunk, int64_t begin, int64_t end, Beside& beside, Use&& use) {
  constexpr int parts = 16 / kLanes;
  alignas(64) uint32_t words[1 << (kDrawBits - 1)];
  const int64_t calls = (end - begin) / 128 * parts;
  if (kLanes == 16 && calls >= 4)
    draw_words<4>(d, chunk, begin, calls, beside, words);
  else
    draw_words<2>(d, chunk, begin, calls, beside, words);
  for (int64_t call = 0; call < calls; ++call) {
    unroll<8 / kGroup>([&](auto group) HSAID_LAMBDA {
      vu magic[kGroup];
      vf g[kGroup];
      unroll<kGroup / 2>([&](auto j) HSAID_LAMBDA {
        const vu word = *(const vu*)(words + (call * 4 + group * kGroup / 2 + j) * kLanes);
        widen_halves(word, &magic[2 * j], &magic[2 * j + 1]);
      });
      normal_vectors(magic, d.table, g);
      unroll<kGroup>([&](auto j) HSAID_LAMBDA {
        constexpr int slot = group * kGroup + j;
        use(begin + call / parts * 128 + call % parts * kLanes + slot * 16, GaussianVector{g[j]});
      });
    });
    beside.count(8 * kLanes);
  }
}

// Calls use(k, d) for the vectors of the diagonal at the 2^min(q, kDrawBits) positions of a draw, which are counted
// in `beside` kDrawCounts times.
template <bool kRademacher>
constexpr int kDrawCounts = kRademacher ? 1 : 2;
template <bool kRademacher, class Use>
HSAID_INLINE void draw_diagonal(const Diagonal& d, int chunk, int64_t draw, Beside& beside, Use&& use) {
  const int q = d.params.q;
  const int64_t begin = draw << kDrawBits, end = q > kDrawBits ? begin + (1 << kDrawBits) : width(d.params);
  if (kRademacher) {
    const uint32_t* words = d.sign_words + chunk * num_sign_words(q);
    with_tile_bits(tile_bits(q), [&](auto t) HSAID_LAMBDA {
      for (int64_t k = begin; k < end; k += 1 << t) {
        sign_tile<t>(words, k, [&](int i, SignVector s) HSAID_LAMBDA { use(k + i * kLanes, s); });
        beside.count(1 << t);
      }
    });
  } else if (q >= 7) {
    draw_gaussian(d, chunk, begin, end, beside, use);
  } else {
    for (int64_t k = begin; k < end; k += kLanes) use(k, GaussianVector{small_gaussian(d, chunk, (uint32_t)k)});
    beside.count(2 * (end - begin));
  }
}

}  // namespace

}  // namespace hsaid
