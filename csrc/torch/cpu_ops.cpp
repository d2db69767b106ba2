// Registers the CPU kernels with torch's dispatcher, through the stable ABI only: one binary serves every torch
// since 2.11. Schemas and their meaning stand in fastfood/ops.py.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "../core/paley.h"
#include "../core/permutation.h"
#include "../cpu/buffer_pool.h"
#include "../cpu/fastfood.h"
#include "../cpu/hadamard.h"
#include "arguments.h"

namespace {

// Weights of more bytes than this are stored past the caches, which they would fill.
constexpr int64_t kLargeBytes = int64_t{16} << 20;
// Weights of more bytes than this go into a pooled buffer.
constexpr int64_t kPooledBytes = int64_t{1} << 20;
// Results of hadamard_transform of more bytes than this leave the pool with their tensor.
constexpr int64_t kMostKeptBytes = int64_t{64} << 20;

hsaid::Threads torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, const hsaid::RangeBody& body) { torch::stable::parallel_for(0, count, 1, body); }};
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

Tensor pooled(int64_t numel, int64_t item, ScalarType dtype, const Tensor& like) {
  const int64_t bytes = numel * item;
  void* buffer = hsaid::take_buffer(bytes);
  STD_TORCH_CHECK(buffer, "numel: no memory for weights of ", bytes, " bytes");
  return torch::stable::from_blob(buffer, {numel}, {1}, like.device(), dtype,
                                  [bytes](void* p) { hsaid::give_buffer(p, bytes); });
}

int64_t empty_cache() { return hsaid::empty_pool(); }

Tensor fastfood_forward(const Tensor& given_theta, const Tensor& given_factors, const std::vector<Tensor>& base,
                        const Tensor& segments, int64_t seed, int64_t width, bool rademacher, const Tensor& holes,
                        int64_t numel, ScalarType dtype, const std::optional<Tensor>& listed, int64_t span,
                        bool one_chunk) {
  const Tensor theta = row_major(given_theta), factors = row_major(given_factors);
  const CheckedPlan plan =
      check_plan(theta, segments, seed, width, rademacher, one_chunk, base.empty() ? -1 : (int64_t)base.size());
  const hsaid::Dtype out_dtype = dtype_of(dtype, "dtype");
  std::vector<hsaid::TensorView> views;
  for (const Tensor& t : base) {
    views.push_back(view_of(t, "base"));
    check_base_dtype(views.back().dtype, out_dtype);
  }
  const hsaid::Segment* hole_rows = check_written(plan, base, holes, numel);
  hsaid::Listed blocks{};
  if (listed) {
    STD_TORCH_CHECK(listed->is_cpu(), "listed: expected a tensor on the CPU, where theta is");
    STD_TORCH_CHECK(plan.segments[0].out_offset == 0, "segments: expected one that begins at 0 with `listed`");
    blocks = check_listed(plan, *listed, span);
    numel = blocks.count * span * width;
    if (numel == 0) return torch::stable::empty({0}, dtype);
  }
  const int64_t item = hsaid::item_size(out_dtype);
  const bool large = numel * item > kLargeBytes;
  Tensor out = numel * item > kPooledBytes ? pooled(numel, item, dtype, theta) : torch::stable::empty({numel}, dtype);
  hsaid::fastfood_forward(
      {plan.params, floats(theta, plan.params.dim, "theta"), floats(factors, plan.num_segments, "factors"),
       plan.segments, plan.num_segments, hole_rows, listed ? 0 : holes.size(0), views.empty() ? nullptr : views.data(),
       out.mutable_data_ptr(), out_dtype, large, blocks},
      torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> fastfood_adjoint(const Tensor& given_theta, const Tensor& given_factors,
                                            const std::vector<std::optional<Tensor>>& grads, const Tensor& segments,
                                            int64_t seed, int64_t width, bool rademacher, int64_t run_blocks,
                                            const std::optional<Tensor>& listed, int64_t span, bool one_chunk) {
  const Tensor theta = row_major(given_theta), factors = row_major(given_factors);
  CheckedPlan plan = check_plan(theta, segments, seed, width, rademacher, one_chunk, grads.size());
  hsaid::Listed blocks{};
  hsaid::Segment segment;
  if (listed) {
    STD_TORCH_CHECK(listed->is_cpu(), "listed: expected a tensor on the CPU");
    blocks = check_listed(plan, *listed, span);
    if (blocks.count == 0) {
      Tensor dtheta = torch::stable::empty_like(theta), dfactors = torch::stable::empty_like(factors);
      return {torch::stable::zero_(dtheta), torch::stable::zero_(dfactors)};
    }
    segment = segment_of(plan, blocks);
    plan.segments = &segment;
  }
  check_run_blocks(run_blocks);
  std::vector<hsaid::TensorView> views;
  for (const std::optional<Tensor>& t : grads)
    views.push_back(t ? view_of(*t, "grads")
                      : hsaid::TensorView{nullptr, hsaid::Dtype::kFloat, true, 0, nullptr, nullptr});
  check_read(plan, grads);

  Tensor padded = torch::stable::new_empty(theta, {plan.params.chunks * width});
  Tensor dfactors = torch::stable::empty_like(factors);
  hsaid::fastfood_adjoint(
      {plan.params, floats(theta, plan.params.dim, "theta"), floats(factors, plan.num_segments, "factors"),
       plan.segments, plan.num_segments, views.data(), run_blocks, blocks},
      padded.mutable_data_ptr<float>(), dfactors.mutable_data_ptr<float>(), torch_threads());
  Tensor dtheta = torch::stable::empty_like(theta);
  std::memcpy(dtheta.mutable_data_ptr(), padded.const_data_ptr(), plan.params.dim * sizeof(float));
  return {dtheta, dfactors};
}

void transform_into(const Tensor& x, double scale, int64_t order, void* to) {
  STD_TORCH_CHECK(hsaid::is_order(order), "order: expected 1, 12, 20 or 28, got ", order);
  const int64_t dim = x.size(x.dim() - 1), rows = x.numel() / dim;
  const void* in = x.const_data_ptr();
  const auto of_floats = [&](auto type) {
    using T = decltype(type);
    hsaid::hadamard_transform((const T*)in, (T*)to, rows, dim, scale, (int)order, torch_threads());
  };
  const auto of_integers = [&](auto type, const char* name) {
    using T = decltype(type);
    STD_TORCH_CHECK(scale == 1, "scale: expected 1 for integers, got ", scale);
    const bool fits = hsaid::hadamard_transform((const T*)in, (T*)to, rows, dim, (int)order, torch_threads());
    STD_TORCH_CHECK(fits, "x: expected integers whose transform fits ", name, ", got larger ones");
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return of_floats(float{});
    case ScalarType::Double:
      return of_floats(double{});
    case ScalarType::BFloat16:
      return of_floats(hsaid::bf16{});
    case ScalarType::Half:
      return of_floats(hsaid::fp16{});
    case ScalarType::Int:
      return of_integers(int32_t{}, "int32");
    case ScalarType::Long:
      return of_integers(int64_t{}, "int64");
    default:
      STD_TORCH_CHECK(false, "x: expected float32, float64, bfloat16, float16, int32 or int64");
  }
}

// Memory from the system would cost more than the transform: pages, one by one.
Tensor like_in_pool(const Tensor& x) {
  const int64_t bytes = x.numel() * x.element_size();
  if (bytes < kLargeBytes) return torch::stable::empty_like(x);
  void* buffer = hsaid::take_buffer(bytes);
  STD_TORCH_CHECK(buffer, "x: no memory for a result of ", bytes, " bytes");
  return torch::stable::from_blob(buffer, x.sizes(), x.strides(), x.device(), x.scalar_type(), [bytes](void* p) {
    if (bytes <= kMostKeptBytes)
      hsaid::give_buffer(p, bytes);
    else
      hsaid::free_buffer(p);
  });
}

void check_transformed(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: expected a last dimension of at least 1");
}

Tensor hadamard_transform(const Tensor& given, double scale, int64_t order) {
  check_transformed(given);
  const Tensor x = row_major(given);
  Tensor out = like_in_pool(x);
  transform_into(x, scale, order, out.mutable_data_ptr());
  return out;
}

void hadamard_transform_into(const Tensor& given, double scale, Tensor out, int64_t order) {
  check_transformed(given);
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == given.scalar_type() && out.sizes().equals(given.sizes()),
                  "out: expected a tensor like x, on the CPU");
  STD_TORCH_CHECK(out.is_contiguous(), "out: expected a contiguous tensor");
  const Tensor x = row_major(given);
  const char *in = (const char*)x.const_data_ptr(), *to = (const char*)out.const_data_ptr();
  const int64_t bytes = x.numel() * x.element_size();
  STD_TORCH_CHECK(in == to || in + bytes <= to || to + bytes <= in, "out: expected x's memory, or none of it");
  transform_into(x, scale, order, out.mutable_data_ptr());
}

// The scalar streams of csrc/core; the kernels have their own, vectorised ones.
Tensor stream_values(const Tensor& like, int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk,
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
  m.impl("hadamard_transform_into", TORCH_BOX(&hadamard_transform_into));
  m.impl("stream_values", TORCH_BOX(&stream_values));
}

// No tensor among its arguments to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(hsaid_kernels, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&empty_cache));
}
