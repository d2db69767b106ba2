// dtheta and dfactors where each block is made from one of several chunks of theta. What is added up are the blocks of
// a chunk, and these lie in all tensors. So a table of the pieces goes to the device, which lists the blocks of each
// chunk while other blocks of threads make z. A block of threads then takes a group of a chunk's list, 2^14 / n entries
// at a time, one for each run: it adds up f G_b H^T g_b, and multiplies G_b H^T g_b by z, which comes from the
// second-level cache. Small kernels add the groups of each chunk, transform the sums, and add each segment's products.
// All orders are the plan's (docs/rng.md). More groups than there is room for come in waves: of some chunks, or, where
// one has too many, of some of its groups.

#include <algorithm>
#include <vector>

#include "adjoint.h"

namespace hsaid::cuda {

namespace {

struct OneChunkPiece {
  Piece grad;
  uint64_t stream;
  int64_t first_block;  // blocks of the pieces before
  int blocks;
  int first_chunk;  // of block 0
};

struct PiecesParams {
  OneChunkPiece* to;
  int count;
  OneChunkPiece pieces[kMaxPieces];
};
static_assert(sizeof(PiecesParams) <= kParameterBytes, "kMaxPieces is too large");

// A block of a chunk's list.
struct alignas(16) Entry {
  int piece, place;  // which block of the piece's gradient it is
  int block;         // of the segment: another number where blocks are listed
};

struct OneChunkParams {
  Params params;
  const float* theta;
  const float* factors;
  Listed listed;
  int64_t group_size;     // blocks of a group
  OneChunkPiece* pieces;  // [num_pieces]
  int64_t num_pieces;
  Entry* lists;  // [chunks, longest]
  int* lengths;  // [chunks]
  int longest;
  float* z;       // [chunks, n], as store_z leaves them
  float* sums;    // [chunks, groups, n] of the wave, natural order
  float* totals;  // [chunks, n] of the wave, natural order
  float* dots;    // [blocks, 4]: a block's products with z, but for the sum over bits 0 and 1 of the position
  float* dtheta;
  float* dfactors;
  int first_chunk, chunks, first_group, groups;  // of the wave
};

constexpr int kEnd = kTableFloats - 1;  // where it waits in the window `tables` while registers are short

HSAID_DEVICE float* dots_at(const OneChunkParams& a, Entry entry) {
  return a.dots + 4 * (a.pieces[entry.piece].first_block + entry.place);
}
HSAID_DEVICE const Entry* list_of(const OneChunkParams& a, int chunk) { return a.lists + (int64_t)chunk * a.longest; }

// --- the pieces, z, and the blocks of each chunk

__global__ void __launch_bounds__(kThreads) one_chunk_pieces_kernel(const __grid_constant__ PiecesParams a) {
  start_next_kernel();
  for (int i = thread_index(); i < a.count; i += kThreads) a.to[i] = a.pieces[i];
}

// The blocks of the piece that are made from the chunk: `count`, the first one and every p.chunks-th after it.
struct Some {
  int first, count;
};
HSAID_DEVICE Some some_blocks(const Params& p, const OneChunkPiece& piece, int chunk) {
  const int first = chunk - piece.first_chunk + (chunk < piece.first_chunk ? p.chunks : 0);
  return {first, first < piece.blocks ? (piece.blocks - first + p.chunks - 1) / p.chunks : 0};
}

// Leaves in place i of `memory` the sum of the counts of threads 0 to i - 1, in place kThreads that of all.
HSAID_DEVICE void add_before(Shared memory, int count) {
  const int i = (int)thread_index();
  int sum = count;
  for (int apart = 1; apart < kThreads; apart *= 2) {
    sync_block();
    memory.store(i + 1, sum);
    sync_block();
    if (i >= apart) sum += memory.load<int>(i + 1 - apart);
  }
  sync_block();
  memory.store(i + 1, sum);
  if (i == 0) memory.store(0, 0);
  sync_block();
}

// Goes through the segments, or the listed blocks, 256 at a time.
HSAID_DEVICE void make_list(const OneChunkParams& a, int chunk) {
  const Params& p = a.params;
  const bool listed = a.listed.entries;
  const int64_t items = listed ? a.pieces[0].blocks : a.num_pieces;
  Entry* list = a.lists + (int64_t)chunk * a.longest;
  int length = 0;
  for (int64_t first = 0; first < items; first += kThreads) {
    const int64_t item = first + thread_index();
    int count = 0;
    if (item < items && listed)
      count = chunk_at(p, a.pieces[0].first_chunk, block_of(a.listed, item)) == chunk;
    else if (item < items)
      count = some_blocks(p, a.pieces[item], chunk).count;
    add_before(exchange(), count);
    const auto before = [](int64_t i) { return exchange().load<int>((int)i); };
    const int wanted = before(kThreads), all = wanted < a.longest - length ? wanted : a.longest - length;
    for (int i = thread_index(); i < all; i += kThreads) {
      const int row = row_of(i, kThreads, before);
      const int number = (int)first + row;
      if (listed) {
        list[length + i] = {0, number, (int)block_of(a.listed, number)};
      } else {
        const int block = some_blocks(p, a.pieces[number], chunk).first + (i - before(row)) * p.chunks;
        list[length + i] = {number, block, block};
      }
    }
    length += all;
  }
  if (thread_index() == 0) a.lengths[chunk] = length;
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) one_chunk_lists_kernel(const __grid_constant__ OneChunkParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int chunk = (int)block_index().x % p.chunks;
  if ((int)block_index().x >= p.chunks) {
    wait_for_previous_kernel();
    return make_list(a, chunk);
  }
  make_z<kKind>(p, a.theta, kSharedStream, chunk);
  store_z(a.z + ((int64_t)chunk << p.q), p.q);
}

// --- the groups

HSAID_DEVICE void prefetch_entry(const OneChunkParams& a, Entry entry) {
  const Piece& grad = a.pieces[entry.piece].grad;
  if (grad.data && is_vectors(grad)) prefetch_tile(grad, (int64_t)entry.place << kTileBits);
}

// A tile of blocks of fewer values: entries `first` to `end` - 1 of a list, 0 behind them.
HSAID_DEVICE void read_blocks(const OneChunkParams& a, const Entry* list, int first, int end, float (&x)[kPerThread]) {
  const int q = a.params.q;
  read_through_exchange(x, [&](int half) {
#pragma unroll 1
    for (int at = thread_index(); at < kTile / 2; at += kThreads) {
      const int e = half * (kTile / 2) + at, i = first + (e >> q);
      float value = 0.0f;
      if (i < end) {
        const Piece& grad = a.pieces[list[i].piece].grad;
        const int64_t k = (int64_t)list[i].place << q | (e & ((1 << q) - 1));
        if (grad.data && k < grad.count) value = load_element(grad, element(grad, k));
      }
      exchange().store(at, value);
    }
  });
}

// The sum over bits 2 and 3 and those from 8 on, the highest first, of what the threads of a block of values have:
// sums over bits 4 to 7, for each of bits 2 and 3. In the lowest of the lanes that have the block, and of warps that
// differ in bit 13 only.
HSAID_DEVICE float fold_dots(float4 sum, int q) {
  static_assert(std::is_same_v<A, Layout<Bits<2, 3, 4, 5, 6, 7>, Bits<8, 9, 10, 11, 12>, Bits<0, 1, 13>>>);
  if (q == kTileBits) {
    const int thread = (int)opaque(thread_index()), upper = thread & 128;
    const Shared mine = exchange() + ((thread >> 5 | 4) * (32 * kRowFloats) + (thread & 31) * 4);  // since b_to_a
    sync_warp();
    if (upper) mine.store(0, sum);
    sync_block();
    if (!upper) sum = sum_of(sum, mine.load<float4>(0));
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    if (1 << q > mask << 8)
      sum = sum_of(sum, {shuffle_xor(sum.x, mask), shuffle_xor(sum.y, mask), shuffle_xor(sum.z, mask),
                         shuffle_xor(sum.w, mask)});
  return (sum.x + sum.z) + (sum.y + sum.w);
}

// Adds a tile in A to the runs in `kept` and makes its dots; for n < 256, where `kept` has its natural order.
template <bool kRademacher>
HSAID_DEVICE void add_slowly(const OneChunkParams& a, const Entry* list, int chunk, int first, int end,
                             const float (&x)[kPerThread]) {
  const Params& p = a.params;
  const float* z = a.z + ((int64_t)chunk << p.q);
  const uint32_t mask = (1u << p.q) - 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // bit 7 of the position, which numbers the block
    const auto position_at = [&](int at) { return (uint32_t)((at & 127) | half << 7 | at >> 7 << 8); };
    sync_block();
#pragma unroll
    for (int i = half * 32; i < half * 32 + 32; ++i) {
      const uint32_t e = position<A>(i);
      exchange().store((int)((e & 127) | e >> 8 << 7), x[i]);
    }
    sync_block();
#pragma unroll 1
    for (int at = thread_index(); at < kTile / 2; at += kThreads) {
      const uint32_t e = position_at(at);
      const int i = first + (int)(e >> p.q);
      if (i >= end) continue;
      const Entry entry = list[i];
      const OneChunkPiece& piece = a.pieces[entry.piece];
      if (!piece.grad.data) continue;
      const Stream s = {p.seed, piece.stream, kDiagonal, entry.block, chunk};
      const float product = stream_value(s, p.q, kRademacher, e & mask) * exchange().load(at);
      kept().store((int)e, kept().load((int)e) + a.factors[entry.piece] * product);
      exchange().store(at, product * z[e & mask]);
    }
    sync_block();
#pragma unroll 1
    for (int at = thread_index() << p.q; at < kTile / 2; at += kThreads << p.q) {
      const int i = first + (int)(position_at(at) >> p.q);
      if (i >= end) break;
      float sums[16] = {};
#pragma unroll 1
      for (int k = 0; k < 1 << p.q; k += 16) {
#pragma unroll
        for (int j = 0; j < 16; ++j) sums[j] = sums[j] + exchange().load(at + k + j);
      }
      float* dots = dots_at(a, list[i]);
#pragma unroll
      for (int j = 0; j < 4; ++j) dots[j] = (sums[j] + sums[j + 8]) + (sums[j + 4] + sums[j + 12]);
    }
  }
}

template <bool kRademacher, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) one_chunk_groups_kernel(const __grid_constant__ OneChunkParams a) {
  constexpr bool kIsTile = is_tile(kKind);
  start_next_kernel();
  Params p = specialised<kKind>(a.params);
  p.one_chunk = false;  // that of all blocks here is known
  // Found anew each time: there are not the registers to keep them.
  const auto chunk = [&] { return a.first_chunk + (int)opaque(block_index().x); };
  const auto entry_at = [&](int i) { return list_of(a, chunk())[i]; };
  wait_for_previous_kernel();
  const int length = a.lengths[chunk()];
  const int64_t begin = (a.first_group + (int64_t)block_index().y) * a.group_size;
  if (begin >= length) return;
  if (thread_index() == 0) tables().store(kEnd, (int)(begin + a.group_size < length ? begin + a.group_size : length));
  const auto end = [] { return tables().load<int>(kEnd); };

  if (kIsTile) prefetch_entry(a, entry_at((int)begin));
  prepare_normals();
#pragma unroll
  for (int v = 0; v < 16; ++v) kept().store(vector_place(v, thread_index()), float4{});
  sync_block();
  float x[kPerThread];
#pragma unroll 1
  for (int first = (int)begin; first < end(); first += 1 << (kTileBits - p.q)) {
    if constexpr (kIsTile) {
      const Entry entry = entry_at(first);
      const Piece& grad = a.pieces[entry.piece].grad;
      if (!grad.data) continue;
      read_gradient(grad, (int64_t)entry.place << kTileBits, x);
    } else {
      read_blocks(a, list_of(a, chunk()), first, end(), x);
    }
    transform_reversed(x, p.q);
    if (kIsTile && first + 1 < end()) prefetch_entry(a, entry_at(first + 1));
    if (!kIsTile && p.q < kFastDrawBits) {
      add_slowly<kRademacher>(a, list_of(a, chunk()), chunk(), first, end(), x);
      continue;
    }
    // Of the thread's values. Behind the end these are zeros, which change no sum.
    const int own = first + (int)(position<A>(0) >> p.q);
    const Entry entry = entry_at(kIsTile || own < end() ? own : end() - 1);
    const OneChunkPiece& piece = a.pieces[entry.piece];
    const bool counts = kIsTile || (own < end() && piece.grad.data);
    const float factor = counts ? a.factors[entry.piece] : 0.0f;
    const float* z = a.z + ((int64_t)chunk() << p.q);
    float dots[4] = {};
    const Draws draws = {p, piece.stream, kDiagonal, entry.block, 0, chunk()};
    draw<kRademacher, Kind::kOneChunk>(draws, [&](int v, const auto(&d)[4]) {
      const int place = vector_place(v, thread_index());
      const float4 u = kept().load<float4>(place), four = z_vector(z, v, p.q);
      const float product[4] = {d[0].times(x[a_register(v, 0)]), d[1].times(x[a_register(v, 1)]),
                                d[2].times(x[a_register(v, 2)]), d[3].times(x[a_register(v, 3)])};
      kept().store(place, float4{u.x + factor * product[0], u.y + factor * product[1], u.z + factor * product[2],
                                 u.w + factor * product[3]});
      float& dot = dots[v & 3];
      dot = dot + product[0] * four.x;
      dot = dot + product[1] * four.y;
      dot = dot + product[2] * four.z;
      dot = dot + product[3] * four.w;
    });
    const float dot = fold_dots({dots[0], dots[1], dots[2], dots[3]}, p.q);
    if (counts && (position<A>(0) & ((1u << p.q) - 1)) < 4) dots_at(a, entry)[warp() & 3] = dot;
  }

  float* sum = a.sums + (((int64_t)opaque(block_index().x) * a.groups + opaque(block_index().y)) << p.q);
  if (!kIsTile && p.q < kFastDrawBits) {
    sync_block();
    return add_runs(p.q, sum);
  }
  take_runs(x);
  write_runs<kIsTile>(x, p.q, sum);
}

// --- the sums of the groups of a chunk

__global__ void __launch_bounds__(kThreads) one_chunk_sums_kernel(const __grid_constant__ OneChunkParams a) {
  start_next_kernel();
  const int64_t n = width(a.params), at = (int64_t)block_index().x * kThreads + thread_index();
  wait_for_previous_kernel();
  if (at >= n * a.chunks) return;
  const int number = (int)(at >> a.params.q);
  const int64_t of_chunk = (a.lengths[a.first_chunk + number] + a.group_size - 1) / a.group_size - a.first_group;
  const int groups = of_chunk < 0 ? 0 : of_chunk < a.groups ? (int)of_chunk : a.groups;
  const float* sums = a.sums + (number * n * a.groups + (at & (n - 1)));
  a.totals[at] = added<32>(a.first_group > 0 ? a.totals[at] : 0.0f, groups, [&](int g) { return sums[g * n]; });
}

// --- B H^T Pi^T of the sum of a chunk

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) one_chunk_gradients_kernel(const __grid_constant__ OneChunkParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int number = (int)block_index().x, chunk = a.first_chunk + number;
  const uint32_t mask = (1u << p.q) - 1;
  prepare_permutation(permutation_keys(p.seed, kSharedStream, chunk), p.q);
  wait_for_previous_kernel();
  const float* total = a.totals + ((int64_t)number << p.q);
#pragma unroll 16
  for (uint32_t k = thread_index(); k <= mask; k += kThreads) kept().store((int)k, total[k]);
  sync_block();
  float x[kPerThread];
  constexpr int kBatch = 8;
#pragma unroll
  for (int first = 0; first < kPerThread; first += kBatch) {
    uint32_t j[kBatch], k[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) j[i] = position<C>(first + i) & mask;
    permute_back(j, p.q, k);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) x[first + i] = kept().load((int)k[i]);
  }
  transform_reversed(x, p.q);
  multiply_signs<kKind>(p, kSharedStream, chunk, x);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    if (position<A>(i) <= mask) kept().store(place_in_a(i, mask), x[i]);
  sync_block();
  float* dtheta = a.dtheta + ((int64_t)chunk << p.q);
  const uint32_t dim = (uint32_t)p.dim - ((uint32_t)chunk << p.q);
#pragma unroll 16
  for (uint32_t k = thread_index(); k <= mask; k += kThreads)
    if (k < dim) dtheta[k] = kept().load(place_of(k));
}

// --- the sums of a segment's products with z: of every 256th block, then of these

__global__ void __launch_bounds__(kThreads) one_chunk_factors_kernel(const __grid_constant__ OneChunkParams a) {
  const int i = (int)thread_index(), number = (int)block_index().x;
  wait_for_previous_kernel();
  const OneChunkPiece& piece = a.pieces[number];
  const int blocks = piece.grad.data && i < piece.blocks ? (piece.blocks - i + kThreads - 1) / kThreads : 0;
  float sum = added<8>(0.0f, blocks, [&](int b) {
    const float4 dot = *(const float4*)(a.dots + 4 * (piece.first_block + i + (int64_t)b * kThreads));
    return (dot.x + dot.z) + (dot.y + dot.w);
  });
  for (int half = kThreads / 2; half > 0; half /= 2) {
    kept().store(i, sum);
    sync_block();
    if (i < half) sum = sum + kept().load(i + half);
    sync_block();
  }
  if (i == 0) a.dfactors[number] = sum;
}

// --- host

// The length of the longest list of a chunk; where blocks are listed, which the device alone knows, at most.
int64_t longest_list(const Adjoint& f) {
  const Params& p = f.params;
  const int64_t chunks = p.chunks;
  if (f.listed.entries) return std::min(f.listed.count * f.listed.span, (f.listed.blocks + chunks - 1) / chunks);
  std::vector<int64_t> change(2 * chunks + 1, 0);  // of how many segments' last, incomplete turns reach a chunk
  int64_t turns = 0;
  for (int64_t i = 0; i < f.num_segments; ++i) {
    const Segment& s = f.segments[i];
    const int64_t blocks = num_blocks(p, s), first = chunk_of(p, (uint64_t)s.stream, 0);
    turns += blocks / chunks;
    ++change[first];
    --change[first + blocks % chunks];
  }
  for (int64_t c = 1; c < 2 * chunks; ++c) change[c] += change[c - 1];
  int64_t longest = 0;
  for (int64_t c = 0; c < chunks; ++c) longest = std::max(longest, change[c] + change[c + chunks]);
  return turns + longest;
}

void launch_pieces(const Adjoint& f, OneChunkPiece* to, cudaStream_t stream) {
  PiecesParams a{};
  int64_t first_block = 0;
  for (int64_t begin = 0; begin < f.num_segments; begin += kMaxPieces) {
    a.to = to + begin;
    a.count = (int)std::min<int64_t>(kMaxPieces, f.num_segments - begin);
    for (int i = 0; i < a.count; ++i) {
      const Segment& s = f.segments[begin + i];
      const int64_t blocks = num_blocks(f.params, s);
      a.pieces[i] = {piece_of(s, f.grads[s.tensor]), (uint64_t)s.stream, first_block, (int)blocks,
                     chunk_of(f.params, (uint64_t)s.stream, 0)};
      first_block += blocks;
    }
    launch(one_chunk_pieces_kernel, "one_chunk_pieces_kernel", dim3(1), kThreads, 0, stream, a);
  }
}

}  // namespace

void adjoint_of_one_chunk(const Adjoint& f, float* dtheta, float* dfactors, const Workspace& workspace,
                          cudaStream_t stream) {
  const Params& p = f.params;
  const int64_t n = width(p), chunks = p.chunks, longest = longest_list(f);
  const int64_t group_size = group_blocks(p, f.run_blocks), groups = (longest + group_size - 1) / group_size;
  // A wave has the sums of so many groups of so many chunks, and the sum of each chunk; all waves of as many chunks.
  const int64_t most = f.sums_floats / n, most_chunks = std::clamp<int64_t>(most / (groups + 1), 1, chunks);
  const int64_t turns = (chunks + most_chunks - 1) / most_chunks, wave_chunks = (chunks + turns - 1) / turns;
  const int64_t wave_groups = std::clamp<int64_t>(most / wave_chunks - 1, 1, std::min<int64_t>(groups, 65535));
  const Segment& last = f.segments[f.num_segments - 1];
  const int64_t blocks = last.first_block + num_blocks(p, last);

  OneChunkParams a{};
  a.params = p;
  a.theta = f.theta;
  a.factors = f.factors;
  a.listed = f.listed;
  a.group_size = group_size;
  a.num_pieces = f.num_segments;
  a.longest = (int)longest;
  a.dtheta = dtheta;
  a.dfactors = dfactors;
  // n is a multiple of 32, the size of a piece one of 16 bytes: what begins a table lies on a multiple of 16 bytes.
  static_assert(sizeof(OneChunkPiece) % 16 == 0);
  constexpr int64_t piece_floats = sizeof(OneChunkPiece) / sizeof(float);
  a.z = workspace(chunks * n + (wave_groups + 1) * wave_chunks * n + 4 * blocks + piece_floats * f.num_segments +
                  4 * chunks * longest + chunks);
  a.sums = a.z + chunks * n;
  a.totals = a.sums + wave_groups * wave_chunks * n;
  a.dots = a.totals + wave_chunks * n;
  a.pieces = (OneChunkPiece*)(a.dots + 4 * blocks);
  a.lists = (Entry*)(a.pieces + f.num_segments);
  a.lengths = (int*)(a.lists + chunks * longest);

  const auto lists_kernel =
      choose_one_chunk<OneChunkParams>(p, [](auto, auto kind) { return one_chunk_lists_kernel<kind.value>; });
  const auto groups_kernel = choose_one_chunk<OneChunkParams>(
      p, [](auto rademacher, auto kind) { return one_chunk_groups_kernel<rademacher.value, kind.value>; });
  const auto gradients_kernel =
      choose_one_chunk<OneChunkParams>(p, [](auto, auto kind) { return one_chunk_gradients_kernel<kind.value>; });
  launch_pieces(f, a.pieces, stream);
  launch_next(lists_kernel, "one_chunk_lists_kernel", dim3((unsigned)(2 * chunks)), kThreads, kSharedBytes, stream, a);
  for (int64_t chunk = 0; chunk < chunks; chunk += wave_chunks) {
    a.first_chunk = (int)chunk;
    a.chunks = (int)std::min(wave_chunks, chunks - chunk);
    const unsigned of_wave = (unsigned)a.chunks;
    for (int64_t group = 0; group < groups; group += wave_groups) {
      a.first_group = (int)group;
      a.groups = (int)std::min(wave_groups, groups - group);
      launch_next(groups_kernel, "one_chunk_groups_kernel", dim3(of_wave, (unsigned)a.groups), kThreads, kSharedBytes,
                  stream, a);
      launch_next(one_chunk_sums_kernel, "one_chunk_sums_kernel",
                  dim3((unsigned)((a.chunks * n + kThreads - 1) / kThreads)), kThreads, 0, stream, a);
    }
    launch_next(gradients_kernel, "one_chunk_gradients_kernel", dim3(of_wave), kThreads, kSharedBytes, stream, a);
  }
  launch_next(one_chunk_factors_kernel, "one_chunk_factors_kernel", dim3((unsigned)f.num_segments), kThreads,
              kThreads * (int)sizeof(float), stream, a);
}

}  // namespace hsaid::cuda
