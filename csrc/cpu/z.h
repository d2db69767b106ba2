// z = Pi H B theta, which all blocks of a segment share, and what makes it: a whole transform, the signs B, and Pi.
#pragma once

#include "../core/permutation.h"
#include "arena.h"
#include "diagonal.h"

namespace hsaid {

namespace {

void walsh_hadamard_block(float* x, int q) {
  Beside nothing = kNothingBeside;
  first_pass(x, q, 0, num_strips(q), nothing, 0, [&](auto t, int64_t k, vf* v) HSAID_LAMBDA {
    unroll<(1 << t) / kLanes>([&](auto i) HSAID_LAMBDA { v[i] = load(x + k + i * kLanes); });
  });
  middle_passes<false>(x, (int64_t)1 << q, q, nothing);
  last_pass<1, false>(x, q, 0, num_lines<1>(q), [&](int64_t k, const vf(&y)[1]) HSAID_LAMBDA { store(x + k, y[0]); });
}

void walsh_hadamard_transposed(float* x, int q) {
  last_pass_transposed<1, false>(x, q, 0, num_lines<1>(q),
                                 [&](int64_t k, vf(&y)[1]) HSAID_LAMBDA { y[0] = load(x + k); });
  Beside nothing = kNothingBeside;
  middle_passes<true>(x, (int64_t)1 << q, q, nothing);
  first_pass_transposed(x, q, 0, num_strips(q), nothing, 0, [&](auto t, int64_t k, vf* v) HSAID_LAMBDA {
    unroll<(1 << t) / kLanes>([&](auto i) HSAID_LAMBDA { store(x + k + i * kLanes, v[i]); });
  });
}

void multiply_signs(const Params& p, uint64_t stream, int chunk, const PhiloxKeys& keys, uint32_t* words, float* x) {
  make_sign_words({p.seed, stream, kSigns, 0, chunk}, keys, p.q, words);
  with_tile_bits(tile_bits(p.q), [&](auto t) HSAID_LAMBDA {
    for (int64_t k = 0; k < width(p); k += 1 << t)
      sign_tile<t>(words, k, [&](int i, vu sign) HSAID_LAMBDA {
        float* values = x + k + i * kLanes;
        store(values, (vf)((vu)load(values) ^ sign));
      });
  });
}

// What a round of the permutation (core/permutation.h) adds to one half of the bits, for each value h < 2^7 of the
// other: byte h >> 5 of word h & 31 of a table, in less time than the two multiplications take that define it.
Table round_table(uint32_t key, int from, int to) {
  uint32_t words[32] = {};
  for (uint32_t byte = 0; 32 * byte < 1u << from; ++byte)
    for (uint32_t i = 0; i < 32; ++i) words[i] |= feistel_round(32 * byte + i, key, to) << 8 * byte;
  Table table;
  for (uint32_t i = 0; i < 32; ++i) set_line(table, kFirstLine + i, float_from_bits(words[i]));
  return table;
}

// pi [n] of a chunk; for small n, as many values more as fill a group of vectors.
void make_permutation(const Params& p, uint64_t stream, int chunk, uint32_t* pi) {
  const PermutationKeys keys = permutation_keys(p.seed, stream, chunk);
  const int low_bits = p.q / 2, high_bits = p.q - p.q / 2;
  Table tables[kFeistelRounds];
  for (int r = 0; r < kFeistelRounds; r += 2) {
    tables[r] = round_table(keys.key[r], low_bits, high_bits);
    tables[r + 1] = round_table(keys.key[r + 1], high_bits, low_bits);
  }
  const auto round = [&](int r, const vu(&half)[kGroup], vu(&other)[kGroup]) HSAID_LAMBDA {
    vf line[kGroup], word[kGroup];
    unroll<kGroup>([&](auto i) HSAID_LAMBDA { line[i] = (vf)(((half[i] & 31) + kFirstLine) << 21); });
    look_up(tables[r], pack_lines(line), word);
    unroll<kGroup>([&](auto i) HSAID_LAMBDA { other[i] ^= (vu)word[i] >> (half[i] >> 5 << 3) & 0xff; });
  };
  for (int64_t k = 0; k < width(p); k += kGroup * kLanes) {
    vu low[kGroup], high[kGroup];
    unroll<kGroup>([&](auto i) HSAID_LAMBDA {
      const vu position = lane_index() + (uint32_t)(k + i * kLanes);
      low[i] = position & ((1u << low_bits) - 1);
      high[i] = position >> low_bits;
    });
    unroll<kFeistelRounds / 2>([&](auto r) HSAID_LAMBDA {
      round(2 * r, low, high);
      round(2 * r + 1, high, low);
    });
    unroll<kGroup>([&](auto i) HSAID_LAMBDA { store(pi + k + i * kLanes, high[i] << low_bits | low[i]); });
  }
}

// What making z takes: arrays of n values and of sign words.
struct ZScratch {
  float* values;
  uint32_t* pi;  // the permutation of the chunk whose z was made last
  uint32_t* words;

  static int64_t count(const Params& p) { return width(p) > kGroup * kLanes ? width(p) : kGroup * kLanes; }
  static int64_t bytes(const Params& p) { return 2 * count(p) * 4 + 4 * num_sign_words(p.q) + kLineBytes; }
  ZScratch(Arena& arena, const Params& p)
      : values(arena.take<float>(width(p))),
        pi(arena.take<uint32_t>(count(p))),
        words(arena.take<uint32_t>(num_sign_words(p.q))) {}
};

// z [n] of one chunk of theta, for the stream of a segment or kSharedStream.
void make_z(const Params& p, uint64_t stream, int chunk, const float* theta, const PhiloxKeys& keys,
            const ZScratch& scratch, float* z) {
  const int64_t n = width(p), begin = chunk * n, count = p.dim - begin < n ? p.dim - begin : n;
  std::memcpy(scratch.values, theta + begin, count * sizeof(float));
  std::memset(scratch.values + count, 0, (n - count) * sizeof(float));
  multiply_signs(p, stream, chunk, keys, scratch.words, scratch.values);
  walsh_hadamard_block(scratch.values, p.q);
  make_permutation(p, stream, chunk, scratch.pi);
  for (int64_t k = 0; k < n; ++k) z[k] = scratch.values[scratch.pi[k]];
}

// factor * B H^T Pi^T u in u's place; scratch.pi is this chunk's.
void transpose_z(const Params& p, uint64_t stream, int chunk, float factor, const PhiloxKeys& keys,
                 const ZScratch& scratch, float* u) {
  float* v = scratch.values;
  for (int64_t k = 0; k < width(p); ++k) v[scratch.pi[k]] = u[k];
  walsh_hadamard_transposed(v, p.q);
  multiply_signs(p, stream, chunk, keys, scratch.words, v);
  for (int64_t k = 0; k < width(p); ++k) u[k] = factor * v[k];
}

}  // namespace

}  // namespace hsaid
