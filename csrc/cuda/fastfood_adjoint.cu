// dtheta and dfactors from the gradients of all tensors. Each gradient is read once: a block of threads takes a group
// of blocks of a segment (2^(14-q) groups side by side where blocks are smaller than a tile) and leaves the group's sum
// sum_b G_b H^T g_b. Three small kernels then add the groups of each segment, transform the sums, and add the segments,
// all in the order of the plan, so that the bits depend on nothing else (docs/rng.md).

#include <algorithm>
#include <vector>

#include "pieces.h"

namespace hsaid::cuda {

namespace {

struct AdjointPiece {
  Piece grad;
  uint64_t stream;
  int64_t first_group;  // of the segment, in this wave
  int groups;           // in this wave
  int first_slot;       // places of the groups of the pieces before
  int first_item;       // blocks of threads that the pieces before take
  int factor;
  bool vectors;  // can be read four values at a time
};

struct AdjointParams {
  Params params;
  const float* theta;
  const float* factors;
  int64_t group_blocks;
  float* sums;           // [chunks, slots, n], natural order
  const float* carried;  // [chunks, n]: the sum of a segment that began in the wave before
  float* carry;          // the same for the wave after
  float* dots;           // [pieces, chunks]
  float* dtheta;
  float* dfactors;
  bool first_wave;
  int slots, num_pieces, finished;  // the first `finished` pieces are the last of their segments
  AdjointPiece pieces[kMaxPieces];
};
static_assert(sizeof(AdjointParams) <= kParameterBytes, "kMaxPieces is too large");

HSAID_DEVICE float* slot(const AdjointParams& a, int chunk, int number) {
  return a.sums + (((int64_t)chunk * a.slots + number) << a.params.q);
}

// --- the groups

// Position e of the tile is element first + e mod n + (e / n) * group_elements of the piece.
HSAID_DEVICE int64_t element_of(uint32_t e, int q, int64_t group_elements) {
  return (e & ((1u << q) - 1)) + (int64_t)(e >> q) * group_elements;
}

template <class T, bool kWhole>
HSAID_DEVICE void read_vectors(const Piece& p, int64_t first, int q, int64_t group_elements, float (&x)[kPerThread]) {
  using Load = typename Quad<T>::Bits;
  const T* data = (const T*)p.data + first;
  const uint32_t own = opaque(position_c(0));
  Load loaded[kPerThread / 4];
#pragma unroll
  for (int v = 0; v < kPerThread / 4; ++v) {
    const uint32_t e = own | register_position_c(4 * v);
    const int64_t at = kWhole ? (int64_t)e : element_of(e, q, group_elements);
    loaded[v] = Load{};
    if (kWhole || first + at < p.count) loaded[v] = load_once((const Load*)(data + at));
  }
#pragma unroll
  for (int v = 0; v < kPerThread / 4; ++v) {
    const float4 w = Quad<T>::widened(loaded[v]);
    x[4 * v] = w.x;
    x[4 * v + 1] = w.y;
    x[4 * v + 2] = w.z;
    x[4 * v + 3] = w.w;
  }
}

// One element at a time, in two halves that go through the exchange: strided, or of a length that is no multiple of 4.
HSAID_DEVICE void read_elements(const Piece& p, int64_t first, int q, int64_t group_elements, float (&x)[kPerThread]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sync_block();
#pragma unroll 1
    for (int at = thread_index(); at < kTile / 2; at += kThreads) {
      const int64_t e = first + element_of((uint32_t)(half * (kTile / 2) + at), q, group_elements);
      exchange().store(at, e < p.count ? load_element(p, element(p, e)) : 0.0f);
    }
    sync_block();
#pragma unroll
    for (int i = half * 32; i < half * 32 + 32; i += 4) {
      const float4 v = exchange().load<float4>((int)position_c(i & 31));
      x[i] = v.x;
      x[i + 1] = v.y;
      x[i + 2] = v.z;
      x[i + 3] = v.w;
    }
  }
}

template <bool kWhole>
HSAID_DEVICE void read_tile(const Piece& p, int64_t first, int q, int64_t group_elements, float (&x)[kPerThread]) {
  if (p.dtype == Dtype::kFloat)
    read_vectors<float, kWhole>(p, first, q, group_elements, x);
  else if (p.dtype == Dtype::kBfloat16)
    read_vectors<bf16, kWhole>(p, first, q, group_elements, x);
  else
    read_vectors<fp16, kWhole>(p, first, q, group_elements, x);
}

// Asks for the thread's share of a tile.
HSAID_DEVICE void prefetch_tile(const Piece& p, int64_t first, int q, int64_t group_elements) {
  const int64_t e = first + element_of((uint32_t)(warp() * 32 + lane()) * kPerThread, q, group_elements);
  if (e + kPerThread > p.count) return;
  const char* line = (const char*)p.data + e * (p.dtype == Dtype::kFloat ? 4 : 2);
  prefetch(line);
  if (p.dtype == Dtype::kFloat) prefetch(line + 128);
}

template <bool kRademacher, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) adjoint_groups_kernel(const __grid_constant__ AdjointParams a) {
  constexpr bool kGeneral = kKind == Kind::kGeneral;
  const Params p = specialised<kKind>(a.params);
  const int item = (int)block_index().x, chunk = (int)block_index().y;
  const AdjointPiece& piece = a.pieces[row_of(item, a.num_pieces, [&](int64_t i) { return a.pieces[i].first_item; })];
  const int group = (item - piece.first_item) << (kTileBits - p.q);  // of the piece, the first of the block of threads
  const int64_t group_elements = a.group_blocks << p.q;
  const int first_block = (int)((piece.first_group + group) * a.group_blocks);
  const int64_t blocks = (piece.grad.count + (1 << p.q) - 1) >> p.q;
  const int last_block = (int)(blocks < first_block + a.group_blocks ? blocks : first_block + a.group_blocks);

  prepare_normals();
#pragma unroll
  for (int v = 0; v < 16; ++v) kept().store(vector_place(v, thread_index()), float4{});
  sync_block();
  float x[kPerThread];
#pragma unroll 1
  for (int block = first_block; block < last_block; ++block) {  // and those of the groups beside it
    const int64_t first = (int64_t)block << p.q;
    if (!piece.vectors)
      read_elements(piece.grad, first, p.q, group_elements, x);
    else if (kKind == Kind::kTile && first + kTile <= piece.grad.count)
      read_tile<true>(piece.grad, first, p.q, group_elements, x);
    else
      read_tile<false>(piece.grad, first, p.q, group_elements, x);
    if (piece.vectors && block + 1 < last_block) prefetch_tile(piece.grad, first + (1 << p.q), p.q, group_elements);
    transform_reversed(x, p.q);
    const Draws draws = {p, piece.stream, kDiagonal, block, a.group_blocks, chunk};
    draw<kRademacher, kGeneral>(draws, [&](int v, const auto(&d)[4]) {
      const int place = vector_place(v, thread_index());
      const float4 u = kept().load<float4>(place);
      kept().store(place, float4{u.x + d[0].times(x[a_register(v, 0)]), u.y + d[1].times(x[a_register(v, 1)]),
                                 u.z + d[2].times(x[a_register(v, 2)]), u.w + d[3].times(x[a_register(v, 3)])});
    });
  }

#pragma unroll
  for (int v = 0; v < 16; ++v) {
    const float4 u = kept().load<float4>(vector_place(v, thread_index()));
    x[a_register(v, 0)] = u.x;
    x[a_register(v, 1)] = u.y;
    x[a_register(v, 2)] = u.z;
    x[a_register(v, 3)] = u.w;
  }
  a_to_b(x);
  b_to_c(x);
  float* sum = slot(a, chunk, piece.first_slot + group);
  const int64_t end = (int64_t)(piece.groups - group) << p.q;
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4)
    if (position_c(i) < end) *(float4*)(sum + position_c(i)) = {x[i], x[i + 1], x[i + 2], x[i + 3]};
}

// --- the sums of the groups of a segment, into the slot of its first group

__global__ void __launch_bounds__(kThreads) adjoint_sums_kernel(const __grid_constant__ AdjointParams a) {
  const AdjointPiece& piece = a.pieces[block_index().y];
  const int64_t n = width(a.params), at = (int64_t)block_index().x * kThreads + thread_index();
  if (at >= n * a.params.chunks) return;
  float* sums = slot(a, (int)(at >> a.params.q), piece.first_slot) + (at & (n - 1));
  float sum = piece.first_group > 0 ? a.carried[at] : 0.0f;
#pragma unroll 16
  for (int g = 0; g < piece.groups; ++g) sum = sum + sums[g * n];
  if ((int)block_index().y < a.finished)
    *sums = sum;
  else
    a.carry[at] = sum;
}

// --- from the sums to <u, z> and factor * B H^T Pi^T u, in their place

template <bool kGeneral>
__global__ void __launch_bounds__(kThreads, 2) adjoint_segments_kernel(const __grid_constant__ AdjointParams a) {
  const Params p = a.params;
  const int number = (int)block_index().x, chunk = (int)block_index().y, n = 1 << p.q;
  const AdjointPiece& piece = a.pieces[number];
  float* sum = slot(a, chunk, piece.first_slot);
  float x[kPerThread];
  make_z<kGeneral>(p, a.theta, piece.stream, chunk);

  // Products with z in its place, then their sum, the upper half added to the lower until one is left.
#pragma unroll 1
  for (int k = thread_index(); k < n; k += kThreads) {
    const int place = place_of((uint32_t)k);
    kept().store(place, sum[k] * kept().load(place));
  }
#pragma unroll 1
  for (int half = n / 2; half > 0; half /= 2) {
    sync_block();
#pragma unroll 1
    for (int k = thread_index(); k < half; k += kThreads) {
      const int place = place_of((uint32_t)k);
      kept().store(place, kept().load(place) + kept().load(place_of((uint32_t)(k + half))));
    }
  }
  sync_block();
  if (thread_index() == 0) a.dots[number * p.chunks + chunk] = kept().load(place_of(0));
  sync_block();

  // H^T Pi^T u, in natural order.
  const PermutationKeys pi = permutation_keys(p.seed, piece.stream, chunk);
#pragma unroll 1
  for (int k = thread_index(); k < n; k += kThreads) kept().store((int)permute((uint32_t)k, p.q, pi), sum[k]);
  sync_block();
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    const float4 v = kept().load<float4>((int)(position_c(i) & (n - 1)));
    x[i] = v.x;
    x[i + 1] = v.y;
    x[i + 2] = v.z;
    x[i + 3] = v.w;
  }
  transform_reversed(x, p.q);
  multiply_signs<kGeneral>(p, piece.stream, chunk, x);
  a_to_b(x);
  b_to_c(x);
  const float factor = a.factors[piece.factor];
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4)
    if (position_c(i) < (uint32_t)n)
      *(float4*)(sum + position_c(i)) = {factor * x[i], factor * x[i + 1], factor * x[i + 2], factor * x[i + 3]};
}

// --- the sums over segments

__global__ void __launch_bounds__(kThreads) adjoint_gradients_kernel(const __grid_constant__ AdjointParams a) {
  const int at = (int)(block_index().x * kThreads + thread_index()), n = 1 << a.params.q;
  if (block_index().x == 0) {
    for (int i = thread_index(); i < a.finished; i += kThreads) {
      float sum = 0.0f;
      for (int chunk = 0; chunk < a.params.chunks; ++chunk) sum = sum + a.dots[i * a.params.chunks + chunk];
      a.dfactors[a.pieces[i].factor] = sum;
    }
  }
  if (at >= a.params.dim) return;
  const float* sums = slot(a, at >> a.params.q, 0) + (at & (n - 1));
  float sum = a.first_wave ? 0.0f : a.dtheta[at];
#pragma unroll 16
  for (int i = 0; i < a.finished; ++i) sum = sum + sums[(int64_t)a.pieces[i].first_slot * n];
  a.dtheta[at] = sum;
}

// --- host

// The groups of all segments that have a gradient, in waves that fit into `slots` places and the kernels' parameters.
std::vector<std::vector<AdjointPiece>> waves_of(const Adjoint& f, int64_t slots) {
  std::vector<std::vector<AdjointPiece>> waves;
  int64_t used = slots;
  for (int64_t i = 0; i < f.num_segments; ++i) {
    const Segment& s = f.segments[i];
    const DeviceTensor grad = f.grads[s.tensor];
    if (!grad.data) continue;
    const Piece piece = piece_of(s, grad);
    const int64_t groups = (num_blocks(f.params, s) + f.group_blocks - 1) / f.group_blocks;
    for (int64_t group = 0; group < groups;) {
      if (used == slots || waves.back().size() == kMaxPieces) {
        waves.emplace_back();
        used = 0;
      }
      const int64_t taken = std::min(groups - group, slots - used);
      waves.back().push_back({piece, (uint64_t)s.stream, group, (int)taken, (int)used, 0, (int)i,
                              is_vectors(piece) && piece.count % 4 == 0});
      group += taken;
      used += taken;
    }
  }
  return waves;
}

}  // namespace

void fastfood_adjoint(const Adjoint& f, float* dtheta, float* dfactors, const Workspace& workspace,
                      cudaStream_t stream) {
  const Params& p = f.params;
  const int64_t n = width(p), size = n * p.chunks;
  const int64_t most = std::max<int64_t>(1, kWorkspaceFloats / size - 2);  // two places are for what is carried
  zero_async(dfactors, f.num_segments * sizeof(float), stream);
  std::vector<std::vector<AdjointPiece>> waves = waves_of(f, most);
  if (waves.empty()) return zero_async(dtheta, p.dim * sizeof(float), stream);
  const auto slots_of = [](const std::vector<AdjointPiece>& wave) {
    return wave.back().first_slot + wave.back().groups;
  };
  int slots = 0;
  size_t pieces = 0;
  for (const auto& wave : waves) {
    slots = std::max(slots, slots_of(wave));
    pieces = std::max(pieces, wave.size());
  }
  const int64_t carry_size = waves.size() > 1 ? size : 0;
  AdjointParams a{};
  a.params = p;
  a.theta = f.theta;
  a.factors = f.factors;
  a.group_blocks = f.group_blocks;
  a.sums = workspace(slots * size + 2 * carry_size + (int64_t)pieces * p.chunks);
  float* carried = a.sums + slots * size;
  a.carried = carried;
  a.carry = carried + carry_size;
  a.dots = a.carry + carry_size;
  a.dtheta = dtheta;
  a.dfactors = dfactors;
  a.first_wave = true;
  a.slots = slots;
  const auto groups_kernel = choose<AdjointParams>(
      p, [](auto rademacher, auto kind) { return adjoint_groups_kernel<rademacher.value, kind.value>; });
  const auto segments_kernel =
      kind_of(p) == Kind::kGeneral ? adjoint_segments_kernel<true> : adjoint_segments_kernel<false>;
  const int side_by_side = kTile >> p.q;
  for (size_t w = 0; w < waves.size(); ++w) {
    int items = 0;
    a.num_pieces = (int)waves[w].size();
    for (int i = 0; i < a.num_pieces; ++i) {
      a.pieces[i] = waves[w][i];
      a.pieces[i].first_item = items;
      items += (a.pieces[i].groups + side_by_side - 1) / side_by_side;
    }
    // The last piece goes on in the next wave if that begins in the middle of a segment.
    a.finished = a.num_pieces - (w + 1 < waves.size() && waves[w + 1][0].first_group > 0);
    const unsigned chunks = (unsigned)p.chunks, slices = (unsigned)((size + kThreads - 1) / kThreads);
    launch(groups_kernel, "adjoint_groups_kernel", dim3((unsigned)items, chunks), kThreads, kSharedBytes, stream, a);
    launch(adjoint_sums_kernel, "adjoint_sums_kernel", dim3(slices, (unsigned)a.num_pieces), kThreads, 0, stream, a);
    if (a.finished)
      launch(segments_kernel, "adjoint_segments_kernel", dim3((unsigned)a.finished, chunks), kThreads, kSharedBytes,
             stream, a);
    launch(adjoint_gradients_kernel, "adjoint_gradients_kernel", dim3((unsigned)((p.dim + kThreads - 1) / kThreads)),
           kThreads, 0, stream, a);
    a.first_wave = false;
    std::swap(a.carry, carried);
    a.carried = carried;
  }
}

}  // namespace hsaid::cuda
