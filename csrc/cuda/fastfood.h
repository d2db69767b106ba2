// The CUDA backend without torch: what the ops call. Values lie on the device, tables on the host; work is queued on
// `stream` of the current device, and no call waits for it. An error of the runtime is thrown as std::runtime_error
// with the kernel's name and shape.
#pragma once

#include <cstdint>
#include <functional>

#include "../core/half.h"
#include "../core/plan.h"

struct CUstream_st;
typedef CUstream_st* cudaStream_t;  // as CUDA's own headers have it

namespace hsaid::cuda {

// A dense tensor; null data: missing.
struct DeviceTensor {
  const void* data;
  Dtype dtype;
};

// Gives memory that is free again once the work that the call queues on the stream is done.
using Workspace = std::function<float*(int64_t floats)>;

// A forward takes so many for z, an adjoint for sums of groups, unless it cannot do with so few.
constexpr int64_t kWorkspaceFloats = 11'000'000;

struct Forward {
  Params params;
  const float* theta;       // [dim]
  const float* factors;     // [num_segments], the scales s_i inside
  const Segment* segments;  // [num_segments]
  int64_t num_segments;
  const Segment* holes;  // [num_holes], elements of no segment: they become the base, or 0
  int64_t num_holes;
  const DeviceTensor* base;  // per tensor; null: zeros
  void* out;
  Dtype out_dtype;
  Listed listed{};  // on the device, an entry for each tile of 2^14 values: only these are made, side by side in `out`
};

// Two launches for every kMaxPieces segments and holes, or for fewer where z of so many does not fit into 44 MB. With
// one chunk a block z takes `dim` floats, and one launch.
void fastfood_forward(const Forward&, const Workspace&, cudaStream_t);

struct Adjoint {
  Params params;
  const float* theta;
  const float* factors;
  const Segment* segments;
  int64_t num_segments;
  const DeviceTensor* grads;  // per tensor
  int64_t run_blocks;         // tiles that are added up first (docs/rng.md)
  Listed listed{};            // as in Forward: the gradient of the only segment has these tiles, side by side
  int64_t sums_floats = kWorkspaceFloats;
};

// dtheta [dim] and dfactors [num_segments]; the same bits on every device. Takes at most 68 MB, or what one group and
// one segment need where that is more. With one chunk a block: at most 44 MB, `dim` floats for z, 32 bytes a block and
// 64 a segment.
void fastfood_adjoint(const Adjoint&, float* dtheta, float* dfactors, const Workspace&, cudaStream_t);

// Float32 values between the two passes over long rows that are meant to stay in the second-level cache.
constexpr int64_t kGroupFloats = 1 << 22;

// rows x dim values with a row stride of dim -> scale * H x, in float32, bfloat16 or float16. Takes memory for
// dim > 32,768, unless it is a power of two and the values are float32: for `group_floats` values, or for one row.
void hadamard_transform(const void* x, void* out, Dtype, int64_t rows, int64_t dim, double scale, const Workspace&,
                        cudaStream_t, int64_t group_floats = kGroupFloats);

// Rows of [order, columns] floats times the matrix of core/paley.h, order 12, 20 or 28. x and out may be the same.
void paley(const float* x, float* out, int order, int64_t rows, int64_t columns, cudaStream_t);

// out [n = 2^q]: the values of one block of a stream.
void stream_values(const Stream&, int q, bool rademacher, float* out, cudaStream_t);

}  // namespace hsaid::cuda
