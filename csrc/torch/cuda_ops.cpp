// Registers the CUDA kernels with torch's dispatcher, through the stable ABI only; loaded where torch has CUDA.
// Schemas and their meaning stand in hsaid_kernels/ops.py.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/stream_values.h"
#include "arguments.h"

namespace {

using torch::stable::Tensor;

cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return (cudaStream_t)stream;
}

Tensor stream_values(Tensor like, int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk,
                     int64_t width, bool rademacher) {
  const hsaid::Stream s = checked_stream(seed, stream, purpose, block, chunk);
  const int q = checked_width_bits(width);
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  Tensor out = torch::stable::new_empty(like, {width}, torch::headeronly::ScalarType::Float);
  const cudaError_t error =
      hsaid::stream_values(s, q, rademacher, out.mutable_data_ptr<float>(), current_stream(like.get_device_index()));
  STD_TORCH_CHECK(error == cudaSuccess, "stream_values_kernel, n = ", width, ": ", cudaGetErrorString(error));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hsaid_kernels, CUDA, m) { m.impl("stream_values", TORCH_BOX(&stream_values)); }
