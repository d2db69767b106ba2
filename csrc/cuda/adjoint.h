// What the adjoint's kernels share, whether a block is made from all chunks or from one: tiles of gradients are read,
// and groups of them added up.
#pragma once

#include "pieces.h"

namespace hsaid::cuda {

// fastfood_adjoint where blocks are made from one of several chunks.
void adjoint_of_one_chunk(const Adjoint&, float* dtheta, float* dfactors, const Workspace&, cudaStream_t);

// sum + load(0) + load(1) + ..., in this order; many loads at a time.
template <int kBatch, class Load>
HSAID_DEVICE float added(float sum, int count, Load&& load) {
  const auto add_batch = [&](auto size, int first, int end) {
    float values[size.value];
#pragma unroll
    for (int j = 0; j < size.value; ++j) values[j] = first + j < end ? load(first + j) : -0.0f;  // changes no sum
#pragma unroll
    for (int j = 0; j < size.value; ++j) sum = sum + values[j];
  };
  int first = 0;
#pragma unroll 1
  for (; first + kBatch <= count; first += kBatch)
    add_batch(std::integral_constant<int, kBatch>{}, first, first + kBatch);
#pragma unroll 1
  for (; first < count; first += 8) add_batch(std::integral_constant<int, 8>{}, first, count);
  return sum;
}

HSAID_INLINE bool is_vectors(const Piece& p) { return p.cols == 0 && p.fours; }

template <class T, bool kWhole>
HSAID_DEVICE void read_vectors(const Piece& p, int64_t first, float (&x)[kPerThread]) {
  using Load = typename Quad<T>::Bits;
  const T* data = (const T*)p.data + first + position<C>(0);
  Load loaded[kPerThread / 4];
#pragma unroll
  for (int v = 0; v < kPerThread / 4; ++v) {
    const uint32_t e = C::Register::spread(4 * v);
    loaded[v] = Load{};
    if (kWhole || first + position<C>(4 * v) < p.count) loaded[v] = load_once((const Load*)(data + e));
  }
#pragma unroll
  for (int v = 0; v < kPerThread / 4; ++v) {
    const float4 w = Quad<T>::widened(loaded[v]);
    x[4 * v] = w.x;
    x[4 * v + 1] = w.y;
    x[4 * v + 2] = w.z;
    x[4 * v + 3] = w.w;
  }
}

// A tile by way of the exchange, in two halves, which fill(half) leaves there in their natural order.
template <class Fill>
HSAID_DEVICE void read_through_exchange(float (&x)[kPerThread], Fill&& fill) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sync_block();
    fill(half);
    sync_block();
#pragma unroll
    for (int i = half * 32; i < half * 32 + 32; i += 4) {
      const float4 v = exchange().load<float4>((int)position<C>(i & 31));
      x[i] = v.x;
      x[i + 1] = v.y;
      x[i + 2] = v.z;
      x[i + 3] = v.w;
    }
  }
}

// By elements, in fours where the piece allows it.
HSAID_DEVICE void read_elements(const Piece& p, int64_t first, float (&x)[kPerThread]) {
  read_through_exchange(x, [&](int half) {
    if (p.fours) {
#pragma unroll 1
      for (int at = thread_index() * 4; at < kTile / 2; at += kThreads * 4) {
        const int64_t e = first + half * (kTile / 2) + at;
        exchange().store(at, e < p.count ? load_four(p, element(p, e)) : float4{});
      }
    } else {
#pragma unroll 1
      for (int at = thread_index(); at < kTile / 2; at += kThreads) {
        const int64_t e = first + half * (kTile / 2) + at;
        exchange().store(at, e < p.count ? load_element(p, element(p, e)) : 0.0f);
      }
    }
  });
}

template <bool kWhole>
HSAID_DEVICE void read_tile(const Piece& p, int64_t first, float (&x)[kPerThread]) {
  if (p.dtype == Dtype::kFloat)
    read_vectors<float, kWhole>(p, first, x);
  else if (p.dtype == Dtype::kBfloat16)
    read_vectors<bf16, kWhole>(p, first, x);
  else
    read_vectors<fp16, kWhole>(p, first, x);
}

HSAID_DEVICE void read_gradient(const Piece& p, int64_t first, float (&x)[kPerThread]) {
  if (!is_vectors(p))
    read_elements(p, first, x);
  else if (first + kTile <= p.count)
    read_tile<true>(p, first, x);
  else
    read_tile<false>(p, first, x);
}

// Asks for the thread's share of a tile, 128 bytes at a time.
HSAID_DEVICE void prefetch_tile(const Piece& p, int64_t first) {
  const int64_t e = first + (int64_t)(warp() * 32 + lane()) * kPerThread;
  if (e + kPerThread > p.count) return;
  const char* line = (const char*)p.data + e * (p.dtype == Dtype::kFloat ? 4 : 2);
  prefetch(line);
  if (p.dtype == Dtype::kFloat) prefetch(line + 128);
}

// The sums of a tile's runs, from `kept`, where the thread has its vectors of A, to x in C.
HSAID_DEVICE void take_runs(float (&x)[kPerThread]) {
#pragma unroll
  for (int v = 0; v < 16; ++v) {
    const float4 u = kept().load<float4>(vector_place(v, thread_index()));
    x[a_register(v, 0)] = u.x;
    x[a_register(v, 1)] = u.y;
    x[a_register(v, 2)] = u.z;
    x[a_register(v, 3)] = u.w;
  }
  a_to_b(x);
  b_to_c(x);
}

// The sum of the runs, which `kept` has in natural order. Runs without a block are 0, which no sum of others is changed
// by.
HSAID_DEVICE void add_runs(int q, float* sum) {
  for (int k = thread_index(); k < 1 << q; k += kThreads) {
    float all = kept().load(k);
#pragma unroll 8
    for (int run = 1; run < 1 << (kTileBits - q); ++run) all = all + kept().load((run << q) + k);
    sum[k] = all;
  }
}

// The sum of the runs in x, in C, of which there is one where a block is a tile.
template <bool kIsTile>
HSAID_DEVICE void write_runs(const float (&x)[kPerThread], int q, float* sum) {
  if constexpr (kIsTile) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) *(float4*)(sum + position<C>(i)) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
  } else {
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4)
      kept().store((int)position<C>(i), float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
    sync_block();
    add_runs(q, sum);
  }
}

HSAID_DEVICE float4 sum_of(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

}  // namespace hsaid::cuda
