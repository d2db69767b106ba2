// csrc/cuda/device.h on a CPU: a launch runs one block of threads after the other, a block's threads are fibers that
// run until they wait for each other. What a device leaves undefined is an error here:
//
//   a barrier that some threads never reach, or that warps or threads reach different ones of
//   shared memory: outside, misaligned, read before it was written, or touched by two threads, one of them writing,
//   without a barrier of the block (or of their warp) in between
//
// and the address and undefined-behaviour sanitizers see to the rest: global memory is the test's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/core/half.h"

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define HSAID_MEMBER inline
#define HSAID_DEVICE static inline

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_, unsigned y_ = 1) : x(x_), y(y_), z(1) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
typedef struct CUstream_st* cudaStream_t;

namespace hsaid::emulator {

// The device: what a test sets, and what it then looks at.
struct Device {
  int resident_blocks = 3;
  int shared_bytes = 99 << 10;     // that a block may have: the least of all devices that the kernels are compiled for
  bool last_thread_first = false;  // the order in which threads run, and blocks
  bool last_block_first = false;
  int64_t only_block = -1;  // of the grid's first dimension, where it has so many; -1: all
  bool idle = false;        // launches do nothing: what is left is the host's time
  std::vector<std::string> launches;
  bool count_wavefronts = false;                                      // slow
  int64_t shared_accesses = 0, wavefronts = 0, least_wavefronts = 0;  // of warps, on 32 banks
};
Device& device();

// Called by a thread.
unsigned thread_index();
uint3 block_index();
unsigned grid_width();
void sync_block();
void sync_warp();
float exchange_lanes(float value, unsigned from_lane);
void* shared_access(int first_word, int words, bool write);

// Runs body() in each of the grid's threads; throws std::runtime_error for what a device leaves undefined.
void run(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& body);

}  // namespace hsaid::emulator

namespace hsaid::cuda {

HSAID_DEVICE unsigned thread_index() { return emulator::thread_index(); }
HSAID_DEVICE uint3 block_index() { return emulator::block_index(); }
HSAID_DEVICE unsigned grid_width() { return emulator::grid_width(); }
HSAID_DEVICE void sync_block() { emulator::sync_block(); }
HSAID_DEVICE void sync_warp() { emulator::sync_warp(); }
HSAID_DEVICE float shuffle_xor(float value, int mask) {
  return emulator::exchange_lanes(value, (thread_index() & 31) ^ (unsigned)mask);
}

class Shared {
 public:
  explicit Shared(int first) : first_(first) {}
  Shared operator+(int offset) const { return Shared(first_ + offset); }
  template <class V = float>
  V load(int i) const {
    return *(const V*)emulator::shared_access(first_ + i, sizeof(V) / 4, false);
  }
  template <class V>
  void store(int i, V value) const {
    *(V*)emulator::shared_access(first_ + i, sizeof(V) / 4, true) = value;
  }
  uint32_t byte(uint32_t i) const { return bits_from_float(load((int)(i / 4))) >> (i % 4 * 8) & 0xff; }
  template <int kWindow>
  float look_up(uint32_t i) const {
    if (first_ % 64) throw std::logic_error("look_up: the windows do not begin on a multiple of 256 bytes");
    return load(kWindow * 64 + (int)(i & 63));
  }

 private:
  int first_;
};

HSAID_DEVICE Shared shared_memory() { return Shared(0); }

HSAID_DEVICE float4 load_once(const float4* p) { return *p; }
HSAID_DEVICE uint2 load_once(const uint2* p) { return *p; }
HSAID_DEVICE void store_once(float4* p, float4 v) { *p = v; }
HSAID_DEVICE void store_once(uint2* p, uint2 v) { *p = v; }
HSAID_DEVICE int add_one(int* p) { return (*p)++; }
HSAID_DEVICE void prefetch(const void* p) { (void)*(const volatile char*)p; }

template <class T>
HSAID_DEVICE uint32_t narrow(float low, float high, T) {
  T halves[2];
  from_float(low, &halves[0]);
  from_float(high, &halves[1]);
  return halves[0].bits | (uint32_t)halves[1].bits << 16;
}
template <class T>
HSAID_DEVICE float widen(uint16_t half, T) {
  return to_float(T{half});
}

HSAID_DEVICE uint32_t below(uint32_t top, uint32_t word, int half) {
  return top << 16 | (half ? word >> 16 : word & 0xffffu);
}
HSAID_DEVICE void wait_for_previous_kernel() {}
HSAID_DEVICE void start_next_kernel() {}
HSAID_DEVICE uint32_t opaque(uint32_t value) { return value; }

// --- host

inline void zero_async(void* p, size_t bytes, cudaStream_t) { std::memset(p, 0, bytes); }

template <class P>
int resident_blocks(void (*)(P), const char*, int, int) {
  return emulator::device().resident_blocks;
}

template <class P>
void launch(void (*kernel)(P), const char* name, dim3 grid, int threads, int shared, cudaStream_t, const P& params) {
  emulator::run(name, grid, threads, shared, [&] { kernel(params); });
}
template <class P>
void launch_next(void (*kernel)(P), const char* name, dim3 grid, int threads, int shared, cudaStream_t stream,
                 const P& params) {
  launch(kernel, name, grid, threads, shared, stream, params);
}

}  // namespace hsaid::cuda
