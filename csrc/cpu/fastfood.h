// The CPU backend without torch: what the ops call, and the table of kernels that each instruction set provides.
#pragma once

#include <cstdint>
#include <functional>

#include "../core/half.h"
#include "../core/plan.h"

namespace hsaid {

// A tensor of any strides (in elements); `dense` where they are row-major.
struct TensorView {
  const void* data;  // null: missing
  Dtype dtype;
  bool dense;
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// Offset in elements of the tensor's flat index `i`.
HSAID_INLINE int64_t strided_offset(const TensorView& t, int64_t i) {
  int64_t offset = 0;
  for (int axis = t.ndim - 1; axis >= 0; --axis) {
    offset += i % t.sizes[axis] * t.strides[axis];
    i /= t.sizes[axis];
  }
  return offset;
}

struct Forward {
  Params params;
  const float* theta;       // [dim]
  const float* factors;     // [num_segments], the scales s_i inside
  const Segment* segments;  // [num_segments]
  int64_t num_segments;
  const Segment* holes;  // [num_holes], pieces of no segment: they become the base, or 0
  int64_t num_holes;
  const TensorView* base;  // per tensor; null: zeros
  void* out;
  Dtype out_dtype;
  bool stream;               // store past the caches: more is written than they hold
  Listed listed{};           // blocks to make and to write side by side; behind the segment's end, 0
  const float* z = nullptr;  // [chunks, n], with one chunk a block
};

// A block of the adjoint with one chunk a block.
struct Place {
  int32_t segment, block;  // a listed block's number is its place in the list
};

struct Adjoint {
  Params params;
  const float* theta;
  const float* factors;
  const Segment* segments;
  int64_t num_segments;
  const TensorView* grads;   // per tensor; data null: zero
  int64_t run_blocks;        // blocks in a run, the innermost of the sums (docs/rng.md)
  Listed listed{};           // the blocks whose gradients lie side by side in the only segment, which has no others
  const float* z = nullptr;  // [chunks, n], with one chunk a block
};

// Blocks that the adjoint adds up in one go: of a segment, or, with one chunk a block, of a chunk.
struct Group {
  const Segment* segment;  // null: those of `places`
  const Place* places;
  int64_t begin, end;  // blocks of the segment, or indices into `places`
};

// The number of blocks that a forward makes.
HSAID_INLINE int64_t num_blocks(const Forward& a) {
  if (a.listed.entries) return a.listed.count * a.listed.span;
  const Segment& last = a.segments[a.num_segments - 1];
  return last.first_block + num_blocks(a.params, last);
}

struct HadamardKernels;

struct Kernels {
  const char* isa;
  // Blocks [begin, end), counted over all segments.
  void (*forward)(const Forward&, int64_t begin, int64_t end);
  // u [num_drawn, n]: the sum over one group of blocks. With one chunk a block also its products with z: dots [blocks
  // of all segments].
  void (*adjoint_group)(const Adjoint&, const Group&, float* u, float* dots);
  // From u [chunks, n], the sum over all groups: factor * B H Pi^T u [chunks, n] in u's place; returns <u, z>.
  float (*adjoint_segment)(const Adjoint&, const Segment&, float factor, float* u);
  // With one chunk a block: z [n] of a chunk; B H Pi^T u in u's place.
  void (*shared_z)(const Params&, int chunk, const float* theta, float* z);
  void (*shared_z_transposed)(const Params&, int chunk, float* u);
  const HadamardKernels* hadamard;  // hadamard.h
};

// Throws std::runtime_error for the kernels, which must not instantiate any of the standard library's functions.
[[noreturn]] void out_of_memory(int64_t bytes);

const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_neon();
const Kernels* kernels_portable();

// The kernels for this machine, or for the instruction set that the environment variable HSAID_CPU_ISA names.
// Throws std::runtime_error for a name that is unknown, or of instructions that this machine does not have.
const Kernels& kernels();

// Bytes of a core's second-level cache: what the environment variable HSAID_CPU_L2 says, or the system; else 1 MB.
// Throws std::runtime_error where the variable is not a positive number.
int64_t second_level_cache();

using RangeBody = std::function<void(int64_t begin, int64_t end)>;

// The caller's threads: `parallel_for` calls body over a partition of [0, size) into at most `count` contiguous
// ranges.
struct Threads {
  int64_t count;
  std::function<void(int64_t size, const RangeBody& body)> parallel_for;
};

void fastfood_forward(const Forward&, const Threads&);
// dtheta [chunks, n] and dfactors [num_segments]; the same bits for any number of threads.
void fastfood_adjoint(const Adjoint&, float* dtheta, float* dfactors, const Threads&);

}  // namespace hsaid
