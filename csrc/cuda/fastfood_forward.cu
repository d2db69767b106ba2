// W = W0 + factor * H(sum_c G_c z_c) for every tensor in one launch. A persistent grid: each block of threads takes a
// run of tiles, all of equal length, makes z_i when it comes to segment i, and needs nothing of the other blocks.

#include <algorithm>
#include <vector>

#include "pieces.h"

namespace hsaid::cuda {

namespace {

// Tiles whose work is as much as making z.
constexpr int64_t kZCost = 3;
struct ForwardPiece {
  Piece base;
  void* out;  // where its first element goes
  uint64_t stream;
  int factor;       // -1: a hole
  int first_tile;   // tiles of the pieces before
  int whole_tiles;  // the first ones, that are read and written in whole vectors
};

struct ForwardParams {
  Params params;
  const float* theta;
  const float* factors;
  Dtype out_dtype;
  // Where theta has several chunks, run_tiles tiles of a segment share the z of each, and keep their sums meanwhile.
  int run_tiles;
  float* sums;  // [grid, run_tiles, 2^14]
  int num_tiles;
  int num_pieces;
  ForwardPiece pieces[kMaxPieces];
};
static_assert(sizeof(ForwardParams) <= kParameterBytes, "kMaxPieces is too large");

HSAID_INLINE int64_t num_tiles(const Piece& p) { return (p.count + kTile - 1) / kTile; }

// W of a whole tile, in vectors of four values.
template <class Out, class Base>
HSAID_DEVICE void write_vectors(const ForwardPiece& piece, int t, const float (&x)[kPerThread], float factor) {
  using Load = typename Quad<Base>::Bits;
  using Store = typename Quad<Out>::Bits;
  const Base* tile = tile_address((const Base*)piece.base.data, t);
  const Base* base = tile + position_c(0);
  Out* out = tile_address((Out*)piece.out, t) + position_c(0);
  constexpr int batch = 32 / (sizeof(Load) / 4);  // vectors in flight: as many as there are registers left
#pragma unroll
  for (int first = 0; first < kPerThread / 4; first += batch) {
    Load loaded[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) loaded[j] = load_once((const Load*)(base + register_position_c(4 * (first + j))));
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = 4 * (first + j);
      const float4 w = Quad<Base>::widened(loaded[j]);
      store_once((Store*)(out + register_position_c(i)),
                 Quad<Out>::narrowed(
                     {w.x + factor * x[i], w.y + factor * x[i + 1], w.z + factor * x[i + 2], w.w + factor * x[i + 3]}));
    }
  }
  if (t + 1 < piece.whole_tiles) {  // asks for the next one, 128 bytes a time
    constexpr int bytes = kPerThread * sizeof(Base);
    const char* next = (const char*)(tile + kTile) + thread_index() * bytes;
#pragma unroll
    for (int i = 0; i < bytes; i += 128) prefetch(next + i);
  }
}

// The same one element at a time, in two halves that go through the exchange: ragged, strided or without a base.
HSAID_DEVICE void write_elements(const ForwardPiece& piece, Dtype dtype, int t, const float (&x)[kPerThread],
                                 float factor) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = opaque(position_c(0));
    sync_block();
#pragma unroll
    for (int i = half * 32; i < half * 32 + 32; i += 4)
      exchange().store((int)(own | register_position_c(i & 31)), float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
    sync_block();
    const int64_t first = (int64_t)t * kTile + half * (kTile / 2);
#pragma unroll 1
    for (int at = thread_index(); at < kTile / 2 && first + at < piece.base.count; at += kThreads) {
      const int64_t offset = element(piece.base, first + at);
      store_element(piece.out, dtype, offset, load_element(piece.base, offset) + factor * exchange().load(at));
    }
  }
}

HSAID_DEVICE void write_tile(const ForwardPiece& piece, Dtype dtype, int t, const float (&x)[kPerThread],
                             float factor) {
  if (t >= piece.whole_tiles)
    write_elements(piece, dtype, t, x, factor);
  else if (dtype == Dtype::kFloat)
    write_vectors<float, float>(piece, t, x, factor);
  else if (dtype == Dtype::kBfloat16 && piece.base.dtype == Dtype::kFloat)
    write_vectors<bf16, float>(piece, t, x, factor);
  else if (dtype == Dtype::kBfloat16)
    write_vectors<bf16, bf16>(piece, t, x, factor);
  else if (piece.base.dtype == Dtype::kFloat)
    write_vectors<fp16, float>(piece, t, x, factor);
  else
    write_vectors<fp16, fp16>(piece, t, x, factor);
}

HSAID_DEVICE void copy_hole(const ForwardPiece& piece, Dtype dtype, int t) {
  const int64_t first = (int64_t)t * kTile;
  for (int at = thread_index(); at < kTile && first + at < piece.base.count; at += kThreads) {
    const int64_t offset = element(piece.base, first + at);
    store_element(piece.out, dtype, offset, load_element(piece.base, offset));
  }
}

template <bool kRademacher, Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) fastfood_forward_kernel(const __grid_constant__ ForwardParams a) {
  constexpr bool kGeneral = kKind == Kind::kGeneral;
  const Params p = specialised<kKind>(a.params);
  const auto first_tile = [&](int64_t i) { return i < a.num_pieces ? a.pieces[i].first_tile : a.num_tiles; };
  const auto cost_before = [&](int64_t i) { return first_tile(i) + kZCost * i; };
  const auto share = [&](unsigned block) {  // the first tile of a block of threads
    return (int)item_at(cost_before(a.num_pieces) * block / grid_width(), a.num_pieces, kZCost, cost_before);
  };
  prepare_normals();  // make_z has the barrier

  // Once a piece, all but the number of the tile is found again: registers are short where z is made.
  for (int tile = share(block_index().x);;) {
    const int last = share(block_index().x + 1);
    if (tile >= last) return;
    const int i = row_of(tile, a.num_pieces, first_tile);
    const ForwardPiece& piece = a.pieces[i];
    const int end = last < first_tile(i + 1) ? last : first_tile(i + 1);
    const float factor = a.factors[piece.factor < 0 ? 0 : piece.factor];
    int t = tile - piece.first_tile;
    const int t_end = end - piece.first_tile;
    tile = end;
    if (piece.factor < 0) {
      for (; t < t_end; ++t) copy_hole(piece, a.out_dtype, t);
      continue;
    }
    while (t < t_end) {
      const int run = t, run_end = p.chunks > 1 && t + a.run_tiles < t_end ? t + a.run_tiles : t_end;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        make_z<kGeneral>(p, a.theta, piece.stream, chunk);
        for (t = run; t < run_end; ++t) {
          float x[kPerThread];
          const Draws draws = {p, piece.stream, kDiagonal, (int64_t)t << (kTileBits - p.q), 1, chunk};
          draw<kRademacher, kGeneral>(draws, [&](int v, const auto(&d)[4]) {
            const float4 z = kept_vector<kGeneral>(v, p.q);
            x[a_register(v, 0)] = d[0].times(z.x);
            x[a_register(v, 1)] = d[1].times(z.y);
            x[a_register(v, 2)] = d[2].times(z.z);
            x[a_register(v, 3)] = d[3].times(z.w);
          });
          if (p.chunks > 1) {
            float* sum = a.sums + ((int64_t)block_index().x * a.run_tiles + t - run) * kTile + thread_index();
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) {
              if (chunk > 0) x[j] = sum[j * kThreads] + x[j];
              if (chunk + 1 < p.chunks) sum[j * kThreads] = x[j];
            }
            if (chunk + 1 < p.chunks) continue;
          }
          transform(x, p.q);
          write_tile(piece, a.out_dtype, t, x, factor);
        }
      }
    }
  }
}

// All pieces of a call, in launches of at most kMaxPieces.
std::vector<ForwardPiece> pieces_of(const Forward& f) {
  std::vector<ForwardPiece> pieces;
  const auto add = [&](const Segment& s, int factor) {
    const DeviceTensor base = f.base && s.tensor >= 0 ? f.base[s.tensor] : DeviceTensor{nullptr, Dtype::kFloat};
    ForwardPiece piece{
        piece_of(s, base), (void*)address(f.out, f.out_dtype, s.out_offset), (uint64_t)s.stream, factor, 0, 0};
    if (is_vectors(piece.base) && is_aligned(piece.out, f.out_dtype))
      piece.whole_tiles = (int)(s.rows * s.cols / kTile);
    pieces.push_back(piece);
  };
  for (int64_t i = 0; i < f.num_segments; ++i) add(f.segments[i], (int)i);
  for (int64_t i = 0; i < f.num_holes; ++i) add(f.holes[i], -1);
  return pieces;
}

void launch_forward(void (*kernel)(ForwardParams), const Forward& f, const Workspace& workspace, cudaStream_t stream) {
  const char* name = "fastfood_forward_kernel";
  const std::vector<ForwardPiece> pieces = pieces_of(f);
  const int resident = resident_blocks(kernel, name, kThreads, kSharedBytes);
  ForwardParams a{f.params, f.theta, f.factors, f.out_dtype, 0, nullptr, 0, 0, {}};
  if (f.params.chunks > 1) {
    const int64_t tiles = (int64_t)resident * kTile;  // one of each block of threads
    a.run_tiles = (int)std::clamp<int64_t>(kWorkspaceFloats / tiles, 1, 16);
    a.sums = workspace(tiles * a.run_tiles);
  }
  for (size_t begin = 0; begin < pieces.size(); begin += kMaxPieces) {
    a.num_pieces = (int)std::min<size_t>(kMaxPieces, pieces.size() - begin);
    a.num_tiles = 0;
    for (int i = 0; i < a.num_pieces; ++i) {
      a.pieces[i] = pieces[begin + i];
      a.pieces[i].first_tile = a.num_tiles;
      a.num_tiles += (int)num_tiles(a.pieces[i].base);
    }
    const unsigned grid = (unsigned)std::min(resident, a.num_tiles);
    launch(kernel, name, dim3(grid), kThreads, kSharedBytes, stream, a);
  }
}

}  // namespace

void fastfood_forward(const Forward& f, const Workspace& workspace, cudaStream_t stream) {
  const auto kernel = choose<ForwardParams>(
      f.params, [](auto rademacher, auto kind) { return fastfood_forward_kernel<rademacher.value, kind.value>; });
  launch_forward(kernel, f, workspace, stream);
}

}  // namespace hsaid::cuda
