// The vision encoder: InternViT, pixel shuffle and projector.

#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "model/buffer.h"
#include "model/cache.h"
#include "model/linear.h"
#include "threads/thread_pool.h"

namespace edgevl {

/// Shape of a vision encoder; the names are those of config.json.
struct VisionConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_hidden_layers = 0;  ///< that are run
  int num_attention_heads = 0;
  int image_size = 0;  ///< of a tile, pixels
  int patch_size = 0;
  bool layer_norm = true;  ///< else root mean square
  float norm_eps = 0;
  int downsample = 0;            ///< patches merged along each axis
  bool swapped_shuffle = false;  ///< pixel shuffle v1, which leaves the axes swapped
  int text_hidden_size = 0;
  float projector_norm_eps = 0;

  int head_dim() const { return hidden_size / num_attention_heads; }
  int side() const { return image_size / patch_size; }   ///< patches along a side
  int positions() const { return side() * side() + 1; }  ///< with the class token
  int patch_values() const { return 3 * patch_size * patch_size; }
  int image_tokens() const { return side() / downsample * (side() / downsample); }
  int merged_size() const { return hidden_size * downsample * downsample; }
};

/// Throws std::invalid_argument, with the name of the size, for a shape that cannot be.
void check(const VisionConfig& config);

struct VisionLayer {
  const float* norm1 = nullptr;       ///< [hidden_size]
  const float* norm1_bias = nullptr;  ///< likewise, or null
  Linear qkv;                         ///< [3 * hidden_size, hidden_size]
  const float* q_norm = nullptr;      ///< [hidden_size] or null: over all heads together
  const float* k_norm = nullptr;      ///< likewise
  Linear proj;
  const float* ls1 = nullptr;  ///< layer scale, [hidden_size]
  const float* norm2 = nullptr;
  const float* norm2_bias = nullptr;
  Linear fc1;
  Linear fc2;
  const float* ls2 = nullptr;
};

/// Weights of a vision encoder; nothing is copied.
struct VisionWeights {
  Linear patch;                               ///< [hidden_size, 3 * patch_size^2]
  const float* class_embedding = nullptr;     ///< [hidden_size]
  const float* position_embedding = nullptr;  ///< [positions, hidden_size]
  std::vector<VisionLayer> layers;
  Norm projector_norm;  ///< [merged_size]
  Linear projector_fc1;
  Linear projector_fc2;
};

/// Weights by name from what has `linear`, `vector`, `optional_vector` and `rows`, as Python's
/// tensors and the emulator's files do.
template <class Source>
VisionWeights read_vision_weights(Source& source, const VisionConfig& config) {
  const auto hidden = static_cast<std::size_t>(config.hidden_size);
  const auto merged = static_cast<std::size_t>(config.merged_size());
  VisionWeights weights;
  weights.patch = source.linear("patch");
  weights.class_embedding = source.vector("class_embedding", hidden);
  weights.position_embedding = source.rows("position_embedding", config.positions(), hidden);
  for (int i = 0; i < config.num_hidden_layers; ++i) {
    const std::string name = "layers." + std::to_string(i) + ".";
    const auto vector = [&](const char* part) { return source.vector(name + part, hidden); };
    VisionLayer layer;
    layer.norm1 = vector("norm1");
    layer.norm1_bias = config.layer_norm ? vector("norm1_bias") : nullptr;
    layer.qkv = source.linear(name + "qkv");
    layer.q_norm = source.optional_vector(name + "q_norm", hidden);
    layer.k_norm = layer.q_norm ? vector("k_norm") : nullptr;
    layer.proj = source.linear(name + "proj");
    layer.ls1 = vector("ls1");
    layer.norm2 = vector("norm2");
    layer.norm2_bias = config.layer_norm ? vector("norm2_bias") : nullptr;
    layer.fc1 = source.linear(name + "fc1");
    layer.fc2 = source.linear(name + "fc2");
    layer.ls2 = vector("ls2");
    weights.layers.push_back(layer);
  }
  weights.projector_norm = {source.vector("projector.norm", merged),
                            source.vector("projector.norm_bias", merged),
                            config.projector_norm_eps};
  weights.projector_fc1 = source.linear("projector.fc1");
  weights.projector_fc2 = source.linear("projector.fc2");
  return weights;
}

/// Tiles to features that take the place of image tokens. Tiles are encoded one after another, so
/// that memory does not grow with their number. `encode` may be called from several threads; one
/// runs at a time.
class VisionEncoder {
 public:
  /// Throws std::invalid_argument where sizes of config and weights do not agree.
  VisionEncoder(const VisionConfig& config, VisionWeights weights, ThreadPool& pool,
                const Kernels& kernels);

  const VisionConfig& config() const { return config_; }

  /// pixels [tiles, 3, image_size, image_size] to out [tiles, image_tokens, text_hidden_size].
  void encode(const float* pixels, int tiles, float* out);

 private:
  template <class Body>
  void each_chunk(int count, Body&& body) const;
  void allocate();
  void encode_tile(Worker& worker, const float* pixels, float* out);
  void embed_patches(Worker& worker, const float* pixels);
  void layer(Worker& worker, int index);
  bool in_int8(const VisionLayer& layer) const;
  void attention(Worker& worker, bool int8);
  void store(int head, bool int8);
  Int8Head int8_head(int head) const;
  void attend(Worker& worker, bool int8, int head, int first, int rows);
  void merge_patches(Worker& worker);
  Norm norm(const float* weight, const float* bias) const;

  const VisionConfig config_;
  const VisionWeights weights_;
  ThreadPool& pool_;
  const Kernels& kernels_;
  std::mutex turn_;

  int padded_head_dim_;  ///< even, as the kernels want it
  Gemm gemm_;
  std::vector<Buffer<float>> scratch_;  ///< for each worker, of attention
  std::vector<Buffer<float>> odd_;  ///< for each worker, queries of heads with an odd channel more

  // While tiles are encoded:
  std::optional<Cache> cache_;       ///< of one layer at a time, where it is not in INT8
  Buffer<std::uint8_t> int8_heads_;  ///< likewise, where it is
  Buffer<float> patches_;            ///< [patches, patch_values], then [image_tokens, merged_size]
  Activations x_;                    ///< [positions, hidden_size]
  Activations qkv_;                  ///< [positions, padded to 16; 3 * hidden_size]
};

}  // namespace edgevl
