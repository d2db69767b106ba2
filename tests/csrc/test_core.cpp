// csrc/core and what stands on it alone: known answers, conversions over all patterns, permutations, the generator's
// lanes against the scalar streams, the buffer pool.  Exits with 1 if anything differs.

#include <cmath>
#include <cstring>

#include "../../csrc/core/permutation.h"
#include "../../csrc/cpu/buffer_pool.h"
#include "../../csrc/cpu/diagonal.h"
#include "check.h"

using namespace hsaid;

namespace {

// --- the generator

void test_philox() {
  const struct {
    uint64_t seed;
    PhiloxWords counter, words;
  } known[] = {
      // Random123's
      {0, {{0, 0, 0, 0}}, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {~uint64_t{0}, {{~0u, ~0u, ~0u, ~0u}}, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {0x299f31d0a4093822,
       {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& k : known) {
    const PhiloxWords got = philox4x32(k.seed, k.counter);
    for (int i = 0; i < 4; ++i) CHECK(got.w[i] == k.words.w[i], "word %d: %08x", i, got.w[i]);
  }
}

// The first rounds' constants and the lanes, for keys and counters with all bits in use.
void test_philox_vectors() {
  for (uint32_t i = 0; i < 1000; ++i) {
    const PhiloxWords random = philox4x32(i, {{1, 2, 3, 4}}), more = philox4x32(i, {{5, 6, 7, 8}});
    const uint64_t seed = (uint64_t)random.w[0] << 32 | random.w[1];
    PhiloxWords c = {{random.w[2], 0, random.w[3], more.w[0]}};
    const vu word1[2] = {lane_index() + more.w[1], lane_index() * more.w[2]};
    vu w[2][4];
    philox_vectors<2>(PhiloxConstants(philox_prefix(seed, c)), philox_keys(seed), word1, w);
    for (int call = 0; call < 2; ++call)
      for (int lane = 0; lane < kLanes; ++lane) {
        c.w[1] = word1[call][lane];
        const PhiloxWords expected = philox4x32(seed, c);
        for (int j = 0; j < 4; ++j)
          CHECK(w[call][j][lane] == expected.w[j], "%u: call %d, lane %d, word %d", i, call, lane, j);
      }
  }
}

void test_normals() {
  CHECK(bits_of(normal_from_half(0)) == 0xc0707413, "%08x", bits_of(normal_from_half(0)));
  CHECK(bits_of(normal_from_half(0x7fff)) == 0xb8206c29, "%08x", bits_of(normal_from_half(0x7fff)));
  CHECK(bits_of(normal_from_half(0x9c40)) == 0x3e8f8e20, "%08x", bits_of(normal_from_half(0x9c40)));
  NormalTable table;
  fill(table);
  for (uint32_t first = 0; first < 65536; first += kGroup * kLanes) {
    vu magic[kGroup];
    vf g[kGroup];
    for (int i = 0; i < kGroup; ++i) magic[i] = (lane_index() + (first + i * kLanes)) | kNormalMagic;
    normal_vectors(magic, table, g);
    for (uint32_t i = 0; i < kGroup * kLanes; ++i) {
      const uint32_t half = first + i;
      CHECK(bits_of(g[i / kLanes][i % kLanes]) == bits_of(normal_from_half(half)), "half %04x", half);
      CHECK(normal_from_half(half) == -normal_from_half(65535 - half), "half %04x", half);
    }
  }
}

// In this file's lanes; those of the other instruction sets are tested through the kernels.
void test_draws() {
  for (int q = kMinWidthBits; q <= kMaxWidthBits; ++q)
    for (bool rademacher : {false, true}) {
      const Params p = {kSeed, (int64_t)3 << q, q, 3, rademacher};
      Segment s{};
      s.stream = -77;
      std::vector<PhiloxPrefix> prefix(p.chunks);
      std::vector<uint32_t> words(p.chunks * num_sign_words(q));
      Diagonal diagonal(p, prefix.data(), words.data());
      diagonal.start(s, (1 << 28) - 1);
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        const Stream stream = stream_of(p, s, kDiagonal, diagonal.block, chunk);
        int64_t seen = 0, wrong = 0;
        const auto use = [&](int64_t k, vf got) {
          for (int lane = 0; lane < kLanes; ++lane, ++seen) {
            const uint32_t at = (uint32_t)k + lane;
            const float expected = rademacher ? (sign_at(stream, at) ? -1.0f : 1.0f) : gaussian_at(stream, q, at);
            wrong += bits_of(got[lane]) != bits_of(expected);
          }
        };
        int64_t moved = 0;  // beside it, a line for every 32 positions that are counted
        const auto move = [](const void* what, int64_t begin, int64_t end) {
          int64_t& moved = *(int64_t*)what;
          if (begin == moved) moved = end;
        };
        Beside beside = {move, &moved, 1, 32};
        if (rademacher) {
          with_tile_bits(tile_bits(q), [&](auto t) {
            for (int64_t k = 0; k < width(p); k += 1 << t)
              sign_tile<t>(words.data() + chunk * num_sign_words(q), k,
                           [&](int i, vu sign) { use(k + i * kLanes, (vf)((vu)broadcast(1.0f) ^ sign)); });
          });
        } else {
          for (int64_t draw = 0; draw < num_draws(q); ++draw) draw_gaussian(diagonal, chunk, draw, beside, use);
          CHECK(moved == kDrawCounts * width(p) / 32, "q %d: %lld lines", q, (long long)moved);
        }
        CHECK(wrong == 0 && seen == width(p), "q %d rademacher %d chunk %d: %lld", q, rademacher, chunk,
              (long long)wrong);
      }
    }
}

void test_permutation() {
  for (int q = kMinWidthBits; q <= kMaxWidthBits; ++q)
    for (int chunk : {0, 1, 32767}) {
      const PermutationKeys keys = permutation_keys(kSeed, 42, chunk);
      std::vector<int> seen(1 << q);
      for (uint32_t k = 0; k < 1u << q; ++k) {
        const uint32_t to = permute(k, q, keys);
        CHECK(to < 1u << q && seen[to]++ == 0, "q %d chunk %d: %u goes to %u", q, chunk, k, to);
      }
    }
}

// --- 16-bit floats

// The value of 16 bits by the definition of their format; the largest exponent is taken as any other.
template <class T>
double exact(uint32_t bits) {
  constexpr int mantissa = std::is_same_v<T, fp16> ? 10 : 7, bias = std::is_same_v<T, fp16> ? 15 : 127;
  const int exponent = (int)(bits & 0x7fff) >> mantissa;
  const uint32_t fraction = bits & ((1u << mantissa) - 1);
  const double magnitude = exponent ? std::ldexp(fraction + (1u << mantissa), exponent - bias - mantissa)
                                    : std::ldexp(fraction, 1 - bias - mantissa);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// Every pattern widens to its value and back; between neighbours the nearer one is taken, halfway the even one.
template <class T>
void test_half(const char* name, uint32_t infinity) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float x = to_float(T{(uint16_t)bits});
    const uint32_t magnitude = bits & 0x7fff, back = narrowed<T>(x).bits;
    const bool negative = bits & 0x8000;
    if (magnitude > infinity) {
      CHECK(std::isnan(x) && (back & 0x7fff) > infinity, "%s %04x: %g, back %04x", name, bits, x, back);
      continue;
    }
    CHECK(back == bits && std::signbit(x) == negative, "%s %04x: %g, back %04x", name, bits, x, back);
    if (magnitude == infinity) {
      CHECK(std::isinf(x), "%s %04x: %g", name, bits, x);
      continue;
    }
    CHECK((double)x == exact<T>(bits), "%s %04x: %g", name, bits, x);
    const double middle = (exact<T>(magnitude) + exact<T>(magnitude + 1)) / 2;
    if (middle > 3.4028235e38) continue;  // past bfloat16's largest: no float
    const float tie = (float)(negative ? -middle : middle), away = negative ? -INFINITY : INFINITY;
    CHECK(narrowed<T>(tie).bits == bits + (bits & 1), "%s %04x: the tie goes to %04x", name, bits,
          narrowed<T>(tie).bits);
    CHECK(narrowed<T>(std::nextafter(tie, 0.0f)).bits == bits, "%s %04x: below the tie", name, bits);
    CHECK(narrowed<T>(std::nextafter(tie, away)).bits == bits + 1, "%s %04x: above the tie", name, bits);
  }
  CHECK((narrowed<T>(3.4028235e38f).bits & 0x7fff) == infinity, "%s: the largest float", name);
  for (uint32_t nan : {0x7f800001u, 0x7fc00000u, 0xff800001u, 0xffffffffu})
    CHECK((narrowed<T>(float_from_bits(nan)).bits & 0x7fff) > infinity, "%s: NaN %08x", name, nan);
}

// --- the pool of buffers

void test_buffer_pool() {
  constexpr int64_t kSize = 20 << 20, kPage = 2 << 20;
  empty_pool();
  void* first = take_buffer(kSize);
  void* second = take_buffer(kSize);
  CHECK((uintptr_t)first % kPage == 0 && (uintptr_t)second % kPage == 0, "%p, %p", first, second);
  CHECK(std::abs((char*)first - (char*)second) >= kSize, "%p and %p overlap", first, second);
  std::memset(first, 1, kSize);
  std::memset(second, 2, kSize);
  CHECK(((char*)first)[kSize - 1] == 1, "the second was written over the first");
  give_buffer(first, kSize);
  void* again = take_buffer(kSize - 5);  // the same number of pages
  CHECK(again == first, "%p, given back was %p", again, first);
  give_buffer(again, kSize - 5);
  give_buffer(second, kSize);  // the pool keeps one and frees the other
  CHECK(empty_pool() == kSize, "of %lld bytes", (long long)kSize);
  CHECK(empty_pool() == 0, "the pool was empty");
  // Sizes that alternate are all kept, unless they take much more than the largest: the oldest goes first.
  constexpr int64_t kMegabyte = 1 << 20, kSizes[] = {kMegabyte, 20 * kMegabyte, 80 * kMegabyte, 60 * kMegabyte};
  void* buffers[4];
  for (int i = 0; i < 4; ++i) buffers[i] = take_buffer(kSizes[i]);
  for (int i = 0; i < 3; ++i) give_buffer(buffers[i], kSizes[i]);
  void* small = take_buffer(kMegabyte);
  CHECK(small == buffers[0], "%p, given back was %p", small, buffers[0]);
  give_buffer(small, kMegabyte);
  give_buffer(buffers[3], kSizes[3]);  // 1 and 20 MB beside it are more than 64
  CHECK(empty_pool() == 141 * kMegabyte, "all but the 20 MB");
}

void test_unknown_isa() {
  setenv("HSAID_CPU_ISA", "mmx", 1);
  std::string said;
  try {
    kernels();
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  CHECK(said.starts_with("HSAID_CPU_ISA: expected one of ") && said.ends_with("got mmx"), "%s", said.c_str());
  unsetenv("HSAID_CPU_ISA");
  kernels();
}

}  // namespace

int main() {
  test_philox();
  test_philox_vectors();
  test_normals();
  test_draws();
  test_permutation();
  test_half<bf16>("bfloat16", 0x7f80);
  test_half<fp16>("float16", 0x7c00);
  test_buffer_pool();
  test_unknown_isa();
  test_fastfood();
  test_hadamard();
  std::printf("%s: %d checks failed\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
