// The plan as kernels see it: fastfood/plan.py makes the table, whose columns are this struct's fields in order.
#pragma once

#include "streams.h"

namespace hsaid {

constexpr int kMinWidthBits = 5, kMaxWidthBits = 14;

// A 2-D strided piece of a tensor; strides and offsets in elements. Also a hole: a piece that is not projected.
struct Segment {
  int64_t tensor;      // index into the lists of base tensors and gradients; of a hole -1 where it is in no tensor
  int64_t offset;      // first element, within the tensor
  int64_t out_offset;  // first element, within the flat output
  int64_t rows, cols;  // numel = rows * cols, read row by row
  int64_t row_stride;
  int64_t stream;       // 64-bit stream id
  int64_t first_block;  // blocks of the segments before
};
static_assert(sizeof(Segment) == 8 * sizeof(int64_t), "Segment is a row of an int64 table");

HSAID_INLINE bool is_dense(const Segment& s) { return s.rows == 1 || s.row_stride == s.cols; }

// Everything else; host and device share it.
struct Params {
  uint64_t seed;
  int64_t dim;  // len(theta)
  int q;        // n = 2^q values a block
  int chunks;   // ceil(dim / n)
  bool rademacher;
};

// Some blocks of a plan's only segment, which is dense: place i of them is what block_of gives.
struct Listed {
  const int64_t* entries;  // [count], rising; each stands for `span` blocks, from entry * span on. Null: all blocks
  int64_t count, span;
};

HSAID_INLINE int64_t block_of(const Listed& listed, int64_t place) {
  if (!listed.entries) return place;
  return listed.entries[place / listed.span] * listed.span + place % listed.span;
}

HSAID_INLINE int64_t width(const Params& p) { return (int64_t)1 << p.q; }
// Blocks that the adjoint adds up in one go: a group is run_blocks tiles of 2^14 values. Run r of a group are the
// blocks r, r + 2^14 / n, r + 2 * 2^14 / n, ... of it (docs/rng.md).
HSAID_INLINE int64_t group_blocks(const Params& p, int64_t run_blocks) { return run_blocks << (kMaxWidthBits - p.q); }
HSAID_INLINE int64_t num_blocks(const Params& p, const Segment& s) { return (s.rows * s.cols + width(p) - 1) >> p.q; }

// The row that has item `item`, first(i) being the items before row i: first(0) = 0.
template <class First>
HSAID_INLINE int row_of(int64_t item, int64_t rows, First&& first) {
  int64_t low = 0, high = rows;  // the last row that starts at or before the item is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first(middle) <= item ? low : high) = middle;
  }
  return (int)low;
}

// Work is measured in items, and `row_cost` items for each row before its first; cost_before(i) is that of the rows
// before i. Returns the number of the item at which a share that begins at `cost` begins.
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
