// The one interface between the model and the instruction sets.
//
// Every implementation is compiled from kernels.inl over the primitives of its instruction set and
// found by name; the model calls through the table and knows none of them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/layout.h"

namespace edgevl {

/// Most tokens any implementation takes in a block.
constexpr int kMaxTokenBlock = 16;

/// What becomes of the products y in a tile: rows of `out`, `stride` floats apart.
struct Epilogue {
  enum class Kind : std::uint8_t {
    kStore,   ///< out = y
    kAdd,     ///< out += scale * y
    kGelu,    ///< out = gelu(y), exact (by erf, to 1e-6)
    kSwiglu,  ///< out = silu(y[0 .. 15]) * y[16 .. 31]
  };
  Kind kind;
  const float* bias;   ///< of the tile's columns, added to y first; or null
  const float* scale;  ///< [width] for kAdd, or null for 1
  float* out;
  std::size_t stride;
  int width;  ///< columns of `out`: up to 32, kSwiglu up to 16
};

/// Biases b that are not in the keys of a head. At position p they would be R_p b, R_p the rotary
/// rotation, and a query's product with that needs no key: a pair of channels (i, i + head_dim / 2)
/// adds an amplitude times the position's cosine for i and another times its sine.
struct KeyBiases {
  int count = 0;                  ///< pairs of channels that have one
  const int* pairs = nullptr;     ///< [count] their i
  const float* values = nullptr;  ///< [count][2] the biases of the two channels
  const float* rotary = nullptr;  ///< [positions / 16][head_dim / 2][cos, sin][16], whole blocks
};

/// Attention of some query rows, which share one key/value head, over a cached sequence.
struct Attention {
  const std::uint32_t* const* keys;    ///< a pointer for each cache block, from position 0
  const std::uint32_t* const* values;  ///< likewise
  int head_dim;                        ///< a multiple of 2; the cache's is padded to 16
  int rows;                            ///< query rows, at most Kernels::token_block
  float scale;                         ///< of the scores, commonly 1 / sqrt(head_dim)
  const float* query[kMaxTokenBlock];  ///< [head_dim] each
  int visible[kMaxTokenBlock];         ///< positions 0 .. visible - 1 are attended to; at least 1
  float* out[kMaxTokenBlock];          ///< [head_dim] each
  float* scratch;         ///< attention_scratch(rows, most visible) floats, 64-byte aligned
  KeyBiases biases = {};  ///< of keys in a cache
};

/// Floats of scratch that `attend` needs: scores, and weights rounded to bfloat16.
constexpr std::size_t attention_scratch(int rows, int visible) {
  std::size_t padded = std::size_t(visible + kCacheBlock - 1) / kCacheBlock * kCacheBlock;
  return rows * (padded + padded / 2) + std::size_t(kMaxTokenBlock) * 64;
}

/// The arithmetic of one instruction set.
///
/// Vectors and rows need no alignment and may have any length, except where it says so.
struct Kernels {
  const char* name;
  int token_block;  ///< tokens that one matrix tile takes

  // --- activations ---

  /// Quantizes rows to int8: the scale of a group is its largest magnitude / 127, values are
  /// rounded to nearest even. Columns from `cols` to out.cols are zero.
  /// Reads x [out.tokens, cols] with `stride` floats from row to row.
  void (*quantize)(const float* x, std::size_t stride, int cols, const Block& out);

  /// Rounds rows to bfloat16, nearest even; otherwise as `quantize`.
  void (*round)(const float* x, std::size_t stride, int cols, const Block& out);

  // --- matrix products: float32 out; scales applied; no bias; of kSplit the upper parts ---

  /// One token: out[16] = a panel times the only token of the block. By Format.
  void (*row[4])(const Matrix& matrix, const std::uint8_t* panel, const Block& x, float* out);

  /// A block: out[tokens][32] = two panels that lie one after the other times the block. By Format.
  /// `out` is 64-byte aligned.
  void (*tile[4])(const Matrix& matrix, const std::uint8_t* panels, const Block& x, float* out);

  /// What the lower parts of a row of kSplit add to its product with x [cols], up to the columns
  /// that x has.
  float (*lower)(const Matrix& matrix, int row, const float* x, int cols);

  /// Does to each of the first `tokens` rows of a tile y[tokens][32] what `epilogue` says.
  void (*apply_epilogue)(const float* tile, int tokens, const Epilogue& epilogue);

  // --- attention: by CacheFormat ---

  /// Puts a key [head_dim] at a position (0 .. kCacheBlock - 1) of a cache block, rounded to
  /// bfloat16, or to int8 as `quantize` does; one that is not finite has the scale NaN then.
  void (*store_key[2])(const float* key, int head_dim, int position, std::uint32_t* block);
  /// The same with `count` values at consecutive positions, rows that are `stride` floats apart.
  void (*store_values[2])(const float* values, std::size_t stride, int count, int head_dim,
                          int position, std::uint32_t* block);

  /// Softmax attention. Query, keys, values and weights are bfloat16, which holds every int8
  /// exactly; sums are float32. In int8, scores take the scale of their key, and weights, before
  /// they are rounded, that of their value; what biases add to a score is float32. Positions that
  /// are not visible may hold anything finite.
  void (*attend[2])(const Attention& attention);

  /// Makes keys and values of `positions` rows, `stride` floats apart, a head in INT8, with at most
  /// kMaxInt8Channels and kMaxInt8Positions. Keys lose their mean, in place too; rows that pad them
  /// to 16 are zero.
  void (*quantize_head)(float* keys, const float* values, std::size_t stride, int positions,
                        int head_dim, const Int8Head& out);

  /// Attention to such a head, its keys and values instead of the cache's; scratch is for all of
  /// its positions. Queries are quantized as `quantize` does. A row's weights are bytes, with 255
  /// steps to the largest (127 where the instructions have no unsigned factor), or two bytes each
  /// where one might take its result more than 1.5 % off.
  void (*attend_int8)(const Attention& attention, const Int8Head& head);

  // --- element by element ---

  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int n, float eps,
                     float* out);
  /// Rotary embedding in place, halves paired: x [head_dim], cos and sin [head_dim / 2].
  void (*rotate)(float* x, const float* cos, const float* sin, int head_dim);
  /// The largest of x [n]; if one is NaN, that, or the largest of some of the others.
  float (*largest)(const float* x, int n);
  /// Inner product of a row in bfloat16 with a float32 vector, in float32.
  float (*dot_bf16)(const std::uint16_t* row, const float* x, int n);

  // --- what the machine can do, for `edgevl bench` ---

  /// Reads `bytes` (a multiple of 256) once; returns something that depends on all of them.
  std::uint64_t (*read)(const std::uint8_t* data, std::size_t bytes);
  /// Keeps the int8 multipliers busy; returns the number of multiply-adds done, about 1e8.
  std::uint64_t (*multiply)();
};

/// Names of the implementations that this processor can run, the best first; ends with "portable".
std::vector<std::string> instruction_sets();

/// The implementation of that name; of the environment's EDGEVL_ISA, or else the best, for "".
/// Throws std::invalid_argument for one that is unknown or that this processor cannot run.
const Kernels& kernels(const std::string& name = "");

}  // namespace edgevl
