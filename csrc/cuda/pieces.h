// The part of the plan that a launch works on, with the tensors' addresses, as kernel parameters. A table on the device
// would have to be copied there, and waited for, whenever an address changes; this way nothing outlives a launch.
#pragma once

#include "fastfood.h"
#include "tile.h"

namespace hsaid::cuda {

// A piece of a tensor, whose element e is the row-major e-th.
struct Piece {
  const void* data;  // the first element; null: all are 0
  int64_t count;
  int64_t cols, row_stride;  // cols 0: dense
  Dtype dtype;
  bool fours;  // element 4i and the three behind it are a vector in memory
};

constexpr int kParameterBytes = 32764;  // of a kernel, at most
constexpr int kMaxPieces = 384;         // in one launch

constexpr int64_t kSegmentFloats = 6'000'000;  // of z and Pi in the adjoint, unless one segment's take more

// The offset of element e.
HSAID_INLINE int64_t element(const Piece& p, int64_t e) {
  if (p.cols == 0) return e;
  if ((e | p.cols) >> 32 == 0) {  // a 64-bit division costs five of these
    const uint32_t row = (uint32_t)e / (uint32_t)p.cols;
    return row * p.row_stride + (uint32_t)e % (uint32_t)p.cols;
  }
  return e / p.cols * p.row_stride + e % p.cols;
}

HSAID_INLINE const void* address(const void* data, Dtype dtype, int64_t element) {
  return data ? (const char*)data + element * item_size(dtype) : nullptr;
}

// Vectors of four values, 16 or 8 bytes, lie on multiples of their size.
HSAID_INLINE bool is_aligned(const void* p, Dtype dtype) { return (uintptr_t)p % (4 * item_size(dtype)) == 0; }

inline Piece piece_of(const Segment& s, DeviceTensor tensor) {
  const void* data = address(tensor.data, tensor.dtype, s.offset);
  const int64_t count = s.rows * s.cols, cols = is_dense(s) ? 0 : s.cols;
  const bool fours = is_aligned(data, tensor.dtype) && (cols == 0 ? count : cols | s.row_stride) % 4 == 0;
  return {data, count, cols, s.row_stride, tensor.dtype, fours};
}

HSAID_DEVICE float load_element(const Piece& p, int64_t offset) {
  if (!p.data) return 0.0f;
  switch (p.dtype) {
    case Dtype::kFloat:
      return ((const float*)p.data)[offset];
    case Dtype::kBfloat16:
      return widen(((const uint16_t*)p.data)[offset], bf16{});
    default:
      return widen(((const uint16_t*)p.data)[offset], fp16{});
  }
}

HSAID_DEVICE void store_element(void* data, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::kFloat:
      ((float*)data)[i] = value;
      return;
    case Dtype::kBfloat16:
      ((uint16_t*)data)[i] = (uint16_t)narrow(value, 0.0f, bf16{});
      return;
    default:
      ((uint16_t*)data)[i] = (uint16_t)narrow(value, 0.0f, fp16{});
  }
}

// Four values in a row, in memory as T.
template <class T>
struct Quad {
  using Bits = uint2;
  HSAID_DEVICE float4 widened(uint2 v) {
    return {widen((uint16_t)v.x, T{}), widen((uint16_t)(v.x >> 16), T{}), widen((uint16_t)v.y, T{}),
            widen((uint16_t)(v.y >> 16), T{})};
  }
  HSAID_DEVICE uint2 narrowed(float4 v) { return {narrow(v.x, v.y, T{}), narrow(v.z, v.w, T{})}; }
};
template <>
struct Quad<float> {
  using Bits = float4;
  HSAID_DEVICE float4 widened(float4 v) { return v; }
  HSAID_DEVICE float4 narrowed(float4 v) { return v; }
};

HSAID_DEVICE float4 load_four(const Piece& p, int64_t offset) {
  if (!p.data) return {0.0f, 0.0f, 0.0f, 0.0f};
  const uint16_t* halves = (const uint16_t*)p.data + offset;
  switch (p.dtype) {
    case Dtype::kFloat:
      return load_once((const float4*)((const float*)p.data + offset));
    case Dtype::kBfloat16:
      return Quad<bf16>::widened(load_once((const uint2*)halves));
    default:
      return Quad<fp16>::widened(load_once((const uint2*)halves));
  }
}

HSAID_DEVICE void store_four(void* data, Dtype dtype, int64_t i, float4 values) {
  switch (dtype) {
    case Dtype::kFloat:
      store_once((float4*)((float*)data + i), values);
      return;
    case Dtype::kBfloat16:
      store_once((uint2*)((uint16_t*)data + i), Quad<bf16>::narrowed(values));
      return;
    default:
      store_once((uint2*)((uint16_t*)data + i), Quad<fp16>::narrowed(values));
  }
}

// Where tile t of a dense piece begins; a product of 32-bit numbers is cheaper than one of 64-bit ones.
template <class T>
HSAID_DEVICE T* tile_address(T* data, int t) {
  return (T*)((uintptr_t)data + (uint64_t)(uint32_t)t * (uint32_t)(kTile * sizeof(T)));
}

// Where in the n floats of z, in global memory, the thread's vector 0 of it lies, vector v dense_apart(v, q) behind it:
// beside those that other threads read with it. Only for n >= 256; below, z has its natural order.
HSAID_DEVICE int dense_place(int q) {
  const uint32_t k = position<A>(0) & ((1u << q) - 1);
  const int lane_bits = q - 8 < 5 ? q - 8 : 5;
  const uint32_t owner = (k >> 8 & 31) | (k & 3) << lane_bits | (k >> 13 & 1) << 7;  // of n / 64
  return (int)owner * 4;
}
HSAID_DEVICE int dense_apart(int v, int q) { return v << (q - 4); }
HSAID_DEVICE float4 z_vector(const float* z, int v, int q) {
  if (q >= kFastDrawBits) return *(const float4*)(z + dense_place(q) + dense_apart(v, q));
  const uint32_t own = opaque(position<A>(0)), mask = (1u << q) - 1;
  float x[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = z[(own | (uint32_t)a_register(v, j) << 2) & mask];
  return {x[0], x[1], x[2], x[3]};
}

// Stores z there from `kept`; only threads that have values of the tile's first block do.
HSAID_DEVICE void store_z(float* z, int q) {
  const uint32_t n = 1u << q;
  if (q < kFastDrawBits) {
    for (uint32_t k = thread_index(); k < n; k += kThreads) z[k] = kept().load(place_of(k));
    return;
  }
  if (position<A>(0) >= n) return;
#pragma unroll
  for (int v = 0; v < 16; ++v) {
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = kept().load(place_in_a(a_register(v, j), n - 1));
    *(float4*)(z + dense_place(q) + dense_apart(v, q)) = {x[0], x[1], x[2], x[3]};
  }
}

}  // namespace hsaid::cuda
