// dtheta and dfactors from the gradients of all tensors, each read once; the same bits on every device. Adding up with
// atomics, in whatever order blocks of threads come to it, would give other bits each time, so every sum has the order
// of the plan (docs/rng.md). A block of threads takes a group of run_blocks tiles of a segment, adds up
// sum_b G_b H^T g_b for each of its 2^(14-q) runs side by side, then the runs; other blocks meanwhile make z and Pi of
// each segment. Three small kernels then add the groups of each segment, transform the sums, and add the segments.
// Where the device can, each kernel is started before the one in front of it has ended, and waits for its results.
// Where tiles are listed, the only gradient has these side by side, and only the draws depend on which they are.

#include <algorithm>
#include <vector>

#include "adjoint.h"

namespace hsaid::cuda {

namespace {

struct AdjointPiece {
  Piece grad;
  uint64_t stream;
  int first_group;  // of the segment, in this wave
  int groups;       // in this wave
  int first_slot;   // places of the groups of the pieces before
  int first_whole;  // whole groups of the pieces before: they go first, or the last blocks of threads would end late
  int first_rest;   // other groups of the pieces before
  int first_added;  // pieces before that have several groups, or go on from the wave before or in the one after
  int factor;
};

struct AdjointParams {
  Params params;
  const float* theta;
  const float* factors;
  int64_t run_blocks;
  const int64_t* listed;  // of kernels for listed tiles
  float* sums;            // [chunks, slots, n], natural order
  const float* carried;   // [chunks, n]: the sum of a segment that began in the wave before
  float* carry;           // the same for the wave after
  float* dots;            // [pieces, chunks]
  float* z;               // [finished, chunks, n], natural order
  uint16_t* pi_back;      // [finished, chunks, n]: pi^-1
  float* dtheta;
  float* dfactors;
  bool first_wave;
  int slots, num_pieces, whole_groups, groups;
  int finished;  // the first `finished` pieces are the last of their segments
  AdjointPiece pieces[kMaxPieces];
  int first_slots[kMaxPieces];  // of the pieces, once more: side by side for a loop over them all
};
static_assert(sizeof(AdjointParams) <= kParameterBytes, "kMaxPieces is too large");

constexpr int kSlotNumber = kTableFloats - 1;  // where it waits in the window `tables` while registers are short

HSAID_DEVICE float* slot(const AdjointParams& a, int chunk, int number) {
  return a.sums + (((int64_t)chunk * a.slots + number) << a.params.q);
}

// --- z and Pi of a segment

template <Kind kKind>
HSAID_DEVICE void make_segment(const AdjointParams& a, const Params& p, int number, int chunk) {
  const int64_t first = (int64_t)(number * p.chunks + chunk) << p.q;
  uint16_t* back = a.pi_back + first;
  make_z<kKind>(p, a.theta, a.pieces[number].stream, chunk,
                [&](uint32_t j, uint4 k) { *(uint2*)(back + j) = {k.x | k.y << 16, k.z | k.w << 16}; });
#pragma unroll 16
  for (int k = thread_index(); k < 1 << p.q; k += kThreads) a.z[first + k] = kept().load(place_of((uint32_t)k));
}

// --- the groups

template <bool kRademacher, Kind kKind, bool kListed>
__global__ void __launch_bounds__(kThreads, 2) adjoint_groups_kernel(const __grid_constant__ AdjointParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int item = (int)block_index().x, chunk = (int)block_index().y;
  if (item >= a.groups) return make_segment<kKind>(a, p, item - a.groups, chunk);
  const bool whole = item < a.whole_groups;
  const int number = row_of(whole ? item : item - a.whole_groups, a.num_pieces,
                            [&](int64_t i) { return whole ? a.pieces[i].first_whole : a.pieces[i].first_rest; });
  const AdjointPiece& piece = a.pieces[number];
  // Of the piece; what is not whole is the last one.
  const int group = whole ? item - piece.first_whole : piece.groups - 1;
  if (thread_index() == 0) tables().store(kSlotNumber, float_from_bits((uint32_t)(piece.first_slot + group)));
  const int64_t tiles = (piece.grad.count + kTile - 1) >> kTileBits;
  const int first_tile = (int)((piece.first_group + group) * a.run_blocks);
  const int last_tile = (int)(tiles < first_tile + a.run_blocks ? tiles : first_tile + a.run_blocks);

  if (is_vectors(piece.grad)) prefetch_tile(piece.grad, (int64_t)first_tile << kTileBits);
  prepare_normals();
#pragma unroll
  for (int v = 0; v < 16; ++v) kept().store(vector_place(v, thread_index()), float4{});
  sync_block();
  float x[kPerThread];
#pragma unroll 1
  for (int tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first = (int64_t)tile << kTileBits;
    read_gradient(piece.grad, first, x);
    if (is_vectors(piece.grad) && tile + 1 < last_tile) prefetch_tile(piece.grad, first + kTile);
    transform_reversed(x, p.q);
    const Draws draws = {p, piece.stream, kDiagonal, (int64_t)tile_of<kListed>(a.listed, tile) << (kTileBits - p.q),
                         1, chunk};
    draw<kRademacher, kKind>(draws, [&](int v, const auto(&d)[4]) {
      const int place = vector_place(v, thread_index());
      const float4 u = kept().load<float4>(place);
      kept().store(place, float4{u.x + d[0].times(x[a_register(v, 0)]), u.y + d[1].times(x[a_register(v, 1)]),
                                 u.z + d[2].times(x[a_register(v, 2)]), u.w + d[3].times(x[a_register(v, 3)])});
    });
  }

  take_runs(x);
  write_runs<is_tile(kKind)>(x, p.q, slot(a, (int)block_index().y, (int)bits_from_float(tables().load(kSlotNumber))));
}

// --- the sums of the groups of a segment, into the slot of its first group

__global__ void __launch_bounds__(kThreads) adjoint_sums_kernel(const __grid_constant__ AdjointParams a) {
  start_next_kernel();
  const int number = row_of(block_index().y, a.num_pieces, [&](int64_t i) { return a.pieces[i].first_added; });
  const AdjointPiece& piece = a.pieces[number];
  const int64_t n = width(a.params), at = (int64_t)block_index().x * kThreads + thread_index();
  wait_for_previous_kernel();
  if (at >= n * a.params.chunks) return;
  float* sums = slot(a, (int)(at >> a.params.q), piece.first_slot) + (at & (n - 1));
  const float sum =
      added<32>(piece.first_group > 0 ? a.carried[at] : 0.0f, piece.groups, [&](int g) { return sums[g * n]; });
  if (number < a.finished)
    *sums = sum;
  else
    a.carry[at] = sum;
}

// --- from the sums to <u, z> and factor * B H^T Pi^T u, in their place

// The sum of eight: those whose numbers differ in the highest bit are added first.
HSAID_DEVICE float4 folded(const float4 (&v)[8]) {
  float4 halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) halves[i] = sum_of(v[i], v[i + 4]);
  return sum_of(sum_of(halves[0], halves[2]), sum_of(halves[1], halves[3]));
}

// The sum of a tile's products, in thread 0: the upper half is added to the lower until one is left. In layout C bit 13
// of the position lies in registers, 12 to 10 in warps, 9 to 7 in registers, 6 to 2 in lanes; `halves` is what adding
// at bit 13 left of the thread's products.
HSAID_DEVICE float fold_tile(const float4 (&halves)[8]) {
  static_assert(std::is_same_v<C, Layout<Bits<0, 1, 7, 8, 9, 13>, Bits<2, 3, 4, 5, 6>, Bits<10, 11, 12>>>);
  const Shared mine = exchange() + lane() * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine.store((warp() * 8 + i) * 128, halves[i]);
  float4 v[8];
  sync_block();
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = mine.load<float4>((i * 8 + warp()) * 128);
  const float4 of_warps = folded(v);
  sync_block();
  mine.store(warp() * 128, of_warps);  // bits 9 to 7 are the number of the warp now
  sync_block();
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = mine.load<float4>(i * 128);
  float4 sum = folded(v);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    sum = sum_of(
        sum, {shuffle_xor(sum.x, mask), shuffle_xor(sum.y, mask), shuffle_xor(sum.z, mask), shuffle_xor(sum.w, mask)});
  return (sum.x + sum.z) + (sum.y + sum.w);
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) adjoint_segments_kernel(const __grid_constant__ AdjointParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int number = (int)block_index().x, chunk = (int)block_index().y, n = 1 << p.q;
  const AdjointPiece& piece = a.pieces[number];
  float* sum = slot(a, chunk, piece.first_slot);
  const int64_t first = (int64_t)(number * p.chunks + chunk) << p.q;
  const uint32_t own = opaque(position<C>(0));
  wait_for_previous_kernel();

  // u . z; -0, which no sum is changed by, where the block has no such position.
  float4 halves[8];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t k = own | C::Register::spread(4 * i);
    float4 product{-0.0f, -0.0f, -0.0f, -0.0f};
    if (k < (uint32_t)n) {
      const float4 u = *(const float4*)(sum + k), z = *(const float4*)(a.z + first + k);
      kept().store((int)k, u);
      product = {u.x * z.x, u.y * z.y, u.z * z.z, u.w * z.w};
    }
    halves[i & 7] = i < 8 ? product : sum_of(halves[i & 7], product);
  }
  const float dot = fold_tile(halves);
  if (thread_index() == 0) a.dots[number * p.chunks + chunk] = dot;

  // H^T Pi^T u, in natural order.
  float x[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4) {
    const uint2 from = *(const uint2*)(a.pi_back + first + ((own | C::Register::spread(i)) & (n - 1)));
    x[i] = kept().load((int)(from.x & 0xffff));
    x[i + 1] = kept().load((int)(from.x >> 16));
    x[i + 2] = kept().load((int)(from.y & 0xffff));
    x[i + 3] = kept().load((int)(from.y >> 16));
  }
  transform_reversed(x, p.q);
  multiply_signs<kKind>(p, piece.stream, chunk, x);
  a_to_b(x);
  b_to_c(x);
  const float factor = a.factors[piece.factor];
#pragma unroll
  for (int i = 0; i < kPerThread; i += 4)
    if (position<C>(i) < (uint32_t)n)
      *(float4*)(sum + position<C>(i)) = {factor * x[i], factor * x[i + 1], factor * x[i + 2], factor * x[i + 3]};
}

// --- the sums over segments

constexpr int kGradientThreads = 64;  // in a block: many small blocks, on all multiprocessors

__global__ void __launch_bounds__(kGradientThreads) adjoint_gradients_kernel(const __grid_constant__ AdjointParams a) {
  const int at = (int)(block_index().x * kGradientThreads + thread_index()), n = 1 << a.params.q;
  wait_for_previous_kernel();
  if (block_index().x == 0) {
    for (int i = thread_index(); i < a.finished; i += kGradientThreads) {
      float sum = 0.0f;
      for (int chunk = 0; chunk < a.params.chunks; ++chunk) sum = sum + a.dots[i * a.params.chunks + chunk];
      a.dfactors[a.pieces[i].factor] = sum;
    }
  }
  if (at >= a.params.dim) return;
  const float* sums = slot(a, at >> a.params.q, 0) + (at & (n - 1));
  a.dtheta[at] = added<64>(a.first_wave ? 0.0f : a.dtheta[at], a.finished,
                           [&](int i) { return sums[(int64_t)a.first_slots[i] * n]; });
}

// --- host

// The groups of all segments that have a gradient, in waves that fit into `slots` places and the kernels' parameters.
std::vector<std::vector<AdjointPiece>> waves_of(const Adjoint& f, int64_t slots, size_t most_pieces) {
  std::vector<std::vector<AdjointPiece>> waves;
  const int64_t group_size = group_blocks(f.params, f.run_blocks);
  int64_t used = slots;
  for (int64_t i = 0; i < f.num_segments; ++i) {
    const Segment& s = f.segments[i];
    const DeviceTensor grad = f.grads[s.tensor];
    if (!grad.data) continue;
    const Piece piece = piece_of(s, grad);
    const int64_t groups = (num_blocks(f.params, s) + group_size - 1) / group_size;
    for (int64_t group = 0; group < groups;) {
      if (used == slots || waves.back().size() == most_pieces) {
        waves.emplace_back();
        waves.back().reserve(std::min<int64_t>(most_pieces, f.num_segments - i));
        used = 0;
      }
      const int64_t taken = std::min(groups - group, slots - used);
      AdjointPiece part{};
      part.grad = piece;
      part.stream = (uint64_t)s.stream;
      part.first_group = (int)group;
      part.groups = (int)taken;
      part.first_slot = (int)used;
      part.factor = (int)i;
      waves.back().push_back(part);
      group += taken;
      used += taken;
    }
  }
  return waves;
}

}  // namespace

void fastfood_adjoint(const Adjoint& f, float* dtheta, float* dfactors, const Workspace& workspace,
                      cudaStream_t stream) {
  if (f.params.one_chunk) return adjoint_of_one_chunk(f, dtheta, dfactors, workspace, stream);
  const Params& p = f.params;
  const int64_t n = width(p), size = n * p.chunks;
  const int64_t most = std::max<int64_t>(1, f.sums_floats / size - 2);  // two places are for what is carried
  const auto missing = [&](const Segment& s) { return !f.grads[s.tensor].data; };
  if (std::any_of(f.segments, f.segments + f.num_segments, missing))
    zero_async(dfactors, f.num_segments * sizeof(float), stream);
  const int64_t most_pieces = std::clamp<int64_t>(kSegmentFloats * 2 / (3 * size), 1, kMaxPieces);
  std::vector<std::vector<AdjointPiece>> waves = waves_of(f, most, (size_t)most_pieces);
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
  a.run_blocks = f.run_blocks;
  a.listed = f.listed.entries;
  // n is a multiple of 32: what begins a table lies on a multiple of 16 bytes.
  const int64_t table = (int64_t)pieces * size;
  a.sums = workspace(slots * size + 2 * carry_size + table + table / 2 + (int64_t)pieces * p.chunks);
  a.z = a.sums + slots * size;
  a.pi_back = (uint16_t*)(a.z + table);
  float* carried = a.z + table + table / 2;
  a.carried = carried;
  a.carry = carried + carry_size;
  a.dots = a.carry + carry_size;
  a.dtheta = dtheta;
  a.dfactors = dfactors;
  a.first_wave = true;
  a.slots = slots;
  const auto all = [](auto rademacher, auto kind) {
    return adjoint_groups_kernel<rademacher.value, kind.value, false>;
  };
  const auto listed = [](auto rademacher, auto kind) {
    return adjoint_groups_kernel<rademacher.value, kind.value, true>;
  };
  const auto groups_kernel = f.listed.entries ? choose_listed<AdjointParams>(p, listed) : choose<AdjointParams>(p, all);
  const auto segments_kernel =
      choose<AdjointParams>(p, [](auto, auto kind) { return adjoint_segments_kernel<kind.value>; });
  const int64_t group_values = f.run_blocks << kTileBits;
  for (size_t w = 0; w < waves.size(); ++w) {
    int whole = 0, rest = 0, added = 0;
    a.num_pieces = (int)waves[w].size();
    // The last piece goes on in the next wave if that begins in the middle of a segment.
    a.finished = a.num_pieces - (w + 1 < waves.size() && waves[w + 1][0].first_group > 0);
    for (int i = 0; i < a.num_pieces; ++i) {
      AdjointPiece& piece = a.pieces[i] = waves[w][i];
      piece.first_whole = whole;
      piece.first_rest = rest;
      piece.first_added = added;
      a.first_slots[i] = piece.first_slot;
      const bool ragged = (piece.first_group + piece.groups) * group_values > piece.grad.count;
      whole += piece.groups - ragged;
      rest += ragged;
      added += piece.groups > 1 || piece.first_group > 0 || i >= a.finished;
    }
    a.whole_groups = whole;
    a.groups = whole + rest;
    const unsigned chunks = (unsigned)p.chunks, slices = (unsigned)((size + kThreads - 1) / kThreads);
    launch(groups_kernel, "adjoint_groups_kernel", dim3((unsigned)(a.groups + a.finished), chunks), kThreads,
           kSharedBytes, stream, a);
    if (added)
      launch_next(adjoint_sums_kernel, "adjoint_sums_kernel", dim3(slices, (unsigned)added), kThreads, 0, stream, a);
    if (a.finished)
      launch_next(segments_kernel, "adjoint_segments_kernel", dim3((unsigned)a.finished, chunks), kThreads,
                  kSharedBytes, stream, a);
    launch_next(adjoint_gradients_kernel, "adjoint_gradients_kernel",
                dim3((unsigned)((p.dim + kGradientThreads - 1) / kGradientThreads)), kGradientThreads, 0, stream, a);
    a.first_wave = false;
    std::swap(a.carry, carried);
    a.carried = carried;
  }
}

}  // namespace hsaid::cuda
