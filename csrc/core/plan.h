// The plan as kernels see it. fastfood/plan.py makes its table, whose columns are Segment's fields in order.
#pragma once

#include "streams.h"

namespace hsaid {

constexpr int kMinWidthBits = 5, kMaxWidthBits = 14;

// A 2-D strided piece of a tensor; strides and offsets in elements. Also a hole: a piece that is not projected.
struct Segment {
  int64_t tensor;      // index into the lists of base tensors and gradients; -1: a hole that is in none
  int64_t offset;      // first element, within the tensor
  int64_t out_offset;  // first element, within the flat output
  int64_t rows, cols;  // numel = rows * cols, read row by row
  int64_t row_stride;
  int64_t stream;       // 64-bit stream id
  int64_t first_block;  // how many blocks the segments before it have
};
static_assert(sizeof(Segment) == 8 * sizeof(int64_t), "Segment is a row of an int64 table");

HSAID_INLINE bool is_dense(const Segment& s) { return s.rows == 1 || s.row_stride == s.cols; }

// What all segments share.
struct Params {
  uint64_t seed;
  int64_t dim;  // len(theta)
  int q;        // n = 2^q values a block
  int chunks;   // ceil(dim / n)
  bool rademacher;
  bool one_chunk = false;  // each block is made from one of several chunks, chunk_of; z is the same for all segments
};

// The stream of B and Pi where z is the same for all segments.
constexpr uint64_t kSharedStream = 0;

// How many chunks a block is made from.
HSAID_INLINE int num_drawn(const Params& p) { return p.one_chunk ? 1 : p.chunks; }
// The first of them.
HSAID_INLINE int chunk_of(const Params& p, uint64_t stream, int64_t block) {
  return p.one_chunk ? (int)((stream % (uint32_t)p.chunks + (uint64_t)block) % (uint32_t)p.chunks) : 0;
}

// A choice of the blocks of a plan's only segment, which is dense. The i-th of them is block_of(listed, i).
struct Listed {
  const int64_t* entries;  // [count], rising; each stands for `span` blocks, from entry * span on. Null: all blocks
  int64_t count, span;
  int64_t blocks = 0;  // for which there could be entries: those of the segment, and the rest of its last entry
};

HSAID_INLINE int64_t block_of(const Listed& listed, int64_t place) {
  if (!listed.entries) return place;
  return listed.entries[place / listed.span] * listed.span + place % listed.span;
}

HSAID_INLINE int64_t width(const Params& p) { return (int64_t)1 << p.q; }
// The blocks of a group, which the adjoint adds up in one go: run_blocks tiles of 2^14 values. Run r of a group is its
// blocks r, r + 2^14 / n, r + 2 * 2^14 / n, ... (docs/rng.md).
HSAID_INLINE int64_t group_blocks(const Params& p, int64_t run_blocks) { return run_blocks << (kMaxWidthBits - p.q); }
HSAID_INLINE int64_t num_blocks(const Params& p, const Segment& s) { return (s.rows * s.cols + width(p) - 1) >> p.q; }

// The row that item `item` is in, where first(i) items come before row i.
template <class First>
HSAID_INLINE int row_of(int64_t item, int64_t rows, First&& first) {
  int64_t low = 0, high = rows;  // the last row that starts at or before the item is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= item ? low : high) = middle;
  }
  return (int)low;
}

// The first item of a share of the work that starts at `cost`. An item costs 1, and a row another `row_cost`, before
// its first item; cost_before(i) is the cost of the rows before row i.
template <class CostBefore>
HSAID_INLINE int64_t item_at(int64_t cost, int64_t rows, int64_t row_cost, CostBefore&& cost_before) {
  const int row = row_of(cost, rows, cost_before);
  const int64_t first = cost_before(row) - row_cost * row, items = cost_before(row + 1) - row_cost * (row + 1) - first;
  const int64_t within = cost - cost_before(row) - row_cost;
  return first + (within < 0 ? 0 : within < items ? within : items);
}

HSAID_INLINE Stream stream_of(const Params& p, const Segment& s, Purpose purpose, int64_t block, int chunk) {
  return {p.seed, (uint64_t)s.stream, purpose, block, chunk};
}

}  // namespace hsaid
