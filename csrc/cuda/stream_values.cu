// The random streams of csrc/core as a device computes them: one thread a position, one block of n values a launch.
// Slow on purpose: the projection's kernels make their streams in registers, and this is what they are compared with.

#include "stream_values.h"

namespace hsaid {

namespace {

constexpr int kThreads = 256;

__global__ void stream_values_kernel(Stream s, int q, bool rademacher, float* out) {
  const uint32_t k = blockIdx.x * kThreads + threadIdx.x;
  if (k < 1u << q) out[k] = stream_value(s, q, rademacher, k);
}

}  // namespace

cudaError_t stream_values(const Stream& s, int q, bool rademacher, float* out, cudaStream_t stream) {
  const unsigned blocks = ((1u << q) + kThreads - 1) / kThreads;
  stream_values_kernel<<<blocks, kThreads, 0, stream>>>(s, q, rademacher, out);
  return cudaGetLastError();
}

}  // namespace hsaid
