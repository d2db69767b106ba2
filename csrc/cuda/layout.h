// Where the bits of a position in a tile lie, among a block's threads and their registers, and how the block goes from
// one such layout to another, by way of an array in shared memory. What an index computed by hand would leave to a
// comment is asserted of the types: each bit lies in one place, vectors are aligned, no two lanes meet in a bank.
#pragma once

#include <type_traits>

#include "../core/plan.h"
#include "device.h"

namespace hsaid::cuda {

constexpr int kThreads = 256, kTileBits = kMaxWidthBits, kTile = 1 << kTileBits, kPerThread = kTile / kThreads;

HSAID_DEVICE int lane() { return thread_index() & 31; }
HSAID_DEVICE int warp() { return thread_index() >> 5 & (kThreads / 32 - 1); }  // the mask tells the compiler the range

// These bits of a position, the first of them the lowest, as a number.
template <int... kBits>
struct Bits {
  static constexpr uint32_t kMask = ((1u << kBits) | ...);

  HSAID_INLINE constexpr uint32_t gather(uint32_t position) {
    uint32_t number = 0;
    int i = 0;
    ((number |= position >> (kBits - i) & moved_by(kBits - i), ++i), ...);
    return number;
  }
  // The position, of whose other bits `onto` says what they are.
  HSAID_INLINE constexpr uint32_t spread(uint32_t number, uint32_t onto = 0) {
    int i = 0;
    ((onto |= (number & moved_by(kBits - i)) << (kBits - i), ++i), ...);
    return onto;
  }

 private:
  // Those of the number's bits that lie so much higher in the position, which move together.
  HSAID_INLINE constexpr uint32_t moved_by(int distance) {
    uint32_t mask = 0;
    int i = 0;
    ((mask |= (uint32_t)(kBits - i == distance) << i, ++i), ...);
    return mask;
  }
};

template <class Register_, class Lane_, class Warp_>
struct Layout {
  using Register = Register_;
  using Lane = Lane_;
  using Warp = Warp_;
  static_assert(Register::gather(kTile - 1) == kPerThread - 1 && Lane::gather(kTile - 1) == 31 &&
                Warp::gather(kTile - 1) == kThreads / 32 - 1);
  static_assert((Register::kMask | Lane::kMask | Warp::kMask) == kTile - 1, "every bit has a place, and so only one");
};

// Where in the tile register i of this thread is.
template <class L>
HSAID_DEVICE uint32_t position(int i) {
  return L::Warp::spread((uint32_t)warp(), L::Lane::spread((uint32_t)lane())) | L::Register::spread((uint32_t)i);
}

// Whether lanes that access 32 words together, kWidth side by side each, find them in as many banks.
template <class Lane, int kWidth, class Place>
HSAID_INLINE constexpr bool is_free_of_conflicts(Place place) {
  uint32_t banks = 0;
  for (uint32_t i = 0; i < 32; ++i) banks |= 1u << (place(Lane::spread(i / kWidth)) + i % kWidth) % 32;
  return banks == ~0u;
}

// A dimension of an array: from one number of these bits to the next it is kStride_ floats.
template <int kStride_, class Bits>
struct Dimension : Bits {
  static constexpr int kStride = kStride_;
};

// Half a tile in shared memory, as an array with the numbers of `Row` side by side. The bit in no dimension says which
// half it is.
template <class Row, class... Dimensions>
struct Array {
  HSAID_INLINE constexpr int place(uint32_t position) {
    return ((int)Row::gather(position) + ... + (Dimensions::kStride * (int)Dimensions::gather(position)));
  }
  static constexpr uint32_t kHalf = (kTile - 1) & ~(Row::kMask | ... | Dimensions::kMask);
  static constexpr int kStrides = (Dimensions::kStride | ...);

  // A thread's accesses in layout L, in vectors of what it has side by side and aligned.
  template <class L>
  struct Access {
    using Register = typename L::Register;
    static constexpr int kOther = Register::gather(kHalf);  // what to add to a register for the one in the other half,
    static constexpr int kSecond = Register::gather(Row::spread(1));  // for the next value of a vector, and for the one
    static constexpr int kThird = kStrides % 4 ? 0 : Register::gather(Row::spread(2));  // after that; 0: there is none
    static constexpr int kWidth = kThird    ? 4
                                  : kSecond ? 2
                                            : 1,
                         kFirst = (kPerThread - 1) & ~(kOther | kSecond | kThird);
    static_assert(kOther, "a thread holds as much of both halves");
    static_assert(kStrides % kWidth == 0, "vectors are aligned");
    static_assert(is_free_of_conflicts<typename L::Lane, kWidth>(place));

    HSAID_DEVICE int of_warp() { return place(L::Warp::spread((uint32_t)warp())); }
    HSAID_DEVICE int of_lane() { return place(L::Lane::spread((uint32_t)lane())); }
    // use(i, where register i lies) for the first registers of all vectors.
    template <class Use>
    HSAID_DEVICE void each(int half, Use&& use) {
#pragma unroll
      for (int n = 0, first = 0; n < kPerThread / 2 / kWidth; ++n, first = (first - kFirst) & kFirst)
        use(first | (half ? kOther : 0), place(Register::spread((uint32_t)first)));
    }
    HSAID_DEVICE void store(Shared own, const float (&x)[kPerThread], int half) {
      each(half, [&](int i, int place) {
        if constexpr (kWidth == 4)
          own.store(place, float4{x[i], x[i | kSecond], x[i | kThird], x[i | kSecond | kThird]});
        else if constexpr (kWidth == 2)
          own.store(place, float2{x[i], x[i | kSecond]});
        else
          own.store(place, x[i]);
      });
    }
    HSAID_DEVICE void load(Shared own, float (&x)[kPerThread], int half) {
      each(half, [&](int i, int place) {
        if constexpr (kWidth == 4) {
          const float4 v = own.load<float4>(place);
          x[i] = v.x;
          x[i | kSecond] = v.y;
          x[i | kThird] = v.z;
          x[i | kSecond | kThird] = v.w;
        } else if constexpr (kWidth == 2) {
          const float2 v = own.load<float2>(place);
          x[i] = v.x;
          x[i | kSecond] = v.y;
        } else {
          x[i] = own.load(place);
        }
      });
    }
  };
};

// From layout L to M, or back, through an array in `memory`. Begins by waiting until nobody in the block uses that any
// more; where both layouts have the same bits in warps, no warp waits for another after that.
template <class L, class M, class Array, bool kBack>
HSAID_DEVICE void change_layout(Shared memory, float (&x)[kPerThread]) {
  using InL = typename Array::template Access<L>;
  using InM = typename Array::template Access<M>;
  constexpr bool kWithinWarps = std::is_same_v<typename L::Warp, typename M::Warp>;
  static_assert(kWithinWarps || std::is_same_v<typename L::Lane, typename M::Lane>);
  const Shared both = memory + (kWithinWarps ? InL::of_warp() : InL::of_lane());
  const Shared l = both + (kWithinWarps ? InL::of_lane() : InL::of_warp());
  const Shared m = both + (kWithinWarps ? InM::of_lane() : InM::of_warp());
  float y[kPerThread];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    kWithinWarps&& half ? sync_warp() : sync_block();
    kBack ? InM::store(m, x, half) : InL::store(l, x, half);
    kWithinWarps ? sync_warp() : sync_block();
    kBack ? InL::load(l, y, half) : InM::load(m, y, half);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x[i] = y[i];
}

}  // namespace hsaid::cuda
