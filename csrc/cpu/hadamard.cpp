// hadamard_transform: from rows of any length and type to rows of order * 2^q values for the kernels, shared between
// threads. Which thread does what changes no bit, and neither does how a row is cut.

#include "hadamard.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "../core/paley.h"
#include "../core/walsh_hadamard.h"

namespace hsaid {

namespace {

// What one thread takes at least, in values.
constexpr int64_t kGrain = int64_t{1} << 15;
// Rows of 2^16 values and more are worth sharing between threads, one after another.
constexpr int kSharedBits = 16;
// Results of this many bytes or more are stored past the caches.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;
// Short rows are padded together, but not many: they are written while the next ones are computed.
constexpr int64_t kPaddedBytes = 2048;

template <class C>
const HadamardOf<C>& kernels_of() {
  const HadamardKernels& k = *kernels().hadamard;
  if constexpr (std::is_same_v<C, float>) return k.of_float;
  if constexpr (std::is_same_v<C, double>) return k.of_double;
  if constexpr (std::is_same_v<C, uint32_t>) return k.of_uint32;
  if constexpr (std::is_same_v<C, uint64_t>) return k.of_uint64;
}

// What a row is padded to: order * 2^q values.
struct Length {
  int order, q = 0;

  Length(int64_t dim, int order_) : order(order_) {
    while (n() < dim) ++q;
  }
  int64_t columns() const { return (int64_t)1 << q; }
  int64_t n() const { return order * columns(); }
};

// body(begin, end) over [0, count), `size` values each.
template <class Body>
void parallel(const Threads& threads, int64_t count, int64_t size, Body&& body) {
  const int64_t each = std::max<int64_t>(1, kGrain / size), units = (count + each - 1) / each;
  if (units <= 1) return count > 0 ? body((int64_t)0, count) : void();
  threads.parallel_for(units, [&](int64_t begin, int64_t end) { body(begin * each, std::min(count, end * each)); });
}

// Whether to share each row between threads, rather than the rows.
bool shares_rows(int64_t rows, int64_t n, const Threads& threads) {
  return n >> kSharedBits && threads.count > 1 && rows < 4 * threads.count && rows % threads.count != 0;
}

template <class C>
void share_row(const C* x, C* out, Length length, C scale, const Threads& threads);

// Rows to compute in, from a cache line on: vectors across two lines take twice as long.
template <class C>
struct Rows {
  static constexpr int64_t kLine = 64;
  C* values;

  explicit Rows(int64_t count)
      : values((C*)std::aligned_alloc(kLine, (count * (int64_t)sizeof(C) + kLine - 1) / kLine * kLine)) {
    if (!values) out_of_memory(count * (int64_t)sizeof(C));
  }
  ~Rows() { std::free(values); }
  Rows(const Rows&) = delete;
};

// Rows in one thread.
template <class C>
void some_rows(const C* x, C* out, int64_t rows, Length length, C scale, bool stream) {
  const HadamardOf<C>& k = kernels_of<C>();
  if (length.order == 1) return k.rows(x, out, rows, length.q, scale, stream);
  const int64_t n = length.n();
  const Rows<C> scratch(stream ? n : 1);
  for (int64_t row = 0; row < rows; ++row, x += n, out += n) {
    C* work = stream ? scratch.values : out;
    k.paley(x, work, length.order, length.columns(), 0, length.columns());
    k.rows(work, out, length.order, length.q, scale, stream);
  }
}

// Rows of `length`.
template <class C>
void whole_rows(const C* x, C* out, int64_t rows, Length length, C scale, const Threads& threads) {
  const int64_t n = length.n(), bytes = n * (int64_t)sizeof(C);
  if (shares_rows(rows, n, threads)) {
    for (int64_t row = 0; row < rows; ++row) share_row(x + row * n, out + row * n, length, scale, threads);
    return;
  }
  // The last step takes a row from the second-level cache past all caches.
  const bool stream = x != out && rows * bytes >= kStreamedBytes && bytes <= second_level_cache();
  parallel(threads, rows, n, [&](int64_t begin, int64_t end) {
    some_rows(x + begin * n, out + begin * n, end - begin, length, scale, stream);
  });
}

template <class C>
void share_row(const C* x, C* out, Length length, C scale, const Threads& threads) {
  const HadamardOf<C>& k = kernels_of<C>();
  if (length.order > 1) {
    const int64_t columns = length.columns();
    parallel(threads, columns, length.order,
             [&](int64_t begin, int64_t end) { k.paley(x, out, length.order, columns, begin, end); });
    return whole_rows(out, out, length.order, Length(columns, 1), scale, threads);
  }
  const int q = length.q, passes = k.num_passes(q);
  int step = passes - 1;
  while (step > 0 && (int64_t)1 << (q - k.block_bits(q, step)) < 2 * threads.count) --step;
  threads.parallel_for((int64_t)1 << (q - k.block_bits(q, step)),
                       [&](int64_t begin, int64_t end) { k.blocks(x, out, q, step, begin, end); });
  while (++step <= passes)
    threads.parallel_for(k.num_parts(q, step),
                         [&](int64_t begin, int64_t end) { k.pass(out, q, step, begin, end, scale); });
}

void convert(const bf16* x, float* out, int64_t count) { kernels().hadamard->widen_bf16(x, out, count); }
void convert(const fp16* x, float* out, int64_t count) { kernels().hadamard->widen_fp16(x, out, count); }
void convert(const float* x, bf16* out, int64_t count) { kernels().hadamard->narrow_bf16(x, out, count); }
void convert(const float* x, fp16* out, int64_t count) { kernels().hadamard->narrow_fp16(x, out, count); }
template <class A, class B>
void convert(const A* x, B* out, int64_t count) {
  std::copy(x, x + count, out);
}

// Rows that are not whole, or not of C: `many` at a time, padded in `padded` [many, n], are transformed there.
template <class C, class T>
void pad_rows(const T* x, int64_t rows, int64_t dim, int64_t n, C* padded) {
  for (int64_t row = 0; row < rows; ++row, x += dim, padded += n) {
    convert(x, padded, dim);
    std::fill(padded + dim, padded + n, C(0));
  }
}

template <class C, class T>
void padded_rows(const T* x, T* out, int64_t rows, int64_t dim, Length length, C scale, const Threads& threads) {
  const int64_t n = length.n();
  if (shares_rows(rows, n, threads)) {
    const Rows<C> scratch(n);
    C* padded = scratch.values;
    for (int64_t row = 0; row < rows; ++row, x += dim, out += dim) {
      parallel(threads, dim, 1, [&](int64_t begin, int64_t end) { convert(x + begin, padded + begin, end - begin); });
      std::fill(padded + dim, padded + n, C(0));
      share_row<C>(padded, padded, length, scale, threads);
      parallel(threads, dim, 1, [&](int64_t begin, int64_t end) { convert(padded + begin, out + begin, end - begin); });
    }
    return;
  }
  const int64_t many = std::min(rows, std::max<int64_t>(1, kPaddedBytes / (n * (int64_t)sizeof(C))));
  parallel(threads, rows, n, [&](int64_t begin, int64_t end) {
    const Rows<C> scratch(many * n);
    C* padded = scratch.values;
    for (int64_t row = begin; row < end; row += many) {
      const int64_t count = std::min(many, end - row);
      pad_rows<C>(x + row * dim, count, dim, n, padded);
      some_rows(padded, padded, count, length, scale, false);
      for (int64_t i = 0; i < count; ++i) convert(padded + i * n, out + (row + i) * dim, dim);
    }
  });
}

template <class C, class T>
void transform(const T* x, T* out, int64_t rows, int64_t dim, C scale, int order, const Threads& threads) {
  const Length length(dim, order);
  if constexpr (std::is_same_v<C, T>)
    if (length.n() == dim) return whole_rows(x, out, rows, length, scale, threads);
  padded_rows<C>(x, out, rows, dim, length, scale, threads);
}

// Whether all of H x fits T; Wide holds any such sum.
template <class Wide, class T>
bool fits(const T* x, int64_t rows, int64_t dim, int order, const Threads& threads) {
  const Length length(dim, order);
  const int64_t n = length.n();
  std::atomic<bool> all{true};
  parallel(threads, rows, n, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Wide[]> row(new Wide[n]);
    for (; begin < end && all; ++begin) {
      pad_rows<Wide>(x + begin * dim, 1, dim, n, row.get());
      if (order > 1) paley_stage(row.get(), order, length.columns());
      for (int i = 0; i < order; ++i) walsh_hadamard(row.get() + i * length.columns(), length.q);
      const auto [least, most] = std::minmax_element(row.get(), row.get() + dim);
      if (*least < std::numeric_limits<T>::min() || *most > std::numeric_limits<T>::max()) all = false;
    }
  });
  return all;
}

}  // namespace

template <class T>
void hadamard_transform(const T* x, T* out, int64_t rows, int64_t dim, double scale, int order,
                        const Threads& threads) {
  using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
  transform<Compute>(x, out, rows, dim, (Compute)scale, order, threads);
}

// Sums modulo 2^bits are right wherever the result fits. It does if dim times the largest magnitude does; only if not,
// the sums are made in a wider type first.
template <class T>
bool hadamard_transform(const T* x, T* out, int64_t rows, int64_t dim, int order, const Threads& threads) {
  using Modular = std::make_unsigned_t<T>;
  using Wide = std::conditional_t<std::is_same_v<T, int32_t>, int64_t, __int128>;
  T least = 0, most = 0;
  for (int64_t k = 0; k < rows * dim; ++k) {
    least = std::min(least, x[k]);
    most = std::max(most, x[k]);
  }
  const __int128 bound = std::max((__int128)most, -(__int128)least) * dim;
  if (bound > std::numeric_limits<T>::max() && !fits<Wide>(x, rows, dim, order, threads)) return false;
  transform((const Modular*)x, (Modular*)out, rows, dim, Modular(1), order, threads);
  return true;
}

template void hadamard_transform(const float*, float*, int64_t, int64_t, double, int, const Threads&);
template void hadamard_transform(const double*, double*, int64_t, int64_t, double, int, const Threads&);
template void hadamard_transform(const bf16*, bf16*, int64_t, int64_t, double, int, const Threads&);
template void hadamard_transform(const fp16*, fp16*, int64_t, int64_t, double, int, const Threads&);
template bool hadamard_transform(const int32_t*, int32_t*, int64_t, int64_t, int, const Threads&);
template bool hadamard_transform(const int64_t*, int64_t*, int64_t, int64_t, int, const Threads&);

}  // namespace hsaid
