// The CUDA library without torch.
#pragma once

#include <cuda_runtime_api.h>

#include "../core/permutation.h"
#include "../core/streams.h"

namespace hsaid {

// out [n = 2^q] on the device: the values of one block of a stream.
cudaError_t stream_values(const Stream& s, int q, bool rademacher, float* out, cudaStream_t stream);

}  // namespace hsaid
