// What the CUDA ops ask of torch about devices. tests/csrc/emulated_device.h has these same names for tensors on the
// CPU.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../cuda/fastfood.h"

#define HSAID_NAMESPACE hsaid_kernels
#define HSAID_DISPATCH_KEY CUDA

namespace {

using torch::stable::accelerator::DeviceGuard;

constexpr const char* kDeviceName = "CUDA device";

inline bool is_on_device(const torch::stable::Tensor& t) { return t.is_cuda(); }

inline cudaStream_t current_stream(const torch::stable::Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return (cudaStream_t)stream;
}

}  // namespace
