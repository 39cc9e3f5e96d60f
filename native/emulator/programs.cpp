// The kinds of models: decoder layers, the output layer, the vision encoder.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "emulator/layer.h"
#include "emulator/model.h"
#include "emulator/problem.h"
#include "kernels/kernels.h"
#include "model/check.h"
#include "model/floats.h"
#include "model/head.h"
#include "model/vision.h"

namespace edgevl::emulator {
namespace {

using Tensors = std::vector<TensorInfo>;
using Views = std::span<std::uint8_t* const>;

/// Most tokens of a run, and most keys of its history.
constexpr std::int32_t kMaxTokens = 1 << 12;
constexpr std::int32_t kMaxHistory = 1 << 20;

[[noreturn]] void fail(const std::string& what) {
  throw Problem(Problem::Kind::kModel, "the model: " + what);
}

void require_tensors(const Group& group, const Tensors& inputs, const Tensors& outputs) {
  if (group.inputs != inputs || group.outputs != outputs) {
    fail("the tensors of a group are not those of its kind");
  }
}

template <class T>
T* as(std::uint8_t* view) {
  return reinterpret_cast<T*>(view);
}

/// The first axis of a tensor [1, n, ...].
std::int32_t second_size(const TensorInfo& tensor, std::int32_t most) {
  if (tensor.shape.size() < 2 || tensor.shape[1] > most) fail(tensor.name + " has a wrong shape");
  return tensor.shape[1];
}

class LayerProgram : public Program {
 public:
  explicit LayerProgram(const ModelFile& file)
      : layer_(config(file), weights(file, config(file)),
               file.vector("inverse_frequencies", config(file).head_dim / 2)) {
    for (const auto& group : file.groups()) check_group(group, config(file));
  }

  void run(const Group& group, Views in, Views out, ThreadPool& pool) override {
    LayerTensors t;
    t.tokens = group.inputs[3].shape[1];
    t.history = group.inputs[4].shape[2] - t.tokens;
    t.keys = as<const std::uint16_t>(in[0]);
    t.values = as<const std::uint16_t>(in[1]);
    t.indices = as<const std::uint32_t>(in[2]);
    t.input = as<const std::uint16_t>(in[3]);
    t.mask = as<const std::uint16_t>(in[4]);
    t.keys_out = as<std::uint16_t>(out[0]);
    t.values_out = as<std::uint16_t>(out[1]);
    t.output = as<std::uint16_t>(out[2]);
    layer_.run(t, pool, kernels());
  }

 private:
  static DecoderConfig config(const ModelFile& file) {
    DecoderConfig c;
    c.hidden_size = file.integer("hidden_size");
    c.intermediate_size = file.integer("intermediate_size");
    c.num_hidden_layers = 1;
    c.num_attention_heads = file.integer("num_attention_heads");
    c.num_key_value_heads = file.integer("num_key_value_heads");
    c.head_dim = file.integer("head_dim");
    c.rms_norm_eps = static_cast<float>(file.numbers("rms_norm_eps", 1)[0]);
    c.vocab_size = c.max_context = c.chunk = 1;  // of no layer
    check(c);
    return c;
  }

  static DecoderLayer weights(const ModelFile& file, const DecoderConfig& c) {
    DecoderLayer layer;
    layer.input_norm = file.vector("input_norm", c.hidden_size);
    layer.qkv = file.linear("qkv");
    layer.q_norm = file.optional_vector("q_norm", c.head_dim);
    layer.k_norm = file.optional_vector("k_norm", c.head_dim);
    layer.o = file.linear("o");
    layer.post_norm = file.vector("post_norm", c.hidden_size);
    layer.gate_up = file.linear("gate_up");
    layer.down = file.linear("down");
    return layer;
  }

  /// A layer without a history does not look at the caches that it is given: compilers choose their
  /// shape (Pulsar2: one row of the hidden size).
  static void check_group(const Group& group, const DecoderConfig& c) {
    if (group.inputs.size() != 5) fail("a layer has 5 inputs");
    const std::int32_t rows = second_size(group.inputs[0], kMaxHistory);
    const std::int32_t tokens = second_size(group.inputs[3], kMaxTokens);
    const auto& mask = group.inputs[4].shape;
    const bool alone = mask.size() == 3 && mask[2] == tokens;
    const std::int32_t width = c.num_key_value_heads * c.head_dim;
    const std::int32_t columns = (alone ? 0 : rows) + tokens;
    const auto cache = alone ? group.inputs[0].shape : std::vector{1, rows, width};
    const auto bf16 = Type::kBf16;
    require_tensors(group,
                    {{"K_cache", bf16, cache},
                     {"V_cache", bf16, cache},
                     {"indices", Type::kU32, {1, tokens}},
                     {"input", bf16, {1, tokens, c.hidden_size}},
                     {"mask", bf16, {1, tokens, columns}}},
                    {{"K_cache_out", bf16, {1, tokens, width}},
                     {"V_cache_out", bf16, {1, tokens, width}},
                     {"output", bf16, {1, tokens, c.hidden_size}}});
  }

  Layer layer_;
};

/// Final norm and output layer: logits, or the tokens with the largest ones and their
/// probabilities among all tokens.
class PostProgram : public Program {
 public:
  PostProgram(const ModelFile& file, ThreadPool& pool)
      : hidden_(file.integer("hidden_size")),
        vocabulary_(file.integer("vocab_size")),
        linear_(head_linear(file)),
        head_(kernels(), norm(file), linear_, std::nullopt, vocabulary_, hidden_, pool.size()),
        gemm_(kernels(), pool.size(), 1) {
    for (const auto& group : file.groups()) check_group(group);
    gemm_.fit(linear_.matrix);
  }

  void run(const Group& group, Views in, Views out, ThreadPool& pool) override {
    std::vector<float> x(hidden_), logits(vocabulary_);
    for (int i = 0; i < hidden_; ++i) x[i] = from_bf16(as<const std::uint16_t>(in[0])[i]);
    pool.run(
        [&](Worker& worker) { head_.run(worker, gemm_, {x.data(), x.size(), 1}, logits.data()); });
    if (group.outputs.size() == 2) {
      const int count = group.outputs[0].shape[2];
      write_best(logits, count, as<std::uint32_t>(out[0]), as<float>(out[1]));
    } else if (group.outputs[0].type == Type::kF32) {
      std::copy(logits.begin(), logits.end(), as<float>(out[0]));
    } else {
      std::transform(logits.begin(), logits.end(), as<std::uint16_t>(out[0]), to_bf16);
    }
  }

 private:
  Linear head_linear(const ModelFile& file) const {
    const Linear linear = file.linear("head");
    check_matrix(linear, "head", vocabulary_, hidden_);
    return linear;
  }

  Norm norm(const ModelFile& file) const {
    return {file.vector("norm", hidden_), nullptr,
            static_cast<float>(file.numbers("rms_norm_eps", 1)[0])};
  }

  void check_group(const Group& group) const {
    const auto& first = group.outputs[0];
    const Tensors inputs = {{"input", Type::kBf16, {1, 1, hidden_}}};
    if (group.outputs.size() == 2) {
      const auto type = first.type == Type::kI32 ? Type::kI32 : Type::kU32;
      if (first.shape.size() != 3 || first.shape[2] > vocabulary_) fail("indices: a wrong shape");
      const std::int32_t count = first.shape[2];
      require_tensors(
          group, inputs,
          {{"indices", type, {1, 1, count}}, {"probabilities", Type::kF32, {1, 1, count}}});
    } else {
      const auto type = first.type == Type::kF32 ? Type::kF32 : Type::kBf16;
      require_tensors(group, inputs, {{"output", type, {1, 1, vocabulary_}}});
    }
  }

  static void write_best(const std::vector<float>& logits, int count, std::uint32_t* indices,
                         float* probabilities) {
    std::vector<std::uint32_t> order(logits.size());
    std::iota(order.begin(), order.end(), 0u);
    std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](auto a, auto b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    const float most = logits[order[0]];
    double total = 0;
    for (const float logit : logits) total += std::exp(static_cast<double>(logit - most));
    for (int i = 0; i < count; ++i) {
      indices[i] = order[i];
      const double weight = std::exp(static_cast<double>(logits[order[i]] - most));
      probabilities[i] = static_cast<float>(weight / total);
    }
  }

  int hidden_, vocabulary_;
  Linear linear_;
  Head head_;
  Gemm gemm_;
};

/// The vision encoder of one tile: normalized pixels, or bytes that are normalized here.
class VisionProgram : public Program {
 public:
  VisionProgram(const ModelFile& file, ThreadPool& pool)
      : config_(config(file)),
        encoder_(config_, read_vision_weights(file, config_), pool, kernels()) {
    for (int i = 0; i < 3; ++i) {
      mean_[i] = static_cast<float>(file.numbers("mean", 3)[i]);
      std_[i] = static_cast<float>(file.numbers("std", 3)[i]);
    }
    for (const auto& group : file.groups()) check_group(group);
  }

  void run(const Group& group, Views in, Views out, ThreadPool&) override {
    if (group.inputs[0].type == Type::kF32) {
      encoder_.encode(as<const float>(in[0]), 1, as<float>(out[0]));
      return;
    }
    const std::size_t pixels = static_cast<std::size_t>(config_.image_size) * config_.image_size;
    std::vector<float> image(3 * pixels);
    for (std::size_t i = 0; i < pixels; ++i) {
      for (int c = 0; c < 3; ++c) {
        image[c * pixels + i] = (static_cast<float>(in[0][3 * i + c]) - mean_[c]) / std_[c];
      }
    }
    encoder_.encode(image.data(), 1, as<float>(out[0]));
  }

 private:
  void check_group(const Group& group) const {
    const std::int32_t size = config_.image_size;
    TensorInfo image{"image", Type::kF32, {1, 3, size, size}};
    if (group.inputs[0].type == Type::kU8) image = {"image", Type::kU8, {1, size, size, 3}};
    require_tensors(
        group, {image},
        {{"output", Type::kF32, {1, config_.image_tokens(), config_.text_hidden_size}}});
  }

  static VisionConfig config(const ModelFile& file) {
    VisionConfig c;
    c.hidden_size = file.integer("hidden_size");
    c.intermediate_size = file.integer("intermediate_size");
    c.num_hidden_layers = file.integer("num_hidden_layers");
    c.num_attention_heads = file.integer("num_attention_heads");
    c.image_size = file.integer("image_size");
    c.patch_size = file.integer("patch_size");
    c.layer_norm = file.integer("layer_norm") != 0;
    c.norm_eps = static_cast<float>(file.numbers("norm_eps", 1)[0]);
    c.downsample = file.integer("downsample");
    c.swapped_shuffle = file.integer("swapped_shuffle") != 0;
    c.text_hidden_size = file.integer("text_hidden_size");
    c.projector_norm_eps = static_cast<float>(file.numbers("projector_norm_eps", 1)[0]);
    check(c);
    return c;
  }

  const VisionConfig config_;
  VisionEncoder encoder_;
  float mean_[3], std_[3];
};

}  // namespace

std::unique_ptr<Program> make_program(const ModelFile& file, ThreadPool& pool) {
  auto program = [&]() -> std::unique_ptr<Program> {
    if (file.kind() == "layer") return std::make_unique<LayerProgram>(file);
    if (file.kind() == "post") return std::make_unique<PostProgram>(file, pool);
    if (file.kind() == "vision") return std::make_unique<VisionProgram>(file, pool);
    fail("its kind is unknown");
  }();
  file.require_all_used();
  return program;
}

}  // namespace edgevl::emulator
