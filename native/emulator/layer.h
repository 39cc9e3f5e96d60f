// A decoder layer as the NPU runs it: new tokens, and keys and values of others, all in bfloat16.

#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "model/decoder.h"
#include "threads/thread_pool.h"

namespace edgevl::emulator {

/// Where a run's tensors lie. W is the width of a key, num_key_value_heads * head_dim; what is
/// uint16 is bfloat16.
struct LayerTensors {
  int tokens;                    ///< T
  int history;                   ///< S, rows of keys and values that the mask has columns for
  const std::uint16_t* keys;     ///< [S, W]
  const std::uint16_t* values;   ///< [S, W]
  const std::uint32_t* indices;  ///< [T], positions
  const std::uint16_t* input;    ///< [T, hidden_size]
  const std::uint16_t* mask;     ///< [T, S + T], 0 or kMasked
  std::uint16_t* keys_out;       ///< [T, W]
  std::uint16_t* values_out;     ///< [T, W]
  std::uint16_t* output;         ///< [T, hidden_size]
};

/// What is added to scores of keys that are not attended to; less than half of it is taken alike.
constexpr float kMasked = -65536;

/// Positions are below this.
constexpr std::uint32_t kMaxPosition = 1 << 20;

class Layer {
 public:
  /// `config` is of a decoder with this one layer. Throws std::invalid_argument where sizes of
  /// config and weights do not agree.
  Layer(const DecoderConfig& config, const DecoderLayer& weights, const float* inverse_frequencies);

  /// Throws Problem for a mask that is not causal, a position that is too large, and outputs that
  /// lie where keys or values are that are attended to.
  void run(const LayerTensors& tensors, ThreadPool& pool, const Kernels& kernels) const;

 private:
  class Run;

  DecoderConfig config_;
  DecoderLayer weights_;
  const float* inverse_frequencies_;
};

}  // namespace edgevl::emulator
