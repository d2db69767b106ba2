// scale * H x along rows of any length, the stages in the order of csrc/core/walsh_hadamard.h. Memory is what takes
// time, so a pass over it for each stage would take log2 n times as long as needed. Up to n = 2^15 a row lies in the
// registers of a block of threads, 64 values a thread, and is read and written once; longer rows take one pass for
// their first 15 bits and one for each four bits more.
//
//           register (from its lowest bit)    lane        warp
//   first   k0 k1 k7 k8 k9 k10                k2 ... k6   k11 k12 k13 k14    stages 2 ... 6 by shuffles, 7 ... 10
//   then    k0 k1 k11 k12 k13 k14             k2 ... k6   k7 k8 k9 k10       stages 11 ... 14, 0, 1
//
// With fewer warps, only as many of these bits change places as a warp's number has.

#include <algorithm>
#include <type_traits>

#include "pieces.h"

namespace hsaid::cuda {

namespace {

constexpr int kMinTileBits = 11, kMaxTileBits = 15;  // 1 and 16 warps
constexpr int kColumnBits = 4;                       // of a pass over the columns of a long row

struct RowParams {
  const void* in;
  void* out;
  int64_t rows, in_dim, out_dim;  // rows lie without gaps
  int q, row_bits, tile_bits;     // row_bits: q, but at least 2, so that a vector is of one row
  bool last;                      // does stages 0 and 1 and the scale
  bool vectors;                   // rows can be read and written four values at a time
  bool whole;                     // and are as long as the transform: a tile has no gaps
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

// Four values of a row of `dim`, from k on; 0 behind its end.
template <class T>
HSAID_DEVICE void load_four(const T* row, int64_t k, int64_t dim, bool vectors, float* x) {
  if (vectors && k + 3 < dim) {
    const float4 v = Quad<T>::widened(*(const typename Quad<T>::Bits*)(row + k));
    x[0] = v.x;
    x[1] = v.y;
    x[2] = v.z;
    x[3] = v.w;
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = k + j < dim ? load_value(row + k + j) : 0.0f;
}
template <class T>
HSAID_DEVICE void store_four(T* row, int64_t k, int64_t dim, bool vectors, const float* x) {
  if (vectors && k + 3 < dim) {
    *(typename Quad<T>::Bits*)(row + k) = Quad<T>::narrowed({x[0], x[1], x[2], x[3]});
    return;
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    if (k + j < dim) store_value(row + k + j, x[j]);
}

template <int bit>
HSAID_DEVICE void lane_stage(float (&x)[kPerThread]) {
  const bool upper = thread_index() >> bit & 1;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const float other = shuffle_xor(x[i], 1 << bit);
    x[i] = upper ? other - x[i] : x[i] + other;
  }
}

// Where vector j (k7 ... k10 at first) of a thread lies in its tile.
HSAID_DEVICE int64_t first_place(int j) {
  return (thread_index() & 31) << 2 | j << 7 | (int64_t)(thread_index() >> 5) << 11;
}
HSAID_DEVICE int64_t then_place(int j, int warp_bits) {
  const int low = j & ((1 << warp_bits) - 1), high = j >> warp_bits << warp_bits;
  return (thread_index() & 31) << 2 | (int64_t)(high | (int)(thread_index() >> 5)) << 7 | (int64_t)low << 11;
}

HSAID_DEVICE void exchange_warps(float (&x)[kPerThread], int warp_bits) {
  const int own = (int)(thread_index() >> 5), lane = (int)(thread_index() & 31);
  const Shared memory = shared_memory();
#pragma unroll
  for (int k1 = 0; k1 < 2; ++k1) {
    sync_block();
#pragma unroll
    for (int j = 0; j < 16; ++j)
      memory.store(((j << warp_bits | own) * 32 + lane) * 2, float2{x[4 * j + 2 * k1], x[4 * j + 2 * k1 + 1]});
    sync_block();
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int from = j >> warp_bits << warp_bits | own, warp = j & ((1 << warp_bits) - 1);
      const float2 pair = memory.load<float2>(((from << warp_bits | warp) * 32 + lane) * 2);
      x[4 * j + 2 * k1] = pair.x;
      x[4 * j + 2 * k1 + 1] = pair.y;
    }
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(512) hadamard_rows_kernel(const __grid_constant__ RowParams a) {
  const int q = a.q, warp_bits = a.tile_bits - kMinTileBits;
  const int64_t mask = ((int64_t)1 << a.row_bits) - 1, end = a.rows << a.row_bits;
  for (int64_t first = (int64_t)block_index().x << a.tile_bits; first < end;
       first += (int64_t)grid_width() << a.tile_bits) {
    const bool whole = a.whole && first + ((int64_t)1 << a.tile_bits) <= end;
    float x[kPerThread];
    if (whole) {  // without a condition between one load and the next
      typename Quad<In>::Bits loaded[16];
#pragma unroll
      for (int j = 0; j < 16; ++j)
        loaded[j] = *(const typename Quad<In>::Bits*)((const In*)a.in + first + first_place(j));
#pragma unroll
      for (int j = 0; j < 16; ++j) *(float4*)(x + 4 * j) = Quad<In>::widened(loaded[j]);
    } else {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int64_t at = first + first_place(j), row = at >> a.row_bits;
        load_four((const In*)a.in + row * a.in_dim, at & mask, row < a.rows ? a.in_dim : 0, a.vectors, x + 4 * j);
      }
    }
    if (q > 2) lane_stage<0>(x);
    if (q > 3) lane_stage<1>(x);
    if (q > 4) lane_stage<2>(x);
    if (q > 5) lane_stage<3>(x);
    if (q > 6) lane_stage<4>(x);
    if (q > 7) butterflies<4>(x);
    if (q > 8) butterflies<8>(x);
    if (q > 9) butterflies<16>(x);
    if (q > 10) butterflies<32>(x);
    if (warp_bits > 0) exchange_warps(x, warp_bits);
    if (q > 11) butterflies<4>(x);
    if (q > 12) butterflies<8>(x);
    if (q > 13) butterflies<16>(x);
    if (q > 14) butterflies<32>(x);
    if (a.last) {
      if (q > 0) butterflies<1>(x);
      if (q > 1) butterflies<2>(x);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) x[i] = x[i] * a.scale;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int64_t at = first + then_place(j, warp_bits), row = at >> a.row_bits;
      if (whole)
        store_four((Out*)a.out, at, INT64_MAX, true, x + 4 * j);
      else
        store_four((Out*)a.out + row * a.out_dim, at & mask, row < a.rows ? a.out_dim : 0, a.vectors, x + 4 * j);
    }
  }
}

struct ColumnParams {
  float* values;  // [rows, n]
  void* out;      // of the last pass
  int64_t rows, dim;
  int q, from, bits;  // stages from ... from + bits - 1
  bool last, vectors;
  float scale;
};

template <class Out>
__global__ void __launch_bounds__(kThreads) hadamard_columns_kernel(const __grid_constant__ ColumnParams a) {
  const int64_t vectors = a.rows << (a.q - 2 - a.bits);  // of four columns
  const int low_bits = a.from - 2;
  for (int64_t v = (int64_t)block_index().x * kThreads + thread_index(); v < vectors;
       v += (int64_t)grid_width() * kThreads) {
    const int64_t low = v & (((int64_t)1 << low_bits) - 1), first = (v >> low_bits << a.bits << low_bits | low) << 2;
    const int64_t row = first >> a.q;
    float x[kPerThread];
#pragma unroll
    for (int j = 0; j < 16; ++j)
      if (j < 1 << a.bits) load_four(a.values + first, (int64_t)j << a.from, INT64_MAX, true, x + 4 * j);
    if (a.bits > 0) butterflies<4>(x);
    if (a.bits > 1) butterflies<8>(x);
    if (a.bits > 2) butterflies<16>(x);
    if (a.bits > 3) butterflies<32>(x);
    if (a.last) {
      butterflies<1>(x);
      butterflies<2>(x);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) x[i] = x[i] * a.scale;
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      if (j >= 1 << a.bits) continue;
      if (a.last)
        store_four((Out*)a.out + row * a.dim, (first & (((int64_t)1 << a.q) - 1)) + ((int64_t)j << a.from), a.dim,
                   a.vectors, x + 4 * j);
      else
        store_four(a.values + first, (int64_t)j << a.from, INT64_MAX, true, x + 4 * j);
    }
  }
}

unsigned grid_for(int64_t blocks) { return (unsigned)std::min<int64_t>(std::max<int64_t>(blocks, 1), 1 << 30); }

template <class T>
void transform_rows(const void* x, void* out, Dtype dtype, int64_t rows, int64_t dim, float scale,
                    const Workspace& workspace, cudaStream_t stream) {
  int q = 0;
  while (((int64_t)1 << q) < dim) ++q;
  const bool aligned = dim % 4 == 0 && is_aligned(x, dtype) && is_aligned(out, dtype);
  const int tile_bits = std::clamp(q, kMinTileBits, kMaxTileBits);
  RowParams a{x,
              out,
              rows,
              dim,
              dim,
              q,
              std::max(q, 2),
              tile_bits,
              true,
              aligned,
              aligned && dim == (int64_t)1 << std::max(q, 2),
              scale};
  const dim3 grid(grid_for(((rows << a.row_bits) + ((int64_t)1 << tile_bits) - 1) >> tile_bits));
  const int threads = 1 << (tile_bits - 6), shared = tile_bits == kMinTileBits ? 0 : 2 << tile_bits;
  if (q <= kMaxTileBits) {
    launch(hadamard_rows_kernel<T, T>, "hadamard_rows_kernel", grid, threads, shared, stream, a);
    return;
  }
  const int64_t n = (int64_t)1 << q;
  float* values = std::is_same_v<T, float> && dim == n && aligned ? (float*)out : workspace(rows * n);
  a.out = values;
  a.out_dim = n;
  a.last = false;
  launch(hadamard_rows_kernel<T, float>, "hadamard_rows_kernel", grid, threads, shared, stream, a);
  for (int from = kMaxTileBits; from < q; from += kColumnBits) {
    const int bits = std::min(kColumnBits, q - from);
    const ColumnParams c{values, out, rows, dim, q, from, bits, from + bits == q, aligned, scale};
    launch(hadamard_columns_kernel<T>, "hadamard_columns_kernel",
           dim3(grid_for(((rows << (q - 2 - bits)) + kThreads - 1) / kThreads)), kThreads, 0, stream, c);
  }
}

}  // namespace

void hadamard_transform(const void* x, void* out, Dtype dtype, int64_t rows, int64_t dim, double scale,
                        const Workspace& workspace, cudaStream_t stream) {
  if (rows == 0) return;
  const auto transform = dtype == Dtype::kFloat      ? transform_rows<float>
                         : dtype == Dtype::kBfloat16 ? transform_rows<bf16>
                                                     : transform_rows<fp16>;
  transform(x, out, dtype, rows, dim, (float)scale, workspace, stream);
}

}  // namespace hsaid::cuda
