// hadamard_transform on the CPU, without torch: rows of any length, side by side.
#pragma once

#include "fastfood.h"

namespace hsaid {

// H x * scale for rows of `dim` values, padded with zeros to n = order * 2^q and cut again, T being float, double, bf16
// or fp16. order: 1, or that of a matrix in core/paley.h, whose Kronecker product with that of order 2^q is H. x and
// out may be the same. float and the 16-bit types compute in float32.
template <class T>
void hadamard_transform(const T* x, T* out, int64_t rows, int64_t dim, double scale, int order, const Threads&);

// H x of integers, T being int32_t or int64_t; false, and nothing is written, where a value does not fit T.
template <class T>
bool hadamard_transform(const T* x, T* out, int64_t rows, int64_t dim, int order, const Threads&);

// What an instruction set provides for rows of n = 2^q values of C. A row goes through a number of steps: step 0 is the
// stages within a tile, each later one, a pass, a few more. A block of step s is 2^block_bits(q, s) values, which its
// stages and those of the steps before do not leave.
template <class C>
struct HadamardOf {
  // Whole rows. x and out may be the same. `stream`: past the caches, where out begins on a cache line.
  void (*rows)(const C* x, C* out, int64_t rows, int q, C scale, bool stream);
  // For a row that threads share: steps 0 to `step`, which is not the last, of blocks [begin, end) of that step.
  void (*blocks)(const C* x, C* out, int q, int step, int64_t begin, int64_t end);
  // Step `step` > 0 by itself, in place: parts [begin, end) of num_parts(q, step).
  void (*pass)(C* x, int q, int step, int64_t begin, int64_t end, C scale);
  int64_t (*num_parts)(int q, int step);
  int (*num_passes)(int q);
  int (*block_bits)(int q, int step);
  // Columns [begin, end) of x [order, columns] times a matrix of core/paley.h. x and out may be the same.
  void (*paley)(const C* x, C* out, int order, int64_t columns, int64_t begin, int64_t end);
};

struct HadamardKernels {
  HadamardOf<float> of_float;
  HadamardOf<double> of_double;
  HadamardOf<uint32_t> of_uint32;  // integers modulo 2^32
  HadamardOf<uint64_t> of_uint64;
  void (*widen_bf16)(const bf16* x, float* out, int64_t count);
  void (*widen_fp16)(const fp16* x, float* out, int64_t count);
  void (*narrow_bf16)(const float* x, bf16* out, int64_t count);
  void (*narrow_fp16)(const float* x, fp16* out, int64_t count);
};

extern const HadamardKernels hadamard_avx512, hadamard_avx2, hadamard_neon, hadamard_portable;

}  // namespace hsaid
