#include "emulator/layer.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "emulator/problem.h"
#include "model/buffer.h"
#include "model/cache.h"
#include "model/check.h"
#include "model/floats.h"
#include "model/linear.h"

namespace edgevl::emulator {
namespace {

using Kind = Problem::Kind;

constexpr int kFormat = static_cast<int>(CacheFormat::kBf16);

void widen(const std::uint16_t* from, int n, float* to) {
  for (int i = 0; i < n; ++i) to[i] = from_bf16(from[i]);
}

void narrow(const float* from, int n, std::uint16_t* to) {
  for (int i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

/// Which of a run's keys each token attends to.
struct Attended {
  std::vector<int> columns;  ///< of the mask, that any token attends to
  std::vector<int> visible;  ///< how many of them each token attends to, the first ones
};

bool is_allowed(std::uint16_t value, int token, int column) {
  const float number = from_bf16(value);
  if (number == 0) return true;
  if (number <= kMasked / 2) return false;
  throw Problem(Kind::kMask, "mask[" + std::to_string(token) + ", " + std::to_string(column) +
                                 "] is " + std::to_string(number) + ", neither 0 nor " +
                                 std::to_string(static_cast<int>(kMasked)));
}

Attended read_mask(const LayerTensors& t) {
  const int columns = t.history + t.tokens;
  auto at = [&](int token, int column) {
    const auto value = t.mask[static_cast<std::size_t>(token) * columns + column];
    return is_allowed(value, token, column);
  };
  Attended attended;
  for (int column = 0; column < columns; ++column) {
    bool any = false;
    for (int token = 0; token < t.tokens; ++token) any |= at(token, column);
    if (any) attended.columns.push_back(column);
  }
  for (int token = 0; token < t.tokens; ++token) {
    const auto& all = attended.columns;
    auto allowed = [&](int column) { return at(token, column); };
    const auto end = std::find_if_not(all.begin(), all.end(), allowed);
    if (std::any_of(end, all.end(), allowed)) {
      throw Problem(Kind::kMask, "mask is not causal: token " + std::to_string(token) +
                                     " attends to a key after one that it leaves out");
    }
    // A softmax of equal scores attends to all alike: so fare rows that only pad a chunk.
    const auto visible = end == all.begin() ? all.end() : end;
    attended.visible.push_back(static_cast<int>(visible - all.begin()));
  }
  if (attended.columns.empty()) throw Problem(Kind::kMask, "mask lets no token attend to anything");
  return attended;
}

}  // namespace

/// One run, with its buffers.
class Layer::Run {
 public:
  Run(const Layer& layer, const LayerTensors& tensors, ThreadPool& pool, const Kernels& kernels)
      : c_(layer.config_),
        w_(layer.weights_),
        inverse_frequencies_(layer.inverse_frequencies_),
        t_(tensors),
        pool_(pool),
        kernels_(kernels),
        width_(c_.num_key_value_heads * c_.head_dim),
        attended_(read_mask(tensors)),
        gemm_(kernels, pool.size(), tensors.tokens),
        x_(tensors.tokens, c_.hidden_size),
        qkv_(tensors.tokens, c_.qkv_rows()),
        angles_(tensors.tokens, c_.head_dim),
        mixed_(tensors.tokens, c_.num_attention_heads * c_.head_dim),
        cache_(1, c_.num_key_value_heads, c_.head_dim) {
    check_positions();
    check_overlap(t_.keys, t_.keys_out, "K_cache_out");
    check_overlap(t_.values, t_.values_out, "V_cache_out");
    const int visible = static_cast<int>(attended_.columns.size());
    cache_.reserve(visible);
    for (int i = 0; i < pool.size(); ++i) {
      scratch_.emplace_back(attention_scratch(kernels.token_block, visible));
      row_.emplace_back(c_.head_dim);
    }
    for (const Linear* linear : {&w_.qkv, &w_.o, &w_.gate_up}) gemm_.fit(linear->matrix);
    gemm_.fit_second(w_.down.matrix);
  }

  void operator()() {
    pool_.run([&](Worker& worker) {
      const int heads = c_.num_key_value_heads, inner = c_.num_attention_heads * c_.head_dim;
      const Norm input_norm{w_.input_norm, nullptr, c_.rms_norm_eps};
      const Norm post_norm{w_.post_norm, nullptr, c_.rms_norm_eps};
      const Output add{Epilogue::Kind::kAdd, x_.row(0), x_.stride(), c_.hidden_size};
      worker.each(t_.tokens, [&](int i) {
        widen(t_.input + static_cast<std::size_t>(i) * c_.hidden_size, c_.hidden_size, x_.row(i));
      });
      gemm_.run(worker, w_.qkv, {x_.row(0), x_.stride(), t_.tokens, c_.hidden_size, input_norm},
                {Epilogue::Kind::kStore, qkv_.row(0), qkv_.stride(), c_.qkv_rows()});
      worker.each(t_.tokens, [&](int i) { place(i); });
      // History is read before anything is written, which may lie among it.
      worker.each(heads, [&](int head) { fill_cache(row_[worker.rank()].data(), head); });
      worker.each(heads, [&](int head) { attend(scratch_[worker.rank()].data(), head); });
      gemm_.run(worker, w_.o, {mixed_.row(0), mixed_.stride(), t_.tokens, inner}, add);
      gemm_.run(worker, {w_.gate_up, Epilogue::Kind::kSwiglu, w_.down, c_.intermediate_size},
                {x_.row(0), x_.stride(), t_.tokens, c_.hidden_size, post_norm}, add);
      worker.each(t_.tokens, [&](int i) { write(i); });
    });
  }

 private:
  void check_positions() const {
    const auto* end = t_.indices + t_.tokens;
    const auto* large =
        std::find_if(t_.indices, end, [](std::uint32_t index) { return index >= kMaxPosition; });
    if (large != end) {
      throw Problem(Kind::kValue, "indices[" + std::to_string(large - t_.indices) + "] is " +
                                      std::to_string(*large) + ", too large for a position");
    }
  }

  /// The board may write while it reads: what is attended to must not be written to.
  void check_overlap(const std::uint16_t* rows, const std::uint16_t* out, const char* name) const {
    auto address = [](const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); };
    const std::size_t row_bytes = static_cast<std::size_t>(width_) * 2;
    for (const int column : attended_.columns) {
      if (column >= t_.history) break;
      const std::uintptr_t row = address(rows) + column * row_bytes;
      if (row + row_bytes > address(out) && row < address(out) + t_.tokens * row_bytes) {
        throw Problem(Kind::kOverlap, std::string(name) + " lies on row " + std::to_string(column) +
                                          " of the cache, which is attended to");
      }
    }
  }

  float* key(int token) const { return qkv_.row(token) + c_.key_row(); }
  float* value(int token) const { return qkv_.row(token) + c_.value_row(); }

  /// Norm and rotary embedding of a token's queries and keys; keys and values become bfloat16.
  void place(int token) const {
    const int half = c_.head_dim / 2;
    float *const cos = angles_.row(token), *const sin = cos + half;
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(t_.indices[token]) * inverse_frequencies_[i];
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    auto rotate = [&](float* x, int heads, const float* norm) {
      for (int head = 0; head < heads; ++head, x += c_.head_dim) {
        if (norm) kernels_.rms_norm(x, norm, c_.head_dim, c_.rms_norm_eps, x);
        kernels_.rotate(x, cos, sin, c_.head_dim);
      }
    };
    rotate(qkv_.row(token), c_.num_attention_heads, w_.q_norm);
    rotate(key(token), c_.num_key_value_heads, w_.k_norm);
    for (float* row : {key(token), value(token)}) {
      for (int i = 0; i < width_; ++i) row[i] = from_bf16(to_bf16(row[i]));
    }
  }

  /// What is attended to, one key after the other.
  void fill_cache(float* row, int head) const {
    const int channel = head * c_.head_dim;
    for (int i = 0; i < static_cast<int>(attended_.columns.size()); ++i) {
      const int column = attended_.columns[i], token = column - t_.history;
      std::uint32_t* keys = cache_.keys(0, head)[i / kCacheBlock];
      std::uint32_t* values = cache_.values(0, head)[i / kCacheBlock];
      auto find = [&](const std::uint16_t* history, float* fresh) -> const float* {
        if (token >= 0) return fresh + channel;
        widen(history + static_cast<std::size_t>(column) * width_ + channel, c_.head_dim, row);
        return row;
      };
      float* const new_key = token >= 0 ? key(token) : nullptr;
      float* const new_value = token >= 0 ? value(token) : nullptr;
      kernels_.store_key[kFormat](find(t_.keys, new_key), c_.head_dim, i % kCacheBlock, keys);
      kernels_.store_values[kFormat](find(t_.values, new_value), c_.head_dim, 1, c_.head_dim,
                                     i % kCacheBlock, values);
    }
  }

  /// Attention of all queries of a key/value head.
  void attend(float* scratch, int head) const {
    const int heads = c_.num_attention_heads / c_.num_key_value_heads;
    const int queries = t_.tokens * heads;
    for (int first = 0; first < queries; first += kernels_.token_block) {
      Attention attention;
      attention.keys = cache_.keys(0, head);
      attention.values = cache_.values(0, head);
      attention.head_dim = c_.head_dim;
      attention.rows = std::min(kernels_.token_block, queries - first);
      attention.scale = 1 / std::sqrt(static_cast<float>(c_.head_dim));
      attention.scratch = scratch;
      for (int i = 0; i < attention.rows; ++i) {
        const int token = (first + i) / heads;
        const int channel = (head * heads + (first + i) % heads) * c_.head_dim;
        attention.query[i] = qkv_.row(token) + channel;
        attention.visible[i] = attended_.visible[token];
        attention.out[i] = mixed_.row(token) + channel;
      }
      kernels_.attend[kFormat](attention);
    }
  }

  void write(int token) const {
    const auto row = static_cast<std::size_t>(token);
    narrow(key(token), width_, t_.keys_out + row * width_);
    narrow(value(token), width_, t_.values_out + row * width_);
    narrow(x_.row(token), c_.hidden_size, t_.output + row * c_.hidden_size);
  }

  const DecoderConfig& c_;
  const DecoderLayer& w_;
  const float* inverse_frequencies_;
  const LayerTensors& t_;
  ThreadPool& pool_;
  const Kernels& kernels_;
  const int width_;
  const Attended attended_;

  Gemm gemm_;
  Activations x_;       ///< [T, hidden_size]
  Activations qkv_;     ///< [T, qkv_rows]
  Activations angles_;  ///< [T, head_dim], cosines and sines
  Activations mixed_;   ///< [T, heads * head_dim]
  Cache cache_;
  std::vector<Buffer<float>> scratch_;  ///< for each worker, of attention
  std::vector<Buffer<float>> row_;      ///< likewise, [head_dim]
};

Layer::Layer(const DecoderConfig& config, const DecoderLayer& weights,
             const float* inverse_frequencies)
    : config_(config), weights_(weights), inverse_frequencies_(inverse_frequencies) {
  const auto& c = config_;
  edgevl::check(c);
  check_matrix(weights.qkv, "qkv", c.qkv_rows(), c.hidden_size);
  check_matrix(weights.o, "o", c.hidden_size, c.num_attention_heads * c.head_dim);
  check_matrix(weights.gate_up, "gate_up", 2 * c.padded(c.intermediate_size), c.hidden_size);
  check_matrix(weights.down, "down", c.hidden_size, c.intermediate_size);
}

void Layer::run(const LayerTensors& tensors, ThreadPool& pool, const Kernels& kernels) const {
  Run(*this, tensors, pool, kernels)();
}

}  // namespace edgevl::emulator
