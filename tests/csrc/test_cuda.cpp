// The CUDA kernels over the emulated device, bit for bit against the CPU backend, which test_fastfood.cpp holds against
// the definition: widths, chunks, diagonals, dtypes, ragged and strided segments, holes, missing gradients, waves, any
// number of multiprocessors and any order of threads; NaN in everything that is to be written, guards round it.

#include <sys/mman.h>

#include <chrono>

#include "../../csrc/core/paley.h"
#include "../../csrc/core/permutation.h"
#include "../../csrc/core/walsh_hadamard.h"
#include "../../csrc/cpu/hadamard.h"
#include "../../csrc/cuda/fastfood.h"
#include "cases.h"
#include "emulator.h"

namespace {

using emulator::device;
constexpr int64_t kTile = 1 << kMaxWidthBits;  // values that a block of threads works on at a time

// Workspace of the call before, poisoned.
std::vector<std::vector<float>> workspaces;
int64_t workspace_floats = 0;
cuda::Workspace workspace() {
  workspaces.clear();
  workspace_floats = 0;
  return [](int64_t floats) {
    workspaces.emplace_back(floats, NAN);
    workspace_floats += floats;
    return workspaces.back().data();
  };
}

// Under sanitizers, which are slow: fewer sizes and devices, every kernel and branch all the same.
bool quick = false;

int many_blocks = 7;

// f() with one device after another: few and many multiprocessors, threads and blocks in either order.
template <class F>
void on_devices(F&& f) {
  for (int i = 0; i < (quick ? 1 : 2); ++i) {
    device().resident_blocks = i == 0 ? 2 : many_blocks;
    device().last_thread_first = device().last_block_first = i == 1;
    f("device " + std::to_string(i));
  }
}

// All that a plan can hold at this width: whole tiles, a ragged one, bands, tiny tensors, one of odd length.
struct Plan : Case {
  std::vector<Segment> holes;

  Plan(int q, int chunks, bool rademacher, bool one_chunk = false)
      : Case({kSeed, ((int64_t)chunks << q) - 5, q, chunks, rademacher, one_chunk},
             {{2, 18000}, {5003}, {11, 40}, {5}, {70, 100}}) {
    for (int64_t t = 0; t < 5; ++t) add_tensor(t, t == 2 ? 24 : t == 4 ? 60 : 0);
    // The last tensor's second band becomes a hole, as do the gap behind it and, of no tensor, one before.
    Segment band = segments.back();
    segments.pop_back();
    factors.pop_back();
    holes.push_back(band);
    holes.push_back({-1, 0, numel - 60, 1, 50, 50, 0, 0});
    holes.push_back({-1, 0, 0, 1, 64, 64, 0, 0});
  }
};

template <class T>
std::vector<cuda::DeviceTensor> device_tensors(const std::vector<Tensor<T>>& tensors) {
  std::vector<cuda::DeviceTensor> found;
  for (const Tensor<T>& tensor : tensors) found.push_back({tensor.data.data(), kDtype<T>});
  return found;
}

template <class Out, class Base>
void check_forward(const Plan& c, const std::string& what, int64_t shift = 0) {
  constexpr bool based = !std::is_void_v<Base>;
  const auto base = tensors_of<std::conditional_t<based, Base, float>>(c, true);
  const auto views = views_of(base);
  const auto tensors = device_tensors(base);
  const int64_t segments = c.segments.size(), holes = c.holes.size();
  std::vector<Out> expected(c.numel + 64 + shift, kGuard<Out>), out = expected;
  fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), segments, c.holes.data(), holes,
                    based ? views.data() : nullptr, expected.data() + shift, kDtype<Out>, false},
                   fake_threads(1));
  on_devices([&](const std::string& on) {
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = bits_of(expected[i]) == bits_of(kGuard<Out>) ? kGuard<Out> : narrowed<Out>(NAN);
    device().launches.clear();
    cuda::fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), segments, c.holes.data(),
                            holes, based ? tensors.data() : nullptr, out.data() + shift, kDtype<Out>},
                           workspace(), {});
    check_same_bits(out.data(), expected.data(), out.size(), what + ", " + on);
    CHECK(device().launches.size() == 2, "%s: %zu launches", what.c_str(), device().launches.size());
    CHECK(workspace_floats * 4 <= 44'000'000, "%s: takes %lld floats", what.c_str(), (long long)workspace_floats);
  });
}

template <class Grad>
void check_adjoint(const Plan& c, int64_t run_blocks, int64_t missing, const std::string& what,
                   int64_t sums_floats = cuda::kWorkspaceFloats) {
  const auto grads = tensors_of<Grad>(c, true);
  auto views = views_of(grads);
  auto tensors = device_tensors(grads);
  if (missing >= 0) {
    views[missing].data = nullptr;
    tensors[missing].data = nullptr;
  }
  const int64_t segments = c.segments.size();
  std::vector<float> padded((int64_t)c.params.chunks << c.params.q), expected(segments);
  fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), c.segments.data(), segments, views.data(), run_blocks},
                   padded.data(), expected.data(), fake_threads(1));
  on_devices([&](const std::string& on) {
    std::vector<float> dtheta(c.params.dim + 2, NAN), dfactors(segments + 2, NAN);
    dtheta.front() = dtheta.back() = dfactors.front() = dfactors.back() = kGuard<float>;
    device().launches.clear();
    cuda::fastfood_adjoint({c.params,
                            c.theta.data(),
                            c.factors.data(),
                            c.segments.data(),
                            segments,
                            tensors.data(),
                            run_blocks,
                            {},
                            sums_floats},
                           dtheta.data() + 1, dfactors.data() + 1, workspace(), {});
    check_same_bits(dtheta.data() + 1, padded.data(), c.params.dim, what + ", dtheta, " + on);
    check_same_bits(dfactors.data() + 1, expected.data(), segments, what + ", dfactors, " + on);
    for (float guard : {dtheta.front(), dtheta.back(), dfactors.front(), dfactors.back()})
      CHECK(guard == kGuard<float>, "%s: written outside", what.c_str());
    CHECK(workspace_floats * 4 <= 68'000'000, "%s: takes %lld floats", what.c_str(), (long long)workspace_floats);
    CHECK(device().launches.size() <= (c.params.one_chunk ? 6 : 4) || sums_floats < cuda::kWorkspaceFloats,
          "%s: %zu launches", what.c_str(), device().launches.size());
  });
}

std::string name_of(int q, int chunks, bool rademacher, bool one_chunk = false) {
  return "q " + std::to_string(q) + (one_chunk ? ", one of chunks " : ", chunks ") + std::to_string(chunks) +
         (rademacher ? ", rademacher" : ", gaussian");
}

void test_every_width() {
  for (int q = kMinWidthBits; q <= kMaxWidthBits; q += quick ? 3 : 1)  // 5, 8, 11, 14
    for (bool rademacher : {false, true}) {
      const Plan one(q, 1, rademacher);
      const std::string what = name_of(q, 1, rademacher);
      check_forward<float, float>(one, what);
      check_adjoint<float>(one, 24, -1, what);
      check_adjoint<float>(one, 1, 0, what + ", one missing");
    }
}

void test_chunks() {
  for (int q : quick ? std::vector<int>{6, 14} : std::vector<int>{5, 7, 8, 11, 14})
    for (bool rademacher : {false, true}) {
      const Plan three(q, 3, rademacher);
      check_forward<float, float>(three, name_of(q, 3, rademacher));
      check_adjoint<float>(three, 2, -1, name_of(q, 3, rademacher));
    }
  many_blocks = 264;  // an H200's: they share 40 MB
  check_forward<float, float>(Plan(14, 2, true), "264 blocks of threads");
  many_blocks = 7;
}

// Each block from one of several chunks, some of which may have none.
void test_one_chunk() {
  for (int q : quick ? std::vector<int>{6, 9, 14} : std::vector<int>{5, 7, 8, 11, 14})
    for (bool rademacher : {false, true}) {
      const int chunks = q == 11 ? 30 : 3;
      const Plan c(q, chunks, rademacher, true);
      const std::string what = name_of(q, chunks, rademacher, true);
      if (rademacher)
        check_forward<bf16, bf16>(c, what, 1);
      else
        check_forward<float, float>(c, what);
      rademacher ? check_adjoint<bf16>(c, 1, 2, what) : check_adjoint<float>(c, 2, -1, what);
    }
  const Plan c(11, 3, true, true);  // waves of a chunk's groups one by one, in threes, of two chunks
  for (int64_t sums : quick ? std::vector<int64_t>{5} : std::vector<int64_t>{1, 4, 10})
    check_adjoint<float>(c, 1, -1, "waves of one chunk, " + std::to_string(sums), sums << 11);
}

// So many tiles that half of them are in the pool, in 16 bits some of these in runs.
void test_pool() {
  Plan c(14, 1, false);
  c.sizes[0] = {37, kTile / 2};
  c.segments.clear();
  c.factors.clear();
  c.holes.clear();
  c.numel = 0;
  for (int64_t t = 0; t < 2; ++t) c.add_tensor(t);
  for (int blocks : {1, 7, 30}) {
    many_blocks = blocks;
    check_forward<float, float>(c, "pool, float");
    check_forward<bf16, bf16>(c, "pool, bf16");
  }
  many_blocks = 7;
}

// Some tiles of a tensor alone, which lie side by side: nothing else is written, and nothing behind the tensor's end
// read.
template <class T>
void check_listed(const Plan& c, const std::vector<int64_t>& entries, bool based, int64_t shift,
                  const std::string& what) {
  const int64_t numel = c.segments[0].rows * c.segments[0].cols, listed_numel = entries.size() * kTile;
  const int64_t span = kTile >> c.params.q, tiles = (numel + kTile - 1) / kTile;
  const Listed listed{entries.data(), (int64_t)entries.size(), span, tiles * span};
  const Segment s{0, 0, 0, 1, numel, numel, c.segments[0].stream, 0};
  std::vector<T> base(numel + shift), grads(listed_numel + shift);
  for (int64_t k = 0; k < numel; ++k) base[shift + k] = narrowed<T>(value(k));
  for (int64_t k = 0; k < listed_numel; ++k) grads[shift + k] = narrowed<T>(value(k + 7));
  const TensorView view{base.data() + shift, kDtype<T>, true, 1, &numel, nullptr};
  const cuda::DeviceTensor tensor{base.data() + shift, kDtype<T>};
  std::vector<T> expected(listed_numel + 128, kGuard<T>), out = expected;
  fastfood_forward({c.params, c.theta.data(), c.factors.data(), &s, 1, nullptr, 0, based ? &view : nullptr,
                    expected.data() + 64, kDtype<T>, false, listed},
                   fake_threads(1));
  on_devices([&](const std::string& on) {
    std::fill(out.begin() + 64, out.end() - 64, narrowed<T>(NAN));
    cuda::fastfood_forward({c.params, c.theta.data(), c.factors.data(), &s, 1, nullptr, 0, based ? &tensor : nullptr,
                            out.data() + 64, kDtype<T>, listed},
                           workspace(), {});
    check_same_bits(out.data(), expected.data(), out.size(), what + ", " + on);
  });

  const Segment of_grads{0, 0, 0, 1, listed_numel, listed_numel, s.stream, 0};
  const TensorView grad_view{grads.data() + shift, kDtype<T>, true, 1, &listed_numel, nullptr};
  const cuda::DeviceTensor grad{grads.data() + shift, kDtype<T>};
  std::vector<float> padded((int64_t)c.params.chunks << c.params.q), dtheta(c.params.dim, NAN);
  float dfactor_expected, dfactor = NAN;
  fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), &of_grads, 1, &grad_view, 2, listed}, padded.data(),
                   &dfactor_expected, fake_threads(1));
  cuda::fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), &of_grads, 1, &grad, 2, listed}, dtheta.data(),
                         &dfactor, workspace(), {});
  check_same_bits(dtheta.data(), padded.data(), c.params.dim, what + ", dtheta");
  check_same_bits(&dfactor, &dfactor_expected, 1, what + ", dfactor");
}

void test_listed() {
  for (int q : quick ? std::vector<int>{7, 10, 14} : std::vector<int>{5, 7, 8, 10, 11, 14})
    for (int chunks : {1, 2})
      for (bool rademacher : {false, true}) {
        if (quick && rademacher != (chunks == 1)) continue;
        const Plan c(q, chunks, rademacher);  // its first tensor is two whole tiles and a ragged one
        const std::string what = "listed, " + name_of(q, chunks, rademacher);
        check_listed<float>(c, {0, 2}, true, 0, what);
        check_listed<bf16>(c, {1}, true, 0, what + ", bf16");
        if (chunks == 1) check_listed<fp16>(c, {1, 2}, true, 1, what + ", shifted fp16");
        if (chunks == 1) check_listed<float>(c, {0, 1, 2}, false, 0, what + ", no base");
      }
  for (int q : quick ? std::vector<int>{7, 14} : std::vector<int>{7, 10, 14}) {
    const Plan c(q, 2, q == 10, true);
    check_listed<float>(c, {0, 2}, true, 0, "listed, " + name_of(q, 2, q == 10, true));
    check_listed<bf16>(c, {1}, true, 1, "listed, shifted, " + name_of(q, 2, q == 10, true));
  }
}

// Of every pair of types, in vectors and (shifted by an element) one at a time.
void test_types() {
  for (int q : quick ? std::vector<int>{14} : std::vector<int>{7, 10, 14}) {
    const Plan c(q, 1, q == 10);
    const std::string what = name_of(q, 1, q == 10);
    check_forward<float, void>(c, what + ", float");
    check_forward<bf16, void>(c, what + ", bf16");
    check_forward<fp16, void>(c, what + ", fp16");
    check_forward<bf16, bf16>(c, what + ", bf16 on bf16");
    check_forward<bf16, float>(c, what + ", bf16 on float");
    check_forward<fp16, fp16>(c, what + ", fp16 on fp16");
    check_forward<fp16, float>(c, what + ", fp16 on float");
    check_forward<float, float>(c, what + ", shifted float", 1);
    check_forward<bf16, bf16>(c, what + ", shifted bf16", 1);
    check_adjoint<bf16>(c, 24, -1, what + ", bf16");
    check_adjoint<fp16>(c, 24, 1, what + ", fp16, one missing");
  }
}

// Zero theta: the weights are W0 + a zero of either sign.
void test_zero_theta() {
  Plan c(8, 1, true);
  std::fill(c.theta.begin(), c.theta.end(), 0.0f);
  for (float& factor : c.factors) factor = -1.0f;
  check_forward<float, void>(c, "zero theta");
  check_forward<bf16, void>(c, "zero theta, bf16");
}

// More pieces than a launch takes.
void check_many_pieces(bool one_chunk) {
  const int64_t count = 403;
  const int chunks = one_chunk ? 7 : 1;
  Plan c(5, chunks, true, one_chunk);
  c.segments.clear();
  c.factors.clear();
  c.holes.clear();
  c.sizes.assign(count, {3});
  c.numel = 0;
  for (int64_t t = 0; t < count; ++t) c.add_tensor(t);
  const auto base = tensors_of<float>(c, true);
  const auto views = views_of(base);
  const auto tensors = device_tensors(base);
  std::vector<float> expected(c.numel, kGuard<float>), out = expected;
  fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), count, nullptr, 0, views.data(),
                    expected.data(), Dtype::kFloat, false},
                   fake_threads(1));
  device().launches.clear();
  cuda::fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), count, nullptr, 0,
                          tensors.data(), out.data(), Dtype::kFloat},
                         workspace(), {});
  check_same_bits(out.data(), expected.data(), out.size(), "many pieces");
  CHECK(device().launches.size() == (one_chunk ? 3 : 4), "%zu launches", device().launches.size());
  device().last_thread_first = device().last_block_first = false;
  std::vector<float> padded(32 * chunks), dfactors_expected(count), dtheta(c.params.dim), dfactors(count);
  fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), c.segments.data(), count, views.data(), 24},
                   padded.data(), dfactors_expected.data(), fake_threads(1));
  device().launches.clear();
  cuda::fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), c.segments.data(), count, tensors.data(), 24},
                         dtheta.data(), dfactors.data(), workspace(), {});
  check_same_bits(dtheta.data(), padded.data(), c.params.dim, "many pieces, dtheta");
  check_same_bits(dfactors.data(), dfactors_expected.data(), count, "many pieces, dfactors");
  CHECK(device().launches.size() == (one_chunk ? 7 : 6), "%zu launches", device().launches.size());
}

void test_many_pieces() {
  check_many_pieces(false);
  check_many_pieces(true);
}

// More groups than have a place: 64 chunks of 64 KB leave seven.
void test_waves() {
  Plan c(14, 64, true);
  c.segments.clear();
  c.factors.clear();
  c.sizes = {{8, 1 << 14}, {40}};
  c.numel = 0;
  for (int64_t t = 0; t < 2; ++t) c.add_tensor(t);
  device().resident_blocks = 2;
  device().last_thread_first = device().last_block_first = false;
  const auto grads = tensors_of<float>(c, true);
  const auto views = views_of(grads);
  const auto tensors = device_tensors(grads);
  std::vector<float> padded(64 << 14), expected(2), dtheta(c.params.dim, NAN), dfactors(2, NAN);
  fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), c.segments.data(), 2, views.data(), 1}, padded.data(),
                   expected.data(), fake_threads(2));
  device().launches.clear();
  cuda::fastfood_adjoint({c.params, c.theta.data(), c.factors.data(), c.segments.data(), 2, tensors.data(), 1},
                         dtheta.data(), dfactors.data(), workspace(), {});
  check_same_bits(dtheta.data(), padded.data(), c.params.dim, "waves, dtheta");
  check_same_bits(dfactors.data(), expected.data(), 2, "waves, dfactors");
  CHECK(workspace_floats * 4 <= 68'000'000, "%lld floats", (long long)workspace_floats);
  CHECK(device().launches.size() == 7, "%zu launches", device().launches.size());
}

void test_no_gradients() {
  const Plan c(6, 2, false);
  const std::vector<cuda::DeviceTensor> missing(5);
  std::vector<float> dtheta(c.params.dim, NAN), dfactors(c.segments.size(), NAN);
  cuda::fastfood_adjoint(
      {c.params, c.theta.data(), c.factors.data(), c.segments.data(), (int64_t)c.segments.size(), missing.data(), 1},
      dtheta.data(), dfactors.data(), workspace(), {});
  for (float x : dtheta) CHECK(bits_of(x) == 0, "%g", x);
  for (float x : dfactors) CHECK(bits_of(x) == 0, "%g", x);
}

// A tensor of more than 2^32 weights: the last tiles, in memory that is only there where it is touched.
void test_large_tensor() {
  const int64_t numel = ((int64_t)1 << 32) + 3 * kTile - 7, tail = 4 * kTile;
  void* pages = mmap(nullptr, numel * 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  CHECK(pages != MAP_FAILED, "no address space");
  bf16* base = (bf16*)pages;
  bf16* out = base + numel;
  for (int64_t e = numel - tail; e < numel; ++e) base[e] = narrowed<bf16>(value(e));
  const Plan c(14, 1, true);
  const Segment s{0, 0, 0, 1, numel, numel, -77, 0};
  const cuda::DeviceTensor tensor{base, Dtype::kBfloat16};
  const TensorView view{base, Dtype::kBfloat16, true, 1, &numel, nullptr};
  device().resident_blocks = 1 << 20;
  device().only_block = (numel + kTile - 1) / kTile - 1;
  cuda::fastfood_forward(
      {c.params, c.theta.data(), c.factors.data(), &s, 1, nullptr, 0, &tensor, out, Dtype::kBfloat16}, workspace(), {});
  device().only_block = -1;
  const std::vector<bf16> got(out + numel - 7, out + numel);
  const Forward forward{c.params,         c.theta.data(), c.factors.data(), &s, 1, nullptr, 0, &view, out,
                        Dtype::kBfloat16, false};
  kernels().forward(forward, numel >> 14, (numel >> 14) + 1);
  check_same_bits(got.data(), out + numel - 7, 7, "a large tensor");
  CHECK(bits_of(got[6]) != 0, "nothing was written");
  munmap(pages, numel * 4);
}

// With x and out `shift` values behind a multiple of 16 bytes; 4: in vectors.
template <class T>
void check_hadamard(int64_t dim, int64_t rows, const std::string& type, int64_t shift = 1,
                    int64_t group_floats = cuda::kGroupFloats) {
  std::vector<T> x(shift + rows * dim), expected(shift + rows * dim + 1, kGuard<T>), out = expected;
  for (size_t k = 0; k < x.size(); ++k) x[k] = narrowed<T>(value(k));
  hadamard_transform(x.data() + shift, expected.data() + shift, rows, dim, 0.3, 1, fake_threads(1));
  device().launches.clear();
  cuda::hadamard_transform(x.data() + shift, out.data() + shift, kDtype<T>, rows, dim, 0.3, workspace(), {},
                           group_floats);
  check_same_bits(out.data(), expected.data(), out.size(), type + ", " + std::to_string(dim));
}

void check_paley(int order, int64_t columns, int64_t rows) {
  std::vector<float> x(rows * order * columns), expected, out(x.size(), kGuard<float>);
  for (size_t k = 0; k < x.size(); ++k) x[k] = value(k);
  expected = x;
  for (int64_t row = 0; row < rows; ++row) paley_stage(expected.data() + row * order * columns, order, columns);
  cuda::paley(x.data(), out.data(), order, rows, columns, {});
  check_same_bits(out.data(), expected.data(), out.size(), "paley " + std::to_string(order));
  cuda::paley(x.data(), x.data(), order, rows, columns, {});
  check_same_bits(x.data(), expected.data(), x.size(), "paley in place " + std::to_string(order));
}

void test_transform() {
  for (int64_t dim : quick ? std::vector<int64_t>{1, 2, 500, 8192}
                           : std::vector<int64_t>{1, 2, 3, 4, 31, 64, 500, 1024, 3000, 4096, 8192, 16384})
    for (int64_t rows : {0, 3}) check_hadamard<float>(dim, rows, "float");
  for (int order : {12, 20, 28})
    for (int64_t columns : {1, 64, 512}) check_paley(order, columns, 3);
  check_hadamard<fp16>(500, 9, "fp16");
  check_hadamard<bf16>(30000, 1, "bf16");
  if (quick) return;
  check_hadamard<float>(32768, 1, "float");
  for (int64_t dim : {4, 64, 500, 1024, 2048, 3000, 4096, 8192, 16384, 32768}) {
    check_hadamard<float>(dim, 3, "float, vectors", 4);
    check_hadamard<bf16>(dim, 5, "bf16, vectors", 4);
    CHECK(device().launches.size() == 1 && workspace_floats == 0, "%zu launches", device().launches.size());
  }
}

// Rows of more than 2^15 values: two launches for each group of rows, and memory for a group at most.
void test_long_rows() {
  struct Row {
    int64_t dim, rows, group_floats, groups, workspace, float_workspace;  // the last: in float32
  };
  const auto check = [](const Row& r, auto type, int64_t shift) {
    using T = decltype(type);
    const std::string what = std::is_same_v<T, float> ? "float" : std::is_same_v<T, bf16> ? "bf16" : "fp16";
    check_hadamard<T>(r.dim, r.rows, what + " in groups", shift, r.group_floats);
    const int64_t memory = std::is_same_v<T, float> && shift == 4 ? r.float_workspace : r.workspace;
    CHECK((int64_t)device().launches.size() == 2 * r.groups && workspace_floats == memory,
          "%s, %lld: %zu launches, %lld floats", what.c_str(), (long long)r.dim, device().launches.size(),
          (long long)workspace_floats);
  };
  constexpr int64_t n = 1 << 16;
  on_devices([&](const std::string&) {
    check({n, 3, 2 * n, 2, 2 * n, 0}, float{}, 4);     // the last group is smaller
    check({40000, 2, n, 2, n, n}, bf16{}, 4);          // padded, cut off
    check({n + 1, 1, n, 1, 2 * n, 2 * n}, fp16{}, 1);  // a row is more than a group
  });
  check({n, 3, 2 * n + 5, 2, 2 * n, 0}, bf16{}, 4);
  if (quick) return;
  check({n, 5, 2 * n, 3, 2 * n, 0}, float{}, 1);
  check({70004, 3, 8 * n, 1, 6 * n, 6 * n}, float{}, 4);
  check({40001, 3, 3 * n, 1, 3 * n, 3 * n}, bf16{}, 1);
  for (int q : {17, 18, 19, 20, 22}) {  // tiles of all sizes
    const int64_t dim = (int64_t)1 << q;
    if (q < 22) check({dim - 4, 1, n, 1, dim, dim}, fp16{}, q % 2 ? 1 : 4);
    if (q != 18) check({dim, 1, n, 1, dim, 0}, float{}, 4);
  }
}

void test_stream_values() {
  for (int q : {5, 9, 14})
    for (bool rademacher : {false, true})
      for (Purpose purpose : {kDiagonal, kSigns, kPermutation}) {
        const Stream s{kSeed, 77, purpose, purpose == kDiagonal ? 5 : 0, 3};
        std::vector<float> out((size_t)1 << q, NAN);
        cuda::stream_values(s, q, rademacher, out.data(), {});
        for (uint32_t k = 0; k < out.size(); ++k)
          CHECK(bits_of(out[k]) == bits_of(stream_value(s, q, rademacher, k)), "%u", k);
      }
}

// On a device of compute capability 7.5 a block has 64 KB: the projection, which keeps z or sums in as much, is refused
// before anything is written, and what must be said of such a device is in fastfood/ops.py.
void test_little_shared_memory() {
  device().shared_bytes = 64 << 10;
  const Plan c(10, 1, false);
  std::vector<float> out(c.numel, NAN), dtheta(c.params.dim, NAN), dfactors(c.segments.size(), NAN);
  const std::vector<float> grad(36000);
  const std::vector<cuda::DeviceTensor> grads(5, {grad.data(), Dtype::kFloat});
  const auto refused = [](const char* kernel, auto&& call) {
    std::string got = "nothing";
    try {
      call();
    } catch (const std::runtime_error& error) {
      got = error.what();
    }
    CHECK(got.find(kernel) == 0 && got.find("101120 bytes of shared memory: the device has 65536") != std::string::npos,
          "%s", got.c_str());
  };
  refused("forward_z_kernel", [&] {
    cuda::fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), (int64_t)c.segments.size(),
                            nullptr, 0, nullptr, out.data(), Dtype::kFloat},
                           workspace(), {});
  });
  refused("adjoint_groups_kernel", [&] {
    cuda::fastfood_adjoint(
        {c.params, c.theta.data(), c.factors.data(), c.segments.data(), (int64_t)c.segments.size(), grads.data(), 1},
        dtheta.data(), dfactors.data(), workspace(), {});
  });
  check_hadamard<float>(32768, 1, "float");  // takes all of the 64
  device().shared_bytes = emulator::Device().shared_bytes;
}

// Shared memory is accessed without bank conflicts, but where z is permuted at random.
void test_banks() {
  const Plan c(14, 1, false);
  const auto grads = tensors_of<float>(c, true);
  const auto tensors = device_tensors(grads);
  std::vector<float> out(c.numel), dtheta(c.params.dim), dfactors(c.segments.size());
  const Segment* segments = c.segments.data();
  device().count_wavefronts = true;
  device().wavefronts = device().least_wavefronts = 0;
  device().resident_blocks = 1;
  cuda::fastfood_forward(
      {c.params, c.theta.data(), c.factors.data(), segments, 1, nullptr, 0, tensors.data(), out.data(), Dtype::kFloat},
      workspace(), {});
  // One z of 512 gathers a warp's 64 registers over 8 warps, each some 3.5 wavefronts; then three tiles.
  const double forward = (double)device().wavefronts / device().least_wavefronts;
  CHECK(device().least_wavefronts > 10000 && forward < 1.15, "forward: %g wavefronts where one would do", forward);
  device().count_wavefronts = false;
}

// What the emulator is for.
template <class F>
void check_fails(const char* expected, int threads, F&& body) {
  std::string got = "nothing";
  try {
    emulator::run("kernel", dim3(1), threads, 1024, body);
  } catch (const std::runtime_error& error) {
    got = error.what();
  }
  CHECK(got.find(expected) != std::string::npos, "expected \"%s\", got \"%s\"", expected, got.c_str());
}

void test_emulator() {
  using namespace cuda;
  const Shared memory = shared_memory();
  check_fails("barrier not reached by all: 63 threads wait for the block, 0 for their warp, 1 are done", 64, [] {
    if (cuda::thread_index() != 5) cuda::sync_block();
  });
  check_fails("barrier not reached by all: 63 threads wait for the block, 1 for their warp", 64,
              [] { cuda::thread_index() == 5 ? cuda::sync_warp() : cuda::sync_block(); });
  check_fails("shared floats 256 to 256 of 256", 1, [&] { memory.store(256, 1.0f); });
  check_fails("a vector of 4 floats at shared float 2", 1, [&] { memory.store(2, float4{}); });
  check_fails("shared float 3 read before it was written", 1, [&] { memory.load(3); });
  check_fails("shared float 7 read that thread 0 wrote, without a barrier", 64, [&] {
    if (cuda::thread_index() == 0) memory.store(7, 1.0f);
    cuda::sync_warp();
    if (cuda::thread_index() == 63) memory.load(7);
  });
  check_fails("shared float 7 written that thread 0 wrote", 2, [&] { memory.store(7, 1.0f); });
  check_fails("shared float 7 written that threads before read", 64, [&] {
    if (cuda::thread_index() == 63) memory.store(7, 1.0f);
    cuda::sync_block();
    memory.load(7);
    if (cuda::thread_index() == 63) memory.store(7, 2.0f);
  });
  check_fails("nothing", 64, [&] {
    if (cuda::thread_index() == 0) memory.store(7, 1.0f);
    cuda::sync_block();
    memory.load(7);
    cuda::sync_block();
    if (cuda::thread_index() == 0) memory.store(7, 2.0f);
    cuda::sync_warp();
    if (cuda::thread_index() < 32) memory.load(7);
  });
  CHECK(emulator::device().launches.back() == "kernel, grid 1 x 1, 64 threads, 1024 bytes", "%s",
        emulator::device().launches.back().c_str());
}

template <class F>
void timed(const char* name, F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  std::printf("%s: %.1f s\n", name, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}

}  // namespace

int main(int argc, char** argv) {
  quick = argc > 1 && std::string(argv[1]) == "quick";
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  timed("emulator", test_emulator);
  timed("stream values", test_stream_values);
  timed("Hadamard transform", test_transform);
  timed("long rows", test_long_rows);
  timed("little shared memory", test_little_shared_memory);
  timed("no gradients", test_no_gradients);
  timed("zero theta", test_zero_theta);
  timed("large tensor", test_large_tensor);
  timed("every width", test_every_width);
  timed("chunks", test_chunks);
  timed("one chunk", test_one_chunk);
  timed("pool", test_pool);
  timed("listed", test_listed);
  timed("types", test_types);
  if (!quick) {
    timed("banks", test_banks);
    timed("many pieces", test_many_pieces);
    timed("waves", test_waves);
  }
  std::printf("%s: %d checks failed\n", failures ? "FAILED" : "passed", failures);
  return failures != 0;
}
