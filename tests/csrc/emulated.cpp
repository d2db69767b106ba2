// The CUDA kernels' very sources, over the emulated device.
#include "../../csrc/cuda/fastfood_adjoint.cu"
#include "../../csrc/cuda/fastfood_forward.cu"
#include "../../csrc/cuda/fastfood_one_chunk.cu"
#include "../../csrc/cuda/hadamard_transform.cu"
#include "../../csrc/cuda/paley.cu"
#include "../../csrc/cuda/stream_values.cu"
