// Projections to test kernels with: plans of every kind, tensors with strides and NaN round them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "check.h"

namespace {

using namespace hsaid;

// About -0.5 to 0.5, with full mantissas.
float value(int64_t k) { return (float)(k * 37 % 101 - 50) / 99; }

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, float>  ? Dtype::kFloat
                         : std::is_same_v<T, bf16> ? Dtype::kBfloat16
                                                   : Dtype::kHalf;

template <class T>
const T kGuard = narrowed<T>(-12345.0f);

struct Case {
  Params params;
  std::vector<std::vector<int64_t>> sizes;  // of the tensors
  std::vector<float> theta, factors;
  std::vector<Segment> segments;
  bool special = false;  // some values of tensors are NaN or infinite
  int64_t numel = 0;     // of the output, with a gap of 64 elements or more before each tensor and at the end

  Case(const Params& p, const std::vector<std::vector<int64_t>>& sizes_) : params(p), sizes(sizes_) {
    for (int64_t k = 0; k < p.dim; ++k) theta.push_back(value(k));
  }
  int64_t count(int64_t tensor) const {
    int64_t product = 1;
    for (int64_t size : sizes[tensor]) product *= size;
    return product;
  }
  // A tensor behind those before it, cut into bands of `cols` columns (0: one whole segment).
  void add_tensor(int64_t tensor, int64_t cols = 0) {
    const bool whole = cols == 0;
    const int64_t rows = whole ? 1 : sizes[tensor][0], row = whole ? count(tensor) : sizes[tensor][1];
    numel += 64;
    for (int64_t at = 0; at < row; at += whole ? row : cols) {
      const int64_t index = segments.size(), length = whole ? row : std::min(cols, row - at);
      const int64_t first = index ? segments.back().first_block + num_blocks(params, segments.back()) : 0;
      segments.push_back({tensor, at, numel + at, rows, length, row, -1000 - index, first});
      factors.push_back(value(index + 60));
    }
    numel += (count(tensor) + 127) / 64 * 64;
  }
};

// Whole blocks, a ragged block, bands of columns, less than a block.
[[maybe_unused]] Case all_kinds(int q, int chunks, bool rademacher, bool one_chunk = false) {
  const int64_t n = (int64_t)1 << q;
  Case c({kSeed, chunks * n - 5, q, chunks, rademacher, one_chunk}, {{2, n}, {n + n / 2 + 3}, {11, 40}, {5}});
  for (int64_t t = 0; t < 4; ++t) c.add_tensor(t, t == 2 ? 24 : 0);
  return c;
}

// Element e of a segment within its tensor.
[[maybe_unused]] int64_t element(const Segment& s, int64_t e) {
  return s.offset + e / s.cols * s.row_stride + e % s.cols;
}

// Row-major, or with dimensions exchanged in memory, or (of one dimension) every third element; NaN in between.
template <class T>
struct Tensor {
  std::vector<int64_t> sizes, strides;
  bool dense;
  std::vector<T> data;

  Tensor(const std::vector<int64_t>& sizes_, bool dense_) : sizes(sizes_), dense(dense_) {
    if (sizes.size() == 1)
      strides = {dense ? 1 : 3};
    else
      strides = dense ? std::vector<int64_t>{sizes[1], 1} : std::vector<int64_t>{1, sizes[0]};
    const int64_t count = sizes.size() == 1 ? sizes[0] : sizes[0] * sizes[1];
    data.resize(offset(count - 1) + 1, narrowed<T>(NAN));
    for (int64_t e = 0; e < count; ++e) data[offset(e)] = narrowed<T>(value(e * 7 + 1));
  }
  int64_t offset(int64_t e) const {
    return sizes.size() == 1 ? e * strides[0] : e / sizes[1] * strides[0] + e % sizes[1] * strides[1];
  }
  float at(int64_t e) const { return to_float(data[offset(e)]); }
  TensorView view() const { return {data.data(), kDtype<T>, dense, (int)sizes.size(), sizes.data(), strides.data()}; }
};

template <class T>
std::vector<Tensor<T>> tensors_of(const Case& c, bool dense) {
  std::vector<Tensor<T>> tensors;
  for (int64_t i = 0; i < (int64_t)c.sizes.size(); ++i) {
    Tensor<T>& tensor = tensors.emplace_back(c.sizes[i], dense);
    for (int64_t e = 3; c.special && e < c.count(i); e += 29) {
      T& x = tensor.data[tensor.offset(e)];
      x = narrowed<T>(e % 2 ? NAN : e % 4 ? INFINITY : -INFINITY);
      // The NaN that becomes 0 if it is rounded as a number. Instructions for fp16 keep its bits, others do not.
      if (!std::is_same_v<T, fp16> && e % 4 == 1) std::memset(&x, 0xff, sizeof x);
    }
  }
  return tensors;
}

template <class T>
std::vector<TensorView> views_of(const std::vector<Tensor<T>>& tensors) {
  std::vector<TensorView> views;
  for (const Tensor<T>& tensor : tensors) views.push_back(tensor.view());
  return views;
}

}  // namespace
