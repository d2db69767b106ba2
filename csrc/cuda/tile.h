// A block of 256 threads holds a tile of 2^14 values in registers, 64 a thread, in one after the other of the layouts
// A, B and C below: one transform of order 2^14, or 2^(14-q) of order 2^q side by side. In shared memory, the obvious
// place, each of the 14 stages would read and write every value; here two exchanges do. A and B exchange within a warp,
// B and C within the block, both in halves, so that 34 KB serve. docs/kernels.md counts what each costs.
#pragma once

#include "../core/permutation.h"
#include "layout.h"

namespace hsaid::cuda {

constexpr int kRowFloats = 34;                          // of the exchange between A and B: 32 and padding
constexpr int kExchangeFloats = kThreads * kRowFloats;  // a row a thread
constexpr int kTableFloats = 32 * kFeistelRounds;       // what pi^-1 is made with, or normals
constexpr int kSharedFloats = kTile + kExchangeFloats + kTableFloats;  // 2^14 values that a kernel keeps, and these
constexpr int kSharedBytes = kSharedFloats * (int)sizeof(float);       // 98 KB, within the 99 of the smaller devices

// The shared memory of a block of threads.
HSAID_DEVICE Shared kept() { return shared_memory(); }
HSAID_DEVICE Shared exchange() { return shared_memory() + kTile; }
HSAID_DEVICE Shared tables() { return shared_memory() + (kTile + kExchangeFloats); }

// --- layouts

// Which bits of the position, e0 ... e13, number the register, the lane and the warp.
using A = Layout<Bits<2, 3, 4, 5, 6, 7>, Bits<8, 9, 10, 11, 12>, Bits<0, 1, 13>>;  // drawing; stages 2 ... 7
using B = Layout<Bits<7, 8, 9, 10, 11, 12>, Bits<2, 3, 4, 5, 6>, Bits<0, 1, 13>>;  // stages 8 ... 12
using C = Layout<Bits<0, 1, 7, 8, 9, 13>, Bits<2, 3, 4, 5, 6>, Bits<10, 11, 12>>;  // stages 13, 0, 1; memory
static_assert(C::Register::spread(3) == 3, "registers in fours are vectors in memory");
static_assert(C::Register::spread(32) == kTile / 2, "the first 32 registers are the first half of the tile");

// Between A and B: a row is what a lane holds in A, a column what it holds in B.
using Rows = Array<B::Lane, Dimension<kRowFloats, A::Lane>, Dimension<32 * kRowFloats, A::Warp>>;
// Between B and C, which both have e8 and e9 in registers.
using Fours = Array<Bits<8, 9>, Dimension<4, B::Lane>, Dimension<128, C::Warp>, Dimension<1024, B::Warp>>;
static_assert(Rows::fits(kExchangeFloats) && Fours::fits(kExchangeFloats));

HSAID_DEVICE void a_to_b(float (&x)[kPerThread]) { change_layout<A, B, Rows, false>(exchange(), x); }
HSAID_DEVICE void b_to_a(float (&x)[kPerThread]) { change_layout<A, B, Rows, true>(exchange(), x); }
HSAID_DEVICE void b_to_c(float (&x)[kPerThread]) { change_layout<B, C, Fours, false>(exchange(), x); }
HSAID_DEVICE void c_to_b(float (&x)[kPerThread]) { change_layout<B, C, Fours, true>(exchange(), x); }

// --- transform

// Stage s adds and subtracts values whose positions differ in this bit: 2 ... 13, 0, 1 (csrc/core/walsh_hadamard.h).
HSAID_INLINE constexpr int stage_bit(int s) { return (s + 2) % kTileBits; }

// From stage s on, the first one whose bit no register of layout L has.
template <class L>
HSAID_INLINE constexpr int stages_end(int s) {
  while (s < kTileBits && L::Register::kMask >> stage_bit(s) & 1) ++s;
  return s;
}
constexpr int kEndA = stages_end<A>(0), kEndB = stages_end<B>(kEndA);
static_assert(stages_end<C>(kEndB) == kTileBits, "A, B and C do all stages, in order");

// Of registers whose numbers differ by kApart, a power of two.
template <int kApart>
HSAID_DEVICE void butterflies(float (&x)[kPerThread]) {
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i & kApart) continue;
    const float a = x[i], b = x[i | kApart];
    x[i] = a + b;
    x[i | kApart] = a - b;
  }
}

// Stages kFirst ... kEnd - 1, those that blocks of 2^q values have; reversed: the last one first.
template <class L, int kFirst, int kEnd, bool kReversed = false>
HSAID_DEVICE void stages(float (&x)[kPerThread], int q) {
  if constexpr (kFirst < kEnd) {
    constexpr int bit = stage_bit(kReversed ? kEnd - 1 : kFirst);
    if (bit < kMinWidthBits || q > bit) butterflies<L::Register::gather(1u << bit)>(x);
    stages<L, kFirst + !kReversed, kEnd - kReversed, kReversed>(x, q);
  }
}

// H of every block of the tile, from A to C.
HSAID_DEVICE void transform(float (&x)[kPerThread], int q) {
  stages<A, 0, kEndA>(x, q);
  a_to_b(x);
  stages<B, kEndA, kEndB>(x, q);
  b_to_c(x);
  stages<C, kEndB, kTileBits>(x, q);
}

// H^T, from C to A.
HSAID_DEVICE void transform_reversed(float (&x)[kPerThread], int q) {
  stages<C, kEndB, kTileBits, true>(x, q);
  c_to_b(x);
  stages<B, kEndA, kEndB, true>(x, q);
  b_to_a(x);
  stages<A, 0, kEndA, true>(x, q);
}

// The registers of A as 16 vectors of four: e2 e3 e7 e6 number the vector, e4 e5 the component. vector_place says where
// `kept` has vector v of a thread. A call of Philox gives the eight normals at e4 e5 e6, or 128 signs at e2 ... e8.
static_assert(std::is_same_v<A::Register, Bits<2, 3, 4, 5, 6, 7>>, "a_register and the draws count on it");
HSAID_DEVICE constexpr int a_register(int v, int j) { return (v & 3) | j << 2 | (v >> 3 & 1) << 4 | (v >> 2 & 1) << 5; }
HSAID_DEVICE int vector_place(int v, int owner) { return (v * kThreads + owner) * 4; }

// The place in `kept` of value k of a block in its natural order: neither 32 values in a row nor what the lanes of a
// warp have in A meet in a bank.
HSAID_INLINE constexpr int place_of(uint32_t k) { return (int)(k ^ A::Lane::gather(k)); }
static_assert(is_free_of_conflicts<Bits<0, 1, 2, 3, 4>, 1>(place_of) && is_free_of_conflicts<A::Lane, 1>(place_of));
// That of what register i holds in A.
HSAID_DEVICE int place_in_a(int i, uint32_t mask) {
  const uint32_t own = (uint32_t)place_of(position<A>(0) & mask), e = A::Register::spread((uint32_t)i) & mask;
  return (int)((own ^ (e & 31)) + (e & ~31u));
}

// --- random streams

// The tile of the segment that is tile t of the call.
template <bool kListed>
HSAID_DEVICE int tile_of(const int64_t* listed, int t) {
  return kListed ? (int)listed[t] : t;
}

// What multiplies a value: a normal, or a sign in bit 31 (times +-1 is exact).
struct Normal {
  float g;
  HSAID_MEMBER float times(float x) const { return g * x; }
};
struct Sign {
  uint32_t sign;
  HSAID_MEMBER float times(float x) const { return float_from_bits(bits_from_float(x) ^ (sign & 0x80000000u)); }
};

// Names the draws of a tile, whose j-th block is block + j * block_step of the segment.
struct Draws {
  Params params;
  uint64_t stream;
  Purpose purpose;
  int64_t block, block_step;
  int chunk;  // with one chunk a block: that of the segment's first block
};

HSAID_DEVICE int chunk_at(const Params& p, int first_chunk, int64_t block) {
  return p.one_chunk ? (int)((uint32_t)(first_chunk + block) % (uint32_t)p.chunks) : first_chunk;
}
HSAID_DEVICE Stream stream_at(const Draws& d, uint32_t position) {
  const int64_t block = d.block + (int64_t)(position >> d.params.q) * d.block_step;
  return {d.params.seed, d.stream, d.purpose, block, chunk_at(d.params, d.chunk, block)};
}

// Fills `tables` for draw_normal, once, before a barrier: a window with the 32 words of the table's A, one with those
// of B, each word in a bank of its own, so that no look-ups of a warp collide; then the top of kNormalMagic, which must
// come from memory, because on a constant that it knows the compiler spends a move a normal.
HSAID_DEVICE void prepare_normals() {
  const uint32_t i = thread_index(), s = kFirstLine + (i & 31);
  if (i < 64) tables().store((int)((i & 32) << 1 | (s & 63)), normal_table((i & 32) | (s & 31)));
  if (i == 64) tables().store(128, float_from_bits(kNormalMagic >> 16));
}

HSAID_DEVICE Normal draw_normal(uint32_t magic) {
  return {normal_from_magic(
      magic, [](uint32_t s) { return tables().look_up<0>(s); }, [](uint32_t s) { return tables().look_up<1>(s); })};
}

// Calls use(v, d) for each vector v of A, with the draws d[4] of its components; those that differ in bits 4 to 7 of
// the position only, in order (signs if kInOrder). Only for n >= 256, where all values of a thread are of one block.
template <class Use>
HSAID_DEVICE void draw_normals(const Draws& d, Use&& use) {
  const uint32_t magic = bits_from_float(tables().load(128));
  const uint32_t own = position<A>(0), k = own & ((1u << d.params.q) - 1);
  const Stream s = stream_at(d, own);
  PhiloxPrefix prefix = philox_prefix(s.seed, counter(s.purpose, s.block, s.chunk, s.id, 0));
  prefix.word0 ^= (k & 15) | k >> 7 << 4 | (uint32_t)s.chunk << 16;
#pragma unroll
  for (int v = 0; v < 8; ++v) {
    const PhiloxWords words = philox_from_prefix(prefix, s.seed, (uint32_t)((v & 3) << 2 | v >> 2 << 4));
    Normal g[8];
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t odd = words.w[word] | 0x00010001u;
      g[2 * word] = draw_normal(below(magic, odd, 0));
      g[2 * word + 1] = draw_normal(below(magic, odd, 1));
    }
    use(v, *(const Normal(*)[4])g);
    use(v | 8, *(const Normal(*)[4])(g + 4));
  }
}

template <bool kInOrder, class Use>
HSAID_DEVICE void draw_signs(const Draws& d, Use&& use) {
  const uint32_t own = position<A>(0), k = own & ((1u << d.params.q) - 1);
  const Stream s = stream_at(d, own);
  const PhiloxPrefix prefix = philox_prefix(s.seed, counter(s.purpose, s.block, s.chunk, s.id, 0));
  const PhiloxWords words = philox_from_prefix(prefix, s.seed, (k & 3) | k >> 9 << 2 | (uint32_t)s.chunk << 16);
  const bool e8 = k >> 8 & 1;
  const uint32_t halves[2] = {e8 ? words.w[2] : words.w[0], e8 ? words.w[3] : words.w[1]};  // at e7 = 0 and 1
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int v = kInOrder ? n >> 1 | (n & 1) << 3 : n;
    Sign signs[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int i = a_register(v, j);
      signs[j].sign = halves[i >> 5] << (31 - (i & 31));
    }
    use(v, signs);
  }
}

// The same for any width, by way of the exchange: one call of Philox a value, because blocks may be smaller than what a
// thread holds.
template <class Use>
HSAID_DEVICE void draw_slowly(const Draws& d, Use&& use) {
  const Shared own = exchange() + (int)thread_index();
  const uint32_t mask = (1u << d.params.q) - 1;
  const bool rademacher = d.params.rademacher || d.purpose != kDiagonal;
  sync_block();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int i = 0; i < 32; ++i) {
      const uint32_t e = position<A>(a_register(half * 8 + i / 4, i % 4));
      own.store(i * kThreads, stream_value(stream_at(d, e), d.params.q, rademacher, e & mask));
    }
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const Normal g[4] = {{own.load(v * 4 * kThreads)},
                           {own.load((v * 4 + 1) * kThreads)},
                           {own.load((v * 4 + 2) * kThreads)},
                           {own.load((v * 4 + 3) * kThreads)}};
      use(half * 8 + v, g);
    }
  }
}

constexpr int kFastDrawBits = 8;  // from here on a thread's values are all of one block

// What a kernel is compiled for: n = 2^14 where theta is one chunk (kTile) or several (kChunks); n = 1024 (k1024) and
// other n >= 256 (kWide) where it is one; everything (kGeneral). With one of several chunks a block: n = 2^14
// (kOneChunk) and everything (kOneChunkGeneral).
enum class Kind { kTile, kChunks, k1024, kWide, kGeneral, kOneChunk, kOneChunkGeneral };

inline Kind kind_of(const Params& p) {
  if (p.q == kTileBits) return p.chunks == 1 ? Kind::kTile : Kind::kChunks;
  if (p.chunks > 1 || p.q < kFastDrawBits) return Kind::kGeneral;
  return p.q == 10 ? Kind::k1024 : Kind::kWide;
}
HSAID_INLINE constexpr bool has_chunks(Kind kind) { return kind == Kind::kChunks || kind == Kind::kGeneral; }
HSAID_INLINE constexpr bool is_one_chunk(Kind kind) {
  return kind == Kind::kOneChunk || kind == Kind::kOneChunkGeneral;
}
HSAID_INLINE constexpr bool is_tile(Kind kind) {
  return kind == Kind::kTile || kind == Kind::kChunks || kind == Kind::kOneChunk;
}

// The parameters, with what the kind fixes as constants.
template <Kind kKind>
HSAID_DEVICE Params specialised(Params p) {
  if (is_tile(kKind)) p.q = kTileBits;
  if (kKind == Kind::k1024) p.q = 10;
  p.one_chunk = is_one_chunk(kKind);
  if (!has_chunks(kKind) && !p.one_chunk) p.chunks = 1;
  return p;
}

// What kernel(rademacher, kind) returns for the integral constants that fit these parameters.
template <class P, class Kernel>
auto choose(const Params& p, Kernel&& kernel) -> void (*)(P) {
  const auto of_kind = [&](auto rademacher) -> void (*)(P) {
    switch (kind_of(p)) {
      case Kind::kTile:
        return kernel(rademacher, std::integral_constant<Kind, Kind::kTile>{});
      case Kind::kChunks:
        return kernel(rademacher, std::integral_constant<Kind, Kind::kChunks>{});
      case Kind::k1024:
        return kernel(rademacher, std::integral_constant<Kind, Kind::k1024>{});
      case Kind::kWide:
        return kernel(rademacher, std::integral_constant<Kind, Kind::kWide>{});
      default:
        return kernel(rademacher, std::integral_constant<Kind, Kind::kGeneral>{});
    }
  };
  return p.rademacher ? of_kind(std::true_type{}) : of_kind(std::false_type{});
}

// The same for listed tiles, of fewer kinds. They have kernels of their own, because asking whether tiles are listed
// would make all others slower (docs/kernels.md).
template <class P, class Kernel>
auto choose_listed(const Params& p, Kernel&& kernel) -> void (*)(P) {
  const auto of_kind = [&](auto rademacher) -> void (*)(P) {
    if (p.q == kTileBits) return kernel(rademacher, std::integral_constant<Kind, Kind::kChunks>{});
    if (p.chunks > 1 || p.q < kFastDrawBits) return kernel(rademacher, std::integral_constant<Kind, Kind::kGeneral>{});
    return kernel(rademacher, std::integral_constant<Kind, Kind::kWide>{});
  };
  return p.rademacher ? of_kind(std::true_type{}) : of_kind(std::false_type{});
}

// The same with one of several chunks a block.
template <class P, class Kernel>
auto choose_one_chunk(const Params& p, Kernel&& kernel) -> void (*)(P) {
  const auto of_kind = [&](auto rademacher) -> void (*)(P) {
    if (p.q == kTileBits) return kernel(rademacher, std::integral_constant<Kind, Kind::kOneChunk>{});
    return kernel(rademacher, std::integral_constant<Kind, Kind::kOneChunkGeneral>{});
  };
  return p.rademacher ? of_kind(std::true_type{}) : of_kind(std::false_type{});
}

template <bool kRademacher, Kind kKind, class Use>
HSAID_DEVICE void draw(const Draws& d, Use&& use) {
  if ((kKind == Kind::kGeneral || kKind == Kind::kOneChunkGeneral) && d.params.q < kFastDrawBits)
    draw_slowly(d, use);
  else if constexpr (kRademacher)
    draw_signs<is_one_chunk(kKind)>(d, use);
  else
    draw_normals(d, use);
}

// --- z

// x, in A, times the signs B of a segment's chunk: the same for every block of the tile.
template <Kind kKind>
HSAID_DEVICE void multiply_signs(const Params& p, uint64_t stream, int chunk, float (&x)[kPerThread]) {
  draw<true, kKind>({p, stream, kSigns, 0, 0, chunk}, [&](int v, const auto(&d)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x[a_register(v, j)] = d[j].times(x[a_register(v, j)]);
  });
}

// Fills `tables` for permute_back, before a barrier, in kernels that draw no normals: what a round adds to one half of
// the position, a byte for each of at most 128 values of the other half. The 32 words of a round lie in banks of their
// own, so that no look-ups of a warp collide.
HSAID_DEVICE void prepare_permutation(const PermutationKeys& keys, int q) {
  const uint32_t i = thread_index();
  if (i >= kTableFloats) return;
  const uint32_t round = opaque(i / 32), *key = keys.key;
  const uint32_t even = round < 2 ? key[0] : round < 4 ? key[2] : key[4];
  const uint32_t odd = round < 2 ? key[1] : round < 4 ? key[3] : key[5];
  uint32_t word = 0;
#pragma unroll
  for (uint32_t j = 0; j < 4; ++j)
    word |= feistel_round(i % 32 * 4 + j, round & 1 ? odd : even, round & 1 ? q / 2 : q - q / 2) << j * 8;
  tables().store((int)i, float_from_bits(word));
}

// k[i] = pi^-1(j[i]), round by round, so that no look-up waits for the one before it.
template <int kCount>
HSAID_DEVICE void permute_back(const uint32_t (&j)[kCount], int q, uint32_t (&k)[kCount]) {
  uint32_t low[kCount], high[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    low[i] = j[i] & ((1u << q / 2) - 1);
    high[i] = j[i] >> q / 2;
  }
#pragma unroll
  for (int r = kFeistelRounds - 2; r >= 0; r -= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) low[i] ^= (tables() + (r + 1) * 32).byte(high[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) high[i] ^= (tables() + r * 32).byte(low[i]);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) k[i] = high[i] << q / 2 | low[i];
}

// Leaves z of a segment's chunk in `kept`, value k at place_of(k). Calls note(j, k) for every fourth j, k being pi^-1
// of j ... j + 3.
template <Kind kKind, class Note>
HSAID_DEVICE void make_z(const Params& p, const float* theta, uint64_t stream, int chunk, Note&& note) {
  const uint32_t mask = (1u << p.q) - 1;
  const uint32_t dim = (uint32_t)p.dim - ((uint32_t)chunk << p.q);
  theta += (int64_t)chunk << p.q;
  prepare_permutation(permutation_keys(p.seed, stream, chunk), p.q);
#pragma unroll 1
  for (uint32_t first = thread_index(); first <= mask; first += 16 * kThreads) {
    float values[16];
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) values[i] = first + i * kThreads < dim ? theta[first + i * kThreads] : 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i)
      if (first + i * kThreads <= mask) kept().store(place_of(first + i * kThreads), values[i]);
  }
  sync_block();
  float x[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x[i] = kept().load(place_in_a(i, mask));
  multiply_signs<kKind>(p, stream, chunk, x);
  transform(x, p.q);
  constexpr int kBatch = 8;
#pragma unroll
  for (int first = 0; first < kPerThread; first += kBatch) {
    uint32_t j[kBatch], k[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) j[i] = position<C>(first + i) & mask;
    permute_back(j, p.q, k);
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (position<C>(first + i) <= mask) kept().store(place_of(k[i]), x[first + i]);
#pragma unroll
    for (int i = 0; i < kBatch; i += 4)
      if (position<C>(first + i) <= mask) note(j[i], {k[i], k[i + 1], k[i + 2], k[i + 3]});
  }
  sync_block();
}
template <Kind kKind>
HSAID_DEVICE void make_z(const Params& p, const float* theta, uint64_t stream, int chunk) {
  make_z<kKind>(p, theta, stream, chunk, [](uint32_t, uint4) {});
}

}  // namespace hsaid::cuda
