// The CPU kernels of every instruction set against the projection written out one position at a time from csrc/core,
// bit for bit: widths, chunks, diagonals, dtypes, strides, bands, threads, alignments; guards round all that is
// written.

#include "../../csrc/core/permutation.h"
#include "../../csrc/core/walsh_hadamard.h"
#include "cases.h"

namespace {

// --- the projection, one position at a time

float diagonal_at(const Params& p, const Segment& s, int64_t block, int chunk, uint32_t k) {
  const Stream stream = stream_of(p, s, kDiagonal, block, chunk);
  return p.rademacher ? (sign_at(stream, k) ? -1.0f : 1.0f) : gaussian_at(stream, p.q, k);
}

// The stream of B and Pi.
uint64_t z_stream(const Params& p, const Segment& s) { return p.one_chunk ? 0 : (uint64_t)s.stream; }

float sign_of_b(const Params& p, const Segment& s, int chunk, uint32_t k) {
  return sign_at({p.seed, z_stream(p, s), kSigns, 0, chunk}, k) ? -1.0f : 1.0f;
}

// The chunks that a block is made from.
std::vector<int> chunks_of(const Params& p, const Segment& s, int64_t block) {
  if (p.one_chunk) return {(int)(((uint64_t)s.stream % p.chunks + block) % p.chunks)};
  std::vector<int> all;
  for (int chunk = 0; chunk < p.chunks; ++chunk) all.push_back(chunk);
  return all;
}

// H^T x: the stages in reverse order.
void scalar_transposed(float* x, int q) {
  for (int bit = 1; bit >= 0; --bit) butterfly_stage(x, (int64_t)1 << q, bit);
  for (int bit = q - 1; bit >= 2; --bit) butterfly_stage(x, (int64_t)1 << q, bit);
}

// z [n] of one chunk.
std::vector<float> scalar_z(const Case& c, const Segment& s, int chunk) {
  const Params& p = c.params;
  std::vector<float> h(width(p)), z(width(p));
  for (int64_t k = 0; k < width(p); ++k) {
    const int64_t at = chunk * width(p) + k;
    h[k] = sign_of_b(p, s, chunk, k) * (at < p.dim ? c.theta[at] : 0.0f);
  }
  walsh_hadamard(h.data(), p.q);
  const PermutationKeys keys = permutation_keys(p.seed, z_stream(p, s), chunk);
  for (int64_t k = 0; k < width(p); ++k) z[k] = h[permute(k, p.q, keys)];
  return z;
}

// factor * H(sum_c G_c z_c) at each projected element of the output.
std::vector<float> scalar_steps(const Case& c) {
  const Params& p = c.params;
  const int64_t n = width(p);
  std::vector<float> steps(c.numel);
  for (size_t i = 0; i < c.segments.size(); ++i) {
    const Segment& s = c.segments[i];
    std::vector<std::vector<float>> z;
    for (int chunk = 0; chunk < p.chunks; ++chunk) z.push_back(scalar_z(c, s, chunk));
    for (int64_t block = 0; block < num_blocks(p, s); ++block) {
      std::vector<float> x(n);
      const std::vector<int> drawn = chunks_of(p, s, block);
      for (int chunk : drawn)
        for (int64_t k = 0; k < n; ++k) {
          const float product = diagonal_at(p, s, block, chunk, k) * z[chunk][k];
          x[k] = chunk == drawn[0] ? product : x[k] + product;
        }
      walsh_hadamard(x.data(), p.q);
      for (int64_t k = 0; k < n && block * n + k < s.rows * s.cols; ++k)
        steps[s.out_offset - s.offset + element(s, block * n + k)] = c.factors[i] * x[k];
    }
  }
  return steps;
}

struct Gradients {
  std::vector<float> dtheta, dfactors;  // [chunks, n], [segments]
};

float folded(std::vector<float> x) {
  for (size_t half = x.size() / 2; half > 0; half /= 2)
    for (size_t k = 0; k < half; ++k) x[k] += x[k + half];
  return x[0];
}

// With one chunk a block: a list of products for each chunk, added run by run.
template <class Grad>
Gradients scalar_adjoint_of_one_chunk(const Case& c, int64_t run_blocks, int64_t missing, Grad&& grad) {
  const Params& p = c.params;
  const int64_t n = width(p), runs = 16384 / n, of_group = runs * run_blocks;
  Gradients sums{std::vector<float>(p.chunks * n), std::vector<float>(c.segments.size())};
  std::vector<std::vector<std::vector<float>>> lists(p.chunks);
  for (size_t i = 0; i < c.segments.size(); ++i) {
    const Segment& s = c.segments[i];
    std::vector<float> of_segment(256);
    for (int64_t block = 0; block < num_blocks(p, s); ++block) {
      const int chunk = chunks_of(p, s, block)[0];
      std::vector<float>& product = lists[chunk].emplace_back(n);
      if (s.tensor == missing) continue;
      std::vector<float> y(n), dot((n + 255) / 256 * 16);
      for (int64_t k = 0; k < n && block * n + k < s.rows * s.cols; ++k) y[k] = grad(s, block * n + k);
      scalar_transposed(y.data(), p.q);
      const std::vector<float> z = scalar_z(c, s, chunk);
      for (int64_t k = 0; k < n; ++k) {
        const float drawn = diagonal_at(p, s, block, chunk, k) * y[k];
        product[k] = c.factors[i] * drawn;
        dot[k / 256 * 16 + k % 16] += drawn * z[k];
      }
      of_segment[block % 256] += folded(dot);
    }
    sums.dfactors[i] = folded(of_segment);
  }
  for (int chunk = 0; chunk < p.chunks; ++chunk) {
    std::vector<float> u(n), v(n);
    const int64_t count = lists[chunk].size();
    for (int64_t begin = 0; begin < count; begin += of_group) {
      std::vector<float> group(n);
      for (int64_t first = begin; first < begin + runs; ++first) {
        std::vector<float> run(n);
        for (int64_t i = first; i < std::min(begin + of_group, count); i += runs)
          for (int64_t k = 0; k < n; ++k) run[k] += lists[chunk][i][k];
        for (int64_t k = 0; k < n; ++k) group[k] += run[k];
      }
      for (int64_t k = 0; k < n; ++k) u[k] += group[k];
    }
    const PermutationKeys keys = permutation_keys(p.seed, 0, chunk);
    for (int64_t k = 0; k < n; ++k) v[permute(k, p.q, keys)] = u[k];
    scalar_transposed(v.data(), p.q);
    for (int64_t k = 0; k < n; ++k) sums.dtheta[chunk * n + k] = sign_of_b(p, c.segments[0], chunk, k) * v[k];
  }
  return sums;
}

// grad(segment, e): the gradient of element e of a segment, as a float.
template <class Grad>
Gradients scalar_adjoint(const Case& c, int64_t run_blocks, int64_t missing, Grad&& grad) {
  if (c.params.one_chunk) return scalar_adjoint_of_one_chunk(c, run_blocks, missing, grad);
  const Params& p = c.params;
  const int64_t n = width(p);
  Gradients sums{std::vector<float>(p.chunks * n), std::vector<float>(c.segments.size())};
  for (size_t i = 0; i < c.segments.size(); ++i) {
    const Segment& s = c.segments[i];
    if (s.tensor == missing) continue;
    std::vector<float> u(p.chunks * n), group(p.chunks * n), run(p.chunks * n);
    const auto add = [](std::vector<float>& to, std::vector<float>& from) {
      for (size_t k = 0; k < to.size(); ++k) to[k] += from[k];
      std::fill(from.begin(), from.end(), 0.0f);
    };
    const int64_t blocks = num_blocks(p, s);
    const int64_t runs = 16384 / n, of_group = runs * run_blocks;
    for (int64_t i = 0; i < (blocks + of_group - 1) / of_group * of_group; ++i) {  // group by group, run by run
      const int64_t block = i / of_group * of_group + i % run_blocks * runs + i % of_group / run_blocks;
      if (i % run_blocks == 0) add(group, run);
      if (i % of_group == 0) add(u, group);
      if (block >= blocks) continue;
      std::vector<float> y(n);
      for (int64_t k = 0; k < n && block * n + k < s.rows * s.cols; ++k) y[k] = grad(s, block * n + k);
      scalar_transposed(y.data(), p.q);
      for (int chunk = 0; chunk < p.chunks; ++chunk)
        for (int64_t k = 0; k < n; ++k) run[chunk * n + k] += diagonal_at(p, s, block, chunk, k) * y[k];
    }
    add(group, run);
    add(u, group);
    for (int chunk = 0; chunk < p.chunks; ++chunk) {
      const std::vector<float> z = scalar_z(c, s, chunk);
      std::vector<float> products(n), v(n);
      const PermutationKeys keys = permutation_keys(p.seed, s.stream, chunk);
      for (int64_t k = 0; k < n; ++k) {
        products[k] = u[chunk * n + k] * z[k];
        v[permute(k, p.q, keys)] = u[chunk * n + k];
      }
      sums.dfactors[i] += folded(products);
      scalar_transposed(v.data(), p.q);
      for (int64_t k = 0; k < n; ++k) sums.dtheta[chunk * n + k] += c.factors[i] * (sign_of_b(p, s, chunk, k) * v[k]);
    }
  }
  return sums;
}

// --- kernels against scalars

// Weights of type Out on bases of type Base (void: none); output on a cache line or not, stored past the caches or not,
// and at the place in a page where the first base is, which the kernels do not store past the caches.
template <class Out, class Base>
void check_forward(const Case& c, const std::vector<float>& steps, bool dense, const std::string& what) {
  constexpr bool based = !std::is_void_v<Base>;
  const auto base = tensors_of<std::conditional_t<based, Base, float>>(c, dense);
  const auto views = views_of(base);
  std::vector<Out> expected(c.numel + 1, kGuard<Out>);
  for (const Segment& s : c.segments)
    for (int64_t e = 0; e < s.rows * s.cols; ++e) {
      const int64_t at = s.out_offset - s.offset + element(s, e);
      expected[at] = narrowed<Out>((based ? base[s.tensor].at(element(s, e)) : 0.0f) + steps[at]);
    }
  constexpr int64_t page = 4096, room = page / sizeof(Out);
  Out* memory = (Out*)std::aligned_alloc(page, ((c.numel + room + 1) * sizeof(Out) / page + 1) * page);
  const int64_t beside = ((uintptr_t)views[0].data + 63) / 64 * 64 % page / sizeof(Out);
  const struct {
    int64_t shift, threads;
    bool stream;
  } ways[] = {{0, 1, false}, {0, 3, true}, {1, 1, true}, {1, 3, false}, {beside, 1, true}};
  for (const auto& way : ways) {
    std::fill(memory, memory + c.numel + room, kGuard<Out>);
    fastfood_forward({c.params, c.theta.data(), c.factors.data(), c.segments.data(), (int64_t)c.segments.size(),
                      nullptr, 0, based ? views.data() : nullptr, memory + way.shift, kDtype<Out>, way.stream},
                     fake_threads(way.threads));
    check_same_bits(memory + way.shift, expected.data(), c.numel + 1,
                    what + ", shift " + std::to_string(way.shift) + ", threads " + std::to_string(way.threads));
    if (way.shift) CHECK(bits_of(memory[way.shift - 1]) == bits_of(kGuard<Out>), "%s: written before", what.c_str());
  }
  std::free(memory);
}

template <class Grad>
void check_adjoint(const Case& c, int64_t run_blocks, bool dense, int64_t missing, const std::string& what) {
  const auto grads = tensors_of<Grad>(c, dense);
  auto views = views_of(grads);
  if (missing >= 0) views[missing].data = nullptr;
  const Gradients expected = scalar_adjoint(
      c, run_blocks, missing, [&](const Segment& s, int64_t e) { return grads[s.tensor].at(element(s, e)); });
  const int64_t size = expected.dtheta.size(), segments = c.segments.size();
  for_each_isa([&](const std::string& isa) {
    for (int64_t threads : {1, 3}) {
      std::vector<float> dtheta(size + 2, kGuard<float>), dfactors(segments + 2, kGuard<float>);
      fastfood_adjoint(
          {c.params, c.theta.data(), c.factors.data(), c.segments.data(), segments, views.data(), run_blocks},
          dtheta.data() + 1, dfactors.data() + 1, fake_threads(threads));
      const std::string name = what + ", " + isa + ", threads " + std::to_string(threads);
      check_same_bits(dtheta.data() + 1, expected.dtheta.data(), size, name + ", dtheta");
      check_same_bits(dfactors.data() + 1, expected.dfactors.data(), segments, name + ", dfactors");
      for (float guard : {dtheta.front(), dtheta.back(), dfactors.front(), dfactors.back()})
        CHECK(guard == kGuard<float>, "%s: written outside", name.c_str());
    }
  });
}

void test_every_width() {
  for (int q = kMinWidthBits; q <= kMaxWidthBits; ++q)
    for (const auto& [chunks, one_chunk] : {std::pair{1, false}, {3, false}, {3, true}})
      for (bool rademacher : {false, true}) {
        const Case c = all_kinds(q, chunks, rademacher, one_chunk);
        const std::string what = "q " + std::to_string(q) + (one_chunk ? ", one chunk of " : ", chunks ") +
                                 std::to_string(chunks) + (rademacher ? ", rademacher" : ", gaussian");
        const std::vector<float> steps = scalar_steps(c);
        for_each_isa([&](const std::string& isa) {
          const std::string name = what + ", " + isa;
          for (bool dense : {true, false}) {
            check_forward<float, float>(c, steps, dense, name + ", float on float");
            check_forward<bf16, bf16>(c, steps, dense, name + ", bf16 on bf16");
            check_forward<bf16, float>(c, steps, dense, name + ", bf16 on float");
            check_forward<fp16, fp16>(c, steps, dense, name + ", fp16 on fp16");
            check_forward<fp16, float>(c, steps, dense, name + ", fp16 on float");
          }
          check_forward<float, void>(c, steps, true, name + ", float");
          check_forward<bf16, void>(c, steps, true, name + ", bf16");
          check_forward<fp16, void>(c, steps, true, name + ", fp16");
        });
        check_adjoint<float>(c, 1, true, -1, what + ", float");
        check_adjoint<float>(c, 4096, false, 1, what + ", strided, one missing");
        check_adjoint<bf16>(c, 2, true, -1, what + ", bf16");
        check_adjoint<fp16>(c, 2, false, -1, what + ", fp16, strided");
      }
}

// Without a base the weights are +0 + step: no negative zeros.
void test_zero_theta() {
  Case c = all_kinds(8, 2, true);
  std::fill(c.theta.begin(), c.theta.end(), 0.0f);
  for (float& factor : c.factors) factor = -1.0f;
  const std::vector<float> steps = scalar_steps(c);
  for_each_isa([&](const std::string& isa) {
    check_forward<float, void>(c, steps, true, "zero theta, " + isa);
    check_forward<bf16, void>(c, steps, true, "zero theta, bf16, " + isa);
  });
}

// NaN and infinities of W0 stay what they are, beside values that they do not touch.
void test_special_values() {
  Case c = all_kinds(9, 1, false);
  c.special = true;
  const std::vector<float> steps = scalar_steps(c);
  for_each_isa([&](const std::string& isa) {
    check_forward<float, float>(c, steps, true, "special values, " + isa);
    check_forward<bf16, float>(c, steps, true, "special values, bf16 on float, " + isa);
    check_forward<bf16, bf16>(c, steps, true, "special values, bf16, " + isa);
    check_forward<fp16, fp16>(c, steps, true, "special values, fp16, " + isa);
  });
}

// Sums of more groups than are held at a time (8 of 2 MB): a segment across them, then small ones.
void test_waves() {
  Case c({kSeed, (int64_t)32 << 14, 14, 32, true}, {{9, 1 << 14}, {40}, {40}});
  for (int64_t t = 0; t < 3; ++t) c.add_tensor(t);
  check_adjoint<float>(c, 1, true, -1, "waves");
}

void test_no_gradients() {
  const Case c = all_kinds(6, 2, false);
  const std::vector<TensorView> missing(4);
  std::vector<float> dtheta(2 << 6, NAN), dfactors(c.segments.size(), NAN);
  fastfood_adjoint(
      {c.params, c.theta.data(), c.factors.data(), c.segments.data(), (int64_t)c.segments.size(), missing.data(), 1},
      dtheta.data(), dfactors.data(), fake_threads(3));
  for (float x : dtheta) CHECK(bits_of(x) == 0, "%g", x);
  for (float x : dfactors) CHECK(bits_of(x) == 0, "%g", x);
}

}  // namespace

void test_fastfood() {
  test_no_gradients();
  test_zero_theta();
  test_special_values();
  test_waves();
  test_every_width();
}
