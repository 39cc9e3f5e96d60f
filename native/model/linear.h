// Products of activations with a weight matrix: norm, quantization, product, what follows.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/layout.h"
#include "model/buffer.h"
#include "threads/thread_pool.h"

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
  Epilogue::Kind kind;
  float* rows;
  std::size_t stride;  ///< floats from row to row
  int cols;
  const float* scale = nullptr;  ///< [cols] or null, for kAdd
  int begin = 0;                 ///< the column that rows begin with
};

/// Two layers with an activation between: second(activation(first(x))).
struct Mlp {
  const Linear& first;
  Epilogue::Kind activation;  ///< kGelu, or kSwiglu where panels of `first` are gate and up in turn
  const Linear& second;
  int inner;  ///< columns of the activation's output
};

/// Runs linear layers on a thread pool; owns the quantized activations.
class Gemm {
 public:
  /// For inputs of up to `tokens` rows.
  Gemm(const Kernels& kernels, int workers, int tokens);

  /// Makes room for the inputs of a matrix, or of an MLP's second one; before the first call.
  void fit(const Matrix& matrix);
  void fit_second(const Matrix& matrix);

  /// One linear layer. All workers call it alike; ends with a barrier.
  ///
  /// Workers claim pairs of panels and take all tokens through each while it is in their cache.
  void run(Worker& worker, const Linear& linear, const Input& input, const Output& output);

  /// Both layers of an MLP, likewise. What comes out of the activation is quantized group by group
  /// while it is in the cache, and is never in memory as float32.
  void run(Worker& worker, const Mlp& mlp, const Input& input, const Output& output);

 private:
  /// Activations of some tokens, in blocks of token_block.
  struct Blocks {
    Buffer<std::uint32_t> words;
    Buffer<float> scales;
    Buffer<std::int32_t> sums;
  };
  /// Some of a step's blocks.
  struct Range {
    int begin, end, tokens;  ///< tokens are all of the step's
  };
  /// Buffers of one worker.
  struct Own {
    Blocks block;          ///< a single one
    Buffer<float> normed;  ///< [token_block, cols]
    Buffer<float> inner;   ///< [tokens, columns that are quantized together]
  };

  int blocks_of(int tokens) const;
  Block block(const Blocks& blocks, const Matrix& matrix, int index, int tokens) const;
  const Blocks& prepare(Worker& worker, const Matrix& matrix, const Input& input);
  void prepare_block(Worker& worker, const Matrix& matrix, const Input& input, int index,
                     const Blocks& blocks);
  void multiply(Worker& worker, const Linear& linear, const Blocks& x, int tokens,
                const Output& output) const;
  void multiply_pair(const Linear& linear, const Blocks& x, const Range& range, int pair,
                     const Output& output) const;
  static void fetch_output(int pair, int first, int tokens, const Output& output);
  void apply_epilogue(const float* tile, int tokens, const Linear& linear, int pair, int first,
                      const Output& output) const;
  void activate(Worker& worker, const Mlp& mlp, const Blocks& x, const Range& range, int unit);
  static int unit_of(const Matrix& matrix);

  const Kernels& kernels_;
  int tokens_;
  std::size_t words_ = 0;   ///< of a token, at most
  std::size_t groups_ = 0;  ///< likewise
  std::size_t cols_ = 0;    ///< likewise
  std::size_t unit_ = 0;    ///< columns that an MLP's item computes, at most
  Blocks shared_;           ///< of a layer's input
  Blocks activated_;        ///< of an MLP's second layer
  Buffer<float> row_;       ///< likewise, of a single token
  std::vector<Own> own_;    ///< for each worker
};

}  // namespace edgevl
