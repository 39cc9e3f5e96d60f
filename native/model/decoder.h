// The language model: Qwen3, Qwen2 and Llama.

#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "model/buffer.h"
#include "model/cache.h"
#include "model/head.h"
#include "model/linear.h"
#include "model/rows.h"
#include "threads/thread_pool.h"

namespace edgevl {

/// Shape of a decoder; the names are those of config.json.
struct DecoderConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_hidden_layers = 0;
  int num_attention_heads = 0;
  int num_key_value_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_context = 0;  ///< most positions of a sequence
  int chunk = 0;        ///< most rows computed at once
  float rms_norm_eps = 0;
  CacheFormat kv_cache = CacheFormat::kBf16;

  /// Rows of the fused projection before those of the keys, and of the values: each part is padded
  /// to whole panels.
  int key_row() const { return padded(num_attention_heads * head_dim); }
  int value_row() const { return key_row() + padded(num_key_value_heads * head_dim); }
  int qkv_rows() const { return value_row() + padded(num_key_value_heads * head_dim); }
  static int padded(int rows) { return (rows + kLanes - 1) / kLanes * kLanes; }
};

/// Throws std::invalid_argument, with the name of the size, for a shape that cannot be.
void check(const DecoderConfig& config);

struct DecoderLayer {
  const float* input_norm = nullptr;  ///< [hidden_size]
  Linear qkv;                         ///< q, k and v, each padded to 16 rows
  const float* q_norm = nullptr;      ///< [head_dim], Qwen3, or null
  const float* k_norm = nullptr;      ///< likewise
  Linear o;
  const float* post_norm = nullptr;  ///< [hidden_size]
  Linear gate_up;                    ///< panels of 16 rows of gate and up in turn
  Linear down;
};

/// Weights of a decoder; nothing is copied.
struct DecoderWeights {
  std::vector<DecoderLayer> layers;
  Rows embedding;                              ///< [vocab_size, hidden_size]
  const float* norm = nullptr;                 ///< [hidden_size]
  Linear head;                                 ///< [vocab_size, hidden_size]
  std::optional<Rows> head_exact;              ///< as `head`, see Head
  const float* inverse_frequencies = nullptr;  ///< [head_dim / 2]
};

/// A sequence of a decoder: its cache, which only that decoder's functions extend.
class Sequence {
 public:
  Cache cache;

 private:
  friend class Decoder;
  Sequence(const DecoderConfig& config, std::shared_ptr<SpareBlocks> spare, std::uint64_t decoder)
      : cache(config.num_hidden_layers, config.num_key_value_heads, config.head_dim,
              config.kv_cache, std::move(spare)),
        decoder_(decoder) {}
  std::uint64_t decoder_;  ///< the number of the decoder it belongs to
};

/// Logits [rows, vocab_size]. The next call overwrites them; the memory lives as long as somebody
/// holds it.
struct Logits {
  std::shared_ptr<Buffer<float>> buffer;
  int rows = 0;
  int vocab_size = 0;
};

/// What a step appends to a sequence: embeddings, or tokens.
struct Part {
  Sequence* sequence = nullptr;
  const float* embeddings = nullptr;  ///< [count, hidden_size], or null
  const std::int64_t* ids = nullptr;  ///< [count], where there are no embeddings
  int count = 0;                      ///< at least 1
  int wanted = 0;                     ///< the last so many, whose logits are computed
};

/// One forward pass for prefill, decode, several sequences together and speculation: rows, each at
/// a position of a sequence.
///
/// Functions throw std::invalid_argument, and change nothing, where positions exceed max_context, a
/// token id is not in the vocabulary, or a sequence is another decoder's; FileError, and sequences
/// keep their length, where rows of the embedding or the exact head cannot be read. They may be
/// called from several threads; one runs at a time.
class Decoder {
 public:
  /// Throws std::invalid_argument where sizes of config and weights do not agree.
  Decoder(const DecoderConfig& config, DecoderWeights weights, ThreadPool& pool,
          const Kernels& kernels);

  const DecoderConfig& config() const { return config_; }

  std::unique_ptr<Sequence> new_sequence() const;

  /// Makes `sequence` the first `length` positions of `other`; they share the memory.
  void share(Sequence& sequence, const Sequence& other, int length);

  /// Words of the first `length` positions of a sequence, 1 .. its length.
  std::size_t words(const Sequence& sequence, int length) const;

  /// Copies them to out [words(sequence, length)]. What the last block has after them is zero.
  void save(const Sequence& sequence, int length, std::uint32_t* out);

  /// Makes `sequence` the `length` positions that `save` gave with the same weights, format of the
  /// cache and kernels. `count`, of `words`, must be what that many positions have. Throws
  /// std::bad_alloc, and the sequence is empty then.
  void load(Sequence& sequence, const std::uint32_t* words, std::size_t count, int length);

  /// Looks up token embeddings: out [ids.size(), hidden_size].
  void embed(std::span<const std::int64_t> ids, float* out) const;

  /// Appends to different sequences, all in one pass of the weights where they are no more than
  /// `chunk` rows; logits of what is wanted, one after the other. Only the first part may want less
  /// than all of its own.
  Logits step(std::span<const Part> parts);

 private:
  /// Rows that are consecutive positions of one sequence.
  struct Span {
    Cache* cache;
    int position;  ///< of the first
    int row;       ///< of the first
    int count;
  };
  /// Biases of a layer's keys that are added to the scores.
  struct LayerBiases {
    std::vector<float> others;               ///< [qkv_rows] the layer's biases without them, if any
    std::vector<std::vector<int>> pairs;     ///< [kv_heads], see KeyBiases
    std::vector<std::vector<float>> values;  ///< likewise
  };
  /// Work for one worker: some of a span's rows (or queries: rows times heads) of a key/value head.
  struct Item {
    int span, head, first, count;
  };

  static std::vector<LayerBiases> large_biases(const DecoderConfig& config,
                                               const DecoderWeights& weights);
  void check(const Sequence& sequence, int tokens) const;
  void check(std::span<const Part> parts) const;
  void run(std::span<const Part> parts, float* logits);
  void put(const Part& part, int begin, int count, int row);
  void check_ids(std::span<const std::int64_t> ids) const;
  void embed(std::span<const std::int64_t> ids, float* out, std::size_t stride) const;
  float* start_logits(int rows);
  void plan(int rows, int wanted);
  void add_attention_items(std::vector<Item>& items, const Span& span, int index, int first) const;
  void deal(std::vector<Item>& items);
  void forward(int rows, int wanted, float* logits);
  void layer(Worker& worker, int index, int rows, int first);
  void attention(Worker& worker, int layer, int rows, int first);
  void store(int layer, const Item& item);
  void attend(Worker& worker, int layer, const Item& item);
  void grow_rotary_table(int positions);

  const DecoderConfig config_;
  const DecoderWeights weights_;
  const std::vector<LayerBiases> biases_;  ///< [layers], or empty if no layer has any
  ThreadPool& pool_;
  const Kernels& kernels_;
  const std::uint64_t number_;  ///< different for each decoder of the process
  std::mutex turn_;

  Gemm gemm_;
  Head head_;
  std::shared_ptr<Buffer<float>> logits_;
  Activations x_;                       ///< [chunk, hidden_size]
  Activations qkv_;                     ///< [chunk, qkv_rows]
  Activations attended_;                ///< [chunk, heads * head_dim]
  std::vector<Buffer<float>> scratch_;  ///< for each worker, of attention
  std::shared_ptr<SpareBlocks> spare_ = std::make_shared<SpareBlocks>();  ///< sequences may live on
  int rotary_positions_ = 0;
  std::vector<float> cos_, sin_;  ///< [rotary_positions_, head_dim / 2]
  Buffer<float> rotary_lines_;    ///< the same as KeyBiases want it, unless biases_ is empty

  // The step at hand.
  std::vector<Span> spans_;
  std::vector<Item> stores_, attends_, last_attends_, dealt_;
};

}  // namespace edgevl
