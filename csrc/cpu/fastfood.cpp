// Chooses the kernels and shares the work between threads. Which thread does what never changes a bit: a block of the
// forward depends on no other, and the adjoint adds fixed groups of blocks in a fixed order. A sum for each thread, the
// obvious way, would depend on their number.

#include "fastfood.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../core/half.h"
#include "subnormals.h"

namespace hsaid {

namespace {

constexpr int64_t kSliceElements = 1024;
// The adjoint works in waves of groups, whose sums are this many bytes at most, but for kMinWave.
constexpr int64_t kMostBytes = int64_t{16} << 20;
constexpr int64_t kMinWave = 8;
constexpr int kDotSums = 256;  // sums that a segment's products with z are added to in turn

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

int64_t second_level_cache() {
  constexpr int64_t usual = int64_t{1} << 20;
  if (const char* wanted = std::getenv("HSAID_CPU_L2"); wanted && *wanted) {
    int64_t bytes = 0;
    const char* end = wanted + std::strlen(wanted);
    const auto [read, error] = std::from_chars(wanted, end, bytes);
    if (error == std::errc() && read == end && bytes > 0) return bytes;
    throw std::runtime_error(std::string("HSAID_CPU_L2: expected a number of bytes, got ") + wanted);
  }
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (found > 0) return found;
#endif
  return usual;
}

namespace {

// z [chunks, n] where it is the same for all segments.
std::unique_ptr<float[]> shared_z(const Params& p, const float* theta, const Threads& threads) {
  std::unique_ptr<float[]> z(new float[p.chunks * width(p)]);
  dynamic_for(threads, p.chunks,
              [&](int64_t chunk) { kernels().shared_z(p, (int)chunk, theta, &z[chunk * width(p)]); });
  return z;
}

// The blocks of all segments, chunk by chunk, in order; first [chunks + 1] says where those of each chunk begin.
std::vector<Place> places_of(const Adjoint& a, std::vector<int64_t>& first) {
  const Params& p = a.params;
  std::vector<int64_t> next(p.chunks + 1, 0);
  const auto each = [&](auto&& use) {
    for (int64_t i = 0; i < a.num_segments; ++i)
      for (int64_t b = 0, blocks = num_blocks(p, a.segments[i]); b < blocks; ++b)
        use(chunk_of(p, (uint64_t)a.segments[i].stream, block_of(a.listed, b)), Place{(int32_t)i, (int32_t)b});
  };
  each([&](int chunk, Place) { ++next[chunk + 1]; });
  for (int c = 0; c < p.chunks; ++c) next[c + 1] += next[c];
  first = next;
  std::vector<Place> places(next[p.chunks]);
  each([&](int chunk, Place place) { places[next[chunk]++] = place; });
  return places;
}

// use(first, last) for parts of [0, size), shared between threads.
template <class Use>
void in_slices(const Threads& threads, int64_t size, Use&& use) {
  threads.parallel_for((size + kSliceElements - 1) / kSliceElements, [&](int64_t from, int64_t to) {
    const KeepSubnormals keep;
    use(from * kSliceElements, std::min(size, to * kSliceElements));
  });
}

// The adjoint with one chunk a block: a group is of blocks of a chunk, which lie anywhere.
void adjoint_of_one_chunk(const Adjoint& given, float* dtheta, float* dfactors, const Threads& threads) {
  const Kernels& kernel = kernels();
  const Params& p = given.params;
  const int64_t n = width(p), group_size = group_blocks(p, given.run_blocks);
  const std::unique_ptr<float[]> z = shared_z(p, given.theta, threads);
  Adjoint a = given;
  a.z = z.get();
  std::vector<int64_t> first;
  const std::vector<Place> places = places_of(a, first);
  std::vector<float> dots(places.size(), 0.0f);
  struct OfChunk {
    int64_t chunk;
    Group group;
  };
  std::vector<OfChunk> groups;
  for (int64_t c = 0; c < p.chunks; ++c)
    for (int64_t begin = first[c]; begin < first[c + 1]; begin += group_size)
      groups.push_back({c, {nullptr, places.data(), begin, std::min(begin + group_size, first[c + 1])}});

  std::fill(dtheta, dtheta + p.chunks * n, 0.0f);
  const int64_t wave = std::min<int64_t>(std::max(kMostBytes / (n * 4), threads.count), groups.size());
  const std::unique_ptr<float[]> partial(new float[wave * n]);
  for (int64_t begin = 0; begin < (int64_t)groups.size(); begin += wave) {
    const int64_t count = std::min<int64_t>(wave, groups.size() - begin);
    const OfChunk* in_wave = groups.data() + begin;
    dynamic_for(threads, count,
                [&](int64_t g) { kernel.adjoint_group(a, in_wave[g].group, &partial[g * n], dots.data()); });
    in_slices(threads, n, [&](int64_t from, int64_t to) {
      for (int64_t g = 0; g < count; ++g)
        for (int64_t k = from; k < to; ++k) dtheta[in_wave[g].chunk * n + k] += partial[g * n + k];
    });
  }
  dynamic_for(threads, p.chunks, [&](int64_t c) { kernel.shared_z_transposed(p, (int)c, dtheta + c * n); });
  const KeepSubnormals keep;
  for (int64_t i = 0; i < a.num_segments; ++i) {
    float sums[kDotSums] = {};
    const float* own = dots.data() + a.segments[i].first_block;
    for (int64_t b = 0; b < num_blocks(p, a.segments[i]); ++b) sums[b % kDotSums] += own[b];
    for (int half = kDotSums / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    dfactors[i] = sums[0];
  }
}

}  // namespace

void fastfood_forward(const Forward& given, const Threads& threads) {
  const Kernels& kernel = kernels();
  Forward a = given;
  const std::unique_ptr<float[]> z = a.params.one_chunk ? shared_z(a.params, a.theta, threads) : nullptr;
  a.z = z.get();
  for (int64_t i = 0; i < a.num_holes; ++i) {
    if (a.out_dtype == Dtype::kFloat) fill_hole<float>(a, a.holes[i], threads);
    if (a.out_dtype == Dtype::kBfloat16) fill_hole<bf16>(a, a.holes[i], threads);
    if (a.out_dtype == Dtype::kHalf) fill_hole<fp16>(a, a.holes[i], threads);
  }
  // Threads get equal shares of the work: a block is one unit of it, making a segment's z is kZCost units.
  const int64_t blocks = num_blocks(a), z_cost = a.z ? 0 : kZCost;
  const auto cost_before = [&](int64_t i) {
    return (i < a.num_segments ? a.segments[i].first_block : blocks) + z_cost * i;
  };
  const auto block_at = [&](int64_t cost) { return item_at(cost, a.num_segments, z_cost, cost_before); };
  const int64_t units = cost_before(a.num_segments);
  threads.parallel_for(units, [&](int64_t begin, int64_t end) { kernel.forward(a, block_at(begin), block_at(end)); });
}

void fastfood_adjoint(const Adjoint& a, float* dtheta, float* dfactors, const Threads& threads) {
  if (a.params.one_chunk) return adjoint_of_one_chunk(a, dtheta, dfactors, threads);
  const Kernels& kernel = kernels();
  const int64_t n = width(a.params), size = n * a.params.chunks;
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
  // As many groups as stay in the threads' caches, or four for each thread if that is more; one for each at least.
  const int64_t cached = threads.count * second_level_cache() / (size * 4);
  const int64_t several = std::min(std::max(cached, 4 * threads.count), kMostBytes / (size * 4));
  const int64_t wave = std::min<int64_t>(std::max({several, kMinWave, threads.count}), groups.size());
  const std::unique_ptr<float[]> partial(new float[wave * size]);  // each group clears its own
  std::vector<float> carried(size, 0.0f);

  for (int64_t begin = 0; begin < (int64_t)groups.size(); begin += wave) {
    const int64_t count = std::min<int64_t>(wave, groups.size() - begin);
    const Group* in_wave = groups.data() + begin;
    dynamic_for(threads, count, [&](int64_t g) {
      const Segment& s = a.segments[in_wave[g].segment];
      const int64_t first = in_wave[g].group * group_size, end = std::min(first + group_size, num_blocks(a.params, s));
      kernel.adjoint_group(a, {&s, nullptr, first, end}, &partial[g * size], nullptr);
    });
    // Running sums in the order of the groups; a segment's whole sum ends up in the place of its last group.
    in_slices(threads, size, [&](int64_t first, int64_t last) {
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
    in_slices(threads, size, [&](int64_t first, int64_t last) {
      for (int64_t g = 0; g < count; ++g)
        if (in_wave[g].last)
          for (int64_t k = first; k < last; ++k) dtheta[k] += partial[g * size + k];
    });
  }
}

}  // namespace hsaid
