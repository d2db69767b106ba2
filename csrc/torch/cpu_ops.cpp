// Registers the CPU kernels with torch's dispatcher, through the stable ABI only: one binary serves every torch
// since 2.11. Schemas and their meaning stand in hsaid_kernels/ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../core/permutation.h"
#include "../cpu/buffer_pool.h"
#include "../cpu/fastfood.h"
#include "arguments.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weights of more bytes than this are stored past the caches, which they would sweep empty, into a pooled buffer.
constexpr int64_t kLargeBytes = int64_t{16} << 20;

hsaid::Threads torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, const hsaid::RangeBody& body) { torch::stable::parallel_for(0, count, 1, body); }};
}

hsaid::Dtype dtype_of(ScalarType type, const char* what) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, what,
                  ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float      ? hsaid::Dtype::kFloat
         : type == ScalarType::BFloat16 ? hsaid::Dtype::kBfloat16
                                        : hsaid::Dtype::kHalf;
}

hsaid::TensorView view_of(const Tensor& t, const char* what) {
  STD_TORCH_CHECK(t.is_cpu(), what, ": expected a tensor on the CPU, where theta is");
  return {t.const_data_ptr(), dtype_of(t.scalar_type(), what), t.is_contiguous(), (int)t.dim(), t.sizes().data(),
          t.strides().data()};
}

const float* floats(const Tensor& t, int64_t count, const char* what) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.numel() == count, what,
                  ": expected a float32 tensor of ", count, " values on the CPU");
  return t.const_data_ptr<float>();
}

// What both ops take of the plan, checked so that no kernel leaves a tensor.
struct CheckedPlan {
  hsaid::Params params;
  const hsaid::Segment* segments;
  int64_t num_segments;
};

// A table of the plan as structs.
const hsaid::Segment* rows_of(const Tensor& table, const char* what, int64_t at_least) {
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == ScalarType::Long && table.dim() == 2 &&
                      table.size(1) * sizeof(int64_t) == sizeof(hsaid::Segment) && table.size(0) >= at_least &&
                      table.is_contiguous(),
                  what, ": expected a contiguous int64 table [rows, ", sizeof(hsaid::Segment) / sizeof(int64_t),
                  "] on the CPU");
  return (const hsaid::Segment*)table.const_data_ptr();
}

// The end of a piece that begins at `offset`; in 128 bits, which no table can overflow.
__extension__ typedef __int128 int128;
int128 end_of(const hsaid::Segment& s, int64_t offset) {
  return (int128)offset + (int128)(s.rows - 1) * s.row_stride + s.cols;
}

bool is_piece(const hsaid::Segment& s) {
  return s.rows >= 1 && s.cols >= 1 && s.row_stride >= s.cols && s.offset >= 0 && s.out_offset >= 0 &&
         end_of(s, std::max(s.offset, s.out_offset)) < (int128)1 << 62;
}

CheckedPlan check_plan(const Tensor& theta, const Tensor& segments, int64_t seed, int64_t width, bool rademacher,
                       int64_t num_tensors) {
  CheckedPlan plan{};
  plan.segments = rows_of(segments, "segments", 1);
  plan.num_segments = segments.size(0);
  plan.params.seed = (uint64_t)seed;
  plan.params.dim = theta.numel();
  plan.params.rademacher = rademacher;
  plan.params.q = checked_width_bits(width);
  STD_TORCH_CHECK(plan.params.dim >= 1 && plan.params.dim <= 1 << 20, "theta: expected 1 to 1048576 values, got ",
                  plan.params.dim);
  plan.params.chunks = (int)((plan.params.dim + width - 1) / width);
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

void check_tensor(const hsaid::Segment& s, const Tensor& t, const char* what) {
  STD_TORCH_CHECK(end_of(s, s.offset) <= t.numel(), what, ": tensor ", s.tensor, " has ", t.numel(),
                  " elements, the plan needs ", (int64_t)end_of(s, s.offset));
}

Tensor pooled(int64_t numel, int64_t item, ScalarType dtype, const Tensor& like) {
  const int64_t bytes = numel * item;
  void* buffer = hsaid::take_buffer(bytes);
  STD_TORCH_CHECK(buffer, "numel: no memory for weights of ", bytes, " bytes");
  return torch::stable::from_blob(buffer, {numel}, {1}, like.device(), dtype,
                                  [bytes](void* p) { hsaid::give_buffer(p, bytes); });
}

int64_t empty_cache() { return hsaid::empty_pool(); }

Tensor fastfood_forward(Tensor theta, Tensor factors, std::vector<Tensor> base, Tensor segments, int64_t seed,
                        int64_t width, bool rademacher, Tensor holes, int64_t numel, ScalarType dtype) {
  theta = torch::stable::contiguous(theta);
  factors = torch::stable::contiguous(factors);
  const CheckedPlan plan =
      check_plan(theta, segments, seed, width, rademacher, base.empty() ? -1 : (int64_t)base.size());
  const hsaid::Dtype out_dtype = dtype_of(dtype, "dtype");
  std::vector<hsaid::TensorView> views;
  for (const Tensor& t : base) {
    views.push_back(view_of(t, "base"));
    STD_TORCH_CHECK(views.back().dtype == out_dtype || views.back().dtype == hsaid::Dtype::kFloat,
                    "base: expected tensors in float32 or in the dtype of the weights");
  }
  const hsaid::Segment* hole_rows = rows_of(holes, "holes", 0);
  const auto check_written = [&](const hsaid::Segment& s) {
    STD_TORCH_CHECK(end_of(s, s.out_offset) <= numel, "numel: expected at least ", (int64_t)end_of(s, s.out_offset),
                    ", got ", numel);
    if (!base.empty() && s.tensor >= 0) check_tensor(s, base[s.tensor], "base");
  };
  for (int64_t i = 0; i < plan.num_segments; ++i) check_written(plan.segments[i]);
  for (int64_t i = 0; i < holes.size(0); ++i) {
    STD_TORCH_CHECK(is_piece(hole_rows[i]) && hole_rows[i].tensor >= -1 &&
                        (base.empty() || hole_rows[i].tensor < (int64_t)base.size()),
                    "holes: row ", i, " is no hole of this plan");
    check_written(hole_rows[i]);
  }

  const int64_t item = out_dtype == hsaid::Dtype::kFloat ? 4 : 2;
  const bool large = numel * item > kLargeBytes;
  Tensor out = large ? pooled(numel, item, dtype, theta) : torch::stable::empty({numel}, dtype);
  hsaid::fastfood_forward(
      {plan.params, floats(theta, plan.params.dim, "theta"), floats(factors, plan.num_segments, "factors"),
       plan.segments, plan.num_segments, hole_rows, holes.size(0), views.empty() ? nullptr : views.data(),
       out.mutable_data_ptr(), out_dtype, large},
      torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> fastfood_adjoint(Tensor theta, Tensor factors, std::vector<std::optional<Tensor>> grads,
                                            Tensor segments, int64_t seed, int64_t width, bool rademacher,
                                            int64_t group_blocks) {
  theta = torch::stable::contiguous(theta);
  factors = torch::stable::contiguous(factors);
  const CheckedPlan plan = check_plan(theta, segments, seed, width, rademacher, grads.size());
  STD_TORCH_CHECK(group_blocks >= 1, "group_blocks: expected at least 1, got ", group_blocks);
  std::vector<hsaid::TensorView> views;
  for (const std::optional<Tensor>& t : grads)
    views.push_back(t ? view_of(*t, "grads")
                      : hsaid::TensorView{nullptr, hsaid::Dtype::kFloat, true, 0, nullptr, nullptr});
  for (int64_t i = 0; i < plan.num_segments; ++i)
    if (const auto& t = grads[plan.segments[i].tensor]) check_tensor(plan.segments[i], *t, "grads");

  Tensor padded = torch::stable::new_empty(theta, {plan.params.chunks * width});
  Tensor dfactors = torch::stable::empty_like(factors);
  hsaid::fastfood_adjoint(
      {plan.params, floats(theta, plan.params.dim, "theta"), floats(factors, plan.num_segments, "factors"),
       plan.segments, plan.num_segments, views.data(), group_blocks},
      padded.mutable_data_ptr<float>(), dfactors.mutable_data_ptr<float>(), torch_threads());
  Tensor dtheta = torch::stable::empty_like(theta);
  std::memcpy(dtheta.mutable_data_ptr(), padded.const_data_ptr(), plan.params.dim * sizeof(float));
  return {dtheta, dfactors};
}

Tensor hadamard_transform(Tensor x, double scale) {
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: expected a last dimension of at least 1");
  const int64_t dim = x.size(x.dim() - 1), rows = x.numel() / dim;
  const void* in = x.const_data_ptr();
  void* to = out.mutable_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float:
      hsaid::hadamard_transform((const float*)in, (float*)to, rows, dim, scale, torch_threads());
      break;
    case ScalarType::Double:
      hsaid::hadamard_transform((const double*)in, (double*)to, rows, dim, scale, torch_threads());
      break;
    case ScalarType::BFloat16:
      hsaid::hadamard_transform((const hsaid::bf16*)in, (hsaid::bf16*)to, rows, dim, scale, torch_threads());
      break;
    case ScalarType::Half:
      hsaid::hadamard_transform((const hsaid::fp16*)in, (hsaid::fp16*)to, rows, dim, scale, torch_threads());
      break;
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16 or float16");
  }
  return out;
}

// The scalar streams of csrc/core; the kernels have their own, vectorised ones.
Tensor stream_values(Tensor like, int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk,
                     int64_t width, bool rademacher) {
  const hsaid::Stream s = checked_stream(seed, stream, purpose, block, chunk);
  const int q = checked_width_bits(width);
  Tensor out = torch::stable::new_empty(like, {width}, ScalarType::Float);
  for (int64_t k = 0; k < width; ++k)
    out.mutable_data_ptr<float>()[k] = hsaid::stream_value(s, q, rademacher, (uint32_t)k);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(hsaid_kernels, CPU, m) {
  m.impl("fastfood_forward", TORCH_BOX(&fastfood_forward));
  m.impl("fastfood_adjoint", TORCH_BOX(&fastfood_adjoint));
  m.impl("hadamard_transform", TORCH_BOX(&hadamard_transform));
  m.impl("stream_values", TORCH_BOX(&stream_values));
}

// No tensor among its arguments to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(hsaid_kernels, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}
