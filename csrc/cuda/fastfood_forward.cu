// W = W0 + factor * H(sum_c G_c z_c) for all tensors in two launches: z of all pieces, then all tiles, for which W0 is
// read once and W written once. A launch for each tensor would be hundreds, many too small to fill a device; and tiles
// in equal shares would wait for the slowest multiprocessor. So the second launch is a persistent grid, whose blocks of
// threads, none of which waits for another, take equal shares of half the tiles and draw tickets for the other half.
// Where tiles are listed, there is one piece, and tile t of the call is tile listed[t] of it. With one chunk a block z
// is the same for all pieces: it is made once, and read for each tile, whose chunk is another than that of the tile
// before.

#include <algorithm>

#include "pieces.h"

namespace hsaid::cuda {

namespace {

constexpr int kTicket = kTableFloats - 1;  // where in `tables` the ticket that a block drew lies

struct ForwardPiece {
  Piece base;
  void* out;  // where its first element goes
  uint64_t stream;
  int factor;       // -1: a hole
  int first_tile;   // how many tiles the pieces before have
  int whole_tiles;  // so many, the first ones, are read and written in vectors alone
  int first_chunk;  // with one chunk a block: that of block 0
};

struct ForwardParams {
  Params params;
  const float* theta;
  const float* factors;
  Dtype out_dtype;
  float* z;       // [pieces, chunks, n], or [chunks, n] with one chunk a block, as store_z leaves them
  int* taken;     // tickets so far
  int pool;       // so many tiles, the first ones, are taken by ticket
  int runs, run;  // the first `runs` tickets are for `run` tiles each, the others for one
  int num_tiles;
  int num_pieces;
  const int64_t* listed;  // of kernels for listed tiles
  int launches;           // that go on with the same z
  ForwardPiece pieces[kMaxPieces];
};
static_assert(sizeof(ForwardParams) <= kParameterBytes, "kMaxPieces is too large");

HSAID_INLINE int64_t num_tiles(const Piece& p) { return (p.count + kTile - 1) / kTile; }

// W of whole tile t, in vectors of four values, to where `out` has tile `to`.
template <class Out, class Base>
HSAID_DEVICE void write_vectors(const ForwardPiece& piece, int t, int to, const float (&x)[kPerThread], float factor) {
  using Load = typename Quad<Base>::Bits;
  using Store = typename Quad<Out>::Bits;
  const Base* base = tile_address((const Base*)piece.base.data, t) + position<C>(0);
  Out* out = tile_address((Out*)piece.out, to) + position<C>(0);
  constexpr int batch = 32 / (sizeof(Load) / 4);  // vectors in flight: as many as there are registers left
#pragma unroll
  for (int first = 0; first < kPerThread / 4; first += batch) {
    Load loaded[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) loaded[j] = load_once((const Load*)(base + C::Register::spread(4 * (first + j))));
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      const int i = 4 * (first + j);
      const float4 w = Quad<Base>::widened(loaded[j]);
      store_once((Store*)(out + C::Register::spread(i)),
                 Quad<Out>::narrowed(
                     {w.x + factor * x[i], w.y + factor * x[i + 1], w.z + factor * x[i + 2], w.w + factor * x[i + 3]}));
    }
  }
}

// Asks for W0 of a whole tile, 128 bytes at a time. Between drawing and the transform is early enough: any earlier, and
// more of it has left the second-level cache again when it is wanted (docs/kernels.md).
HSAID_DEVICE void prefetch_base(const ForwardPiece& piece, int t) {
  if (t >= piece.whole_tiles) return;
  const int size = item_size(piece.base.dtype);
  const char* share = (const char*)piece.base.data + ((int64_t)t * kTile + (int64_t)thread_index() * kPerThread) * size;
  prefetch(share);
  if (size == 4) prefetch(share + 128);
}

// W of any other tile, ragged, strided, misaligned or without a base: in two halves that go through the exchange, by
// elements, or in fours where the piece allows it.
template <bool kListed>
HSAID_DEVICE void write_elements(const ForwardPiece& piece, Dtype dtype, int t, int to, const float (&x)[kPerThread],
                                 float factor) {
  void* out = kListed ? (char*)piece.out + (int64_t)(to - t) * (kTile * item_size(dtype)) : piece.out;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t own = opaque(position<C>(0));
    sync_block();
#pragma unroll
    for (int i = half * 32; i < half * 32 + 32; i += 4)
      exchange().store((int)(own | C::Register::spread(i & 31)), float4{x[i], x[i + 1], x[i + 2], x[i + 3]});
    sync_block();
    const int64_t first = (int64_t)t * kTile + half * (kTile / 2);
    if (piece.base.fours) {
#pragma unroll 1
      for (int at = thread_index() * 4; at < kTile / 2 && first + at < piece.base.count; at += kThreads * 4) {
        const int64_t offset = element(piece.base, first + at);
        const float4 w = load_four(piece.base, offset), v = exchange().load<float4>(at);
        store_four(out, dtype, offset,
                   {w.x + factor * v.x, w.y + factor * v.y, w.z + factor * v.z, w.w + factor * v.w});
      }
      continue;
    }
#pragma unroll 1
    for (int at = thread_index(); at < kTile / 2 && first + at < piece.base.count; at += kThreads) {
      const int64_t offset = element(piece.base, first + at);
      store_element(out, dtype, offset, load_element(piece.base, offset) + factor * exchange().load(at));
    }
  }
}

// Zeros behind the end of a piece, in the rest of the tile.
HSAID_DEVICE void write_rest(const ForwardPiece& piece, Dtype dtype, int t, int to) {
  const int64_t first = (int64_t)to * kTile, left = piece.base.count - (int64_t)t * kTile;
#pragma unroll 1
  for (int64_t at = left + thread_index(); at < kTile; at += kThreads)
    store_element(piece.out, dtype, first + at, 0.0f);
}

template <bool kListed>
HSAID_DEVICE void write_tile(const ForwardPiece& piece, Dtype dtype, int t, int to, const float (&x)[kPerThread],
                             float factor) {
  if (t >= piece.whole_tiles) {
    write_elements<kListed>(piece, dtype, t, to, x, factor);
    if (kListed) write_rest(piece, dtype, t, to);
  } else if (dtype == Dtype::kFloat)
    write_vectors<float, float>(piece, t, to, x, factor);
  else if (dtype == Dtype::kBfloat16 && piece.base.dtype == Dtype::kFloat)
    write_vectors<bf16, float>(piece, t, to, x, factor);
  else if (dtype == Dtype::kBfloat16)
    write_vectors<bf16, bf16>(piece, t, to, x, factor);
  else if (piece.base.dtype == Dtype::kFloat)
    write_vectors<fp16, float>(piece, t, to, x, factor);
  else
    write_vectors<fp16, fp16>(piece, t, to, x, factor);
}

HSAID_DEVICE void copy_hole(const ForwardPiece& piece, Dtype dtype, int t) {
  const int64_t first = (int64_t)t * kTile;
  if (piece.base.fours) {
    for (int at = thread_index() * 4; at < kTile && first + at < piece.base.count; at += kThreads * 4) {
      const int64_t offset = element(piece.base, first + at);
      store_four(piece.out, dtype, offset, load_four(piece.base, offset));
    }
    return;
  }
  for (int at = thread_index(); at < kTile && first + at < piece.base.count; at += kThreads) {
    const int64_t offset = element(piece.base, first + at);
    store_element(piece.out, dtype, offset, load_element(piece.base, offset));
  }
}

// z of every chunk of every piece.
template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) forward_z_kernel(const __grid_constant__ ForwardParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int piece = (int)block_index().x, chunk = (int)block_index().y;
  if (piece == 0 && chunk == 0 && thread_index() == 0) *a.taken = 0;
  if (a.pieces[piece].factor < 0) return;
  make_z<kKind>(p, a.theta, a.pieces[piece].stream, chunk);
  store_z(a.z + ((int64_t)(piece * p.chunks + chunk) << p.q), p.q);
}

// z of every chunk, the same for all pieces; the counters of `launches` launches.
template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) forward_shared_z_kernel(const __grid_constant__ ForwardParams a) {
  start_next_kernel();
  const Params p = specialised<kKind>(a.params);
  const int chunk = (int)block_index().x;
  if (chunk == 0)
    for (int i = thread_index(); i < a.launches; i += kThreads) a.taken[i] = 0;
  make_z<kKind>(p, a.theta, kSharedStream, chunk);
  store_z(a.z + ((int64_t)chunk << p.q), p.q);
}

// z for all values of a tile with one chunk a block; for n < 256 by way of the exchange, as in draw_slowly.
HSAID_DEVICE void load_z(const float* z, const Draws& d, float (&x)[kPerThread]) {
  const int q = d.params.q;
  if (q >= kFastDrawBits) {
    const float* own = z + ((int64_t)stream_at(d, position<A>(0)).chunk << q);
#pragma unroll
    for (int v = 0; v < 16; ++v) {
      const float4 four = z_vector(own, v, q);
      x[a_register(v, 0)] = four.x;
      x[a_register(v, 1)] = four.y;
      x[a_register(v, 2)] = four.z;
      x[a_register(v, 3)] = four.w;
    }
    return;
  }
  const Shared own = exchange() + (int)thread_index();
  sync_block();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1
    for (int i = 0; i < 32; ++i) {
      const uint32_t e = position<A>(half * 32 + i), mask = (1u << q) - 1;
      own.store(i * kThreads, z[(int64_t)stream_at(d, e).chunk << q | (e & mask)]);
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) x[half * 32 + i] = own.load(i * kThreads);
  }
}

template <bool kRademacher, Kind kKind, bool kListed>
__global__ void __launch_bounds__(kThreads, 2) fastfood_forward_kernel(const __grid_constant__ ForwardParams a) {
  constexpr bool kChunks = has_chunks(kKind), kOneChunk = is_one_chunk(kKind);
  const Params p = specialised<kKind>(a.params);
  const auto first_tile = [&](int64_t i) { return i < a.num_pieces ? a.pieces[i].first_tile : a.num_tiles; };
  const auto share = [&](unsigned block) {  // the first tile of a block of threads
    return a.pool + (int)((int64_t)(a.num_tiles - a.pool) * block / grid_width());
  };
  const auto z_of = [&](int piece, int chunk) { return a.z + ((int64_t)(piece * p.chunks + chunk) << p.q); };
  prepare_normals();
  sync_block();
  wait_for_previous_kernel();

  int tile = share(block_index().x), last = share(block_index().x + 1), ready = -1;  // the piece whose z is in `kept`
  for (;;) {
    if (tile == last) {
      sync_block();
      if (thread_index() == 0) tables().store(kTicket, float_from_bits((uint32_t)add_one(a.taken)));
      sync_block();
      const int ticket = (int)bits_from_float(tables().load(kTicket));
      const bool in_run = ticket < a.runs;
      tile = in_run ? ticket * a.run : a.runs * (a.run - 1) + ticket;
      if (tile >= a.pool) return;
      last = tile + (in_run ? a.run : 1);
    }
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
    if (!kChunks && !kOneChunk && i != ready) {
#pragma unroll
      for (int v = 0; v < 16; ++v) kept().store(vector_place(v, thread_index()), z_vector(z_of(i, 0), v, p.q));
      ready = i;
    }
    for (; t < t_end; ++t) {
      float x[kPerThread];
      Draws draws = {p, piece.stream, kDiagonal, (int64_t)tile_of<kListed>(a.listed, t) << (kTileBits - p.q), 1, 0};
      const auto add_product = [&](int v, const auto(&d)[4], float4 z) {
        const float product[4] = {d[0].times(z.x), d[1].times(z.y), d[2].times(z.z), d[3].times(z.w)};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& sum = x[a_register(v, j)];
          sum = kChunks ? sum + product[j] : product[j];
        }
      };
      if constexpr (kOneChunk) {
        draws.chunk = piece.first_chunk;
        load_z(a.z, draws, x);
        draw<kRademacher, kKind>(draws, [&](int v, const auto(&d)[4]) {
#pragma unroll
          for (int j = 0; j < 4; ++j) x[a_register(v, j)] = d[j].times(x[a_register(v, j)]);
        });
      } else if constexpr (kChunks) {
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) x[j] = -0.0f;  // which changes no product
#pragma unroll 1
        for (; draws.chunk < p.chunks; ++draws.chunk) {
          const float* z = z_of(i, draws.chunk);
          draw<kRademacher, kKind>(draws, [&](int v, const auto(&d)[4]) { add_product(v, d, z_vector(z, v, p.q)); });
        }
      } else {
        draw<kRademacher, kKind>(draws, [&](int v, const auto(&d)[4]) {
          add_product(v, d, kept().load<float4>(vector_place(v, thread_index())));
        });
      }
      prefetch_base(piece, tile_of<kListed>(a.listed, t));
      transform(x, p.q);
      write_tile<kListed>(piece, a.out_dtype, tile_of<kListed>(a.listed, t), t, x, factor);
    }
  }
}

// Piece i of a call: of the segments, then the holes.
ForwardPiece forward_piece(const Forward& f, int64_t i) {
  const bool hole = i >= f.num_segments;
  const Segment& s = hole ? f.holes[i - f.num_segments] : f.segments[i];
  const DeviceTensor base = f.base && s.tensor >= 0 ? f.base[s.tensor] : DeviceTensor{nullptr, f.out_dtype};
  ForwardPiece piece{piece_of(s, base),
                     (void*)address(f.out, f.out_dtype, s.out_offset),
                     (uint64_t)s.stream,
                     hole ? -1 : (int)i,
                     0,
                     0,
                     hole ? 0 : chunk_of(f.params, (uint64_t)s.stream, 0)};
  if (!is_aligned(piece.out, f.out_dtype))
    piece.base.fours = false;
  else if (base.data && piece.base.cols == 0 && is_aligned(piece.base.data, base.dtype))
    piece.whole_tiles = (int)(s.rows * s.cols / kTile);
  return piece;
}

void launch_forward(void (*z_kernel)(ForwardParams), void (*kernel)(ForwardParams), const Forward& f,
                    const Workspace& workspace, cudaStream_t stream) {
  const char* name = "fastfood_forward_kernel";
  const int64_t pieces = f.num_segments + f.num_holes;
  const int resident = resident_blocks(kernel, name, kThreads, kSharedBytes), chunks = f.params.chunks;
  const bool shared_z = f.params.one_chunk;
  const int64_t z_floats = width(f.params) * chunks, z_pieces = shared_z ? kMaxPieces : kWorkspaceFloats / z_floats;
  const int64_t most = std::clamp<int64_t>(z_pieces, 1, std::min<int64_t>(kMaxPieces, pieces));
  ForwardParams a{};
  a.params = f.params;
  a.theta = f.theta;
  a.factors = f.factors;
  a.out_dtype = f.out_dtype;
  a.listed = f.listed.entries;
  a.launches = shared_z ? (int)((pieces + most - 1) / most) : 1;
  const int64_t all_z = shared_z ? z_floats : most * z_floats;
  a.z = workspace(all_z + a.launches);
  a.taken = (int*)(a.z + all_z);
  if (shared_z) launch(z_kernel, "forward_shared_z_kernel", dim3((unsigned)chunks), kThreads, kSharedBytes, stream, a);
  for (int64_t begin = 0; begin < pieces; begin += most, a.taken += shared_z) {
    a.num_pieces = (int)std::min(most, pieces - begin);
    a.num_tiles = 0;
    for (int i = 0; i < a.num_pieces; ++i) {
      a.pieces[i] = forward_piece(f, begin + i);
      a.pieces[i].first_tile = a.num_tiles;
      a.num_tiles += (int)(a.listed ? f.listed.count : num_tiles(a.pieces[i].base));
    }
    // Tiles of 16-bit weights take less time, so that coming to the pool for each would tell; but the last go singly.
    a.pool = a.num_tiles > resident ? a.num_tiles / 2 : 0;
    a.run = f.out_dtype == Dtype::kFloat ? 1 : 4;
    a.runs = a.pool / 4 * 3 / a.run;
    if (!shared_z)
      launch(z_kernel, "forward_z_kernel", dim3((unsigned)a.num_pieces, (unsigned)chunks), kThreads, kSharedBytes,
             stream, a);
    launch_next(kernel, name, dim3((unsigned)std::min(resident, a.num_tiles)), kThreads, kSharedBytes, stream, a);
  }
}

}  // namespace

void fastfood_forward(const Forward& f, const Workspace& workspace, cudaStream_t stream) {
  const auto all = [](auto rademacher, auto kind) {
    return fastfood_forward_kernel<rademacher.value, kind.value, false>;
  };
  const auto listed = [](auto rademacher, auto kind) {
    return fastfood_forward_kernel<rademacher.value, kind.value, true>;
  };
  const bool list = f.listed.entries;
  if (f.params.one_chunk) {
    const auto z_kernel =
        choose_one_chunk<ForwardParams>(f.params, [](auto, auto kind) { return forward_shared_z_kernel<kind.value>; });
    const auto kernel =
        list ? choose_one_chunk<ForwardParams>(f.params, listed) : choose_one_chunk<ForwardParams>(f.params, all);
    return launch_forward(z_kernel, kernel, f, workspace, stream);
  }
  const auto z_kernel = choose<ForwardParams>(f.params, [](auto, auto kind) { return forward_z_kernel<kind.value>; });
  const auto kernel = list ? choose_listed<ForwardParams>(f.params, listed) : choose<ForwardParams>(f.params, all);
  launch_forward(z_kernel, kernel, f, workspace, stream);
}

}  // namespace hsaid::cuda
