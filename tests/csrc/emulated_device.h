// csrc/torch/cuda_device.h for tensors on the CPU: the ops of csrc/torch/cuda_ops.cpp in a namespace of their own, over
// the emulated device, so that tests/fastfood/test_gpu.py runs the very code that a GPU runs, from Python to kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdlib>

#include "../../csrc/cuda/fastfood.h"
#include "emulator.h"

#define HSAID_NAMESPACE hsaid_kernels_emulated
#define HSAID_DISPATCH_KEY CPU

namespace {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}  // there is something to guard, as far as the compiler knows
};

constexpr const char* kDeviceName = "CUDA device";

inline bool is_on_device(const torch::stable::Tensor& t) { return t.is_cpu(); }
inline cudaStream_t current_stream(const torch::stable::Tensor&) {
  hsaid::emulator::Device& device = hsaid::emulator::device();
  device.idle = std::getenv("HSAID_EMULATED_IDLE") != nullptr;
  const char* capability = std::getenv("HSAID_EMULATED_CAPABILITY");
  device.shared_bytes = capability && std::string(capability) == "7.5" ? 64 << 10 : 99 << 10;
  return nullptr;
}

}  // namespace
