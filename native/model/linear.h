// Products of activations with a weight matrix: norm, quantization, product, what follows.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/layout.h"
#include "model/buffer.h"
#include "threads/team.h"

namespace edgevl {

/// Root mean square norm, or layer norm where there is a bias. None where there is no weight.
struct Norm {
  const float* weight = nullptr;  ///< [cols]
  const float* bias = nullptr;    ///< [cols] or null
  float eps = 0;

  void apply(const Kernels& kernels, const float* x, int cols, float* out) const;
};

struct Linear {
  Matrix matrix;
  const float* bias = nullptr;  ///< [matrix.rows] or null
};

/// What is multiplied: rows [tokens, cols], each normalized first.
struct Input {
  const float* rows;
  std::size_t stride;  ///< floats from row to row
  int tokens;
  int cols;
  Norm norm = {};
};

/// What becomes of the products y, bias added: rows [tokens, cols].
struct Output {
  enum class Kind : std::uint8_t {
    kStore,   ///< out = y
    kAdd,     ///< out += y, or scale * y
    kGelu,    ///< out = gelu(y)
    kSwiglu,  ///< out = silu(gate) * up, where y has panels of gate and up in turn
  };
  Kind kind;
  float* rows;
  std::size_t stride;
  int cols;
  const float* scale = nullptr;  ///< [cols] or null, for kAdd
};

/// Runs linear layers on a team; owns the quantized activations.
class Products {
 public:
  /// For inputs of up to `tokens` rows.
  Products(const Kernels& kernels, int members, int tokens);

  /// Makes room for the inputs of a matrix; before the first call with it.
  void fit(const Matrix& matrix);

  /// One linear layer. All members call it alike; ends with a barrier.
  ///
  /// One token: each member streams its own contiguous share of the weights. More: members claim
  /// pairs of panels and take all tokens through each while it is in their cache.
  void run(Member& member, const Linear& linear, const Input& input, const Output& output);

 private:
  /// Activations of some tokens, in blocks of token_block.
  struct Blocks {
    Buffer<std::uint32_t> words;
    Buffer<float> scales;
    Buffer<std::int32_t> sums;
  };

  Block block(Blocks& blocks, const Matrix& matrix, int index, int tokens) const;
  void prepare(const Matrix& matrix, const Input& input, int index, Blocks& blocks, float* normed);
  void finish(const Linear& linear, const Output& output, int pair, int first, int tokens,
              float* tile) const;

  const Kernels& kernels_;
  int tokens_;
  std::size_t words_ = 0;   ///< of a token, at most
  std::size_t groups_ = 0;  ///< likewise
  std::size_t cols_ = 0;    ///< likewise
  Blocks shared_;
  std::vector<Blocks> own_;            ///< for each member, a single block
  std::vector<Buffer<float>> normed_;  ///< for each member, [token_block, cols]
};

}  // namespace edgevl
