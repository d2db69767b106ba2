// scale * H x along rows of any length, the stages in the order of csrc/core/walsh_hadamard.h. Memory is what takes
// time, so a row of n = 2^q values goes to and from it as seldom as can be: once up to n = 2^15, twice up to n = 2^25.
// What lies between two passes is meant to stay in the second-level cache: rows go through all passes in groups of so
// many as have 2^22 values.
//
// A block of threads holds a tile of 2^11 ... 2^15 values in registers, 64 a thread. These are the bits of a position
// in the tile; with fewer warps, only as many of them change places as a warp's number has:
//
//           register (from its lowest bit)    lane        warp                  stages
//   first   e0 e1 e7 e8 e9 e10                e2 ... e6   e11 e12 e13 e14       2 ... 6 by shuffles, 7 ... 10
//   then    e0 e1 e11 e12 e13 e14             e2 ... e6   e7 e8 e9 e10          11 ... 14, 0, 1
//
// A pass over rows has a tile of neighbours, and all their stages. One over columns takes the values between the passes
// as a matrix with lines of 2^l: a tile is 32 neighbours, 128 bytes, of 2^h lines, and as the stages of e2, e3, e4 are
// done, the tile has those from e5 on.
//
//   pass     stages                                     from        to
//   whole    2 ... q - 1, 0, 1                          x           out
//   first    2 ... l - 1                                x           float32
//   middle   l ... l + h - 1; only where q > 25         float32     float32, in place
//   last     q - h ... q - 1, 0, 1                      float32     out

#include <math.h>

#include <algorithm>
#include <type_traits>

#include "pieces.h"

namespace hsaid::cuda {

namespace {

constexpr int kMinTileBits = 11, kMaxTileBits = 15;  // 1 and 16 warps
constexpr int kColumnBits = 5;                       // of a position that tell columns apart

enum class Pass { kWhole, kFirst, kMiddle, kLast };

struct PassParams {
  const void* in;
  void* out;
  int64_t rows, dim;  // of x and out: rows lie without gaps; those of float32 between passes have 2^row_bits values
  int row_bits;       // q, but at least 2, so that a vector is of one row
  int end;            // of a pass over rows: q or l, the bits that have stages
  int line_bit;       // of a pass over columns: l, or what is in its place behind a middle one
  bool vectors;       // x and out can be read and written four values at a time
  float scale;
};

template <class T>
HSAID_DEVICE float load_value(const T* p) {
  if constexpr (std::is_same_v<T, float>)
    return *p;
  else
    return widen(p->bits, T{});
}
template <class T>
HSAID_DEVICE void store_value(T* p, float value) {
  if constexpr (std::is_same_v<T, float>)
    *p = value;
  else
    p->bits = (uint16_t)narrow(value, 0.0f, T{});
}

HSAID_DEVICE int at_most(int64_t count, int most) { return count < 0 ? 0 : count < most ? (int)count : most; }

// Up to four values of a row, of which `left` are left at p; the others are 0.
template <class T>
HSAID_DEVICE void load_four(const T* p, int64_t left, bool vectors, float* x) {
  float4 v{0.0f, 0.0f, 0.0f, 0.0f};
  if (vectors) {
    if (left > 0) v = Quad<T>::widened(load_once((const typename Quad<T>::Bits*)p));
  } else {
    if (left > 0) v.x = load_value(p);
    if (left > 1) v.y = load_value(p + 1);
    if (left > 2) v.z = load_value(p + 2);
    if (left > 3) v.w = load_value(p + 3);
  }
  *(float4*)x = v;
}
template <class T>
HSAID_DEVICE void store_four(T* p, int64_t left, bool vectors, const float* x) {
  if (vectors) {
    if (left > 0) store_once((typename Quad<T>::Bits*)p, Quad<T>::narrowed(*(const float4*)x));
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (left > j) store_value(p + j, x[j]);
}

// Times 1 or -1 and added is the sum or the difference, rounded once, in one instruction.
template <int bit>
HSAID_DEVICE void lane_stage(float (&x)[kPerThread]) {
  const float sign = thread_index() >> bit & 1 ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x[i] = fmaf(x[i], sign, shuffle_xor(x[i], 1 << bit));
}

template <int kCount>
HSAID_DEVICE void register_stages(float (&x)[kPerThread]) {
  if constexpr (kCount > 0) butterflies<4>(x);
  if constexpr (kCount > 1) butterflies<8>(x);
  if constexpr (kCount > 2) butterflies<16>(x);
  if constexpr (kCount > 3) butterflies<32>(x);
}
// Where the count is known only now: a condition for each stage would cost half a move a value.
HSAID_DEVICE void register_stages(float (&x)[kPerThread], int count) {
  if (count > 3)
    register_stages<4>(x);
  else if (count == 3)
    register_stages<3>(x);
  else if (count == 2)
    register_stages<2>(x);
  else if (count == 1)
    register_stages<1>(x);
}

// The position in the tile of a thread's vector 0, and what is added for vector j.
HSAID_DEVICE int first_position() { return (thread_index() & 31) << 2 | (thread_index() >> 5) << 11; }
HSAID_INLINE constexpr int first_vector(int j) { return j << 7; }
HSAID_DEVICE int then_position() { return (thread_index() & 31) << 2 | (thread_index() >> 5) << 7; }
template <int kWarpBits>
HSAID_INLINE constexpr int then_vector(int j) {
  constexpr int kMoved = (1 << kWarpBits) - 1;
  return (j & ~kMoved) << 7 | (j & kMoved) << 11;
}

template <int kWarpBits>
HSAID_DEVICE void exchange_warps(float (&x)[kPerThread]) {
  constexpr int kMoved = (1 << kWarpBits) - 1;
  const int own = (int)(thread_index() >> 5), lane = (int)(thread_index() & 31);
  const Shared store = shared_memory() + (own * 32 + lane) * 2,
               load = shared_memory() + ((own << kWarpBits) * 32 + lane) * 2;
#pragma unroll
  for (int k1 = 0; k1 < 2; ++k1) {
    sync_block();
#pragma unroll
    for (int j = 0; j < 16; ++j) store.store((j << kWarpBits) * 64, float2{x[4 * j + 2 * k1], x[4 * j + 2 * k1 + 1]});
    sync_block();
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 pair = load.load<float2>(((j & ~kMoved) << kWarpBits | (j & kMoved)) * 64);
      x[4 * j + 2 * k1] = pair.x;
      x[4 * j + 2 * k1 + 1] = pair.y;
    }
  }
}

template <class T, Pass kPass, int kTileBits>
__global__ void __launch_bounds__(1 << (kTileBits - 6), 1 << (kMaxTileBits - kTileBits))
    hadamard_kernel(const __grid_constant__ PassParams a) {
  constexpr bool kReads = kPass == Pass::kWhole || kPass == Pass::kFirst;  // x
  constexpr bool kWrites = kPass == Pass::kWhole || kPass == Pass::kLast;  // out
  constexpr bool kColumns = kPass == Pass::kMiddle || kPass == Pass::kLast;
  constexpr bool kShort = kPass == Pass::kWhole && kTileBits == kMinTileBits;  // a tile may have several rows
  constexpr int kWarpBits = kTileBits - kMinTileBits;
  using In = std::conditional_t<kReads, T, float>;
  using Out = std::conditional_t<kWrites, T, float>;
  using InBits = typename Quad<In>::Bits;
  using OutBits = typename Quad<Out>::Bits;
  // Stages of the tile's bits below this one; with a range that the compiler can see.
  const int end = kColumns                    ? kTileBits
                  : kTileBits == kMinTileBits ? a.end
                  : kPass == Pass::kFirst     ? kTileBits - (a.end < kTileBits)
                                              : kTileBits;
  // How far the value at position e is from the tile's first one; a sum over the bits of e.
  const auto distance = [&](int e) {
    return kColumns ? (e & ((1 << kColumnBits) - 1)) + ((int64_t)(e >> kColumnBits) << a.line_bit) : (int64_t)e;
  };
  const int64_t mask = ((int64_t)1 << a.row_bits) - 1;
  const int64_t tiles = ((a.rows << a.row_bits) + ((int64_t)1 << kTileBits) - 1) >> kTileBits;
  if constexpr (kPass != Pass::kWhole) start_next_kernel();
  for (int64_t tile = block_index().x; tile < tiles; tile += grid_width()) {
    int64_t first = tile << kTileBits;
    if constexpr (kColumns) {
      const int apart = a.line_bit - kColumnBits;
      const int64_t lines = tile >> apart, columns = tile & (((int64_t)1 << apart) - 1);
      first = lines << (kTileBits - kColumnBits + a.line_bit) | columns << kColumnBits;
    }
    const int64_t row = first >> a.row_bits, k = first & mask;
    const bool whole = a.vectors && (kShort ? a.dim > mask && row + ((1 << kTileBits) >> a.row_bits) <= a.rows
                                            : k + distance((1 << kTileBits) - 1) < a.dim);
    // Where x and out have the value at position e, and of how many, up to four, it is the first in its row.
    const int left_at_first = at_most(a.dim - k, 1 << kTileBits);
    const auto find = [&](int e, int& left) {
      if constexpr (kShort) {
        const int below = e >> a.row_bits, in_row = e & (int)mask;
        left = row + below < a.rows ? left_at_first - in_row : 0;
        return row * a.dim + (below * (int)a.dim + in_row);
      } else {
        left = kColumns ? at_most(a.dim - k - distance(e), 4) : left_at_first - e;
        return row * a.dim + k + distance(e);
      }
    };
    float x[kPerThread];
    if constexpr (!kReads) wait_for_previous_kernel();
    if (!kReads || whole) {  // without a condition between one load and the next
      const InBits* own =
          (const InBits*)((const In*)a.in + (kReads ? row * a.dim + k : first) + distance(first_position()));
      InBits loaded[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const InBits* p = own + (distance(first_vector(j)) >> 2);
        loaded[j] = kReads ? load_once(p) : *p;
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) *(float4*)(x + 4 * j) = Quad<In>::widened(loaded[j]);
    } else {
      const int own = (int)opaque(first_position());  // or places would be kept in registers, all the way to the stores
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        int left;
        const In* p = (const In*)a.in + find(own + first_vector(j), left);
        load_four(p, left, a.vectors, x + 4 * j);
      }
    }
    if constexpr (!kColumns) {
      if (end > 2) lane_stage<0>(x);
      if (end > 3) lane_stage<1>(x);
      if (end > 4) lane_stage<2>(x);
    }
    if (end > 5) lane_stage<3>(x);
    if (end > 6) lane_stage<4>(x);
    register_stages(x, end - 7);
    if constexpr (kWarpBits > 0) {
      exchange_warps<kWarpBits>(x);
      register_stages(x, end - 11);
    }
    if constexpr (kWrites) {
      if (end > 1) {
        butterflies<1>(x);
        butterflies<2>(x);
      } else if (end > 0) {
        butterflies<1>(x);
      }
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) x[i] = x[i] * a.scale;
    }
    if constexpr (kPass == Pass::kFirst) wait_for_previous_kernel();
    if (!kWrites || whole) {
      OutBits* own = (OutBits*)((Out*)a.out + (kWrites ? row * a.dim + k : first) + distance(then_position()));
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        OutBits* p = own + (distance(then_vector<kWarpBits>(j)) >> 2);
        const OutBits bits = Quad<Out>::narrowed(*(const float4*)(x + 4 * j));
        if constexpr (kWrites)
          store_once(p, bits);
        else
          *p = bits;
      }
    } else {
      const int own = (int)opaque(then_position());
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        int left;
        Out* p = (Out*)a.out + find(own + then_vector<kWarpBits>(j), left);
        store_four(p, left, a.vectors, x + 4 * j);
      }
    }
  }
}

// With the smallest tile that has `bits` bits; the passes over long rows do with every second size.
template <class T, Pass kPass, int kTileBits = kMinTileBits>
void launch_pass(const PassParams& a, int bits, bool early, cudaStream_t stream) {
  if constexpr (kTileBits < kMaxTileBits)
    if (bits > kTileBits)
      return launch_pass<T, kPass, kTileBits + (kPass == Pass::kWhole ? 1 : 2)>(a, bits, early, stream);
  const int64_t tiles = ((a.rows << a.row_bits) + ((int64_t)1 << kTileBits) - 1) >> kTileBits;
  const dim3 grid((unsigned)std::min<int64_t>(tiles, 1 << 30));
  const int threads = 1 << (kTileBits - 6), shared = kTileBits == kMinTileBits ? 0 : 2 << kTileBits;
  (early ? launch_next<PassParams> : launch<PassParams>)(hadamard_kernel<T, kPass, kTileBits>, "hadamard_kernel", grid,
                                                         threads, shared, stream, a);
}

template <class T>
void transform_rows(const void* x, void* out, Dtype dtype, int64_t rows, int64_t dim, float scale,
                    const Workspace& workspace, cudaStream_t stream, int64_t group_floats) {
  int q = 0;
  while (((int64_t)1 << q) < dim) ++q;
  const bool vectors = dim % 4 == 0 && is_aligned(x, dtype) && is_aligned(out, dtype);
  const PassParams all{x, out, rows, dim, std::max(q, 2), q, 0, vectors, scale};
  if (q <= kMaxTileBits) return launch_pass<T, Pass::kWhole>(all, q, false, stream);

  // As few passes over columns as can be, each of the fewest stages with which the first pass's tiles are no larger.
  constexpr int kMaxLineBits = kMaxTileBits - kColumnBits;
  const int passes = (q - kMaxTileBits + kMaxLineBits - 1) / kMaxLineBits;
  int line_bits = kMinTileBits - kColumnBits;
  while (q - passes * line_bits > line_bits + kColumnBits) line_bits += 2;

  const int64_t n = (int64_t)1 << q, group = std::clamp<int64_t>(group_floats >> q, 1, rows);
  float* const kept = std::is_same_v<T, float> && dim == n && vectors ? nullptr : workspace(group * n);
  for (int64_t row = 0; row < rows; row += group) {
    PassParams a = all;
    a.rows = std::min(group, rows - row);
    a.in = (const T*)x + row * dim;
    a.out = kept ? kept : (float*)out + row * n;
    a.end = q - passes * line_bits;
    launch_pass<T, Pass::kFirst>(a, a.end, row > 0, stream);
    a.in = a.out;
    for (a.line_bit = a.end; a.line_bit + line_bits < q; a.line_bit += line_bits)
      launch_pass<float, Pass::kMiddle>(a, line_bits + kColumnBits, true, stream);
    a.out = (T*)out + row * dim;
    launch_pass<T, Pass::kLast>(a, line_bits + kColumnBits, true, stream);
  }
}

}  // namespace

void hadamard_transform(const void* x, void* out, Dtype dtype, int64_t rows, int64_t dim, double scale,
                        const Workspace& workspace, cudaStream_t stream, int64_t group_floats) {
  if (rows == 0) return;
  const auto transform = dtype == Dtype::kFloat      ? transform_rows<float>
                         : dtype == Dtype::kBfloat16 ? transform_rows<bf16>
                                                     : transform_rows<fp16>;
  transform(x, out, dtype, rows, dim, (float)scale, workspace, stream, group_floats);
}

}  // namespace hsaid::cuda
