// What the C++ tests share: a check that counts, bitwise comparison, every instruction set of the machine, threads.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../csrc/cpu/fastfood.h"

inline int failures = 0;

// CHECK(condition, format, ...): says which condition failed and what printf makes of the rest.
#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition) && ++failures <= 20) {                       \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
    }                                                             \
  } while (0)

constexpr uint64_t kSeed = 0xfedcba9876543210u;

inline uint32_t bits_of(float x) { return hsaid::bits_from_float(x); }
inline uint32_t bits_of(hsaid::bf16 x) { return x.bits; }
inline uint32_t bits_of(hsaid::fp16 x) { return x.bits; }

template <class T>
T narrowed(float x) {
  T y;
  hsaid::from_float(x, &y);
  return y;
}

template <class T>
void check_same_bits(const T* got, const T* expected, int64_t count, const std::string& what) {
  int64_t different = 0, first = 0;
  for (int64_t k = count - 1; k >= 0; --k)
    if (bits_of(got[k]) != bits_of(expected[k])) {
      ++different;
      first = k;
    }
  CHECK(different == 0, "%s: %lld of %lld values differ, first at %lld: got %g (0x%x), expected %g (0x%x)",
        what.c_str(), (long long)different, (long long)count, (long long)first, hsaid::to_float(got[first]),
        bits_of(got[first]), hsaid::to_float(expected[first]), bits_of(expected[first]));
}

// Ranges of unequal length, each on a thread of its own.
inline hsaid::Threads fake_threads(int64_t threads) {
  return {threads, [threads](int64_t count, const hsaid::RangeBody& body) {
            std::vector<std::thread> running;
            for (int64_t t = 0; t < threads; ++t) {
              const int64_t begin = count * t * t / (threads * threads);
              const int64_t end = count * (t + 1) * (t + 1) / (threads * threads);
              if (begin < end) running.emplace_back([&body, begin, end] { body(begin, end); });
            }
            for (std::thread& thread : running) thread.join();
          }};
}

// Calls f(name) with each instruction set of this machine chosen. On Arm, which is mostly an emulator, only with NEON:
// the portable code is tested elsewhere, and its lanes there by test_core.cpp.
#if defined(__aarch64__)
constexpr const char* kIsas[] = {"neon"};
#else
constexpr const char* kIsas[] = {"portable", "avx2", "avx512"};
#endif
template <class F>
void for_each_isa(F&& f) {
  for (const char* isa : kIsas) {
    setenv("HSAID_CPU_ISA", isa, 1);
    try {
      hsaid::kernels();
    } catch (const std::runtime_error&) {
      continue;
    }
    CHECK(std::string(hsaid::kernels().isa) == isa, "got %s", hsaid::kernels().isa);
    f(std::string(isa));
  }
  unsetenv("HSAID_CPU_ISA");
}

void test_fastfood();
void test_hadamard();
