// hadamard_transform of every instruction set, bit for bit against core/walsh_hadamard.h and core/paley.h: lengths,
// types, threads, in place and not; guards before and after. Integers against sums in 128 bits.

#include <algorithm>
#include <limits>
#include <type_traits>

#include "../../csrc/core/paley.h"
#include "../../csrc/core/walsh_hadamard.h"
#include "../../csrc/cpu/hadamard.h"
#include "check.h"

namespace {

using namespace hsaid;

// A row of `dim` values, made by value(k), padded with zeros, through the transform.
template <class C, class Value>
std::vector<C> transformed(int64_t dim, int order, Value&& value) {
  int q = 0;
  while ((int64_t)order << q < dim) ++q;
  const int64_t columns = (int64_t)1 << q;
  std::vector<C> y(order * columns, C(0));
  for (int64_t k = 0; k < dim; ++k) y[k] = value(k);
  if (order > 1) paley_stage(y.data(), order, columns);
  for (int i = 0; i < order; ++i) walsh_hadamard(y.data() + i * columns, q);
  return y;
}

double as_compute(double x) { return x; }
template <class T>
float as_compute(T x) {
  return to_float(x);
}
template <class T>
T as_value(double x) {
  if constexpr (std::is_same_v<T, double>)
    return x;
  else
    return narrowed<T>((float)x);
}

template <class T>
void check_same(const T* got, const T* expected, int64_t count, const std::string& what) {
  int64_t first = 0;
  while (first < count && !std::memcmp(got + first, expected + first, sizeof(T))) ++first;
  CHECK(first == count, "%s: value %lld of %lld", what.c_str(), (long long)first, (long long)count);
}

template <class T>
void check_transform(int64_t rows, int64_t dim, const std::string& type, int order = 1) {
  constexpr int64_t at = 1;
  using Compute = decltype(as_compute(T{}));
  const T guard = as_value<T>(-12345);
  std::vector<T> x(rows * dim + at + 1, guard), expected = x;
  for (int64_t row = 0; row < rows; ++row) {
    T* values = x.data() + at + row * dim;
    const std::vector<Compute> y = transformed<Compute>(dim, order, [&](int64_t k) {
      return as_compute(values[k] = as_value<T>((double)((k + row) * 37 % 101 - 50) / 99));
    });
    for (int64_t k = 0; k < dim; ++k) expected[at + row * dim + k] = as_value<T>(y[k] * (Compute)0.3);
  }
  for_each_isa([&](const std::string& isa) {
    for (int64_t threads : {1, 3, 8}) {
      const std::string what = type + ", " + isa + ", " + std::to_string(rows) + " x " + std::to_string(dim) +
                               ", order " + std::to_string(order) + ", " + std::to_string(threads) + " threads";
      std::vector<T> out(x.size(), guard), place = x;
      hadamard_transform(x.data() + at, out.data() + at, rows, dim, 0.3, order, fake_threads(threads));
      check_same(out.data(), expected.data(), out.size(), what);
      hadamard_transform(place.data() + at, place.data() + at, rows, dim, 0.3, order, fake_threads(threads));
      check_same(place.data(), expected.data(), out.size(), what + ", in place");
    }
  });
}

template <class T>
void test_floats(const char* type) {
  for (int q = 0; q <= 13; ++q)
    for (int64_t rows : {1, 3, 40}) check_transform<T>(rows, (int64_t)1 << q, type);
  for (int64_t dim : {3, 31, 33, 500, 5000}) check_transform<T>(7, dim, type);
  check_transform<T>(0, 4, type);
  for (int q = 14; q <= 19; ++q) check_transform<T>(1, (int64_t)1 << q, type);
  for (int64_t dim : {20000, 70000}) check_transform<T>(3, dim, type);
  check_transform<T>(5, 1 << 17, type);
  for (int order : {12, 20, 28}) {
    for (int q = 0; q <= 10; ++q) check_transform<T>(3, order << q, type, order);
    for (int64_t dim : {1, 12, 21, 500, 20000}) check_transform<T>(5, dim, type, order);
    check_transform<T>(1, order << 14, type, order);  // rows that threads share
    check_transform<T>(1, (order << 13) - 5, type, order);
  }
}

// Large enough to be stored past the caches, where the result begins on a cache line and where not.
template <class T>
[[maybe_unused]] void test_streamed(const char* type, int order, std::vector<int64_t> dims) {
  for (int64_t dim : dims) {
    const int64_t rows = ((9 << 20) / (int64_t)sizeof(T) + dim - 1) / dim;
    const T guard = as_value<T>(-12345);
    std::vector<T> x(rows * dim), expected(rows * dim), memory(rows * dim + 64);
    for (int64_t k = 0; k < rows * dim; ++k) x[k] = as_value<T>((double)(k * 37 % 101 - 50) / 99);
    for (int64_t row = 0; row < rows; ++row) {
      const std::vector<T> y = transformed<T>(dim, order, [&](int64_t k) { return x[row * dim + k]; });
      std::copy(y.begin(), y.end(), expected.begin() + row * dim);
    }
    for_each_isa([&](const std::string& isa) {
      for (int64_t shift : {0, 1}) {
        std::fill(memory.begin(), memory.end(), guard);
        const int64_t begin = (64 - (int64_t)((uintptr_t)memory.data() % 64)) % 64 / (int64_t)sizeof(T) + shift;
        hadamard_transform(x.data(), memory.data() + begin, rows, dim, 1.0, order, fake_threads(3));
        const std::string what = std::string(type) + ", streamed, " + isa + ", " + std::to_string(dim);
        check_same(memory.data() + begin, expected.data(), rows * dim, what);
        for (int64_t k = 0; k < (int64_t)memory.size(); ++k)
          if (k < begin || k >= begin + rows * dim)
            CHECK(memory[k] == guard, "%s: guard %lld", what.c_str(), (long long)k);
      }
    });
  }
}

template <class T>
void check_integers(int64_t rows, int64_t dim, int order, T largest, bool fits, const std::string& what) {
  std::vector<T> x(rows * dim), expected(rows * dim);
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<__int128> y = transformed<__int128>(dim, order, [&](int64_t k) {
      return x[row * dim + k] = (T)(largest - (T)((k + row) * 7 % 5)) * (k % 3 ? 1 : -1);
    });
    for (int64_t k = 0; k < dim; ++k) {
      expected[row * dim + k] = (T)y[k];
      CHECK(!fits || y[k] == expected[row * dim + k], "%s: a case that does not fit", what.c_str());
    }
  }
  for_each_isa([&](const std::string& isa) {
    std::vector<T> out(x.size(), 77), place = x;
    const bool got = hadamard_transform(x.data(), out.data(), rows, dim, order, fake_threads(3));
    hadamard_transform(place.data(), place.data(), rows, dim, order, fake_threads(2));
    CHECK(got == fits, "%s, %s", what.c_str(), isa.c_str());
    check_same(out.data(), (fits ? expected : std::vector<T>(x.size(), 77)).data(), x.size(), what + ", " + isa);
    check_same(place.data(), (fits ? expected : x).data(), x.size(), what + ", in place, " + isa);
  });
}

template <class T>
void test_integers(const std::string& type) {
  constexpr T most = std::numeric_limits<T>::max(), least = std::numeric_limits<T>::min();
  for (int64_t dim : {1, 2, 3, 16, 100, 512, 5000, 1 << 16})
    for (int64_t rows : {1, 5}) check_integers<T>(rows, dim, 1, (T)1000, true, type + ", small");
  for (int order : {12, 20, 28})
    for (int64_t dim : {12, 100, 2000}) {
      check_integers<T>(2, dim, order, (T)1000, true, type + ", small");
      check_integers<T>(2, dim, order, most, false, type + ", large");
    }
  for (int64_t dim : {2, 16, 1000}) check_integers<T>(3, dim, 1, most, false, type + ", large");
  check_integers<T>(3, 1, 1, most, true, type + ", one value");
  // At the limits: by magnitude too large, and yet what comes fits; the least value has no counterpart.
  std::vector<T> row = {most, least, 0, 0}, out(4);
  for_each_isa([&](const std::string& isa) {
    row = {most / 2 + 1, least / 2, 0, 0};
    CHECK(!hadamard_transform(row.data(), out.data(), 1, 4, 1, fake_threads(1)), "%s", isa.c_str());
    row = {most / 2, least / 2, 0, 0};
    CHECK(hadamard_transform(row.data(), out.data(), 1, 4, 1, fake_threads(1)), "%s", isa.c_str());
    CHECK(out[0] == -1 && out[1] == most && out[2] == -1 && out[3] == most, "%s", isa.c_str());
    row = {least, 0, 0, 0};
    CHECK(hadamard_transform(row.data(), out.data(), 1, 2, 1, fake_threads(1)), "%s", isa.c_str());
    CHECK(out[0] == least && out[1] == least, "%s", isa.c_str());
  });
}

}  // namespace

void test_hadamard() {
  test_floats<float>("float");
  test_floats<double>("double");
  test_floats<bf16>("bf16");
  test_floats<fp16>("fp16");
#if !defined(__aarch64__)                    // NEON has no stores past the caches
  for (const char* cache : {"", "65536"}) {  // which rows go there
    setenv("HSAID_CPU_L2", cache, 1);
    test_streamed<float>("float", 1, {1, 2, 16, 64, 1024, 1 << 15, 1 << 18});
    test_streamed<double>("double", 1, {1, 2, 16, 64, 1024, 1 << 15, 1 << 18});
    test_streamed<float>("float", 20, {20, 20 << 5, 20 << 10});
    test_streamed<double>("double", 12, {12 << 10});
  }
  unsetenv("HSAID_CPU_L2");
#endif
  test_integers<int32_t>("int32");
  test_integers<int64_t>("int64");
}
