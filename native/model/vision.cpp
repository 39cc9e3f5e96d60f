#include "model/vision.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "model/check.h"

namespace edgevl {
namespace {

/// Of keys and values, which are read as soon as they are there: smaller ones would gain nothing.
constexpr int kCacheFormat = static_cast<int>(CacheFormat::kBf16);

/// Rows that go through the linear layers together: their activations stay in a core's cache while
/// panel after panel is multiplied with them.
constexpr int kChunk = 128;

VisionWeights checked(VisionWeights w, const VisionConfig& c) {
  check(c);
  require(c.num_hidden_layers == static_cast<int>(w.layers.size()),
          "there are weights of " + std::to_string(w.layers.size()) + " layers");
  check_matrix(w.patch, "patch", c.hidden_size, c.patch_values());
  for (std::size_t i = 0; i < w.layers.size(); ++i) {
    const auto& layer = w.layers[i];
    const std::string name = "layers." + std::to_string(i);
    check_matrix(layer.qkv, name + ".qkv", 3 * c.hidden_size, c.hidden_size);
    check_matrix(layer.proj, name + ".proj", c.hidden_size, c.hidden_size);
    check_matrix(layer.fc1, name + ".fc1", c.intermediate_size, c.hidden_size);
    check_matrix(layer.fc2, name + ".fc2", c.hidden_size, c.intermediate_size);
    require(layer.norm1 && layer.norm2 && layer.ls1 && layer.ls2, name + " lacks a norm or scale");
    require(!c.layer_norm || (layer.norm1_bias && layer.norm2_bias), name + " lacks a norm's bias");
  }
  check_matrix(w.projector_fc1, "projector.fc1", c.text_hidden_size, c.merged_size());
  check_matrix(w.projector_fc2, "projector.fc2", c.text_hidden_size, c.text_hidden_size);
  require(
      w.class_embedding && w.position_embedding && w.projector_norm.weight && w.projector_norm.bias,
      "an embedding or the projector's norm is missing");
  return w;
}

}  // namespace

void check(const VisionConfig& c) {
  const std::pair<const char*, int> sizes[] = {
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_attention_heads", c.num_attention_heads},
      {"image_size", c.image_size},
      {"patch_size", c.patch_size},
      {"downsample", c.downsample},
      {"text_hidden_size", c.text_hidden_size},
  };
  for (const auto& [name, size] : sizes) {
    require(size >= 1 && size <= 1 << 20, std::string(name) + " is " + std::to_string(size));
  }
  require(c.image_size <= 1 << 13 && c.image_size % c.patch_size == 0,
          "image_size is not a multiple of patch_size, or too large");
  require(c.side() % c.downsample == 0, "patches of a side are not a multiple of downsample");
  require(c.hidden_size % c.num_attention_heads == 0,
          "hidden_size is not a multiple of num_attention_heads");
}

VisionEncoder::VisionEncoder(const VisionConfig& config, VisionWeights weights, ThreadPool& pool,
                             const Kernels& kernels)
    : config_(config),
      weights_(checked(std::move(weights), config)),
      pool_(pool),
      kernels_(kernels),
      padded_head_dim_((config.head_dim() + 1) / 2 * 2),
      gemm_(kernels, pool.size(), kChunk),
      scratch_(pool.size()),
      odd_(config.head_dim() % 2 ? pool.size() : 0) {
  for (auto& odd : odd_) odd.reserve(kMaxTokenBlock * padded_head_dim_);
  for (auto& scratch : scratch_) {
    scratch.reserve(attention_scratch(kernels.token_block, config.positions()));
  }
  gemm_.fit(weights_.patch.matrix);
  for (const auto& layer : weights_.layers) {
    for (const Linear* linear : {&layer.qkv, &layer.proj, &layer.fc1}) {
      gemm_.fit(linear->matrix);
    }
    gemm_.fit_second(layer.fc2.matrix);
  }
  gemm_.fit(weights_.projector_fc1.matrix);
  gemm_.fit_second(weights_.projector_fc2.matrix);
}

/// Makes room for a tile's activations. Throws std::bad_alloc.
void VisionEncoder::allocate() {
  const std::size_t positions = config_.positions(), tokens = config_.image_tokens();
  patches_ = Buffer<float>(
      std::max((positions - 1) * config_.patch_values(), tokens * config_.merged_size()));
  x_ = Activations(positions, config_.hidden_size);
  qkv_ = Activations((positions + kLanes - 1) / kLanes * kLanes, 3 * config_.hidden_size);
  for (const auto& layer : weights_.layers) {
    if (in_int8(layer)) {
      int8_heads_.reserve(config_.num_attention_heads *
                          Int8Head::bytes(config_.positions(), config_.head_dim()));
    } else if (!cache_) {
      cache_.emplace(1, config_.num_attention_heads, padded_head_dim_);
      cache_->reserve(config_.positions());
    }
  }
}

void VisionEncoder::encode(const float* pixels, int tiles, float* out) {
  std::lock_guard lock(turn_);
  const auto& c = config_;
  allocate();
  const std::size_t tile = 3 * static_cast<std::size_t>(c.image_size) * c.image_size;
  const std::size_t features = static_cast<std::size_t>(c.image_tokens()) * c.text_hidden_size;
  for (int i = 0; i < tiles; ++i) {
    pool_.run([&](Worker& worker) { encode_tile(worker, pixels + i * tile, out + i * features); });
  }
  // They are as large as a thousand positions of text, and not needed while an answer is generated.
  patches_ = {};
  x_ = {};
  qkv_ = {};
  int8_heads_ = {};
  cache_.reset();
}

/// Calls body(first, rows) for chunks of `count` rows, about equally long.
template <class Body>
void VisionEncoder::each_chunk(int count, Body&& body) const {
  const int chunks = (count + kChunk - 1) / kChunk, block = kernels_.token_block;
  const int even = (count + chunks - 1) / chunks;
  const int rows = std::min((even + block - 1) / block * block, kChunk);
  for (int first = 0; first < count; first += rows) {
    body(static_cast<std::size_t>(first), std::min(rows, count - first));
  }
}

void VisionEncoder::encode_tile(Worker& worker, const float* pixels, float* out) {
  const auto& c = config_;
  const auto& w = weights_;
  embed_patches(worker, pixels);
  for (int i = 0; i < c.num_hidden_layers; ++i) layer(worker, i);
  merge_patches(worker);
  const std::size_t merged = c.merged_size(), hidden = c.text_hidden_size;
  each_chunk(c.image_tokens(), [&](std::size_t first, int rows) {
    gemm_.run(worker, {w.projector_fc1, Epilogue::Kind::kGelu, w.projector_fc2, c.text_hidden_size},
              {patches_.data() + first * merged, merged, rows, c.merged_size(), w.projector_norm},
              {Epilogue::Kind::kStore, out + first * hidden, hidden, c.text_hidden_size});
  });
}

/// Patches, in the order of the convolution's kernel, times its weights; the class token before
/// them; positions.
void VisionEncoder::embed_patches(Worker& worker, const float* pixels) {
  const auto& c = config_;
  const int side = c.side(), size = c.patch_size;
  worker.each(c.positions(), [&](int position) {
    float* x = x_.row(position);
    std::copy_n(weights_.position_embedding + static_cast<std::size_t>(position) * c.hidden_size,
                c.hidden_size, x);
    if (position == 0) {
      for (int i = 0; i < c.hidden_size; ++i) x[i] += weights_.class_embedding[i];
      return;
    }
    const int row = (position - 1) / side, column = (position - 1) % side;
    float* patch = patches_.data() + static_cast<std::size_t>(position - 1) * c.patch_values();
    for (int channel = 0; channel < 3; ++channel) {
      for (int y = 0; y < size; ++y, patch += size) {
        const std::size_t line = static_cast<std::size_t>(channel) * c.image_size + row * size + y;
        std::copy_n(pixels + line * c.image_size + column * size, size, patch);
      }
    }
  });
  const std::size_t values = c.patch_values();
  each_chunk(c.positions() - 1, [&](std::size_t first, int rows) {
    gemm_.run(worker, weights_.patch,
              {patches_.data() + first * values, values, rows, c.patch_values()},
              {Epilogue::Kind::kAdd, x_.row(1 + first), x_.stride(), c.hidden_size});
  });
}

void VisionEncoder::layer(Worker& worker, int index) {
  const auto& c = config_;
  const auto& w = weights_.layers[index];
  const int positions = c.positions();

  each_chunk(positions, [&](std::size_t first, int rows) {
    gemm_.run(worker, w.qkv,
              {x_.row(first), x_.stride(), rows, c.hidden_size, norm(w.norm1, w.norm1_bias)},
              {Epilogue::Kind::kStore, qkv_.row(first), qkv_.stride(), 3 * c.hidden_size});
  });
  if (w.q_norm) {
    worker.each(positions, [&](int position) {
      float* q = qkv_.row(position);
      float* k = q + c.hidden_size;
      kernels_.rms_norm(q, w.q_norm, c.hidden_size, c.norm_eps, q);
      kernels_.rms_norm(k, w.k_norm, c.hidden_size, c.norm_eps, k);
    });
  }
  attention(worker, in_int8(w));
  each_chunk(positions, [&](std::size_t first, int rows) {
    gemm_.run(worker, w.proj, {qkv_.row(first), qkv_.stride(), rows, c.hidden_size},
              {Epilogue::Kind::kAdd, x_.row(first), x_.stride(), c.hidden_size, w.ls1});
    gemm_.run(worker, {w.fc1, Epilogue::Kind::kGelu, w.fc2, c.intermediate_size},
              {x_.row(first), x_.stride(), rows, c.hidden_size, norm(w.norm2, w.norm2_bias)},
              {Epilogue::Kind::kAdd, x_.row(first), x_.stride(), c.hidden_size, w.ls2});
  });
}

/// Queries, keys and values in qkv_ to what is attended to, which takes the queries' place; every
/// position sees every other.
void VisionEncoder::attention(Worker& worker, bool int8) {
  const int heads = config_.num_attention_heads, positions = config_.positions();
  worker.each(heads, [&](int head) { store(head, int8); });
  // Blocks of one head follow one another, so that its keys and values stay in the cache.
  const int size = kernels_.token_block, blocks = (positions + size - 1) / size;
  worker.each(heads * blocks, [&](int item) {
    const int first = item % blocks * size;
    attend(worker, int8, item / blocks, first, std::min(size, positions - first));
  });
}

/// A head's keys and values into what they are attended to in.
void VisionEncoder::store(int head, bool int8) {
  const int hidden = config_.hidden_size, head_dim = config_.head_dim();
  const int positions = config_.positions();
  float* key = qkv_.row(0) + hidden + head * head_dim;
  if (int8) {
    kernels_.quantize_head(key, key + hidden, qkv_.stride(), positions, head_dim, int8_head(head));
    return;
  }
  std::uint32_t* const* keys = cache_->keys(0, head);
  std::uint32_t* const* values = cache_->values(0, head);
  for (int first = 0; first < positions; first += kCacheBlock) {
    const int block = first / kCacheBlock, count = std::min(kCacheBlock, positions - first);
    for (int i = 0; i < count; ++i, key += qkv_.stride()) {
      kernels_.store_key[kCacheFormat](key, head_dim, i, keys[block]);
    }
    kernels_.store_values[kCacheFormat](qkv_.row(first) + 2 * hidden + head * head_dim,
                                        qkv_.stride(), count, head_dim, 0, values[block]);
  }
}

Int8Head VisionEncoder::int8_head(int head) const {
  const std::size_t bytes = Int8Head::bytes(config_.positions(), config_.head_dim());
  return {int8_heads_.data() + head * bytes, config_.positions(), config_.head_dim()};
}

void VisionEncoder::attend(Worker& worker, bool int8, int head, int first, int rows) {
  const auto& c = config_;
  const int head_dim = c.head_dim();
  Attention attention;
  attention.keys = int8 ? nullptr : cache_->keys(0, head);
  attention.values = int8 ? nullptr : cache_->values(0, head);
  attention.head_dim = padded_head_dim_;
  attention.rows = rows;
  attention.scale = 1 / std::sqrt(static_cast<float>(head_dim));
  attention.scratch = scratch_[worker.rank()].data();
  auto query = [&](int i) { return qkv_.row(first + i) + head * head_dim; };
  const bool odd = head_dim != padded_head_dim_;
  float* const copies = odd ? odd_[worker.rank()].data() : nullptr;
  for (int i = 0; i < rows; ++i) {
    float* copy = copies + (odd ? i * padded_head_dim_ : 0);
    if (odd) {
      std::copy_n(query(i), head_dim, copy);
      copy[head_dim] = 0;
    }
    attention.query[i] = odd ? copy : query(i);
    attention.visible[i] = c.positions();
    attention.out[i] = odd ? copy : query(i);
  }
  if (int8) {
    kernels_.attend_int8(attention, int8_head(head));
  } else {
    kernels_.attend[kCacheFormat](attention);
  }
  if (!odd) return;
  for (int i = 0; i < rows; ++i) std::copy_n(attention.out[i], head_dim, query(i));
}

/// Pixel shuffle: `downsample` patches along each axis become channels of one, (row, column,
/// channel).
void VisionEncoder::merge_patches(Worker& worker) {
  const auto& c = config_;
  const int n = c.downsample, side = c.side() / n;
  worker.each(c.image_tokens(), [&](int token) {
    int row = token / side, column = token % side;
    if (c.swapped_shuffle) std::swap(row, column);
    float* out = patches_.data() + static_cast<std::size_t>(token) * c.merged_size();
    for (int y = 0; y < n; ++y) {
      const std::size_t patch = (static_cast<std::size_t>(row) * n + y) * c.side() + column * n;
      for (int x = 0; x < n; ++x, out += c.hidden_size) {
        std::copy_n(x_.row(1 + patch + x), c.hidden_size, out);
      }
    }
  });
}

/// Whether a layer's attention is computed in INT8, as what it is made of.
bool VisionEncoder::in_int8(const VisionLayer& layer) const {
  return layer.qkv.matrix.format != Format::kBf16 && config_.head_dim() <= kMaxInt8Channels &&
         config_.positions() <= kMaxInt8Positions;
}

Norm VisionEncoder::norm(const float* weight, const float* bias) const {
  return {weight, config_.layer_norm ? bias : nullptr, config_.norm_eps};
}

}  // namespace edgevl
