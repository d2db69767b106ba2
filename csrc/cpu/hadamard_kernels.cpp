// The Walsh-Hadamard transform of rows of n = 2^q values, compiled once for each instruction set (HSAID_ISA):
//
//     step 0           stages at bits 2 .. t-1, in a tile of 2^t values in registers
//     step 1           a pass: one to four stages more, between the lines of the tiles
//     step 2, 3, ...   passes of three stages, between the lines of eight blocks of the step before
//     the last step    stages 0 and 1 too, which lie within a line, and the scale
//
// A row of a tile or less takes one step. A block goes through all its steps before the next one begins, so that what a
// pass reads is in the smallest cache that holds the block. Eight lines and no more, because their distance is a power
// of two: they fall into the same set of the first-level cache, which has eight ways.
// Rows of m 2^q values, m = 12, 20 or 28, go through Paley's matrix of order m first, m values 2^q apart; what is left
// are m rows of 2^q values. Everything here has internal linkage, as in fastfood_kernels.cpp.

#include "../core/paley.h"
#include "arena.h"
#include "hadamard.h"
#include "subnormals.h"

#define HSAID_CONCAT_(a, b) a##b
#define HSAID_CONCAT(a, b) HSAID_CONCAT_(a, b)

namespace hsaid {
namespace {

constexpr int kVectorBytes = 4 * kLanes;
template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef C any __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
HSAID_INLINE Vector<C> load_of(const C* p) {
  return *(const typename VectorOf<C>::any*)p;
}
template <class C>
HSAID_INLINE void store_of(C* p, Vector<C> x) {
  *(typename VectorOf<C>::any*)p = x;
}

constexpr int log2_of(int x) { return x > 1 ? 1 + log2_of(x / 2) : 0; }
template <class C>
constexpr int kLanesOf = kVectorBytes / (int)sizeof(C);
template <class C>
constexpr int kLaneBitsOf = log2_of(kLanesOf<C>);

constexpr int kPassBits = 3;
// The first pass takes what is left of the stages: up to four with 32 registers. Tiles are near enough, 1 KB, for their
// lines to fall into several sets.
constexpr int kFirstPassBits = kLanes == 16 ? 4 : 3;
// A tile has 16 vectors where there are 32 registers, else 8.
template <class C>
constexpr int kTileBitsOf = kLaneBitsOf<C> + (kLanes == 16 ? 4 : 3);
// Vectors that a pass takes of each block at a time: stages 0 and 1 are between four values.
template <class C>
constexpr int kPartVectors = kLanesOf<C> < 4 ? 4 / kLanesOf<C> : 1;
template <class C>
constexpr int kPartValues = kPartVectors<C> * kLanesOf<C>;

// Step 0 fetches what it reads and writes next, while the passes only compute; in place, and for what is in the cache
// anyway, nothing.
constexpr int64_t kAheadBytes = 4096;

typedef double vd __attribute__((vector_size(kVectorBytes), may_alias));
HSAID_INLINE vd add_signed(vd sum, vd x, vd sign) {
#if defined(__AVX512F__)
  return (vd)_mm512_fmadd_pd((__m512d)x, (__m512d)sign, (__m512d)sum);
#elif defined(__AVX2__)
  return (vd)_mm256_fmadd_pd((__m256d)x, (__m256d)sign, (__m256d)sum);
#elif defined(HSAID_NEON)
  return (vd)vfmaq_f64((float64x2_t)sum, (float64x2_t)x, (float64x2_t)sign);
#else
  return sum + x * sign;
#endif
}
template <class V>
HSAID_INLINE V add_signed(V sum, V x, V sign) {  // unsigned integers
  const V mask = V{} - (sign >> (8 * sizeof(x[0]) - 1));
  return sum + ((x ^ mask) - mask);
}

// Stage kBit over vectors that lie side by side.
template <int kBit, class C, int kVectors>
HSAID_INLINE void stage(Vector<C> (&x)[kVectors]) {
  if constexpr (kBit < kLaneBitsOf<C>) {
    Vector<C> sign;
    for (int i = 0; i < kLanesOf<C>; ++i) sign[i] = i >> kBit & 1 ? C(-1) : C(1);
    unroll<kVectors>([&](auto i) HSAID_LAMBDA {
      x[i] = add_signed(shuffle(x[i], x[i], [](int lane) { return lane ^ 1 << kBit; }), x[i], sign);
    });
  } else {
    constexpr int half = 1 << (kBit - kLaneBitsOf<C>);
    unroll<kVectors / 2>([&](auto pair) HSAID_LAMBDA {
      constexpr int low = (pair / half) * 2 * half + pair % half;
      const Vector<C> a = x[low], b = x[low + half];
      x[low] = a + b;
      x[low + half] = a - b;
    });
  }
}
template <int kFirst, int kEnd, class C, int kVectors>
HSAID_INLINE void stages(Vector<C> (&x)[kVectors]) {
  if constexpr (kFirst < kEnd) unroll<kEnd - kFirst>([&](auto i) HSAID_LAMBDA { stage<kFirst + i, C>(x); });
}

template <bool kStream, class C>
HSAID_INLINE void put(C* p, Vector<C> x) {
  if constexpr (kStream)
    stream_out((uint32_t*)p, (vu)x);
  else
    store_of(p, x);
}

// `count` tiles side by side: stages 2 .. kEnd-1. kWhole: rows of 2^kEnd values, with all that there is to do.
template <class C, int kEnd, bool kWhole, bool kStream>
HSAID_NOINLINE void tiles(const C* x, C* out, int64_t count, C scale, bool to_cache) {
  constexpr int lanes = kLanesOf<C>, vectors = 1 << (kTileBitsOf<C> - kLaneBitsOf<C>), tile = vectors * lanes;
  const int64_t ahead = x == out ? 0 : kAheadBytes, ahead_of_out = to_cache ? 0 : ahead;
  for (const C* end = x + count * tile; x < end; x += tile, out += tile) {
    Vector<C> v[vectors];
    unroll<vectors>([&](auto i) HSAID_LAMBDA {
      v[i] = load_of(x + i * lanes);
      if constexpr (!kStream) __builtin_prefetch((const char*)(x + i * lanes) + ahead, 0, 2);
      if constexpr (!kWhole) __builtin_prefetch((const char*)(out + i * lanes) + ahead_of_out, 1, 2);
    });
    stages<2, kEnd, C>(v);
    if constexpr (kWhole) {
      stages < 0, kEnd<2 ? kEnd : 2, C>(v);
      unroll<vectors>([&](auto i) HSAID_LAMBDA { v[i] = v[i] * scale; });
    }
    unroll<vectors>([&](auto i) HSAID_LAMBDA { put<kStream>(out + i * lanes, v[i]); });
  }
}
template <class C>
HSAID_INLINE void first_step(const C* x, C* out, int64_t count, bool to_cache) {
  tiles<C, kTileBitsOf<C>, false, false>(x, out, count, C(1), to_cache);
}

// kBits stages between 2^kBits blocks of `stride` values: the parts [begin, end) of each.
template <class C, int kBits, bool kLast, bool kStream>
HSAID_NOINLINE void join_blocks(const C* x, C* out, int64_t stride, int64_t begin, int64_t end, C scale) {
  // Past the caches go whole lines.
  constexpr int lanes = kLanesOf<C>, vectors = kStream ? kLineBytes / kVectorBytes : kPartVectors<C>;
  for (int64_t k = begin * kPartValues<C>; k < end * kPartValues<C>; k += vectors * lanes) {
    Vector<C> v[vectors][1 << kBits];
    unroll<vectors>([&](auto j) HSAID_LAMBDA {
      unroll<1 << kBits>([&](auto i) HSAID_LAMBDA { v[j][i] = load_of(x + k + i * stride + j * lanes); });
      stages<kLaneBitsOf<C>, kLaneBitsOf<C> + kBits, C>(v[j]);
    });
    unroll<1 << kBits>([&](auto i) HSAID_LAMBDA {
      Vector<C> part[vectors];
      unroll<vectors>([&](auto j) HSAID_LAMBDA { part[j] = v[j][i]; });
      if constexpr (kLast) {
        stages<0, 2, C>(part);
        unroll<vectors>([&](auto j) HSAID_LAMBDA { part[j] = part[j] * scale; });
      }
      unroll<vectors>([&](auto j) HSAID_LAMBDA { put<kStream>(out + k + i * stride + j * lanes, part[j]); });
    });
  }
}

template <class C>
int num_passes(int q) {
  const int left = q - kTileBitsOf<C> - kFirstPassBits;
  return q <= kTileBitsOf<C> ? 0 : left <= 0 ? 1 : 1 + (left + kPassBits - 1) / kPassBits;
}
template <class C>
int block_bits(int q, int step) {
  return step == 0 && q > kTileBitsOf<C> ? kTileBitsOf<C> : q - kPassBits * (num_passes<C>(q) - step);
}
// Parts of a block of the step before, which a pass joins with others.
template <class C>
int64_t parts_of_block(int q, int step) {
  return ((int64_t)1 << block_bits<C>(q, step - 1)) / kPartValues<C>;
}
template <class C>
int64_t num_parts(int q, int step) {
  return parts_of_block<C>(q, step) << (q - block_bits<C>(q, step));
}

// Pass `step` of one block.
template <class C>
void pass_of_block(const C* x, C* out, int q, int step, int64_t begin, int64_t end, C scale, bool stream) {
  const int below = block_bits<C>(q, step - 1), bits = block_bits<C>(q, step) - below;
  const bool last = step == num_passes<C>(q);
  unroll<kFirstPassBits>([&](auto i) HSAID_LAMBDA {
    if (bits != i + 1) return;
    const auto join = !last    ? join_blocks<C, i + 1, false, false>
                      : stream ? join_blocks<C, i + 1, true, kStreams>
                               : join_blocks<C, i + 1, true, false>;
    join(x, out, (int64_t)1 << below, begin, end, scale);
  });
}

// Steps 0 to `step` of one block, the last of them from `work`, which may be in the cache, to out.
template <class C>
void steps_of_block(const C* x, C* work, C* out, int q, int step, C scale, bool to_cache, bool stream) {
  if (step == 0) return first_step(x, out, 1, to_cache);
  const int below = block_bits<C>(q, step - 1);
  const int64_t count = (int64_t)1 << (block_bits<C>(q, step) - below);
  if (step == 1)
    first_step(x, work, count, to_cache);
  else
    for (int64_t i = 0; i < count; ++i) {
      C* sub = work + (i << below);
      steps_of_block(x + (i << below), sub, sub, q, step - 1, scale, to_cache, false);
    }
  pass_of_block(work, out, q, step, 0, parts_of_block<C>(q, step), scale, stream);
}

// Rows of 2^kEnd values, a tile or less each; what is no whole tile of them at the end goes through one on the side.
template <class C, int kEnd>
void short_rows(const C* x, C* out, int64_t rows, C scale, bool stream) {
  constexpr int64_t tile = (int64_t)1 << kTileBitsOf<C>;
  const int64_t values = rows << kEnd, count = values / tile, rest = values % tile;
  (stream ? tiles<C, kEnd, true, kStreams> : tiles<C, kEnd, true, false>)(x, out, count, scale, false);
  if (!rest) return;
  alignas(kLineBytes) C side[tile] = {};
  std::memcpy(side, x + count * tile, rest * sizeof(C));
  tiles<C, kEnd, true, false>(side, side, 1, scale, true);
  std::memcpy(out + count * tile, side, rest * sizeof(C));
}

template <class C>
void rows(const C* x, C* out, int64_t rows, int q, C scale, bool stream) {
  const KeepSubnormals keep;
  stream = stream && kStreams && (uintptr_t)out % kLineBytes == 0;
  if (q <= kTileBitsOf<C>) {
    unroll<kTileBitsOf<C> + 1>([&](auto end) HSAID_LAMBDA {
      if (q == end) short_rows<C, end>(x, out, rows, scale, stream);
    });
  } else {
    const int64_t n = (int64_t)1 << q, bytes = n * (int64_t)sizeof(C);
    const auto each = [&](C* work) HSAID_LAMBDA {
      for (int64_t k = 0; k < rows * n; k += n)
        steps_of_block(x + k, work ? work : out + k, out + k, q, num_passes<C>(q), scale, stream, stream);
    };
    if (stream) {
      Arena arena(bytes);
      each(arena.take<C>(n));
    } else {
      each(nullptr);
    }
  }
  if (stream) finish_streaming();
}

template <class C>
void blocks(const C* x, C* out, int q, int step, int64_t begin, int64_t end) {
  const KeepSubnormals keep;
  const int bits = block_bits<C>(q, step);
  for (int64_t i = begin; i < end; ++i)
    steps_of_block(x + (i << bits), out + (i << bits), out + (i << bits), q, step, C(1), false, false);
}

template <class C>
void pass(C* x, int q, int step, int64_t begin, int64_t end, C scale) {
  const KeepSubnormals keep;
  const int64_t parts = parts_of_block<C>(q, step);
  while (begin < end) {
    const int64_t block = begin / parts, first = begin % parts;
    const int64_t count = parts - first < end - begin ? parts - first : end - begin;
    C* at = x + (block << block_bits<C>(q, step));
    pass_of_block(at, at, q, step, first, first + count, scale, false);
    begin += count;
  }
}

// core/paley.h at one value of each row, or at a vector of them.
template <class V, int kOrder, class C>
HSAID_INLINE void paley_at(const C* x, C* out, int64_t columns) {
  typedef V any __attribute__((aligned(sizeof(C)), may_alias));
  constexpr int half = kOrder / 2;
  V sum[half], difference[half];
  unroll<half>([&](auto i) HSAID_LAMBDA {
    const V a = *(const any*)(x + 2 * i * columns), b = *(const any*)(x + (2 * i + 1) * columns);
    sum[i] = a + b;
    difference[i] = a - b;
  });
  unroll<half>([&](auto i) HSAID_LAMBDA {
    V even = difference[i], odd = -sum[i];
    unroll<half - 1>([&](auto step) HSAID_LAMBDA {
      constexpr int row = i, j = (row + step + 1) % half;
      constexpr bool plus = conference_sign(half, row, j) > 0;
      even = plus ? even + sum[j] : even - sum[j];
      odd = plus ? odd + difference[j] : odd - difference[j];
    });
    *(any*)(out + 2 * i * columns) = even;
    *(any*)(out + (2 * i + 1) * columns) = odd;
  });
}
template <class C, int kOrder>
HSAID_NOINLINE void paley_columns(const C* x, C* out, int64_t columns, int64_t begin, int64_t end) {
  for (; begin + kLanesOf<C> <= end; begin += kLanesOf<C>) paley_at<Vector<C>, kOrder>(x + begin, out + begin, columns);
  for (; begin < end; ++begin) paley_at<C, kOrder>(x + begin, out + begin, columns);
}
template <class C>
void paley(const C* x, C* out, int order, int64_t columns, int64_t begin, int64_t end) {
  const KeepSubnormals keep;
  const auto stage = order == 12 ? paley_columns<C, 12> : order == 20 ? paley_columns<C, 20> : paley_columns<C, 28>;
  stage(x, out, columns, begin, end);
}

template <class T>
void widen(const T* x, float* out, int64_t count) {
  for (; count >= kLanes; count -= kLanes, x += kLanes, out += kLanes) {
    if constexpr (std::is_same_v<T, fp16>)
      store(out, load_as_float(x));
    else
      for (int i = 0; i < kLanes; ++i) out[i] = to_float(x[i]);
  }
  for (; count > 0; --count) *out++ = to_float(*x++);
}
template <class T>
void narrow(const float* x, T* out, int64_t count) {
  for (; count >= kLanes; count -= kLanes, x += kLanes, out += kLanes) {
    if constexpr (std::is_same_v<T, fp16>) {
      const vh half = hsaid::narrow(load(x), fp16{});
      std::memcpy(out, &half, sizeof half);
    } else {
      for (int i = 0; i < kLanes; ++i) from_float(x[i], out + i);
    }
  }
  for (; count > 0; --count) from_float(*x++, out++);
}

template <class C>
constexpr HadamardOf<C> kernels_of = {rows<C>,       blocks<C>,     pass<C>, num_parts<C>,
                                      num_passes<C>, block_bits<C>, paley<C>};

}  // namespace

const HadamardKernels HSAID_CONCAT(hadamard_, HSAID_ISA) = {
    kernels_of<float>, kernels_of<double>, kernels_of<uint32_t>, kernels_of<uint64_t>,
    widen<bf16>,       widen<fp16>,        narrow<bf16>,         narrow<fp16>};

}  // namespace hsaid
