// Checks of arguments that the CPU's and the CUDA library's ops share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../core/half.h"
#include "../core/plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor itself where it is contiguous: contiguous() would be a call of torch's dispatcher.
inline Tensor row_major(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// q of a width 2^q
inline int checked_width_bits(int64_t width) {
  int q = 0;
  while (((int64_t)1 << q) < width && q < hsaid::kMaxWidthBits) ++q;
  STD_TORCH_CHECK(q >= hsaid::kMinWidthBits && width == (int64_t)1 << q,
                  "width: expected a power of two from 32 to 16384, got ", width);
  return q;
}

inline hsaid::Dtype dtype_of(ScalarType type, const char* what) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, what,
                  ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float      ? hsaid::Dtype::kFloat
         : type == ScalarType::BFloat16 ? hsaid::Dtype::kBfloat16
                                        : hsaid::Dtype::kHalf;
}

inline void check_base_dtype(hsaid::Dtype dtype, hsaid::Dtype out) {
  STD_TORCH_CHECK(dtype == out || dtype == hsaid::Dtype::kFloat,
                  "base: expected tensors in float32 or in the dtype of the weights");
}

inline hsaid::Stream checked_stream(int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk) {
  STD_TORCH_CHECK(purpose >= hsaid::kDiagonal && purpose <= hsaid::kPermutation, "purpose: expected 0, 1 or 2, got ",
                  purpose);
  STD_TORCH_CHECK(block >= 0 && block < 1 << 28, "block: expected 0 to 2**28 - 1, got ", block);
  STD_TORCH_CHECK(chunk >= 0 && chunk < 1 << 16, "chunk: expected 0 to 65535, got ", chunk);
  return {(uint64_t)seed, (uint64_t)stream, (hsaid::Purpose)purpose, block, (int)chunk};
}

// What both ops take of the plan, checked: no kernel reads or writes outside a tensor.
struct CheckedPlan {
  hsaid::Params params;
  const hsaid::Segment* segments;
  int64_t num_segments;
};

// A table of the plan as structs.
inline const hsaid::Segment* rows_of(const Tensor& table, const char* what, int64_t at_least) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) * sizeof(int64_t) == sizeof(hsaid::Segment) && table.size(0) >= at_least &&
                      table.is_contiguous(),
                  what, ": expected a contiguous int64 table [rows, ", sizeof(hsaid::Segment) / sizeof(int64_t),
                  "] on the CPU");
  return (const hsaid::Segment*)table.const_data_ptr();
}

// The end of a piece that begins at `offset`; in 128 bits, which no table can overflow.
__extension__ typedef __int128 int128;
inline int128 end_of(const hsaid::Segment& s, int64_t offset) {
  return (int128)offset + (int128)(s.rows - 1) * s.row_stride + s.cols;
}

inline bool is_piece(const hsaid::Segment& s) {
  return s.rows >= 1 && s.cols >= 1 && s.row_stride >= s.cols && s.offset >= 0 && s.out_offset >= 0 &&
         end_of(s, std::max(s.offset, s.out_offset)) < (int128)1 << 62;
}

inline CheckedPlan check_plan(const Tensor& theta, const Tensor& segments, int64_t seed, int64_t width, bool rademacher,
                              bool one_chunk, int64_t num_tensors) {
  CheckedPlan plan{};
  plan.segments = rows_of(segments, "segments", 1);
  plan.num_segments = segments.size(0);
  plan.params.seed = (uint64_t)seed;
  plan.params.dim = theta.numel();
  plan.params.rademacher = rademacher;
  plan.params.q = checked_width_bits(width);
  STD_TORCH_CHECK(plan.params.dim >= 1 && plan.params.dim <= 1 << 24, "theta: expected 1 to 16777216 values, got ",
                  plan.params.dim);
  plan.params.chunks = (int)((plan.params.dim + width - 1) / width);
  STD_TORCH_CHECK(plan.params.chunks <= 1 << 16, "width: expected chunks of theta that are at most 65536, got ",
                  plan.params.chunks);
  plan.params.one_chunk = one_chunk && plan.params.chunks > 1;
  int64_t block = 0;
  for (int64_t i = 0; i < plan.num_segments; ++i) {
    const hsaid::Segment& s = plan.segments[i];
    STD_TORCH_CHECK(is_piece(s) && s.tensor >= 0 && (num_tensors < 0 || s.tensor < num_tensors) &&
                        s.first_block == block && hsaid::num_blocks(plan.params, s) <= 1 << 28,
                    "segments: row ", i, " is no segment of this plan");
    block += hsaid::num_blocks(plan.params, s);
  }
  return plan;
}

inline void check_tensor(const hsaid::Segment& s, const Tensor& t, const char* what) {
  STD_TORCH_CHECK(end_of(s, s.offset) <= t.numel(), what, ": tensor ", s.tensor, " has ", t.numel(),
                  " elements, the plan needs ", (int64_t)end_of(s, s.offset));
}

// Checks that all that a forward reads of `base` and writes is there; returns the rows of `holes`.
inline const hsaid::Segment* check_written(const CheckedPlan& plan, const std::vector<Tensor>& base,
                                           const Tensor& holes, int64_t numel) {
  const hsaid::Segment* hole_rows = rows_of(holes, "holes", 0);
  const auto check = [&](const hsaid::Segment& s) {
    STD_TORCH_CHECK(end_of(s, s.out_offset) <= numel, "numel: expected at least ", (int64_t)end_of(s, s.out_offset),
                    ", got ", numel);
    if (!base.empty() && s.tensor >= 0) check_tensor(s, base[s.tensor], "base");
  };
  for (int64_t i = 0; i < plan.num_segments; ++i) check(plan.segments[i]);
  for (int64_t i = 0; i < holes.size(0); ++i) {
    STD_TORCH_CHECK(is_piece(hole_rows[i]) && hole_rows[i].tensor >= -1 &&
                        (base.empty() || hole_rows[i].tensor < (int64_t)base.size()),
                    "holes: row ", i, " is no hole of this plan");
    check(hole_rows[i]);
  }
  return hole_rows;
}

// The blocks that a call is about: `span` for each entry of `listed`, int64 [count]. Entries on the CPU are checked;
// for those on a device the caller answers.
inline hsaid::Listed check_listed(const CheckedPlan& plan, const Tensor& listed, int64_t span) {
  const hsaid::Segment& s = plan.segments[0];
  STD_TORCH_CHECK(plan.num_segments == 1 && hsaid::is_dense(s), "segments: expected one dense segment with `listed`");
  STD_TORCH_CHECK(listed.scalar_type() == ScalarType::Long && listed.dim() == 1 && listed.is_contiguous(),
                  "listed: expected a contiguous int64 tensor [count]");
  const int64_t blocks = hsaid::num_blocks(plan.params, s);
  STD_TORCH_CHECK(span >= 1 && span <= 1 << 28, "span: expected at least 1, got ", span);
  const int64_t entries = (blocks + span - 1) / span;
  STD_TORCH_CHECK(listed.numel() <= entries, "listed: expected at most ", entries, " entries of ", span,
                  " blocks, got ", listed.numel());
  const int64_t* values = listed.const_data_ptr<int64_t>();
  if (listed.is_cpu())
    for (int64_t i = 0; i < listed.numel(); ++i)
      STD_TORCH_CHECK(values[i] >= 0 && values[i] < entries && (i == 0 || values[i] > values[i - 1]),
                      "listed: expected rising numbers from 0 to ", entries - 1, ", got ", values[i]);
  return {values, listed.numel(), span, entries * span};
}

// The plan's only segment, of the listed blocks alone, whose gradients lie side by side.
inline hsaid::Segment segment_of(const CheckedPlan& plan, const hsaid::Listed& listed) {
  hsaid::Segment s = plan.segments[0];
  s.offset = s.out_offset = 0;
  s.rows = 1;
  s.cols = s.row_stride = listed.count * listed.span << plan.params.q;
  return s;
}

inline void check_run_blocks(int64_t run_blocks) {
  STD_TORCH_CHECK(run_blocks >= 1 && run_blocks <= 1 << 28, "run_blocks: expected at least 1, got ", run_blocks);
}

// Checks that all that an adjoint reads is there.
inline void check_read(const CheckedPlan& plan, const std::vector<std::optional<Tensor>>& grads) {
  for (int64_t i = 0; i < plan.num_segments; ++i)
    if (const auto& t = grads[plan.segments[i].tensor]) check_tensor(plan.segments[i], *t, "grads");
}

}  // namespace
