// Weights into the layout of kernels/layout.h, and back.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/layout.h"
#include "model/floats.h"
#include "threads/thread_pool.h"

namespace edgevl {

/// "int4", "int8", "bf16" or "split". Throws std::invalid_argument for anything else.
Format parse_format(const std::string& name);

/// "BF16", "F16" or "F32". Throws std::invalid_argument for anything else.
Dtype parse_dtype(const std::string& name);

/// A matrix [rows, cols] as it will be laid out, with its columns padded.
///
/// Throws std::invalid_argument where a size is not positive, too large, or `group` does not suit
/// the format.
Matrix describe(Format format, int rows, int cols, int group, const std::uint8_t* data = nullptr);

/// A matrix as a checkpoint has it: rows [rows, cols] in order, without gaps.
struct PlainMatrix {
  Dtype dtype = Dtype::kF32;
  int rows = 0;
  int cols = 0;
  const void* data = nullptr;

  /// Converts a row to float32 [cols].
  void row(int index, float* out) const;
};

/// A 4-bit GPTQ matrix: symmetric, columns in order.
struct GptqMatrix {
  int rows = 0;
  int cols = 0;                          ///< a multiple of 8
  int group = 0;                         ///< columns that share a scale
  const std::uint32_t* words = nullptr;  ///< [cols / 8][rows], low nibble first; 8 is zero
  Dtype scale_dtype = Dtype::kF16;       ///< kF16 or kF32
  const void* scales = nullptr;          ///< [ceil(cols / group)][rows]
};

/// Where a source's panels go in a matrix: panel i to first + i * step.
struct Place {
  int first = 0;
  int step = 1;
};

/// Packs rows by rounding to nearest.
///
/// INT8: the scale of a row is its largest magnitude / 127. INT4: of five scales around the one
/// that takes a group's largest magnitude to -8, the one with the least squared error. kSplit:
/// twice a group's largest magnitude / 9.4.
///
/// `out` has the layout of `matrix`; rows beyond the source's in its last panel become zeros,
/// panels that nothing is put into are left as they are. Throws std::invalid_argument where the
/// source does not fit.
void pack(const PlainMatrix& source, const Matrix& matrix, std::uint8_t* out, Place place,
          ThreadPool& pool);

/// Packs a GPTQ matrix as kInt4, exactly as it is (scales in float16).
void pack(const GptqMatrix& source, const Matrix& matrix, std::uint8_t* out, Place place,
          ThreadPool& pool);

/// What a matrix stands for: float32 [rows, cols], the first `cols` of its padded columns.
void unpack(const Matrix& matrix, int cols, float* out);

}  // namespace edgevl
