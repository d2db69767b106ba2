// The random streams of csrc/core as a device computes them: one thread a position, one block of n values a launch.
// Slow on purpose: the projection's kernels draw their streams in registers, and are compared with this.

#include "pieces.h"

namespace hsaid::cuda {

namespace {

struct StreamParams {
  Stream stream;
  int q;
  bool rademacher;
  float* out;
};

__global__ void __launch_bounds__(kThreads) stream_values_kernel(const __grid_constant__ StreamParams a) {
  const uint32_t k = block_index().x * kThreads + thread_index();
  if (k < 1u << a.q) a.out[k] = stream_value(a.stream, a.q, a.rademacher, k);
}

}  // namespace

void stream_values(const Stream& s, int q, bool rademacher, float* out, cudaStream_t stream) {
  const unsigned blocks = ((1u << q) + kThreads - 1) / kThreads;
  launch(stream_values_kernel, "stream_values_kernel", dim3(blocks), kThreads, 0, stream,
         StreamParams{s, q, rademacher, out});
}

}  // namespace hsaid::cuda
