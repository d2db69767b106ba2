// The few things that only a device has. Everything else in csrc/cuda is plain C++: tests/csrc/emulator.h has the same
// names for a CPU, so that these very kernels run, and are checked, where there is no GPU.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../core/half.h"

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_runtime.h>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "HSAID_CUDA_ARCHITECTURES: expected 80 or newer, older GPUs have too little shared memory for the kernels"
#endif

#define HSAID_MEMBER __device__ __forceinline__
#define HSAID_DEVICE static HSAID_MEMBER  // a function of its file

namespace hsaid::cuda {

HSAID_DEVICE unsigned thread_index() { return threadIdx.x; }
HSAID_DEVICE uint3 block_index() { return blockIdx; }
HSAID_DEVICE unsigned grid_width() { return gridDim.x; }

HSAID_DEVICE void sync_block() { __syncthreads(); }
HSAID_DEVICE void sync_warp() { __syncwarp(); }
// The value of the warp's lane that differs in the bits of `mask`.
HSAID_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The block's shared memory in floats; vectors lie on multiples of their size.
class Shared {
 public:
  HSAID_MEMBER explicit Shared(float* at) : at_(at) {}
  HSAID_MEMBER Shared operator+(int offset) const { return Shared(at_ + offset); }
  template <class V = float>
  HSAID_MEMBER V load(int i) const {
    return *(const V*)(at_ + i);
  }
  template <class V>
  HSAID_MEMBER void store(int i, V value) const {
    *(V*)(at_ + i) = value;
  }

  // Byte i from here.
  HSAID_MEMBER uint32_t byte(uint32_t i) const { return ((const uint8_t*)at_)[i]; }

  // Float i mod 64 of the 64-float window `kWindow`; the first window begins on a multiple of 256 bytes. The address
  // takes one instruction, which the compiler does not find by itself.
  template <int kWindow>
  HSAID_MEMBER float look_up(uint32_t i) const {
    const uint32_t address = (uint32_t)__cvta_generic_to_shared(at_) | (i & 63) << 2;
    float value;
    asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(value) : "r"(address), "n"(kWindow * 256));
    return value;
  }

 private:
  float* at_;
};

HSAID_DEVICE Shared shared_memory() {
  extern __shared__ __align__(256) float4 hsaid_shared[];
  return Shared((float*)hsaid_shared);
}

// For global memory that is read or written once: goes past the first-level cache, and is first to leave the second.
HSAID_DEVICE float4 load_once(const float4* p) { return __ldcs(p); }
HSAID_DEVICE uint2 load_once(const uint2* p) { return __ldcs(p); }
HSAID_DEVICE void store_once(float4* p, float4 v) { __stcs(p, v); }
HSAID_DEVICE void store_once(uint2* p, uint2 v) { __stcs(p, v); }
// Adds 1 for all blocks of threads to see; returns what was there.
HSAID_DEVICE int add_one(int* p) { return atomicAdd(p, 1); }
HSAID_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// In a kernel that launch_next started: waits until the kernel before it has ended and what that wrote can be read.
HSAID_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// In the kernel before it: the next one may start once every block of threads has come here or ended.
HSAID_DEVICE void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// top << 16 | the low (0) or the high (1) half of a word.
HSAID_DEVICE uint32_t below(uint32_t top, uint32_t word, int half) {
  return __byte_perm(word, top, half ? 0x5432 : 0x5410);
}

// The same value, but the compiler takes it for another each time round a loop: what depends on it is computed again
// instead of being kept in registers that are not there.
HSAID_DEVICE uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Two floats rounded to nearest even, the first in the low half. A NaN is any NaN.
HSAID_DEVICE uint32_t narrow(float low, float high, bf16) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
HSAID_DEVICE uint32_t narrow(float low, float high, fp16) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
HSAID_DEVICE float widen(uint16_t half, bf16) { return float_from_bits((uint32_t)half << 16); }
HSAID_DEVICE float widen(uint16_t half, fp16) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// --- host

inline void check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

inline void zero_async(void* p, size_t bytes, cudaStream_t stream) {
  check(cudaMemsetAsync(p, 0, bytes, stream), "cudaMemsetAsync of " + std::to_string(bytes) + " bytes");
}

// What there is to know of a kernel on a device; asked of the runtime once.
struct KernelFacts {
  int resident_blocks;   // of threads, that fit on the device at a time
  bool can_start_early;  // compiled for devices that know wait_for_previous_kernel, and running on one
};

inline KernelFacts ask_facts(const void* kernel, int device, int threads, int shared, const std::string& what) {
  int processors, per_processor, major, most;
  cudaFuncAttributes attributes;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), what);
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), what);
  check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), what);
  check(cudaFuncGetAttributes(&attributes, kernel), what);
  check(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - (int)attributes.sharedSizeBytes),
      what);
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, shared), what);
  if (per_processor < 1) throw std::runtime_error(what + ": more than a multiprocessor of this device has");
  return {processors * per_processor, major >= 9 && attributes.ptxVersion >= 90};
}

template <class P>
KernelFacts facts_of(void (*kernel)(P), const char* name, int threads, int shared) {
  using Key = std::tuple<void (*)(P), int, int, int>;
  static std::mutex mutex;
  static std::map<Key, KernelFacts> known;
  const auto what = [&] {
    return std::string(name) + ", " + std::to_string(shared) + " bytes of shared memory a block";
  };
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) check(error, what());
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{kernel, device, threads, shared};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = ask_facts((const void*)kernel, device, threads, shared, what());
}

// Blocks of `threads` threads with `shared` bytes that fit on the current device at a time.
template <class P>
int resident_blocks(void (*kernel)(P), const char* name, int threads, int shared) {
  return facts_of(kernel, name, threads, shared).resident_blocks;
}

template <class P>
void launch_as(bool early, void (*kernel)(P), const char* name, dim3 grid, int threads, int shared, cudaStream_t stream,
               const P& params) {
  const KernelFacts facts = facts_of(kernel, name, threads, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = early && facts.can_start_early;
  void* arguments[] = {(void*)&params};
  if (const cudaError_t error = cudaLaunchKernelExC(&config, (const void*)kernel, arguments))
    check(error, std::string(name) + ", grid " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + ", " +
                     std::to_string(threads) + " threads, " + std::to_string(shared) + " bytes of shared memory");
}

template <class P>
void launch(void (*kernel)(P), const char* name, dim3 grid, int threads, int shared, cudaStream_t stream,
            const P& params) {
  launch_as(false, kernel, name, grid, threads, shared, stream, params);
}

// For a kernel that may start before the one launched last has ended: each of its threads calls
// wait_for_previous_kernel before it reads or writes what other kernels do.
template <class P>
void launch_next(void (*kernel)(P), const char* name, dim3 grid, int threads, int shared, cudaStream_t stream,
                 const P& params) {
  launch_as(true, kernel, name, grid, threads, shared, stream, params);
}

}  // namespace hsaid::cuda

#endif
