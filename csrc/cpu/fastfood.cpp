// Chooses the kernels and shares the work between threads. Which thread does what never changes a bit: a block of the
// forward depends on no other, and the adjoint adds fixed groups of blocks in a fixed order. A sum for each thread, the
// obvious way, would depend on their number.

#include "fastfood.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/half.h"
#include "../core/walsh_hadamard.h"
#include "subnormals.h"

namespace hsaid {

namespace {

constexpr int64_t kSliceElements = 1024;
// Sums of groups that the adjoint holds at a time: it works in waves of so many groups.
constexpr int64_t kWaveBytes = int64_t{2} << 20, kMostBytes = int64_t{16} << 20;
constexpr int64_t kMinWave = 8;

// Making z takes as long as generating this many blocks.
constexpr int64_t kZCost = 2;

// f(i) for i in [0, count), each taken by the next thread that is free: for work of unequal size.
template <class F>
void dynamic_for(const Threads& threads, int64_t count, F&& f) {
  std::atomic<int64_t> next{0};
  threads.parallel_for(std::min(count, threads.count), [&](int64_t begin, int64_t end) {
    for (; begin < end; ++begin)
      for (int64_t i; (i = next.fetch_add(1)) < count;) f(i);
  });
}

template <class T, class Base>
void copy_row(const TensorView& base, int64_t from, int64_t count, T* out) {
  const Base* data = (const Base*)base.data;
  if (base.dense && std::is_same_v<T, Base>) {
    std::memcpy(out, data + from, count * sizeof(T));
    return;
  }
  for (int64_t i = 0; i < count; ++i)
    from_float(to_float(data[base.dense ? from + i : strided_offset(base, from + i)]), out + i);
}

template <class T>
void fill_hole(const Forward& a, const Segment& hole, const Threads& threads) {
  const auto fill_row = [&](int64_t row) {
    T* out = (T*)a.out + hole.out_offset + row * hole.row_stride;
    const int64_t from = hole.offset + row * hole.row_stride;
    if (hole.tensor < 0 || !a.base)
      std::memset(out, 0, hole.cols * sizeof(T));
    else if (a.base[hole.tensor].dtype == Dtype::kFloat)
      copy_row<T, float>(a.base[hole.tensor], from, hole.cols, out);
    else
      copy_row<T, T>(a.base[hole.tensor], from, hole.cols, out);  // in float32 or in the dtype of the weights
  };
  if (hole.rows == 1) return fill_row(0);
  threads.parallel_for(hole.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) fill_row(row);
  });
}

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(HSAID_HAS_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(kernels_avx512());
  if (avx2) found.push_back(kernels_avx2());
#elif defined(HSAID_HAS_NEON)
  found.push_back(kernels_neon());
#endif
  found.push_back(kernels_portable());
  return found;
}

}  // namespace

void out_of_memory(int64_t bytes) { throw std::runtime_error("no memory for " + std::to_string(bytes) + " bytes"); }

const Kernels& kernels() {
  static const std::vector<const Kernels*> found = available_kernels();
  const char* wanted = std::getenv("HSAID_CPU_ISA");
  if (!wanted || !*wanted) return *found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (std::string(wanted) == k->isa) return *k;
    names += names.empty() ? k->isa : std::string(", ") + k->isa;
  }
  throw std::runtime_error("HSAID_CPU_ISA: expected one of " + names + " on this machine, got " + wanted);
}

void fastfood_forward(const Forward& a, const Threads& threads) {
  const Kernels& kernel = kernels();
  for (int64_t i = 0; i < a.num_holes; ++i) {
    if (a.out_dtype == Dtype::kFloat) fill_hole<float>(a, a.holes[i], threads);
    if (a.out_dtype == Dtype::kBfloat16) fill_hole<bf16>(a, a.holes[i], threads);
    if (a.out_dtype == Dtype::kHalf) fill_hole<fp16>(a, a.holes[i], threads);
  }
  // Threads get equal shares of the work: a block is one unit of it, making a segment's z is kZCost units.
  const int64_t blocks = num_blocks(a);
  const auto cost_before = [&](int64_t i) {
    return (i < a.num_segments ? a.segments[i].first_block : blocks) + kZCost * i;
  };
  const auto block_at = [&](int64_t cost) { return item_at(cost, a.num_segments, kZCost, cost_before); };
  const int64_t units = cost_before(a.num_segments);
  threads.parallel_for(units, [&](int64_t begin, int64_t end) { kernel.forward(a, block_at(begin), block_at(end)); });
}

void fastfood_adjoint(const Adjoint& a, float* dtheta, float* dfactors, const Threads& threads) {
  const Kernels& kernel = kernels();
  const int64_t n = width(a.params), size = n * a.params.chunks, slices = (size + kSliceElements - 1) / kSliceElements;
  const int64_t group_size = group_blocks(a.params, a.run_blocks);
  struct Group {
    int64_t segment, group;
    bool last;  // of its segment
  };
  std::vector<Group> groups;
  for (int64_t i = 0; i < a.num_segments; ++i) {
    dfactors[i] = 0.0f;
    if (!a.grads[a.segments[i].tensor].data) continue;
    const int64_t count = (num_blocks(a.params, a.segments[i]) + group_size - 1) / group_size;
    for (int64_t g = 0; g < count; ++g) groups.push_back({i, g, g + 1 == count});
  }
  std::fill(dtheta, dtheta + size, 0.0f);
  // As many groups as stay in the cache, or four for each thread within kMostBytes if that is more; one for each at
  // least.
  const int64_t several = std::min<int64_t>(4 * threads.count, kMostBytes / (size * 4));
  const int64_t wave =
      std::min<int64_t>(std::max({kWaveBytes / (size * 4), several, kMinWave, (int64_t)threads.count}), groups.size());
  const std::unique_ptr<float[]> partial(new float[wave * size]);  // each group clears its own
  std::vector<float> carried(size, 0.0f);

  for (int64_t begin = 0; begin < (int64_t)groups.size(); begin += wave) {
    const int64_t count = std::min<int64_t>(wave, groups.size() - begin);
    const Group* in_wave = groups.data() + begin;
    dynamic_for(threads, count, [&](int64_t g) {
      kernel.adjoint_group(a, a.segments[in_wave[g].segment], in_wave[g].group, &partial[g * size]);
    });
    // Running sums in the order of the groups; a segment's whole sum ends up in the place of its last group.
    threads.parallel_for(slices, [&](int64_t from, int64_t to) {
      const KeepSubnormals keep;
      const int64_t first = from * kSliceElements, last = std::min(size, to * kSliceElements);
      for (int64_t g = 0; g < count; ++g) {
        float* sum = &partial[g * size];
        for (int64_t k = first; k < last; ++k) {
          sum[k] = carried[k] + sum[k];
          carried[k] = in_wave[g].last ? 0.0f : sum[k];
        }
      }
    });
    dynamic_for(threads, count, [&](int64_t g) {
      const int64_t i = in_wave[g].segment;
      if (in_wave[g].last) dfactors[i] = kernel.adjoint_segment(a, a.segments[i], a.factors[i], &partial[g * size]);
    });
    threads.parallel_for(slices, [&](int64_t from, int64_t to) {
      const KeepSubnormals keep;
      const int64_t first = from * kSliceElements, last = std::min(size, to * kSliceElements);
      for (int64_t g = 0; g < count; ++g)
        if (in_wave[g].last)
          for (int64_t k = first; k < last; ++k) dtheta[k] += partial[g * size + k];
    });
  }
}

template <class T>
void hadamard_transform(const T* x, T* out, int64_t rows, int64_t dim, double scale, const Threads& threads) {
  using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const Kernels& kernel = kernels();
  int q = 0;
  while (((int64_t)1 << q) < dim) ++q;
  const int64_t n = (int64_t)1 << q;
  threads.parallel_for(rows, [&](int64_t begin, int64_t end) {
    const KeepSubnormals keep;
    std::vector<Compute> row(n);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t k = 0; k < dim; ++k) {
        if constexpr (std::is_same_v<T, double>)
          row[k] = x[r * dim + k];
        else
          row[k] = to_float(x[r * dim + k]);
      }
      std::fill(row.begin() + dim, row.end(), Compute(0));
      if (std::is_same_v<Compute, float> && q >= kMinWidthBits)
        kernel.walsh_hadamard((float*)row.data(), q);
      else
        walsh_hadamard(row.data(), q);
      for (int64_t k = 0; k < dim; ++k) {
        const Compute y = row[k] * (Compute)scale;
        if constexpr (std::is_same_v<T, double>)
          out[r * dim + k] = y;
        else
          from_float(y, out + r * dim + k);
      }
    }
  });
}

template void hadamard_transform(const float*, float*, int64_t, int64_t, double, const Threads&);
template void hadamard_transform(const bf16*, bf16*, int64_t, int64_t, double, const Threads&);
template void hadamard_transform(const fp16*, fp16*, int64_t, int64_t, double, const Threads&);
template void hadamard_transform(const double*, double*, int64_t, int64_t, double, const Threads&);

}  // namespace hsaid
