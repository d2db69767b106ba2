// core/paley.h over rows of `order` x `columns` floats: a thread takes a column, whose values are read once and written
// once. Additions: order / 2 for each value.

#include <algorithm>

#include "../core/paley.h"
#include "pieces.h"

namespace hsaid::cuda {

namespace {

struct PaleyParams {
  const float* x;  // [total / columns, order, columns]; may be out
  float* out;
  int64_t columns, total;
};

template <int kOrder>
__global__ void __launch_bounds__(kThreads) paley_kernel(const __grid_constant__ PaleyParams a) {
  constexpr int half = kOrder / 2;
  constexpr ConferenceSigns<half> signs = conference_signs<half>();
  for (int64_t k = (int64_t)block_index().x * kThreads + thread_index(); k < a.total;
       k += (int64_t)grid_width() * kThreads) {
    const int64_t first = k / a.columns * a.columns * kOrder + k % a.columns;
    float sum[half], difference[half];
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float x = a.x[first + 2 * i * a.columns], y = a.x[first + (2 * i + 1) * a.columns];
      sum[i] = x + y;
      difference[i] = x - y;
    }
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float even = difference[i], odd = -sum[i];
#pragma unroll
      for (int step = 1; step < half; ++step) {
        const int j = (i + step) % half;
        const bool plus = signs.plus[i] >> j & 1;
        even = plus ? even + sum[j] : even - sum[j];
        odd = plus ? odd + difference[j] : odd - difference[j];
      }
      a.out[first + 2 * i * a.columns] = even;
      a.out[first + (2 * i + 1) * a.columns] = odd;
    }
  }
}

}  // namespace

void paley(const float* x, float* out, int order, int64_t rows, int64_t columns, cudaStream_t stream) {
  const PaleyParams a{x, out, columns, rows * columns};
  if (a.total == 0) return;
  const auto kernel = order == 12 ? paley_kernel<12> : order == 20 ? paley_kernel<20> : paley_kernel<28>;
  const dim3 grid((unsigned)std::min<int64_t>((a.total + kThreads - 1) / kThreads, 1 << 30));
  launch(kernel, "paley_kernel", grid, kThreads, 0, stream, a);
}

}  // namespace hsaid::cuda
