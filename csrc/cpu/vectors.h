// Vectors of kLanes floats or words, and all that is the same for every instruction set: GCC's and Clang's vector
// extensions add, multiply, shift and shuffle. Intrinsics for these would say the same four times, in no better
// instructions.
#pragma once

#include <type_traits>
#include <utility>

#include "../core/half.h"

#define HSAID_LAMBDA __attribute__((always_inline))
// For what is called once a tile or less: one copy keeps the code small.
#define HSAID_NOINLINE __attribute__((noinline))

namespace hsaid {

namespace {  // each instruction set its own copy, see fastfood_kernels.cpp

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kLaneBits = kLanes == 16 ? 4 : kLanes == 8 ? 3 : 2;
constexpr int kLineBytes = 64;

typedef float vf __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint64_t vw __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * kLanes), may_alias));
// At any address.
typedef float vf_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

// f(0), f(1), ..., f(N - 1) with constants for arguments: arrays indexed by them live in registers.
template <int... I, class F>
HSAID_INLINE void unroll_indices(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
HSAID_INLINE void unroll(F&& f) {
  unroll_indices(std::make_integer_sequence<int, N>{}, f);
}

HSAID_INLINE vf broadcast(float x) { return vf{} + x; }
HSAID_INLINE vu broadcast(uint32_t x) { return vu{} + x; }
HSAID_INLINE vf load(const float* p) { return *(const vf_any*)p; }
HSAID_INLINE vu load(const uint32_t* p) { return *(const vu_any*)p; }
HSAID_INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
HSAID_INLINE void store(uint32_t* p, vu x) { *(vu_any*)p = x; }
HSAID_INLINE vu lane_index() {
  vu lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Lane i of the result is lane source(i) of a and b side by side.
template <class V, class Source, int... I>
HSAID_INLINE V shuffle_lanes(V a, V b, Source, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Source{}(I)...);
#else
  return __builtin_shuffle(a, b, decltype(a == b){std::integral_constant<int, Source{}(I)>{}...});
#endif
}
template <class V, class Source>
HSAID_INLINE V shuffle(V a, V b, Source source) {
  return shuffle_lanes(a, b, source, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>{});
}

}  // namespace

}  // namespace hsaid
