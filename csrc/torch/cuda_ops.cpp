// Registers the CUDA kernels with torch's dispatcher, through the stable ABI only; loaded where torch has CUDA.
// Schemas and their meaning stand in fastfood/ops.py. The plan's tables are on the CPU: they are checked here and
// travel as kernel parameters.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../core/paley.h"
#include "../cuda/fastfood.h"
#include "arguments.h"
#if defined(USE_CUDA)
#include "cuda_device.h"
#else
#include "emulated_device.h"  // of tests/csrc: the same ops on the CPU, over the emulated device
#endif

namespace {

namespace cuda = hsaid::cuda;

// Reads a call's arguments, which lie on theta's device. There are hundreds: each is asked no more than need be.
struct Arguments {
  explicit Arguments(const Tensor& theta) : device(theta.get_device_index()) {}

  void check_device(const Tensor& t, const char* what) const {
    const bool there = is_on_device(t);
    STD_TORCH_CHECK(there && t.get_device_index() == device, what, ": expected a tensor on ", kDeviceName, " ", device,
                    ", where theta is, got one on ", there ? "another one" : "the CPU");
  }

  const float* floats(const Tensor& t, int64_t count, const char* what) const {
    check_device(t, what);
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.dim() == 1 && t.numel() == count, what,
                    ": expected a float32 tensor of ", count, " values");
    return t.const_data_ptr<float>();
  }

  // The tensor itself, or a row-major copy of one with other strides.
  cuda::DeviceTensor dense(const Tensor& t, const char* what) {
    check_device(t, what);
    const hsaid::Dtype dtype = dtype_of(t.scalar_type(), what);
    if (t.is_contiguous()) return {t.const_data_ptr(), dtype};
    kept.push_back(torch::stable::contiguous(t));
    return {kept.back().const_data_ptr(), dtype};
  }

  // Memory of torch's allocator, which may take it back once the stream has come as far as the call.
  cuda::Workspace workspace(const Tensor& like) {
    return [&like, this](int64_t floats) {
      kept.push_back(torch::stable::new_empty(like, {floats}, ScalarType::Float));
      return kept.back().mutable_data_ptr<float>();
    };
  }

  // The numbers of tiles: the kernels make no part of one.
  hsaid::Listed tiles(const CheckedPlan& plan, const Tensor& listed, int64_t span) const {
    check_device(listed, "listed");
    const int64_t of_tile = (int64_t)1 << (hsaid::kMaxWidthBits - plan.params.q);
    STD_TORCH_CHECK(span == of_tile, "span: expected ", of_tile, ", a tile of 16384 values, got ", span);
    return check_listed(plan, listed, span);
  }

  const int32_t device;
  std::vector<Tensor> kept;
};

// Makes theta's device the current one.
DeviceGuard guard_for(const Tensor& theta, const char* what) {
  STD_TORCH_CHECK(is_on_device(theta), what, ": expected a tensor on a ", kDeviceName, ", got one on the CPU");
  return DeviceGuard(theta.get_device_index());
}

Tensor fastfood_forward(const Tensor& given_theta, const Tensor& given_factors, const std::vector<Tensor>& base,
                        const Tensor& segments, int64_t seed, int64_t width, bool rademacher, const Tensor& holes,
                        int64_t numel, ScalarType dtype, const std::optional<Tensor>& listed, int64_t span,
                        bool one_chunk) {
  const auto guard = guard_for(given_theta, "theta");
  const Tensor theta = row_major(given_theta), factors = row_major(given_factors);
  const CheckedPlan plan =
      check_plan(theta, segments, seed, width, rademacher, one_chunk, base.empty() ? -1 : (int64_t)base.size());
  const hsaid::Dtype out_dtype = dtype_of(dtype, "dtype");
  Arguments arguments(theta);
  std::vector<cuda::DeviceTensor> tensors;
  tensors.reserve(base.size());
  for (const Tensor& t : base) {
    tensors.push_back(arguments.dense(t, "base"));
    check_base_dtype(tensors.back().dtype, out_dtype);
  }
  const hsaid::Segment* hole_rows = check_written(plan, base, holes, numel);
  hsaid::Listed tiles{};
  if (listed) {
    tiles = arguments.tiles(plan, *listed, span);
    STD_TORCH_CHECK(plan.segments[0].out_offset == 0, "segments: expected one that begins at 0 with `listed`");
    numel = tiles.count << hsaid::kMaxWidthBits;
  }
  Tensor out = torch::stable::new_empty(theta, {numel}, dtype);
  if (listed && numel == 0) return out;
  cuda::fastfood_forward({plan.params, arguments.floats(theta, plan.params.dim, "theta"),
                          arguments.floats(factors, plan.num_segments, "factors"), plan.segments, plan.num_segments,
                          hole_rows, listed ? 0 : holes.size(0), tensors.empty() ? nullptr : tensors.data(),
                          out.mutable_data_ptr(), out_dtype, tiles},
                         arguments.workspace(theta), current_stream(theta));
  return out;
}

std::tuple<Tensor, Tensor> fastfood_adjoint(const Tensor& given_theta, const Tensor& given_factors,
                                            const std::vector<std::optional<Tensor>>& grads, const Tensor& segments,
                                            int64_t seed, int64_t width, bool rademacher, int64_t run_blocks,
                                            const std::optional<Tensor>& listed, int64_t span, bool one_chunk) {
  const auto guard = guard_for(given_theta, "theta");
  const Tensor theta = row_major(given_theta), factors = row_major(given_factors);
  CheckedPlan plan = check_plan(theta, segments, seed, width, rademacher, one_chunk, grads.size());
  check_run_blocks(run_blocks);
  Arguments arguments(theta);
  hsaid::Listed tiles{};
  hsaid::Segment segment;
  if (listed) {
    tiles = arguments.tiles(plan, *listed, span);
    if (tiles.count == 0) {
      Tensor dtheta = torch::stable::empty_like(theta), dfactors = torch::stable::empty_like(factors);
      return {torch::stable::zero_(dtheta), torch::stable::zero_(dfactors)};
    }
    segment = segment_of(plan, tiles);
    plan.segments = &segment;
  }
  std::vector<cuda::DeviceTensor> tensors;
  tensors.reserve(grads.size());
  for (const std::optional<Tensor>& t : grads)
    tensors.push_back(t ? arguments.dense(*t, "grads") : cuda::DeviceTensor{nullptr, hsaid::Dtype::kFloat});
  check_read(plan, grads);
  Tensor dtheta = torch::stable::empty_like(theta), dfactors = torch::stable::empty_like(factors);
  cuda::fastfood_adjoint({plan.params, arguments.floats(theta, plan.params.dim, "theta"),
                          arguments.floats(factors, plan.num_segments, "factors"), plan.segments, plan.num_segments,
                          tensors.data(), run_blocks, tiles},
                         dtheta.mutable_data_ptr<float>(), dfactors.mutable_data_ptr<float>(),
                         arguments.workspace(theta), current_stream(theta));
  return {dtheta, dfactors};
}

// With an order above 1, of whole rows in float32 (hadamard_transform_of_order in fastfood/ops.py makes them).
Tensor hadamard_transform(const Tensor& given, double scale, int64_t order) {
  const auto guard = guard_for(given, "x");
  Tensor x = row_major(given);
  Tensor out = torch::stable::empty_like(x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "x: expected a last dimension of at least 1");
  int64_t dim = x.size(x.dim() - 1), rows = x.numel() / dim;
  const hsaid::Dtype dtype = dtype_of(x.scalar_type(), "x");
  Arguments arguments(x);
  if (order != 1) {
    const int64_t columns = dim / order;
    STD_TORCH_CHECK(hsaid::is_order(order), "order: expected 1, 12, 20 or 28, got ", order);
    STD_TORCH_CHECK(dtype == hsaid::Dtype::kFloat && columns * order == dim && (columns & (columns - 1)) == 0,
                    "x: expected float32 and rows of ", order, " times a power of two with this order, got ", dim);
    cuda::paley(x.const_data_ptr<float>(), out.mutable_data_ptr<float>(), (int)order, rows, columns, current_stream(x));
    x = out;
    rows *= order;
    dim = columns;
  }
  cuda::hadamard_transform(x.const_data_ptr(), out.mutable_data_ptr(), dtype, rows, dim, scale, arguments.workspace(x),
                           current_stream(x));
  return out;
}

Tensor stream_values(const Tensor& like, int64_t seed, int64_t stream, int64_t purpose, int64_t block, int64_t chunk,
                     int64_t width, bool rademacher) {
  const hsaid::Stream s = checked_stream(seed, stream, purpose, block, chunk);
  const int q = checked_width_bits(width);
  const auto guard = guard_for(like, "like");
  Tensor out = torch::stable::new_empty(like, {width}, ScalarType::Float);
  cuda::stream_values(s, q, rademacher, out.mutable_data_ptr<float>(), current_stream(like));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HSAID_NAMESPACE, HSAID_DISPATCH_KEY, m) {
  m.impl("fastfood_forward", TORCH_BOX(&fastfood_forward));
  m.impl("fastfood_adjoint", TORCH_BOX(&fastfood_adjoint));
  m.impl("hadamard_transform", TORCH_BOX(&hadamard_transform));
  m.impl("stream_values", TORCH_BOX(&stream_values));
}
