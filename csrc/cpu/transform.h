// The Walsh-Hadamard transform of a block in few passes over a buffer that stays in the cache: several stages a pass,
// in registers, where a pass for each stage would load and store every value for one addition.
//
//     first pass   stages at bits 2 .. t-1 of a tile of 2^t values, filled by the caller, 16 vectors at most; with
//                  shorter vectors kStripStages more over a strip of tiles, while it is in the first-level cache
//     middle       up to kMiddleBits stages a pass
//     last pass    the top kLastBits stages, then bits 0 and 1, whole cache lines handed to the caller
//
// The order of stages is core/walsh_hadamard.h's; the transposed transform runs everything backwards.
// Passes take ranges of strips, or of lines: while one block is computed, the lines of another go to memory.
#pragma once

#include "simd.h"

namespace hsaid {

namespace {

// AVX2 has 16 registers, which hold a pass over eight vectors; the others hold sixteen.
constexpr int kMiddleBits = kLanes == 8 ? 3 : 4;
constexpr int kMaxTileBits = kLaneBits + kMiddleBits;
constexpr int kStripStages = kLanes == 16 ? 0 : kLanes == 8 ? 3 : 10 - kMaxTileBits;
constexpr int kLastBits = 2;

HSAID_INLINE int tile_bits(int q) { return q < kMaxTileBits ? q : kMaxTileBits; }
HSAID_INLINE int strip_bits(int q) {
  return q < kMaxTileBits + kStripStages ? tile_bits(q) : kMaxTileBits + kStripStages;
}
HSAID_INLINE int last_bits(int q) { return q - strip_bits(q) < kLastBits ? q - strip_bits(q) : kLastBits; }

// Calls f with t as a constant.
template <class F>
HSAID_INLINE void with_tile_bits(int t, F&& f) {
  if (t == 5) return f(std::integral_constant<int, 5>{});
  if (t == 6) return f(std::integral_constant<int, 6>{});
  if constexpr (kMaxTileBits >= 7)
    if (t == 7) return f(std::integral_constant<int, 7>{});
  if constexpr (kMaxTileBits >= 8)
    if (t == 8) return f(std::integral_constant<int, 8>{});
}
template <class F>
HSAID_INLINE void with_last_bits(int r, F&& f) {
  switch (r) {
    case 0:
      return f(std::integral_constant<int, 0>{});
    case 1:
      return f(std::integral_constant<int, 1>{});
    default:
      return f(std::integral_constant<int, kLastBits>{});
  }
}

// Stages over the index of 2^kBits vectors, lowest bit first (or last, transposed).
template <int kBits, bool kTranspose>
HSAID_INLINE void register_stages(vf* x) {
  unroll<kBits>([&](auto stage) HSAID_LAMBDA {
    constexpr int half = 1 << (kTranspose ? kBits - 1 - stage : (int)stage);
    unroll<(1 << kBits) / 2>([&](auto pair) HSAID_LAMBDA {
      constexpr int low = (pair / half) * 2 * half + pair % half;
      const vf a = x[low], b = x[low + half];
      x[low] = a + b;
      x[low + half] = a - b;
    });
  });
}

// Stages at bits 2 .. t-1 of a tile in registers: those within a vector, then those between vectors.
template <int kTileBits, bool kTranspose>
HSAID_INLINE void tile_stages(vf* x) {
  constexpr int vectors = (1 << kTileBits) / kLanes;
  if constexpr (kTranspose) register_stages<kTileBits - kLaneBits, true>(x);
  unroll<kLaneBits - 2>([&](auto stage) HSAID_LAMBDA {
    constexpr int bit = kTranspose ? kLaneBits - 1 - stage : 2 + stage;
    unroll<vectors>([&](auto i) HSAID_LAMBDA { x[i] = lane_stage<bit>(x[i]); });
  });
  if constexpr (!kTranspose) register_stages<kTileBits - kLaneBits, false>(x);
}

// Moves lines between memory and the caches beside a computation: `step` of each part that the last pass joins, for
// every `cost` positions that the computation counts. If they came all at once, the core would wait for them, and after
// that the memory for the core.
struct Beside {
  void (*move)(const void* what, int64_t begin, int64_t end);
  const void* what;
  int64_t step, cost;
  int64_t line = 0, counted = 0;

  __attribute__((always_inline)) void count(int64_t positions) {
    for (counted += positions; counted >= cost; counted -= cost, line += step) move(what, line, line + step);
  }
};
constexpr Beside kNothingBeside = {nullptr, nullptr, 0, INT64_MAX};

// kBits stages, from `bit` up, over the whole buffer, whose positions are counted in `beside`.
template <int kBits, bool kTranspose>
void middle_pass(float* x, int64_t n, int bit, Beside& beside) {
  const int64_t stride = (int64_t)1 << bit;
  for (int64_t high = 0; high < n; high += stride << kBits)
    for (int64_t k = high; k < high + stride; k += kLanes) {
      vf v[1 << kBits];
      unroll<1 << kBits>([&](auto i) HSAID_LAMBDA { v[i] = load(x + k + i * stride); });
      register_stages<kBits, kTranspose>(v);
      unroll<1 << kBits>([&](auto i) HSAID_LAMBDA { store(x + k + i * stride, v[i]); });
      beside.count(kLanes << kBits);
    }
}

// All stages between the first and the last pass, over one or more of the parts that the last pass joins.
HSAID_INLINE int num_middle_passes(int q) { return (q - last_bits(q) - strip_bits(q) + kMiddleBits - 1) / kMiddleBits; }
template <bool kTranspose>
HSAID_INLINE void middle_passes(float* x, int64_t size, int q, Beside& beside) {
  const int begin = strip_bits(q), end = q - last_bits(q), full = (end - begin) / kMiddleBits;
  const int rest = end - begin - full * kMiddleBits;
  const auto rest_pass = [&]() HSAID_LAMBDA {
    const int bit = end - rest;
    if (rest == 1) middle_pass<1, kTranspose>(x, size, bit, beside);
    if (rest == 2) middle_pass<2, kTranspose>(x, size, bit, beside);
    if (rest == 3) middle_pass<3, kTranspose>(x, size, bit, beside);
  };
  if (kTranspose) rest_pass();
  for (int i = 0; i < full; ++i)
    middle_pass<kMiddleBits, kTranspose>(x, size, begin + kMiddleBits * (kTranspose ? full - 1 - i : i), beside);
  if (!kTranspose) rest_pass();
}

// First pass over strips [begin, end), whose positions are counted in `beside` `counts` times: fill(t, k, x) sets the
// 2^t values at k.
template <class Fill>
HSAID_INLINE void first_pass(float* buffer, int q, int64_t begin, int64_t end, Beside& beside, int counts,
                             Fill&& fill) {
  const int64_t strip = (int64_t)1 << strip_bits(q);
  with_tile_bits(tile_bits(q), [&](auto t) HSAID_LAMBDA {
    constexpr int vectors = (1 << t) / kLanes;
    for (int64_t start = begin * strip; start < end * strip; start += strip) {
      for (int64_t k = start; k < start + strip; k += 1 << t) {
        beside.count(counts << t);
        vf x[vectors];
        fill(t, k, x);
        tile_stages<t, false>(x);
        unroll<vectors>([&](auto i) HSAID_LAMBDA { store(buffer + k + i * kLanes, x[i]); });
      }
      if constexpr (kStripStages > 0)
        if (strip > 1 << t) {
          Beside nothing = kNothingBeside;
          middle_pass<kStripStages, false>(buffer + start, strip, t, nothing);
        }
    }
  });
}

// Its transpose: drain(t, k, x) takes the 2^t values at k.
template <class Drain>
HSAID_INLINE void first_pass_transposed(float* buffer, int q, int64_t begin, int64_t end, Beside& beside, int counts,
                                        Drain&& drain) {
  const int64_t strip = (int64_t)1 << strip_bits(q);
  with_tile_bits(tile_bits(q), [&](auto t) HSAID_LAMBDA {
    constexpr int vectors = (1 << t) / kLanes;
    for (int64_t start = begin * strip; start < end * strip; start += strip) {
      if constexpr (kStripStages > 0)
        if (strip > 1 << t) {
          Beside nothing = kNothingBeside;
          middle_pass<kStripStages, true>(buffer + start, strip, t, nothing);
        }
      for (int64_t k = start; k < start + strip; k += 1 << t) {
        vf x[vectors];
        unroll<vectors>([&](auto i) HSAID_LAMBDA { x[i] = load(buffer + k + i * kLanes); });
        tile_stages<t, true>(x);
        drain(t, k, x);
        beside.count(counts << t);
      }
    }
  });
}

// Stages 0 and 1 of a line, which lie within a vector. kSplit: vectors as they lie in memory become split ones
// (simd.h), the values at even places and those at odd ones; transposed, the other way round.
template <bool kSplit, int kVectors>
HSAID_INLINE void line_stages(vf (&y)[kVectors]) {
  if constexpr (kSplit)
    unroll<kVectors / 2>([&](auto i) HSAID_LAMBDA {
      vf even, odd;
      split(y[2 * i], y[2 * i + 1], &even, &odd);
      y[2 * i] = lane_stage<0>(even + odd);
      y[2 * i + 1] = lane_stage<0>(even - odd);
    });
  else
    unroll<kVectors>([&](auto v) HSAID_LAMBDA { y[v] = lane_stage<1>(lane_stage<0>(y[v])); });
}
template <bool kSplit, int kVectors>
HSAID_INLINE void line_stages_transposed(vf (&y)[kVectors]) {
  if constexpr (kSplit)
    unroll<kVectors / 2>([&](auto i) HSAID_LAMBDA {
      const vf even = lane_stage<0>(y[2 * i]), odd = lane_stage<0>(y[2 * i + 1]);
      join(even + odd, even - odd, &y[2 * i], &y[2 * i + 1]);
    });
  else
    unroll<kVectors>([&](auto v) HSAID_LAMBDA { y[v] = lane_stage<0>(lane_stage<1>(y[v])); });
}

// Last pass over lines [begin, end) of the lowest of 2^r parts of the block, a line being kVectors vectors:
// drain(k, x) takes the line at k.
template <int kVectors, bool kSplit, class Drain>
HSAID_INLINE void last_pass(const float* buffer, int q, int64_t begin, int64_t end, Drain&& drain) {
  constexpr int line = kVectors * kLanes;
  with_last_bits(last_bits(q), [&](auto r) HSAID_LAMBDA {
    const int64_t part = (int64_t)1 << (q - r);
    for (int64_t k = begin * line; k < end * line; k += line) {
      vf x[kVectors][1 << r];
      unroll<kVectors>([&](auto v) HSAID_LAMBDA {
        unroll<1 << r>([&](auto p) HSAID_LAMBDA { x[v][p] = load(buffer + k + p * part + v * kLanes); });
        register_stages<r, false>(x[v]);
      });
      unroll<1 << r>([&](auto p) HSAID_LAMBDA {
        vf y[kVectors];
        unroll<kVectors>([&](auto v) HSAID_LAMBDA { y[v] = x[v][p]; });
        line_stages<kSplit>(y);
        drain(k + p * part, y);
      });
    }
  });
}

// Its transpose: fill(k, x) sets the line at k.
template <int kVectors, bool kSplit, class Fill>
HSAID_INLINE void last_pass_transposed(float* buffer, int q, int64_t begin, int64_t end, Fill&& fill) {
  constexpr int line = kVectors * kLanes;
  with_last_bits(last_bits(q), [&](auto r) HSAID_LAMBDA {
    const int64_t part = (int64_t)1 << (q - r);
    for (int64_t k = begin * line; k < end * line; k += line) {
      vf x[kVectors][1 << r];
      unroll<1 << r>([&](auto p) HSAID_LAMBDA {
        vf y[kVectors];
        fill(k + p * part, y);
        line_stages_transposed<kSplit>(y);
        unroll<kVectors>([&](auto v) HSAID_LAMBDA { x[v][p] = y[v]; });
      });
      unroll<kVectors>([&](auto v) HSAID_LAMBDA {
        register_stages<r, true>(x[v]);
        unroll<1 << r>([&](auto p) HSAID_LAMBDA { store(buffer + k + p * part + v * kLanes, x[v][p]); });
      });
    }
  });
}

HSAID_INLINE int64_t num_strips(int q) { return (int64_t)1 << (q - strip_bits(q)); }
// Lines of kVectors vectors in each of the parts that the last pass joins.
template <int kVectors>
HSAID_INLINE int64_t num_lines(int q) {
  return ((int64_t)1 << (q - last_bits(q))) / (kVectors * kLanes);
}

}  // namespace

}  // namespace hsaid
