// The projection's kernels, compiled once for each instruction set (HSAID_ISA):
//
//     forward   out_b = base_b + f * H(sum_c G_bc . z_c)     block after block; z (z.h) is made when a segment begins,
//                                                            or before where it is the same for all
//     adjoint   u_c  += G_bc . (H g_b)                       block after block of a group
//
// A block of n <= 16,384 floats and z stay in the second-level cache. Memory is touched once: W0 read and W written, or
// the gradients read. That pass over one block goes beside the generation of the next, which only computes: one after
// the other, the core would wait for the memory, and then the memory for the core.
// Everything here and in the headers beside it has internal linkage, and nothing calls the standard library's inline
// functions, of which the linker would keep one instruction set's copy for all.

#include "hadamard.h"
#include "subnormals.h"
#include "z.h"

#define HSAID_CONCAT_(a, b) a##b
#define HSAID_CONCAT(a, b) HSAID_CONCAT_(a, b)
#define HSAID_STRING_(a) #a
#define HSAID_STRING(a) HSAID_STRING_(a)

namespace hsaid {
namespace {

template <class T>
constexpr int kLineVectors = kLineBytes / (int)sizeof(T) / kLanes;
template <class T>
constexpr bool kSplit = std::is_same_v<T, bf16>;

HSAID_INLINE int64_t diagonal_bytes(const Params& p) {
  return num_drawn(p) * (int64_t)(sizeof(PhiloxPrefix) + 4 * num_sign_words(p.q)) + 2 * kLineBytes;
}

// The runs of consecutive elements that values [first, first + count) of a segment fall into:
// f(offset from the segment's first element, number of values before, length).
template <class F>
HSAID_INLINE void for_runs(const Segment& s, int64_t first, int64_t count, F&& f) {
  if (is_dense(s)) return f(first, (int64_t)0, count);
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / s.cols, col = (first + done) % s.cols;
    const int64_t length = s.cols - col < count - done ? s.cols - col : count - done;
    f(row * s.row_stride + col, done, length);
    done += length;
  }
}

// Values [first, first + count) of a segment of a tensor as floats.
template <class T>
void gather(const TensorView& t, const Segment& s, int64_t first, int64_t count, float* out) {
  const T* data = (const T*)t.data;
  for_runs(s, first, count, [&](int64_t offset, int64_t done, int64_t length) HSAID_LAMBDA {
    if (t.dense)
      for (int64_t i = 0; i < length; ++i) out[done + i] = to_float(data[s.offset + offset + i]);
    else
      for (int64_t i = 0; i < length; ++i) out[done + i] = to_float(data[strided_offset(t, s.offset + offset + i)]);
  });
}

void gather_any(const TensorView& t, const Segment& s, int64_t first, int64_t count, float* out) {
  if (t.dtype == Dtype::kFloat) return gather<float>(t, s, first, count, out);
  if (t.dtype == Dtype::kBfloat16) return gather<bf16>(t, s, first, count, out);
  return gather<fp16>(t, s, first, count, out);
}

// Some processors let a load, or a fetch, wait for older stores whose addresses have the same lowest twelve bits, and a
// store past the caches is not done for long (docs/cpu.md, "Addresses").
constexpr uintptr_t kPage = 4096;

// The distance, in values, from a line of the block at `from` to the line that is fetched with it: `ahead`, to the same
// line of the next block. It is up to a page more where a block is as long as a page, so that half of the lines come
// from one page and half from the next: two pages come faster side by side than one after the other; and where what is
// fetched from a shorter block would be near the place in a page of what is stored at `out`, if anything is.
HSAID_INLINE int64_t fetch_ahead(const void* from, int64_t ahead, int q, uintptr_t item, const void* out) {
  const uintptr_t bytes = item << q, next = (uintptr_t)from + ahead * item, to = (uintptr_t)out;
  constexpr uintptr_t near = 8 * kLineBytes;
  const bool meets = out && bytes < kPage && (next - to + near) % kPage < 2 * near;
  if (bytes != kPage && !meets) return ahead;
  const uintptr_t place = out ? to + kPage * 5 / 8 : kPage / 2;  // no part of a burst is stored there
  return ahead + (int64_t)((place - next) % kPage / item);
}

// Draws that make a part of the last pass, over which the middle passes go while it is in the first-level cache.
HSAID_INLINE int64_t draws_together(int q) {
  const int64_t draws = num_draws(q) >> last_bits(q);
  return draws ? draws : 1;
}

// How often each position is counted in `beside` (transform.h) while a block is generated or accumulated.
HSAID_INLINE int64_t counts(const Params& p) {
  return (p.rademacher ? num_drawn(p) : kDrawCounts * num_drawn(p) + 1) + num_middle_passes(p.q);
}
// Lines of T that are moved at a time while a block is generated or accumulated: so many that they cost much more than
// a call.
constexpr int kBurst = kLanes == 8 ? 16 : 8;
template <class T>
HSAID_INLINE Beside beside(const Params& p, void (*move)(const void*, int64_t, int64_t), const void* what,
                           int burst = kBurst) {
  const int64_t lines = num_lines<kLineVectors<T>>(p.q), most = burst >> last_bits(p.q);
  const int64_t step = lines < most ? lines : most;
  return {move, what, step, counts(p) * width(p) / lines * step};
}

// A transformed block on its way out.
struct Emission {
  const Forward* forward;
  const Segment* segment;
  int64_t block, next;  // numbers in the segment: of this block, of the next one made
  int64_t place;        // among the segment's blocks that are made
  float factor;
  const float* buffer;  // after the middle passes
  void* out;
  const void* base = nullptr;  // what it is added to; null: 0
  int64_t ahead = 0;           // from a line of it to the one that is fetched, in values
  bool stream = false;
};

// Whether loads of a burst may meet two or more stores of the same burst, which takes a block longer than a page: parts
// of it then are at the same place in a page. All of the burst must then be loaded before any of it is stored.
HSAID_INLINE bool must_store_apart(const void* base, const void* out, int q, uintptr_t item) {
  const uintptr_t part = (item << q) >> last_bits(q), repeats = part < kPage ? part : kPage;
  const uintptr_t length = (kBurst >> last_bits(q)) * kLineBytes;
  return item << q > kPage && ((uintptr_t)base - (uintptr_t)out + length - 1) % repeats < length + kLineBytes - 1;
}

// Lines to memory, each to its own place: as many as registers hold.
constexpr int kApart = 8;
HSAID_INLINE void store_burst(const void* lines, void* const (&to)[kApart], bool stream) {
  constexpr int vectors = kLineBytes / sizeof(vu);
  vu x[kApart][vectors];
  unroll<kApart>([&](auto line) HSAID_LAMBDA {
    unroll<vectors>([&](auto i) HSAID_LAMBDA { x[line][i] = ((const vu*)lines)[line * vectors + i]; });
  });
  asm volatile("" : : "r"(lines) : "memory");  // or the compiler might mix loads and stores
  unroll<kApart>([&](auto line) HSAID_LAMBDA { store_words(to[line], x[line], stream); });
}

// How lines are stored.
enum class Store { kCached, kPastCaches, kApart };

// Lines [begin, end) of each part of the last pass.
template <class T, class Base, Store kStore>
void emit_lines(const void* emission, int64_t begin, int64_t end) {
  const Emission& e = *(const Emission*)emission;
  T* out = (T*)e.out;
  const Base* base = (const Base*)e.base;
  const vf factor = broadcast(e.factor);
  constexpr int vectors = kLineVectors<T>, line = kLineBytes / sizeof(T);
  alignas(kLineBytes) T burst[kApart * line];
  void* to[kApart];
  int count = 0;
  const auto drain = [&](int64_t k, const vf(&y)[vectors]) HSAID_LAMBDA {
    vf w[vectors];
    if constexpr (std::is_void_v<Base>)
      unroll<vectors>([&](auto i) HSAID_LAMBDA { w[i] = vf{}; });
    else if constexpr (kSplit<T>)
      unroll<vectors / 2>([&](auto i)
                              HSAID_LAMBDA { load_split(base + k + 2 * i * kLanes, &w[2 * i], &w[2 * i + 1]); });
    else
      unroll<vectors>([&](auto i) HSAID_LAMBDA { w[i] = load_as_float(base + k + i * kLanes); });
    unroll<vectors>([&](auto i) HSAID_LAMBDA {
      const vf step = factor * y[i];
      w[i] = w[i] + step;
    });
    if constexpr (!std::is_void_v<Base>)
      for (int i = 0; i < (int)(vectors * kLanes * sizeof(Base)); i += kLineBytes)
        __builtin_prefetch((const char*)(base + k + e.ahead) + i, 0, 2);
    if constexpr (kStore == Store::kApart) {
      to[count] = out + k;
      store_line(burst + line * count++, w, false);
    } else {
      store_line(out + k, w, kStore == Store::kPastCaches);
    }
  };
  last_pass<vectors, kSplit<T>>(e.buffer, e.forward->params.q, begin, end, drain);
  if constexpr (kStore == Store::kApart) store_burst(burst, to, e.stream);
}

// A block that is ragged, or whose segment or base is not dense. `scratch` is two times n.
template <class T>
HSAID_NOINLINE void emit_slowly(const Emission& e, float* scratch) {
  const Forward& a = *e.forward;
  const Segment& s = *e.segment;
  const int64_t n = width(a.params), first = e.block * n;
  const int64_t left = s.rows * s.cols - first, count = left < n ? left : n;
  float *values = scratch, *base_values = scratch + n;
  T* out = (T*)a.out + s.out_offset;
  if (a.listed.entries) {
    out += (e.place - e.block) * n;
    if (count < n) std::memset(out + (count > 0 ? first + count : first), 0, (count > 0 ? n - count : n) * sizeof(T));
    if (count <= 0) return;
  }
  last_pass<1, false>(e.buffer, a.params.q, 0, num_lines<1>(a.params.q),
                      [&](int64_t k, const vf(&y)[1]) HSAID_LAMBDA { store(values + k, y[0]); });
  if (a.base)
    gather_any(a.base[s.tensor], s, first, count, base_values);
  else
    std::memset(base_values, 0, count * sizeof(float));
  for_runs(s, first, count, [&](int64_t offset, int64_t done, int64_t length) HSAID_LAMBDA {
    for (int64_t i = 0; i < length; ++i) {
      const float step = e.factor * values[done + i];
      from_float(base_values[done + i] + step, out + offset + i);
    }
  });
}

// Completes an emission, and returns what takes it out beside other work; a block that cannot go by lines is out
// already.
template <class T>
Beside begin_emission(Emission& e, float* scratch) {
  const Params& p = e.forward->params;
  const Segment& s = *e.segment;
  const TensorView* base = e.forward->base ? e.forward->base + s.tensor : nullptr;
  if (((e.block + 1) << p.q) > s.rows * s.cols || !is_dense(s) || (base && !base->dense)) {
    emit_slowly<T>(e, scratch);
    return kNothingBeside;
  }
  const bool wide = base && base->dtype == Dtype::kFloat;
  if (base) {
    const int64_t item = item_size(base->dtype);
    e.base = (const char*)base->data + (s.offset + (e.block << p.q)) * item;
    e.ahead = fetch_ahead(e.base, (e.next - e.block) << p.q, p.q, item, e.out);
  }
  e.stream = e.forward->stream && (uintptr_t)e.out % kLineBytes == 0;
  if (kStreams && base && item_size(base->dtype) == sizeof(T) && must_store_apart(e.base, e.out, p.q, sizeof(T)))
    return beside<T>(p, emit_lines<T, T, Store::kApart>, &e, kApart);
  const auto emit = [&](auto store) HSAID_LAMBDA {
    return !base ? emit_lines<T, const void, store> : wide ? emit_lines<T, float, store> : emit_lines<T, T, store>;
  };
  constexpr Store past_caches = kStreams ? Store::kPastCaches : Store::kCached;
  const auto move = e.stream ? emit(std::integral_constant<Store, past_caches>{})
                             : emit(std::integral_constant<Store, Store::kCached>{});
  return beside<T>(p, move, &e);
}

Beside begin_emission(Emission& e, float* scratch) {
  if (e.forward->out_dtype == Dtype::kFloat) return begin_emission<float>(e, scratch);
  if (e.forward->out_dtype == Dtype::kBfloat16) return begin_emission<bf16>(e, scratch);
  return begin_emission<fp16>(e, scratch);
}

// A draw of sum_c G_c . z_c, and the first pass over it.
template <bool kRademacher>
HSAID_NOINLINE void generate(const Diagonal& diagonal, const float* z, float* buffer, int64_t draw, Beside& beside) {
  const Params& p = diagonal.params;
  const int64_t strips = num_strips(p.q) / num_draws(p.q), begin = draw * strips, end = begin + strips;
  const int64_t n = width(p), sign_words = num_sign_words(p.q);
  const int drawn = num_drawn(p);
  const uint32_t* signs = diagonal.sign_words;
  if constexpr (kRademacher) {
    first_pass(buffer, p.q, begin, end, beside, drawn, [&](auto t, int64_t k, vf* x) HSAID_LAMBDA {
      const auto each_product = [&](int chunk, auto&& use) HSAID_LAMBDA {
        const float* values = z + chunk * n + k;
        sign_tile<t>(signs + chunk * sign_words, k, [&](int i, vu sign) HSAID_LAMBDA {  //
          use(i, (vf)((vu)load(values + i * kLanes) ^ sign));
        });
      };
      each_product(0, [&](int i, vf product) HSAID_LAMBDA { x[i] = product; });
      for (int chunk = 1; chunk < drawn; ++chunk)
        each_product(chunk, [&](int i, vf product) HSAID_LAMBDA { x[i] = x[i] + product; });
    });
  } else {
    draw_gaussian(diagonal, 0, draw, beside, [&](int64_t k, vf g) HSAID_LAMBDA { store(buffer + k, g * load(z + k)); });
    for (int chunk = 1; chunk < drawn; ++chunk) {
      z += n;
      draw_gaussian(diagonal, chunk, draw, beside, [&](int64_t k, vf g) HSAID_LAMBDA {
        const vf product = g * load(z + k);
        store(buffer + k, load(buffer + k) + product);
      });
    }
    first_pass(buffer, p.q, begin, end, beside, 1, [&](auto t, int64_t k, vf* x) HSAID_LAMBDA {
      unroll<(1 << t) / kLanes>([&](auto i) HSAID_LAMBDA { x[i] = load(buffer + k + i * kLanes); });
    });
  }
}

void forward(const Forward& a, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const KeepSubnormals keep;
  const Params& p = a.params;
  const int64_t n = width(p), draws = num_draws(p.q), together = draws_together(p.q);
  const int drawn = num_drawn(p);
  Arena arena((drawn + 4) * n * (int64_t)sizeof(float) + ZScratch::bytes(p) + diagonal_bytes(p));
  float* own_z = arena.take<float>(drawn * n);
  float* buffers[2] = {arena.take<float>(n), arena.take<float>(n)};
  float* scratch = arena.take<float>(2 * n);
  const ZScratch z_scratch(arena, p);
  PhiloxPrefix* prefix = arena.take<PhiloxPrefix>(drawn);
  Diagonal diagonal(p, prefix, arena.take<uint32_t>(drawn * num_sign_words(p.q)));

  Emission waiting{};  // the block before
  Beside going_out = kNothingBeside;
  int64_t index = 0;
  for (int64_t i = begin; i < end; ++i) {
    while (index + 1 < a.num_segments && a.segments[index + 1].first_block <= i) ++index;
    const Segment& s = a.segments[index];
    const int64_t place = i - s.first_block, block = block_of(a.listed, place);
    const int64_t next = i + 1 < end ? block_of(a.listed, place + 1) : block + 1;
    if (!a.z && (i == begin || place == 0))
      for (int chunk = 0; chunk < p.chunks; ++chunk)
        make_z(p, (uint64_t)s.stream, chunk, a.theta, diagonal.keys, z_scratch, own_z + chunk * n);
    diagonal.start(s, block);
    const float* z = a.z ? a.z + diagonal.first_chunk * n : own_z;
    char* out = (char*)a.out + (s.out_offset + place * n) * item_size(a.out_dtype);
    float* buffer = buffers[i & 1];
    for (int64_t draw = 0; draw < draws;) {
      const int64_t first = draw;
      for (; draw < first + together; ++draw)
        (p.rademacher ? generate<true> : generate<false>)(diagonal, z, buffer, draw, going_out);
      middle_passes<false>(buffer + first * n / draws, together * n / draws, p.q, going_out);
    }
    waiting = {&a, &s, block, next, place, a.factors[index], buffer, out};
    going_out = begin_emission(waiting, scratch);
  }
  going_out.count(counts(p) * n);
  if (a.stream) finish_streaming();
}

// A block of gradients on its way in, through the transposed last pass.
struct Reading {
  const void* grads;
  int64_t ahead;  // from a line to the one that is fetched, in values
  int q;
  float* buffer;
};

template <class T>
void read_lines(const void* reading, int64_t begin, int64_t end) {
  const Reading& r = *(const Reading*)reading;
  const T* data = (const T*)r.grads;
  constexpr int vectors = kLineVectors<T>;
  const auto fill = [&](int64_t k, vf(&y)[vectors]) HSAID_LAMBDA {
    if constexpr (kSplit<T>)
      unroll<vectors / 2>([&](auto i)
                              HSAID_LAMBDA { load_split(data + k + 2 * i * kLanes, &y[2 * i], &y[2 * i + 1]); });
    else
      unroll<vectors>([&](auto i) HSAID_LAMBDA { y[i] = load_as_float(data + k + i * kLanes); });
    __builtin_prefetch(data + k + r.ahead, 0, 2);
  };
  last_pass_transposed<vectors, kSplit<T>>(r.buffer, r.q, begin, end, fill);
}

// A block of a segment's gradient.
struct Block {
  const Segment* segment;
  int64_t number;
};

// The address of a block that is whole and dense, else null.
template <class T>
const T* lines_of(const Adjoint& a, const Block& block) {
  const Segment& s = *block.segment;
  const TensorView& grad = a.grads[s.tensor];
  const int64_t n = width(a.params), first = block.number * n;
  if (s.rows * s.cols - first < n || !is_dense(s) || !grad.dense || sizeof(T) != item_size(grad.dtype)) return nullptr;
  return (const T*)grad.data + s.offset + first;
}

// Returns what reads a block into r.buffer beside other work; `next` is read after it. A block that is ragged, or not
// dense, is gathered in `scratch` [n] first.
template <class T>
Beside begin_reading(const Adjoint& a, const Block& block, const Block& next, float* scratch, Reading& r) {
  const Segment& s = *block.segment;
  const TensorView& grad = a.grads[s.tensor];
  const int64_t n = width(a.params), first = block.number * n, left = s.rows * s.cols - first;
  if (const T* lines = lines_of<T>(a, block)) {
    const T* following = lines_of<T>(a, next);
    r.grads = lines;
    r.ahead = fetch_ahead(lines, following ? ((intptr_t)following - (intptr_t)lines) / (intptr_t)sizeof(T) : 0,
                          a.params.q, sizeof(T), nullptr);
    return beside<T>(a.params, read_lines<T>, &r);
  }
  const int64_t count = left < n ? left : n;
  gather<T>(grad, s, first, count, scratch);
  std::memset(scratch + count, 0, (n - count) * sizeof(float));
  r.grads = scratch;
  r.ahead = 0;
  return beside<float>(a.params, read_lines<float>, &r);
}

// With one chunk a block: what a block's sum is multiplied by, and its product with z.
struct Dot {
  float factor;
  const float* z;  // null where a block is made from all chunks
  float* sums;     // of z . G . x [num_dot_sums]: over the positions that differ in bits 4 to 7 only, in order
};

// The sum of a power of two of values, in their place: adds the upper half to the lower until one is left.
float fold(float* x, int64_t count) {
  for (int64_t half = count / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) x[k] = x[k] + x[k + half];
  return x[0];
}

// Ends the transform of a draw of x, and adds: u_c += G_c . x, or u += factor * (G . x).
template <bool kRademacher>
HSAID_NOINLINE void accumulate(const Diagonal& diagonal, float* x, float* u, const Dot& to, int64_t draw,
                               Beside& beside) {
  const Params& p = diagonal.params;
  const int64_t strips = num_strips(p.q) / num_draws(p.q), begin = draw * strips, end = begin + strips;
  const int64_t n = width(p), sign_words = num_sign_words(p.q);
  const int drawn = num_drawn(p);
  const uint32_t* signs = diagonal.sign_words;
  // use(c * n + k, i, G_c . x at k + i)
  const auto each_product = [&](auto&& use) HSAID_LAMBDA {
    if constexpr (kRademacher) {
      first_pass_transposed(x, p.q, begin, end, beside, drawn, [&](auto t, int64_t k, const vf* y) HSAID_LAMBDA {
        for (int chunk = 0; chunk < drawn; ++chunk)
          sign_tile<t>(signs + chunk * sign_words, k, [&](int i, vu sign) HSAID_LAMBDA {  //
            use(chunk * n + k, i * kLanes, (vf)((vu)y[i] ^ sign));
          });
      });
    } else {
      first_pass_transposed(x, p.q, begin, end, beside, 1, [&](auto t, int64_t k, const vf* y) HSAID_LAMBDA {
        unroll<(1 << t) / kLanes>([&](auto i) HSAID_LAMBDA { store(x + k + i * kLanes, y[i]); });
      });
      for (int chunk = 0; chunk < drawn; ++chunk)
        draw_gaussian(diagonal, chunk, draw, beside,
                      [&](int64_t k, vf g) HSAID_LAMBDA { use(chunk * n + k, 0, g * load(x + k)); });
    }
  };
  if (to.z) {
    const vf factor = broadcast(to.factor);
    each_product([&](int64_t k, int i, vf product) HSAID_LAMBDA {
      const vf step = factor * product;
      store(u + k + i, load(u + k + i) + step);
      float* sums = to.sums + (k >> 8) * 16 + (k + i) % 16;
      const vf dot = product * load(to.z + k + i);
      store(sums, load(sums) + dot);
    });
    return;
  }
  each_product([&](int64_t k, int i, vf product) HSAID_LAMBDA {
    float* sum = u + k + i;
    store(sum, load(sum) + product);
  });
}

HSAID_INLINE int64_t num_dot_sums(int q) { return q > 8 ? (int64_t)16 << (q - 8) : 16; }

void adjoint_group(const Adjoint& a, const Group& group, float* u, float* dots) {
  const KeepSubnormals keep;
  const Params& p = a.params;
  const int drawn = num_drawn(p);
  const int64_t n = width(p), draws = num_draws(p.q), together = draws_together(p.q), size = drawn * n;
  const int64_t runs = group_blocks(p, 1), begin = group.begin, end = group.end;
  Arena arena((3 * n + (runs > 1 ? size : 0) + num_dot_sums(p.q)) * (int64_t)sizeof(float) + diagonal_bytes(p) +
              kLineBytes);
  float* buffers[2] = {arena.take<float>(n), arena.take<float>(n)};
  float* scratch = arena.take<float>(n);
  float* run = runs > 1 ? arena.take<float>(size) : u;
  float* dot_sums = arena.take<float>(num_dot_sums(p.q));
  PhiloxPrefix* prefix = arena.take<PhiloxPrefix>(drawn);
  Diagonal diagonal(p, prefix, arena.take<uint32_t>(drawn * num_sign_words(p.q)));
  const auto block_at = [&](int64_t i) -> Block {
    if (group.segment) return {group.segment, i};
    return {a.segments + group.places[i].segment, group.places[i].block};
  };
  const auto begin_reading_any = [&](const Block& block, const Block& next, Reading& r) {
    const Dtype dtype = a.grads[block.segment->tensor].dtype;
    return dtype == Dtype::kFloat  ? begin_reading<float>(a, block, next, scratch, r)
           : dtype == Dtype::kHalf ? begin_reading<fp16>(a, block, next, scratch, r)
                                   : begin_reading<bf16>(a, block, next, scratch, r);
  };
  const auto is_missing = [&](int64_t i) { return !a.grads[block_at(i).segment->tensor].data; };
  const auto run_of = [&](int64_t i) { return i < 0 ? -1 : (i - begin) % runs; };
  // The block after this one, in the order of runs; -1 after the last.
  const auto after = [&](int64_t i) -> int64_t {
    while (i >= 0) {
      const int64_t first = run_of(i) + 1;
      i = i + runs < end ? i + runs : first < runs && begin + first < end ? begin + first : -1;
      if (i >= 0 && !is_missing(i)) break;
    }
    return i;
  };
  std::memset(u, 0, size * sizeof(float));
  std::memset(run, 0, size * sizeof(float));

  // A block is read while the one before it is accumulated.
  int64_t block = is_missing(begin) ? after(begin) : begin, before = -1;
  for (int which = 0; block >= 0 || before >= 0; which ^= 1, before = block, block = after(block)) {
    Reading reading{nullptr, 0, p.q, buffers[which]};
    Beside coming_in = kNothingBeside;
    if (block >= 0) {
      const int64_t next = after(block);
      coming_in = begin_reading_any(block_at(block), block_at(next < 0 ? block : next), reading);
    }
    if (before < 0) {
      coming_in.count(counts(p) * n);
    } else {
      const auto [s, number] = block_at(before);
      diagonal.start(*s, block_of(a.listed, number));
      const Dot dot{a.factors[s - a.segments], a.z ? a.z + diagonal.first_chunk * n : nullptr, dot_sums};
      if (a.z) std::memset(dot_sums, 0, num_dot_sums(p.q) * sizeof(float));
      float* buffer = buffers[which ^ 1];
      for (int64_t draw = 0; draw < draws;) {
        const int64_t first = draw;
        middle_passes<true>(buffer + first * n / draws, together * n / draws, p.q, coming_in);
        for (; draw < first + together; ++draw)
          (p.rademacher ? accumulate<true> : accumulate<false>)(diagonal, buffer, run, dot, draw, coming_in);
      }
      if (a.z) dots[s->first_block + number] = fold(dot_sums, num_dot_sums(p.q));
    }
    if (runs > 1 && before >= 0 && run_of(block) != run_of(before)) {
      for (int64_t k = 0; k < size; ++k) u[k] = u[k] + run[k];
      std::memset(run, 0, size * sizeof(float));
    }
  }
}

float adjoint_segment(const Adjoint& a, const Segment& s, float factor, float* u) {
  const KeepSubnormals keep;
  const Params& p = a.params;
  const int64_t n = width(p);
  Arena arena(n * (int64_t)sizeof(float) + ZScratch::bytes(p));
  float* z = arena.take<float>(n);
  const ZScratch scratch(arena, p);
  const PhiloxKeys keys = philox_keys(p.seed);
  float dot = 0.0f;
  for (int chunk = 0; chunk < p.chunks; ++chunk, u += n) {
    make_z(p, (uint64_t)s.stream, chunk, a.theta, keys, scratch, z);
    for (int64_t k = 0; k < n; ++k) z[k] = u[k] * z[k];
    dot += fold(z, n);
    transpose_z(p, (uint64_t)s.stream, chunk, factor, keys, scratch, u);
  }
  return dot;
}

void shared_z(const Params& p, int chunk, const float* theta, float* z) {
  const KeepSubnormals keep;
  Arena arena(ZScratch::bytes(p));
  make_z(p, kSharedStream, chunk, theta, philox_keys(p.seed), ZScratch(arena, p), z);
}

void shared_z_transposed(const Params& p, int chunk, float* u) {
  const KeepSubnormals keep;
  Arena arena(ZScratch::bytes(p));
  const ZScratch scratch(arena, p);
  make_permutation(p, kSharedStream, chunk, scratch.pi);
  transpose_z(p, kSharedStream, chunk, 1.0f, philox_keys(p.seed), scratch, u);
}

}  // namespace

const Kernels* HSAID_CONCAT(kernels_, HSAID_ISA)() {
  static constexpr Kernels table = {HSAID_STRING(HSAID_ISA),
                                    forward,
                                    adjoint_group,
                                    adjoint_segment,
                                    shared_z,
                                    shared_z_transposed,
                                    &HSAID_CONCAT(hadamard_, HSAID_ISA)};
  return &table;
}

}  // namespace hsaid
