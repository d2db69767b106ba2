// A tile lies in the registers of a block of threads. A layout says which bits of a value's position number the
// register, the lane and the warp. The obvious way, a formula for each layout and for each exchange between two, has
// these bits in every formula and leaves to comments what must hold. Here a layout is a type: positions and addresses
// come from it, and the compiler checks that every bit has one place, every value of an exchange a place of its own,
// that vectors are aligned, and that no two lanes meet in a bank of shared memory. The machine code is that of the
// formulas.
#pragma once

#include <type_traits>

#include "../core/plan.h"
#include "device.h"

namespace hsaid::cuda {

constexpr int kThreads = 256, kTileBits = kMaxWidthBits, kTile = 1 << kTileBits, kPerThread = kTile / kThreads;

HSAID_DEVICE int lane() { return thread_index() & 31; }
HSAID_DEVICE int warp() { return thread_index() >> 5 & (kThreads / 32 - 1); }  // the mask tells the compiler the range

// A number made of these bits of a position, lowest first. Neighbouring bits move together, with one shift.
template <int... kBits>
struct Bits {
  static constexpr uint32_t kMask = ((1u << kBits) | ...);

  HSAID_INLINE constexpr uint32_t gather(uint32_t position) {
    uint32_t number = 0;
    int i = 0;
    ((number |= position >> (kBits - i) & moved_by(kBits - i), ++i), ...);
    return number;
  }
  // The position with this number; its other bits are those of `rest`.
  HSAID_INLINE constexpr uint32_t spread(uint32_t number, uint32_t rest = 0) {
    int i = 0;
    ((rest |= (number & moved_by(kBits - i)) << (kBits - i), ++i), ...);
    return rest;
  }

 private:
  HSAID_INLINE constexpr uint32_t moved_by(int distance) {  // which bits of the number are
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
  static_assert(Register::gather(kTile - 1) == kPerThread - 1);
  static_assert(Lane::gather(kTile - 1) == 31 && Warp::gather(kTile - 1) == kThreads / 32 - 1);
  static_assert((Register::kMask | Lane::kMask | Warp::kMask) == kTile - 1, "every bit has a place, so only one");
};

// The position in the tile of this thread's register i.
template <class L>
HSAID_DEVICE uint32_t position(int i) {
  return L::Warp::spread((uint32_t)warp(), L::Lane::spread((uint32_t)lane())) | L::Register::spread((uint32_t)i);
}

// Whether lanes that access 32 words together, kWidth neighbours each, find them in 32 banks.
template <class Lane, int kWidth, class Place>
HSAID_INLINE constexpr bool is_free_of_conflicts(Place place) {
  uint32_t banks = 0;
  for (uint32_t i = 0; i < 32; ++i) banks |= 1u << (place(Lane::spread(i / kWidth)) + i % kWidth) % 32;
  return banks == ~0u;
}

// A dimension of an array, indexed by these bits.
template <int kStride_, class Bits>
struct Dimension : Bits {
  static constexpr int kStride = kStride_;
};

// Half a tile as an array of floats in shared memory; the stride of `Row` is 1. The bit that is in no dimension tells
// one half from the other.
template <class Row, class... Dimensions>
struct Array {
  static constexpr uint32_t kHalf = (kTile - 1) & ~(Row::kMask | ... | Dimensions::kMask);
  static constexpr int kStrides = (Dimensions::kStride | ...);

  HSAID_INLINE constexpr int place(uint32_t position) {
    return ((int)Row::gather(position) + ... + (Dimensions::kStride * (int)Dimensions::gather(position)));
  }
  // In so many floats, no two values of a half in one place.
  HSAID_INLINE constexpr bool fits(int floats) {
    int last = Row::gather(kTile - 1);
    bool apart = true;
    ((apart &= last < Dimensions::kStride, last += Dimensions::kStride * Dimensions::gather(kTile - 1)), ...);
    return apart && last < floats;
  }

  // How a thread in layout L accesses the array: in the widest vectors of which it holds all values.
  template <class L>
  struct Access {
    using Register = typename L::Register;
    // Added to the number of a register: the register in the other half; of a vector, the second and the third value.
    static constexpr int kOther = Register::gather(kHalf), kSecond = Register::gather(Row::spread(1));
    static constexpr int kThird = kStrides % 4 ? 0 : Register::gather(Row::spread(2));
    static constexpr int kWidth = 1 << !!kSecond << !!kThird;
    static constexpr int kFirst = (kPerThread - 1) & ~(kOther | kSecond | kThird);
    static_assert(kOther, "a thread holds as much of both halves");
    static_assert((kSecond || !kThird) && kStrides % kWidth == 0, "vectors are whole and aligned");
    static_assert(is_free_of_conflicts<typename L::Lane, kWidth>(place));

    HSAID_DEVICE int warp_place() { return place(L::Warp::spread((uint32_t)warp())); }
    HSAID_DEVICE int lane_place() { return place(L::Lane::spread((uint32_t)lane())); }

    // use(i, place): register i is the first of a vector, which lies so far from the thread's own place.
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

// From layout L to M, or back, through an array in `memory`, half a tile at a time. First waits until no thread of the
// block uses this memory any more; from then on warps wait for each other only where values change warps.
// How its addresses and loops are written decides what registers nvcc needs: after a change, compare the machine code.
template <class L, class M, class Array, bool kBack>
HSAID_DEVICE void change_layout(Shared memory, float (&x)[kPerThread]) {
  using InL = typename Array::template Access<L>;
  using InM = typename Array::template Access<M>;
  constexpr bool kWithinWarps = std::is_same_v<typename L::Warp, typename M::Warp>;
  static_assert(kWithinWarps || std::is_same_v<typename L::Lane, typename M::Lane>);
  const Shared both = memory + (kWithinWarps ? InL::warp_place() : InL::lane_place());
  const Shared l = both + (kWithinWarps ? InL::lane_place() : InL::warp_place());
  const Shared m = both + (kWithinWarps ? InM::lane_place() : InM::warp_place());
  float y[kPerThread];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    half&& kWithinWarps ? sync_warp() : sync_block();
    kBack ? InM::store(m, x, half) : InL::store(l, x, half);
    kWithinWarps ? sync_warp() : sync_block();
    kBack ? InL::load(l, y, half) : InM::load(m, y, half);
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) x[i] = y[i];
}

}  // namespace hsaid::cuda
