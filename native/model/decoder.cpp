#include "model/decoder.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "model/check.h"

namespace edgevl {
namespace {

/// Positions that one item stores: whole lines of the cache, so that no two workers write to one.
constexpr int kStoreRun = kLanes;

/// A pair of key channels whose biases are larger has them added to the scores. The rest of a key
/// has a root mean square of 1 to 2 in trained models, beside which smaller ones hardly count.
constexpr float kLargeBias = 4;

std::uint64_t next_number() {
  static std::atomic<std::uint64_t> number{0};
  return ++number;
}

void check_rows(const Rows& matrix, const char* name, int rows, int cols) {
  require(matrix.rows() == rows && matrix.cols() == cols,
          std::string(name) + " is " + std::to_string(matrix.rows()) + " x " +
              std::to_string(matrix.cols()) + ", expected " + std::to_string(rows) + " x " +
              std::to_string(cols));
}

/// Returns the weights, whose shapes agree with the configuration.
DecoderWeights checked(DecoderWeights weights, const DecoderConfig& c) {
  check(c);
  require(static_cast<int>(weights.layers.size()) == c.num_hidden_layers,
          "there are weights of " + std::to_string(weights.layers.size()) + " layers");
  const int inner = c.num_attention_heads * c.head_dim;
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const auto& layer = weights.layers[i];
    const std::string name = "layers." + std::to_string(i);
    check_matrix(layer.qkv, name + ".qkv", c.qkv_rows(), c.hidden_size);
    check_matrix(layer.o, name + ".o", c.hidden_size, inner);
    check_matrix(layer.gate_up, name + ".gate_up", 2 * c.padded(c.intermediate_size),
                 c.hidden_size);
    check_matrix(layer.down, name + ".down", c.hidden_size, c.intermediate_size);
    require(layer.input_norm && layer.post_norm, name + " has no norm");
  }
  check_rows(weights.embedding, "embedding", c.vocab_size, c.hidden_size);
  check_matrix(weights.head, "head", c.vocab_size, c.hidden_size, true);
  if (weights.head_exact) {
    check_rows(*weights.head_exact, "head_exact", c.vocab_size, c.hidden_size);
  }
  require(weights.norm && weights.inverse_frequencies, "norm or inverse_frequencies is missing");
  return weights;
}

}  // namespace

void check(const DecoderConfig& c) {
  const std::pair<const char*, int> sizes[] = {
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_hidden_layers},
      {"num_attention_heads", c.num_attention_heads},
      {"num_key_value_heads", c.num_key_value_heads},
      {"head_dim", c.head_dim},
      {"vocab_size", c.vocab_size},
      {"max_context", c.max_context},
      {"chunk", c.chunk},
  };
  for (const auto& [name, size] : sizes) {
    require(size >= 1 && size <= 1 << 24, std::string(name) + " is " + std::to_string(size));
  }
  require(c.num_attention_heads % c.num_key_value_heads == 0,
          "num_attention_heads is not a multiple of num_key_value_heads");
  require(c.head_dim % 2 == 0, "head_dim is odd");
  require(static_cast<long long>(c.num_attention_heads) * c.head_dim <= 1 << 22,
          "num_attention_heads * head_dim is too large");
}

Decoder::Decoder(const DecoderConfig& config, DecoderWeights weights, ThreadPool& pool,
                 const Kernels& kernels)
    : config_(config),
      weights_(checked(std::move(weights), config)),
      biases_(large_biases(config, weights_)),
      pool_(pool),
      kernels_(kernels),
      number_(next_number()),
      gemm_(kernels, pool.size(), config.chunk),
      head_(kernels, {weights_.norm, nullptr, config.rms_norm_eps}, weights_.head,
            weights_.head_exact, config.vocab_size, config.hidden_size, pool.size()),
      x_(config.chunk, config.hidden_size),
      qkv_(config.chunk, config.qkv_rows()),
      attended_(config.chunk, config.num_attention_heads * config.head_dim),
      scratch_(pool.size()) {
  for (const auto& layer : weights_.layers) {
    for (const Linear* linear : {&layer.qkv, &layer.o, &layer.gate_up}) {
      gemm_.fit(linear->matrix);
    }
    gemm_.fit_second(layer.down.matrix);
  }
  gemm_.fit(weights_.head.matrix);
}

/// Some models have biases of keys a hundred times as large as what tells their keys apart. In one
/// number with them, and in int8 under one scale, that would lose its precision.
std::vector<Decoder::LayerBiases> Decoder::large_biases(const DecoderConfig& c,
                                                        const DecoderWeights& weights) {
  std::vector<LayerBiases> biases(weights.layers.size());
  const int half = c.head_dim / 2;
  bool any = false;
  for (std::size_t layer = 0; layer < biases.size(); ++layer) {
    const auto& w = weights.layers[layer];
    auto& own = biases[layer];
    own.pairs.resize(c.num_key_value_heads);
    own.values.resize(c.num_key_value_heads);
    if (!w.qkv.bias || w.k_norm) continue;  // a norm takes the bias in
    own.others.assign(w.qkv.bias, w.qkv.bias + c.qkv_rows());
    for (int head = 0; head < c.num_key_value_heads; ++head) {
      float* bias = own.others.data() + c.key_row() + head * c.head_dim;
      for (int i = 0; i < half; ++i) {
        if (!(std::hypot(bias[i], bias[half + i]) > kLargeBias)) continue;
        own.pairs[head].push_back(i);
        own.values[head].insert(own.values[head].end(), {bias[i], bias[half + i]});
        bias[i] = bias[half + i] = 0;
        any = true;
      }
    }
  }
  return any ? biases : std::vector<LayerBiases>();
}

std::unique_ptr<Sequence> Decoder::new_sequence() const {
  return std::unique_ptr<Sequence>(new Sequence(config_, spare_, number_));
}

void Decoder::share(Sequence& sequence, const Sequence& other, int length) {
  std::lock_guard lock(turn_);
  check(sequence, 0);
  check(other, 0);
  sequence.cache.share(other.cache, length);
}

std::size_t Decoder::words(const Sequence& sequence, int length) const {
  check(sequence, 0);
  require(length >= 1 && length <= sequence.cache.length(),
          "save " + std::to_string(length) + " positions, but " +
              std::to_string(sequence.cache.length()) + " are cached");
  return sequence.cache.words(length);
}

void Decoder::save(const Sequence& sequence, int length, std::uint32_t* out) {
  std::lock_guard lock(turn_);
  words(sequence, length);
  const auto& c = config_;
  Cache part(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, c.kv_cache);
  part.share(sequence.cache, length);
  const int begin = length % kCacheBlock;
  if (begin != 0) {  // the last block has what was said next
    part.reserve(length + 1);
    const std::vector<float> zeros(c.head_dim);
    const int block = length / kCacheBlock, format = static_cast<int>(c.kv_cache);
    for (int layer = 0; layer < c.num_hidden_layers; ++layer) {
      for (int head = 0; head < c.num_key_value_heads; ++head) {
        for (int position = begin; position < kCacheBlock; ++position) {
          kernels_.store_key[format](zeros.data(), c.head_dim, position,
                                     part.keys(layer, head)[block]);
        }
        kernels_.store_values[format](zeros.data(), 0, kCacheBlock - begin, c.head_dim, begin,
                                      part.values(layer, head)[block]);
      }
    }
  }
  part.copy_to(out, length);
}

void Decoder::load(Sequence& sequence, const std::uint32_t* words, std::size_t count, int length) {
  std::lock_guard lock(turn_);
  check(sequence, 0);
  require(length >= 1 && length <= config_.max_context, "load " + std::to_string(length) +
                                                            " positions into a context of " +
                                                            std::to_string(config_.max_context));
  const std::size_t expected = sequence.cache.words(length);
  require(count == expected, std::to_string(length) + " positions have " +
                                 std::to_string(expected) + " words, not " + std::to_string(count));
  sequence.cache.assign(words, length);
}

void Decoder::embed(std::span<const std::int64_t> ids, float* out) const {
  check_ids(ids);
  embed(ids, out, config_.hidden_size);
}

void Decoder::embed(std::span<const std::int64_t> ids, float* out, std::size_t stride) const {
  Buffer<std::uint8_t> stored(weights_.embedding.row_bytes());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    weights_.embedding.row(static_cast<int>(ids[i]), out + i * stride, stored.data());
  }
}

Logits Decoder::step(std::span<const Part> parts) {
  std::lock_guard lock(turn_);
  check(parts);
  int wanted = 0;
  for (const auto& part : parts) wanted += part.wanted;
  std::vector<int> lengths;
  for (const auto& part : parts) lengths.push_back(part.sequence->cache.length());
  float* logits = start_logits(wanted);
  try {
    run(parts, logits);
  } catch (...) {
    for (std::size_t i = 0; i < parts.size(); ++i) parts[i].sequence->cache.truncate(lengths[i]);
    throw;
  }
  return {logits_, wanted, config_.vocab_size};
}

/// Computes the rows of all parts, one after the other, in passes of up to `chunk`. What is wanted
/// are the last rows of each pass, as only the first part may want less than all.
void Decoder::run(std::span<const Part> parts, float* logits) {
  const int most = config_.chunk;
  int rows = 0, wanted = 0;
  spans_.clear();
  const auto pass = [&] {
    forward(rows, wanted, logits);
    logits += static_cast<std::size_t>(wanted) * config_.vocab_size;
    rows = wanted = 0;
    spans_.clear();
  };
  for (const auto& part : parts) {
    Cache& cache = part.sequence->cache;
    const int start = cache.length();
    for (int begin = 0; begin < part.count;) {
      const int count = std::min(most - rows, part.count - begin);
      put(part, begin, count, rows);
      spans_.push_back({&cache, start + begin, rows, count});
      begin += count;
      rows += count;
      wanted += std::clamp(begin - (part.count - part.wanted), 0, count);
      if (rows == most) pass();
    }
  }
  if (rows > 0) pass();
}

/// Puts `count` inputs of a part, from `begin` on, into x_, from `row` on.
void Decoder::put(const Part& part, int begin, int count, int row) {
  if (part.ids) {
    embed({part.ids + begin, static_cast<std::size_t>(count)}, x_.row(row), x_.stride());
    return;
  }
  for (int i = 0; i < count; ++i) {
    std::copy_n(part.embeddings + static_cast<std::size_t>(begin + i) * config_.hidden_size,
                config_.hidden_size, x_.row(row + i));
  }
}

void Decoder::check(std::span<const Part> parts) const {
  require(!parts.empty(), "a step of nothing");
  for (const auto& part : parts) {
    check(*part.sequence, part.count);
    require(part.count >= 1, "a step appends nothing to a sequence");
    require(part.wanted >= 0 && part.wanted <= part.count &&
                (&part == parts.data() || part.wanted == part.count),
            "logits of " + std::to_string(part.wanted) + " of " + std::to_string(part.count) +
                " positions are wanted");
    require(std::none_of(parts.data(), &part,
                         [&](const Part& other) { return other.sequence == part.sequence; }),
            "a sequence is given twice");
    if (part.ids) check_ids({part.ids, static_cast<std::size_t>(part.count)});
  }
}

void Decoder::check(const Sequence& sequence, int tokens) const {
  require(sequence.decoder_ == number_, "the cache is another decoder's");
  require(tokens <= config_.max_context - sequence.cache.length(),
          std::to_string(sequence.cache.length()) + " + " + std::to_string(tokens) +
              " positions exceed " + std::to_string(config_.max_context));
}

void Decoder::check_ids(std::span<const std::int64_t> ids) const {
  for (const auto id : ids) {
    require(id >= 0 && id < config_.vocab_size, "token id " + std::to_string(id) +
                                                    " is not in the vocabulary of " +
                                                    std::to_string(config_.vocab_size));
  }
}

float* Decoder::start_logits(int rows) {
  const std::size_t size = static_cast<std::size_t>(rows) * config_.vocab_size;
  if (!logits_ || logits_->size() < size) logits_ = std::make_shared<Buffer<float>>(size);
  return logits_->data();
}

/// Makes room for a step's positions and divides its attention into items.
void Decoder::plan(int rows, int wanted) {
  int longest = 0;
  for (const auto& span : spans_) {
    span.cache->reserve(span.position + span.count);
    longest = std::max(longest, span.position + span.count);
  }
  grow_rotary_table(longest);
  for (auto& scratch : scratch_) scratch.reserve(attention_scratch(kernels_.token_block, longest));
  head_.reserve(wanted);

  stores_.clear();
  attends_.clear();
  last_attends_.clear();
  for (int index = 0; index < static_cast<int>(spans_.size()); ++index) {
    const Span& span = spans_[index];
    for (int head = 0; head < config_.num_key_value_heads; ++head) {
      for (int first = 0; first < span.count;) {
        const int line_end = kStoreRun - (span.position + first) % kStoreRun;
        const int count = std::min(line_end, span.count - first);
        stores_.push_back({index, head, first, count});
        first += count;
      }
    }
    add_attention_items(attends_, span, index, 0);
    const int skipped = std::clamp(rows - wanted - span.row, 0, span.count);
    add_attention_items(last_attends_, span, index, skipped);
  }
  deal(attends_);
  deal(last_attends_);
}

/// Deals items out among the workers' shares, so that each has long and short ones.
void Decoder::deal(std::vector<Item>& items) {
  dealt_.clear();
  for (int rank = 0; rank < pool_.size(); ++rank) {
    for (std::size_t i = rank; i < items.size(); i += pool_.size()) dealt_.push_back(items[i]);
  }
  items.swap(dealt_);
}

/// Adds items for the rows of a span from `first` on. The late rows, which see most, come first, so
/// that no worker is left with a long item at the end.
void Decoder::add_attention_items(std::vector<Item>& items, const Span& span, int index,
                                  int first) const {
  const int heads = config_.num_attention_heads / config_.num_key_value_heads;
  const int begin = first * heads, queries = span.count * heads - begin;
  // Few queries are divided among all workers, though they read the same keys then.
  const int workers = pool_.size(), kv_heads = config_.num_key_value_heads;
  const int items_a_head = std::max(1, (workers + kv_heads - 1) / kv_heads);
  const int size = std::clamp((queries + items_a_head - 1) / items_a_head, 1, kernels_.token_block);
  for (int last = (queries - 1) / size; queries > 0 && last >= 0; --last) {
    const int at = last * size;
    for (int head = 0; head < kv_heads; ++head) {
      items.push_back({index, head, begin + at, std::min(size, queries - at)});
    }
  }
}

/// Runs the rows in x_ through all layers; the last `wanted` of them go on to the head.
void Decoder::forward(int rows, int wanted, float* logits) {
  plan(rows, wanted);
  pool_.run([&](Worker& worker) {
    const int layers = config_.num_hidden_layers;
    for (int i = 0; i < layers; ++i) layer(worker, i, rows, i + 1 < layers ? 0 : rows - wanted);
    if (wanted > 0) {
      head_.run(worker, gemm_, {x_.row(rows - wanted), x_.stride(), wanted}, logits);
    }
  });
  for (const auto& span : spans_) span.cache->set_length(span.position + span.count);
}

/// One layer. Rows before `first` only leave their keys and values: in the last layer nothing else
/// of them is needed.
void Decoder::layer(Worker& worker, int index, int rows, int first) {
  const auto& c = config_;
  const auto& w = weights_.layers[index];
  const int inner = c.num_attention_heads * c.head_dim;
  const Norm input_norm{w.input_norm, nullptr, c.rms_norm_eps};
  const Norm post_norm{w.post_norm, nullptr, c.rms_norm_eps};
  const auto kStore = Epilogue::Kind::kStore, kAdd = Epilogue::Kind::kAdd;

  const float* bias =
      biases_.empty() || biases_[index].others.empty() ? w.qkv.bias : biases_[index].others.data();
  gemm_.run(worker, {w.qkv.matrix, bias}, {x_.row(0), x_.stride(), rows, c.hidden_size, input_norm},
            {kStore, qkv_.row(0), qkv_.stride(), c.qkv_rows()});
  attention(worker, index, rows, first);
  const int left = rows - first;
  if (left == 0) return;
  const Output add{kAdd, x_.row(first), x_.stride(), c.hidden_size};
  gemm_.run(worker, w.o, {attended_.row(first), attended_.stride(), left, inner}, add);
  gemm_.run(worker, {w.gate_up, Epilogue::Kind::kSwiglu, w.down, c.intermediate_size},
            {x_.row(first), x_.stride(), left, c.hidden_size, post_norm}, add);
}

/// Queries, keys and values in qkv_ to attended_, by way of the cache.
void Decoder::attention(Worker& worker, int layer, int rows, int first) {
  const auto& attends = first == 0 ? attends_ : last_attends_;
  const int kv_heads = config_.num_key_value_heads;
  if (rows <= kernels_.token_block && worker.size() <= kv_heads) {
    // A head is stored and attended to by one worker: no barrier between.
    worker.each(kv_heads, [&](int head) {
      for (const auto& item : stores_) {
        if (item.head == head) store(layer, item);
      }
      for (const auto& item : attends) {
        if (item.head == head) attend(worker, layer, item);
      }
    });
    return;
  }
  worker.each(static_cast<int>(stores_.size()), [&](int i) { store(layer, stores_[i]); });
  worker.each(static_cast<int>(attends.size()), [&](int i) { attend(worker, layer, attends[i]); });
}

/// Norm and rotary embedding of an item's queries and keys; keys and values into the cache.
void Decoder::store(int layer, const Item& item) {
  const auto& c = config_;
  const auto& w = weights_.layers[layer];
  const Span& span = spans_[item.span];
  const int heads = c.num_attention_heads / c.num_key_value_heads;
  std::uint32_t* const* keys = span.cache->keys(layer, item.head);
  std::uint32_t* const* values = span.cache->values(layer, item.head);
  const int format = static_cast<int>(c.kv_cache);
  for (int row = item.first; row < item.first + item.count; ++row) {
    const int position = span.position + row;
    const float* cos = cos_.data() + static_cast<std::size_t>(position) * c.head_dim / 2;
    const float* sin = sin_.data() + static_cast<std::size_t>(position) * c.head_dim / 2;
    float* qkv = qkv_.row(span.row + row);
    auto place = [&](float* x, const float* norm) {
      if (norm) kernels_.rms_norm(x, norm, c.head_dim, c.rms_norm_eps, x);
      kernels_.rotate(x, cos, sin, c.head_dim);
    };
    for (int i = 0; i < heads; ++i) place(qkv + (item.head * heads + i) * c.head_dim, w.q_norm);
    float* key = qkv + c.key_row() + item.head * c.head_dim;
    place(key, w.k_norm);
    kernels_.store_key[format](key, c.head_dim, position % kCacheBlock,
                               keys[position / kCacheBlock]);
  }
  const int first = span.position + item.first;
  const float* value = qkv_.row(span.row + item.first) + c.value_row() + item.head * c.head_dim;
  kernels_.store_values[format](value, qkv_.stride(), item.count, c.head_dim, first % kCacheBlock,
                                values[first / kCacheBlock]);
}

void Decoder::attend(Worker& worker, int layer, const Item& item) {
  const auto& c = config_;
  const Span& span = spans_[item.span];
  const int heads = c.num_attention_heads / c.num_key_value_heads;
  Attention attention;
  attention.keys = span.cache->keys(layer, item.head);
  attention.values = span.cache->values(layer, item.head);
  attention.head_dim = c.head_dim;
  attention.rows = item.count;
  attention.scale = 1 / std::sqrt(static_cast<float>(c.head_dim));
  attention.scratch = scratch_[worker.rank()].data();
  if (!biases_.empty()) {
    const auto& pairs = biases_[layer].pairs[item.head];
    const auto& values = biases_[layer].values[item.head];
    attention.biases = {static_cast<int>(pairs.size()), pairs.data(), values.data(),
                        rotary_lines_.data()};
  }
  for (int i = 0; i < item.count; ++i) {
    const int row = (item.first + i) / heads;
    const int head = item.head * heads + (item.first + i) % heads;
    const std::size_t at = span.row + row;
    attention.query[i] = qkv_.row(at) + head * c.head_dim;
    attention.visible[i] = span.position + row + 1;
    attention.out[i] = attended_.row(at) + head * c.head_dim;
  }
  kernels_.attend[static_cast<int>(c.kv_cache)](attention);
}

/// Angles are products in float32, as in transformers.
void Decoder::grow_rotary_table(int positions) {
  if (positions <= rotary_positions_) return;
  const int count = std::min(std::max(positions, 2 * rotary_positions_), config_.max_context);
  const int half = config_.head_dim / 2;
  cos_.resize(static_cast<std::size_t>(count) * half);
  sin_.resize(cos_.size());
  for (int position = rotary_positions_; position < count; ++position) {
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * weights_.inverse_frequencies[i];
      cos_[static_cast<std::size_t>(position) * half + i] = std::cos(angle);
      sin_[static_cast<std::size_t>(position) * half + i] = std::sin(angle);
    }
  }
  if (!biases_.empty()) {
    const int blocks = (count + kCacheBlock - 1) / kCacheBlock;
    rotary_lines_.reserve(static_cast<std::size_t>(blocks) * kCacheBlock * 2 * half);
    for (int position = 0; position < count; ++position) {
      const std::size_t group = position / kLanes, at = static_cast<std::size_t>(position) * half;
      float* line = rotary_lines_.data() + group * 2 * half * kLanes + position % kLanes;
      for (int i = 0; i < half; ++i, line += 2 * kLanes) {
        line[0] = cos_[at + i];
        line[kLanes] = sin_[at + i];
      }
    }
  }
  rotary_positions_ = count;
}

}  // namespace edgevl
