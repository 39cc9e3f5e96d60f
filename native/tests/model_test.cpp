// The threads, the packed weights, and the forward passes on every instruction set that this
// machine has. Prints what failed; the exit status is 1 then.

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "model/buffer.h"
#include "model/cache.h"
#include "model/decoder.h"
#include "model/floats.h"
#include "model/measure.h"
#include "model/pack.h"
#include "model/rows.h"
#include "model/vision.h"
#include "threads/thread_pool.h"

using namespace edgevl;

namespace {

int failures = 0;
std::string context;  // what is being tested, for messages
std::mt19937 random_bits(20240501);

void fail(const std::string& what, int line) {
  ++failures;
  std::printf("FAILED %s: %s (line %d)\n", context.c_str(), what.c_str(), line);
}

#define CHECK(condition)                          \
  do {                                            \
    if (!(condition)) fail(#condition, __LINE__); \
  } while (false)

#define CHECK_THROWS(expression)                                         \
  do {                                                                   \
    bool thrown = false;                                                 \
    try {                                                                \
      expression;                                                        \
    } catch (const std::invalid_argument&) {                             \
      thrown = true;                                                     \
    }                                                                    \
    if (!thrown) fail(#expression " throws invalid_argument", __LINE__); \
  } while (false)

std::vector<float> normal(std::size_t n, float size = 1, float mean = 0) {
  std::normal_distribution<float> distribution(mean, size);
  std::vector<float> values(n);
  for (auto& value : values) value = distribution(random_bits);
  return values;
}

/// |a - b| / |b|, of whole vectors.
double distance(const float* a, const float* b, std::size_t n) {
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < n; ++i) {
    difference += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
    size += static_cast<double>(b[i]) * b[i];
  }
  return std::sqrt(difference / size);  // NaN, which is not less than anything, if one is
}

// --- threads ---------------------------------------------------------------------------------

void test_team() {
  context = "pool";
  CHECK_THROWS(ThreadPool(0));
  CHECK_THROWS(ThreadPool(257));
  for (int threads : {1, 2, 3, 7}) {
    ThreadPool pool(threads);
    CHECK(pool.size() == threads);
    constexpr int kItems = 1000;
    for (int round = 0; round < 50; ++round) {
      std::vector<int> times(kItems), shared(kItems);
      std::vector<long> sums(threads);
      pool.run([&](Worker& worker) {
        worker.each(kItems, [&](int i) { ++times[i]; });
        // After a barrier everybody sees what everybody wrote.
        sums[worker.rank()] = std::accumulate(times.begin(), times.end(), 0L);
        worker.barrier();
        const auto [begin, end] = worker.share(kItems);
        for (int i = begin; i < end; ++i) ++shared[i];
        worker.each(3, [&](int i) { times[i] += 10; });
      });
      CHECK(std::count(shared.begin(), shared.end(), 1) == kItems);
      CHECK(std::count(sums.begin(), sums.end(), kItems) == threads);
      CHECK(times[0] == 11 && times[2] == 11 && times[3] == 1 && times[kItems - 1] == 1);
    }
  }
}

void test_team_sleeps_and_wakes() {
  context = "pool that slept";
  ThreadPool pool(3);
  std::atomic<int> count{0};
  for (int i = 0; i < 3; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    pool.run([&](Worker& worker) {
      if (worker.rank() == 1) std::this_thread::sleep_for(std::chrono::milliseconds(2));
      worker.barrier();
      ++count;
    });
  }
  CHECK(count == 9);
}

void test_team_errors() {
  context = "pool with errors";
  ThreadPool pool(3);
  for (int i = 0; i < 20; ++i) {
    bool thrown = false;
    try {
      pool.run([&](Worker& worker) {
        if (worker.rank() == i % 3) throw std::runtime_error("expected");
      });
    } catch (const std::runtime_error&) {
      thrown = true;
    }
    CHECK(thrown);
    int count = 0;
    pool.run([&](Worker& worker) { worker.each(1, [&](int) { ++count; }); });
    CHECK(count == 1);
  }
}

void test_team_with_two_callers() {
  context = "pool with two callers";
  ThreadPool pool(2);
  long total = 0;  // not atomic: steps must not overlap
  auto call = [&] {
    for (int i = 0; i < 200; ++i) {
      pool.run([&](Worker& worker) {
        worker.each(10, [&](int j) {
          if (j == 0) ++total;
        });
      });
    }
  };
  std::thread other(call);
  call();
  other.join();
  CHECK(total == 400);
}

// --- weights ---------------------------------------------------------------------------------

void test_floats() {
  context = "floats";
  for (std::uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const bool nan_f16 = (bits & 0x7c00) == 0x7c00 && (bits & 0x3ff);
    const bool nan_bf16 = (bits & 0x7f80) == 0x7f80 && (bits & 0x7f);
    if (nan_f16 ? !std::isnan(from_f16(half)) : to_f16(from_f16(half)) != half) {
      return fail("half precision does not come back", __LINE__);
    }
    if (nan_bf16 ? !std::isnan(from_bf16(to_bf16(from_bf16(half))))
                 : to_bf16(from_bf16(half)) != half) {
      return fail("bfloat16 does not come back", __LINE__);
    }
  }
  CHECK(from_f16(0x3c00) == 1 && from_f16(0x0001) == 0x1p-24f && from_f16(0xc500) == -5);
  CHECK(to_f16(65519.0f) == 0x7bff && to_f16(65520.0f) == 0x7c00 && to_f16(-1e30f) == 0xfc00);
  CHECK(to_f16(1 + 0x1p-11f) == 0x3c00 && to_f16(1 + 3 * 0x1p-11f) == 0x3c02);
  CHECK(to_f16(0x1p-25f) == 0 && to_f16(3 * 0x1p-25f) == 2 && std::isnan(from_f16(to_f16(NAN))));
  CHECK(to_bf16(1 + 0x1p-8f) == 0x3f80 && to_bf16(1 + 3 * 0x1p-8f) == 0x3f82);
}

/// Packed weights and what they stand for.
struct Packed {
  Linear linear;
  Buffer<std::uint8_t> bytes;
  std::vector<float> weights;  ///< float32 [rows, cols], unpacked again

  Packed(Format format, int rows, int cols, int group, ThreadPool& pool,
         const std::vector<float>& source, const std::vector<float>* source2 = nullptr) {
    linear.matrix = describe(format, rows, cols, group);
    bytes = Buffer<std::uint8_t>(linear.matrix.bytes());
    if (source2) {
      const int each = static_cast<int>(source.size()) / cols;
      pack(PlainMatrix{Dtype::kF32, each, cols, source.data()}, linear.matrix, bytes.data(), {0, 2},
           pool);
      pack(PlainMatrix{Dtype::kF32, each, cols, source2->data()}, linear.matrix, bytes.data(),
           {1, 2}, pool);
    } else {
      pack(PlainMatrix{Dtype::kF32, rows, cols, source.data()}, linear.matrix, bytes.data(), {},
           pool);
    }
    linear.matrix.data = bytes.data();
    weights.resize(static_cast<std::size_t>(rows) * cols);
    unpack(linear.matrix, cols, weights.data());
  }
};

void test_packing() {
  ThreadPool pool(2);
  for (const auto& [rows, cols, group] :
       {std::tuple{16, 8, 8}, {37, 100, 32}, {64, 250, 128}, {40, 300, 16}}) {
    const auto source = normal(static_cast<std::size_t>(rows) * cols);
    for (const auto format : {Format::kInt4, Format::kInt8, Format::kBf16, Format::kSplit}) {
      if (format == Format::kSplit && group % 16 != 0) continue;
      context = "packing, format " + std::to_string(static_cast<int>(format));
      const Packed packed(format, rows, cols, group, pool, source);
      CHECK(packed.linear.matrix.cols >= cols && packed.linear.matrix.panels() % 2 == 0);
      for (int row = 0; row < rows; ++row) {
        const float* x = source.data() + static_cast<std::size_t>(row) * cols;
        const float* y = packed.weights.data() + static_cast<std::size_t>(row) * cols;
        float largest = 0;
        for (int c = 0; c < cols; ++c) largest = std::max(largest, std::fabs(x[c]));
        for (int c = 0; c < cols; ++c) {
          const float error = std::fabs(x[c] - y[c]);
          if (format == Format::kBf16) CHECK(y[c] == from_bf16(to_bf16(x[c])));
          if (format == Format::kInt8) CHECK(error <= largest / 127 * 0.5001f);
        }
        for (int g = 0; g < cols && format == Format::kSplit; g += group) {
          const int end = std::min(g + group, cols);
          float peak = 0;
          for (int c = g; c < end; ++c) peak = std::max(peak, std::fabs(x[c]));
          // Half a step, or what is clipped; the scale is rounded to float16.
          const float step = peak / (7.5f / 0.8f);
          for (int c = g; c < end; ++c) {
            const float clipped = std::fabs(x[c]) - 7.5f * step;
            CHECK(std::fabs(x[c] - y[c]) <= std::max(0.5f * step, clipped) + peak * 0x1p-10f);
          }
        }
        for (int g = 0; g < cols && format == Format::kInt4; g += group) {
          // Better than rounding with the largest magnitude at 7; a little worse where the scale's
          // float16 falls badly.
          const int end = std::min(g + group, cols);
          float peak = 0;
          for (int c = g; c < end; ++c) peak = std::max(peak, std::fabs(x[c]));
          double plain = 0, ours = 0;
          for (int c = g; c < end; ++c) {
            const float rounded = std::nearbyint(x[c] / peak * 7) * peak / 7;
            plain += (x[c] - rounded) * (x[c] - rounded);
            ours += (x[c] - y[c]) * (x[c] - y[c]);
          }
          CHECK(ours <= 1.01 * plain + 1e-6);
        }
      }
    }
  }
  context = "packing zeros and NaN";
  for (const auto format : {Format::kInt4, Format::kInt8, Format::kBf16, Format::kSplit}) {
    const Packed zeros(format, 16, 32, 32, pool, std::vector<float>(16 * 32));
    CHECK(std::count(zeros.weights.begin(), zeros.weights.end(), 0.0f) == 16 * 32);
    Packed(format, 16, 32, 32, pool, std::vector<float>(16 * 32, NAN));  // must not be undefined
  }
  context = "packing what does not fit";
  std::vector<float> source(40 * 32);
  Buffer<std::uint8_t> out(1 << 16);
  const Matrix matrix = describe(Format::kInt8, 32, 32, 32);
  CHECK_THROWS(pack(PlainMatrix{Dtype::kF32, 40, 32, source.data()}, matrix, out.data(), {}, pool));
  CHECK_THROWS(pack(PlainMatrix{Dtype::kF32, 32, 64, source.data()}, matrix, out.data(), {}, pool));
  CHECK_THROWS(
      pack(PlainMatrix{Dtype::kF32, 32, 32, source.data()}, matrix, out.data(), {1, 1}, pool));
  CHECK_THROWS(describe(Format::kInt4, 16, 16, 12));
  CHECK_THROWS(describe(Format::kSplit, 16, 16, 24));
  CHECK_THROWS(describe(Format::kInt8, 0, 16, 16));
}

void test_gptq() {
  context = "GPTQ";
  ThreadPool pool(2);
  const int rows = 40, cols = 64, group = 32;
  std::vector<std::uint32_t> words(cols / 8 * rows);
  for (auto& word : words) word = random_bits();
  std::vector<std::uint16_t> scales(cols / group * rows);
  for (auto& scale : scales) scale = to_f16(normal(1, 0.1f)[0]);
  const Matrix layout = describe(Format::kInt4, rows, cols, group);
  Buffer<std::uint8_t> bytes(layout.bytes());
  pack(GptqMatrix{rows, cols, group, words.data(), Dtype::kF16, scales.data()}, layout,
       bytes.data(), {}, pool);
  Matrix matrix = layout;
  matrix.data = bytes.data();
  std::vector<float> weights(rows * cols);
  unpack(matrix, cols, weights.data());
  for (int row = 0; row < rows; ++row) {
    for (int c = 0; c < cols; ++c) {
      const int nibble = words[c / 8 * rows + row] >> (4 * (c % 8)) & 15;
      const float expected =
          static_cast<float>(nibble - 8) * from_f16(scales[c / group * rows + row]);
      CHECK(weights[row * cols + c] == expected);
    }
  }
}

void test_spare_blocks() {
  context = "spare blocks";
  auto spare = std::make_shared<SpareBlocks>();
  constexpr std::size_t kWords = 4096;
  const std::uint32_t* place;
  {
    auto block = SpareBlocks::take(spare, kWords);
    block->data()[kWords - 1] = 7;
    place = block->data();
    const auto shared = block;
    block.reset();
    CHECK(SpareBlocks::take(spare, kWords)->data() != place);  // somebody still has it
  }
  const auto first = SpareBlocks::take(spare, kWords);
  const auto second = SpareBlocks::take(spare, kWords);
  CHECK(first->data() == place || second->data() == place);
  for (std::size_t i = 0; i < kWords; ++i) {
    CHECK(first->data()[i] == 0);
    CHECK(second->data()[i] == 0);
  }

  // More than is kept: what is beyond goes back to the system, and untouched pages take no memory.
  context = "many spare blocks";
  constexpr std::size_t kLarge = (40 << 20) / sizeof(std::uint32_t);
  auto large = std::make_shared<SpareBlocks>();
  std::vector<SpareBlocks::Block> blocks;
  for (int i = 0; i < 5; ++i) blocks.push_back(SpareBlocks::take(large, kLarge));
  CHECK(large->bytes() == 0);
  blocks.clear();
  CHECK(large->bytes() == 3 * kLarge * sizeof(std::uint32_t));

  context = "a cache that outlives what it was made with";
  Cache cache(2, 3, 24, CacheFormat::kBf16, std::make_shared<SpareBlocks>());
  cache.reserve(100);
  cache.set_length(100);
  cache.truncate(0);
  CHECK(cache.length() == 0);
}

void test_cache() {
  context = "cache";
  Cache cache(2, 3, 24);
  CHECK(cache.length() == 0 && cache.bytes() == 0);
  cache.reserve(1);
  const std::size_t block = cache.bytes();
  CHECK(block == 2 * 3 * 2 * cache_words(24) * 4);
  cache.reserve(10 * kCacheBlock);
  CHECK(cache.bytes() == 10 * block);
  cache.keys(1, 2)[9][0] = 7;
  cache.set_length(10 * kCacheBlock);
  CHECK_THROWS(cache.truncate(-1));
  CHECK_THROWS(cache.truncate(10 * kCacheBlock + 1));
  cache.truncate(kCacheBlock + 1);
  CHECK(cache.length() == kCacheBlock + 1 && cache.bytes() == 3 * block);
  cache.truncate(0);
  CHECK(cache.bytes() == block);
  cache.reserve(10 * kCacheBlock);
  CHECK(cache.keys(1, 2)[9][0] == 0);

  // Shared until one of the two writes.
  cache.set_length(2 * kCacheBlock + 5);
  cache.keys(1, 2)[2][3] = 11;
  Cache twin(2, 3, 24);
  CHECK_THROWS(twin.share(cache, 2 * kCacheBlock + 6));
  CHECK_THROWS(twin.share(cache, -1));
  twin.share(cache, 2 * kCacheBlock + 4);
  CHECK(twin.length() == 2 * kCacheBlock + 4 && twin.bytes() == 3 * block);
  CHECK(twin.keys(1, 2)[2] == cache.keys(1, 2)[2]);
  twin.reserve(3 * kCacheBlock + 1);
  CHECK(twin.keys(0, 0)[1] == cache.keys(0, 0)[1] && twin.bytes() == 4 * block);
  CHECK(twin.keys(1, 2)[2] != cache.keys(1, 2)[2] && twin.keys(1, 2)[2][3] == 11);
  twin.truncate(kCacheBlock + 1);
  twin.reserve(kCacheBlock + 2);
  CHECK(twin.keys(0, 0)[0] == cache.keys(0, 0)[0] && twin.keys(0, 0)[1] != cache.keys(0, 0)[1]);
  const auto* kept = cache.keys(0, 0)[0];
  cache.truncate(0);
  cache.reserve(1);
  CHECK(twin.keys(0, 0)[0] == kept && cache.keys(0, 0)[0] != kept);

  // Out and in again, also into one whose blocks are shared.
  twin.keys(1, 2)[1][3] = 12;
  std::vector<std::uint32_t> words(twin.words(kCacheBlock + 1));
  CHECK(words.size() * 4 == 2 * block && twin.words(kCacheBlock) * 4 == block);
  twin.copy_to(words.data(), kCacheBlock + 1);
  Cache sharer(2, 3, 24);
  cache.set_length(1);
  cache.keys(1, 2)[0][3] = 13;
  sharer.share(cache, 1);
  sharer.assign(words.data(), kCacheBlock + 1);
  CHECK(sharer.length() == kCacheBlock + 1 && sharer.keys(1, 2)[1][3] == 12);
  CHECK(sharer.keys(1, 2)[0][3] == twin.keys(1, 2)[0][3] && cache.keys(1, 2)[0][3] == 13);

  Cache small(2, 3, 24, CacheFormat::kInt8);
  small.reserve(1);
  CHECK(small.bytes() == 2 * 3 * 2 * kCacheBlock * (32 + 4));          // padded to 16; a scale
  small.values(1, 2)[0][cache_words(24, CacheFormat::kInt8) - 1] = 7;  // the last of all
}

// --- decoder ---------------------------------------------------------------------------------

/// A small decoder with random weights, and its forward pass in double precision.
struct SmallDecoder {
  DecoderConfig config;
  Format format;  ///< of all matrices but the head
  std::vector<std::vector<float>> vectors;
  std::vector<Packed> matrices;  // qkv, o, gate_up, down of each layer; head
  PlainMatrix embedding;
  DecoderWeights weights;

  SmallDecoder(bool qwen3, Format head_format, bool exact, ThreadPool& pool,
               bool large_biases = false)
      : format(head_format == Format::kSplit ? Format::kInt4 : head_format) {
    auto& c = config;
    c.hidden_size = 56;
    c.intermediate_size = 72;
    c.num_hidden_layers = 2;
    c.num_attention_heads = qwen3 ? 4 : 6;
    c.num_key_value_heads = 2;
    c.head_dim = qwen3 ? 16 : 12;
    c.vocab_size = 203;
    c.max_context = 200;
    c.chunk = 17;
    c.rms_norm_eps = 1e-6f;
    vectors.reserve(1000);
    matrices.reserve(1000);
    const int inner = c.num_attention_heads * c.head_dim;
    for (int i = 0; i < c.num_hidden_layers; ++i) {
      DecoderLayer layer;
      layer.input_norm = vector(c.hidden_size, 0.2f, 1);
      layer.qkv = matrix(c.qkv_rows(), c.hidden_size, pool);
      if (qwen3) {
        layer.q_norm = vector(c.head_dim, 0.2f, 1);
        layer.k_norm = vector(c.head_dim, 0.2f, 1);
      }
      if (!qwen3 || large_biases) {
        float* bias = vector(c.qkv_rows(), 0.5f);
        for (int head = 0; large_biases && head < c.num_key_value_heads; ++head) {
          float* key = bias + c.key_row() + head * c.head_dim;
          key[c.head_dim - 1] = 200;
          key[c.head_dim - 2] = key[c.head_dim / 2 - 2] = -70;
        }
        layer.qkv.bias = bias;
        if (!qwen3) layer.o.bias = vector(c.hidden_size, 0.5f);
      }
      const float* o_bias = layer.o.bias;
      layer.o = matrix(c.hidden_size, inner, pool);
      layer.o.bias = o_bias;
      layer.post_norm = vector(c.hidden_size, 0.2f, 1);
      const auto gate = random_matrix(c.intermediate_size, c.hidden_size);
      const auto up = random_matrix(c.intermediate_size, c.hidden_size);
      matrices.emplace_back(format, 2 * c.padded(c.intermediate_size), c.hidden_size, 32, pool,
                            gate, &up);
      layer.gate_up = matrices.back().linear;
      layer.down = matrix(c.hidden_size, c.intermediate_size, pool);
      weights.layers.push_back(layer);
    }
    embedding = {Dtype::kF32, c.vocab_size, c.hidden_size, vector(c.vocab_size * c.hidden_size, 1)};
    weights.embedding = embedding;
    weights.norm = vector(c.hidden_size, 0.2f, 1);
    const float* head = vector(c.vocab_size * c.hidden_size, 0.2f);
    matrices.emplace_back(head_format, c.vocab_size, c.hidden_size, 32, pool, vectors.back());
    weights.head = matrices.back().linear;
    if (exact) weights.head_exact = PlainMatrix{Dtype::kF32, c.vocab_size, c.hidden_size, head};
    float* frequencies = vector(c.head_dim / 2, 0);
    for (int i = 0; i < c.head_dim / 2; ++i) {
      frequencies[i] = std::pow(large_biases ? 1e6f : 100.0f, -2.0f * i / c.head_dim);
    }
    weights.inverse_frequencies = frequencies;
  }

  float* vector(int n, float size, float mean = 0) {
    vectors.push_back(normal(n, size, mean));
    return vectors.back().data();
  }
  std::vector<float> random_matrix(int rows, int cols) {
    return normal(static_cast<std::size_t>(rows) * cols, 1 / std::sqrt(static_cast<float>(cols)));
  }
  Linear matrix(int rows, int cols, ThreadPool& pool) {
    matrices.emplace_back(format, rows, cols, 32, pool, random_matrix(rows, cols));
    return matrices.back().linear;
  }

  using Row = std::vector<double>;

  static Row norm(const double* x, const float* weight, int n, double eps) {
    double squares = 0;
    for (int i = 0; i < n; ++i) squares += x[i] * x[i];
    Row out(n);
    for (int i = 0; i < n; ++i) out[i] = x[i] / std::sqrt(squares / n + eps) * weight[i];
    return out;
  }
  static Row product(const std::vector<float>& w, const float* bias, const Row& x) {
    const std::size_t rows = w.size() / x.size();
    Row out(rows);
    for (std::size_t r = 0; r < rows; ++r) {
      out[r] = bias ? bias[r] : 0;
      for (std::size_t c = 0; c < x.size(); ++c) out[r] += w[r * x.size() + c] * x[c];
    }
    return out;
  }
  void rotate(double* x, int position) const {
    const int half = config.head_dim / 2;
    for (int i = 0; i < half; ++i) {
      const double angle = static_cast<float>(position) * weights.inverse_frequencies[i];
      const double a = x[i], b = x[half + i];
      x[i] = a * std::cos(angle) - b * std::sin(angle);
      x[half + i] = b * std::cos(angle) + a * std::sin(angle);
    }
  }

  /// Logits [ids, vocabulary].
  std::vector<float> reference(const std::vector<std::int64_t>& ids) const {
    const auto& c = config;
    const int heads = c.num_attention_heads, group = heads / c.num_key_value_heads;
    std::vector<Row> x;
    for (const auto id : ids) {
      const auto* row = static_cast<const float*>(embedding.data) + id * c.hidden_size;
      x.emplace_back(row, row + c.hidden_size);
    }
    for (int l = 0; l < c.num_hidden_layers; ++l) {
      const auto& w = weights.layers[l];
      std::vector<Row> qkv;
      for (std::size_t t = 0; t < x.size(); ++t) {
        qkv.push_back(product(matrices[4 * l].weights, w.qkv.bias,
                              norm(x[t].data(), w.input_norm, c.hidden_size, c.rms_norm_eps)));
        for (int h = 0; h < heads + c.num_key_value_heads; ++h) {
          double* head =
              qkv[t].data() + (h < heads ? h * c.head_dim : c.key_row() + (h - heads) * c.head_dim);
          if (const float* weight = h < heads ? w.q_norm : w.k_norm) {
            const Row normed = norm(head, weight, c.head_dim, c.rms_norm_eps);
            std::copy(normed.begin(), normed.end(), head);
          }
          rotate(head, static_cast<int>(t));
        }
      }
      for (std::size_t t = 0; t < x.size(); ++t) {
        Row mixed(heads * c.head_dim);
        for (int h = 0; h < heads; ++h) {
          const int key = c.key_row() + h / group * c.head_dim;
          const int value = c.value_row() + h / group * c.head_dim;
          Row scores(t + 1);
          for (std::size_t s = 0; s <= t; ++s) {
            for (int i = 0; i < c.head_dim; ++i) {
              scores[s] += qkv[t][h * c.head_dim + i] * qkv[s][key + i];
            }
          }
          double total = 0;
          for (auto& score : scores) total += score = std::exp(score / std::sqrt(c.head_dim));
          for (std::size_t s = 0; s <= t; ++s) {
            for (int i = 0; i < c.head_dim; ++i) {
              mixed[h * c.head_dim + i] += scores[s] / total * qkv[s][value + i];
            }
          }
        }
        const Row o = product(matrices[4 * l + 1].weights, w.o.bias, mixed);
        for (int i = 0; i < c.hidden_size; ++i) x[t][i] += o[i];
        const Row both = product(matrices[4 * l + 2].weights, nullptr,
                                 norm(x[t].data(), w.post_norm, c.hidden_size, c.rms_norm_eps));
        Row gated(c.intermediate_size);
        for (int i = 0; i < c.intermediate_size; ++i) {
          const double gate = both[i / kLanes * 2 * kLanes + i % kLanes];
          gated[i] =
              gate / (1 + std::exp(-gate)) * both[(i / kLanes * 2 + 1) * kLanes + i % kLanes];
        }
        const Row down = product(matrices[4 * l + 3].weights, nullptr, gated);
        for (int i = 0; i < c.hidden_size; ++i) x[t][i] += down[i];
      }
    }
    std::vector<float> logits;
    for (const auto& row : x) {
      const Row out = product(matrices.back().weights, nullptr,
                              norm(row.data(), weights.norm, c.hidden_size, c.rms_norm_eps));
      logits.insert(logits.end(), out.begin(), out.end());
    }
    return logits;
  }
};

std::vector<std::int64_t> token_ids(int n, int vocabulary) {
  std::vector<std::int64_t> ids(n);
  for (auto& id : ids) id = random_bits() % vocabulary;
  return ids;
}

/// What rounding activations to bfloat16, or to int8, adds up to in the small decoders. An int8
/// cache adds two roundings a layer, independent of the others: of vectors whose peak is 2.5 times
/// their root mean square, off by 2.5 / (127 sqrt(12)); softmax makes that 3 times as much at most.
/// Large biases of keys, in channels that positions hardly turn, add nearly the same to all scores
/// of a query, and so change nothing of it.
double tolerance(Format format, CacheFormat kv_cache) {
  const double cache = 3 * 2.5 / (127 * std::sqrt(12)) * std::sqrt(2 * 2);
  return std::hypot(format == Format::kBf16 ? 0.02 : 0.08,
                    kv_cache == CacheFormat::kInt8 ? cache : 0);
}

using Ids = std::span<const std::int64_t>;

Logits prefill(Decoder& decoder, Sequence& sequence, const float* embeddings, int tokens) {
  const Part part{&sequence, embeddings, nullptr, tokens, 1};
  return decoder.step({&part, 1});
}

Logits extend(Decoder& decoder, Sequence& sequence, Ids ids) {
  const int count = static_cast<int>(ids.size());
  const Part part{&sequence, nullptr, ids.data(), count, count};
  return decoder.step({&part, 1});
}

Logits decode(Decoder& decoder, std::span<Sequence* const> sequences, Ids ids) {
  std::vector<Part> parts;
  for (std::size_t i = 0; i < sequences.size(); ++i) {
    parts.push_back({sequences[i], nullptr, &ids[i], 1, 1});
  }
  return decoder.step(parts);
}

void test_decoder(const std::string& isa, int threads, bool qwen3, Format format,
                  CacheFormat kv_cache = CacheFormat::kBf16, bool large_biases = false) {
  context = "decoder " + isa + ", " + std::to_string(threads) + " threads, " +
            (qwen3 ? "qwen3" : "qwen2") + ", format " + std::to_string(static_cast<int>(format)) +
            ", cache " + std::to_string(static_cast<int>(kv_cache)) +
            (large_biases ? ", large biases" : "");
  ThreadPool pool(threads);
  SmallDecoder small(qwen3, format, false, pool, large_biases);
  small.config.kv_cache = kv_cache;
  const auto& c = small.config;
  Decoder decoder(c, small.weights, pool, kernels(isa));
  const auto vocabulary = static_cast<std::size_t>(c.vocab_size);
  const auto ids = token_ids(90, c.vocab_size);
  const auto expected = small.reference(ids);
  auto near = [&](const Logits& logits, int row, std::size_t position) {
    return distance(logits.buffer->data() + row * vocabulary, &expected[position * vocabulary],
                    vocabulary) < tolerance(format, kv_cache);
  };
  std::vector<float> embeddings(ids.size() * c.hidden_size);
  decoder.embed(ids, embeddings.data());

  // Prefill in chunks, then token by token.
  const auto sequence = decoder.new_sequence();
  CHECK(near(prefill(decoder, *sequence, embeddings.data(), 70), 0, 69));
  CHECK(sequence->cache.length() == 70);
  Sequence* one[] = {sequence.get()};
  for (int t = 70; t < 80; ++t) CHECK(near(decode(decoder, one, {{ids[t]}}), 0, t));

  // Several at once, logits of each; from a shortened cache.
  sequence->cache.truncate(63);
  const auto extended = extend(decoder, *sequence, std::span(ids).subspan(63, 20));
  for (int i = 0; i < 20; ++i) CHECK(near(extended, i, 63 + i));

  // A part of one, of which the last logits are wanted or none, beside tokens of another.
  for (const int wanted : {0, 1, 3}) {
    const auto beside = decoder.new_sequence();
    sequence->cache.truncate(63);
    const Part parts[] = {{beside.get(), embeddings.data(), nullptr, 40, wanted},
                          {sequence.get(), nullptr, &ids[63], 20, 20}};
    const auto mixed = decoder.step(parts);
    CHECK(mixed.rows == wanted + 20 && beside->cache.length() == 40);
    for (int i = 0; i < wanted; ++i) CHECK(near(mixed, i, 40 - wanted + i));
    for (int i = 0; i < 20; ++i) CHECK(near(mixed, wanted + i, 63 + i));
    CHECK(near(extend(decoder, *beside, std::span(ids).subspan(40, 1)), 0, 40));
  }

  // Several sequences, of different lengths.
  const auto second = decoder.new_sequence();
  prefill(decoder, *second, embeddings.data(), 1);
  std::vector<std::unique_ptr<Sequence>> more;
  std::vector<Sequence*> all = {sequence.get(), second.get()};
  std::vector<std::int64_t> next = {ids[83], ids[1]};
  for (int i = 0; i < c.chunk; ++i) {  // more than a chunk takes
    more.push_back(decoder.new_sequence());
    prefill(decoder, *more.back(), embeddings.data(), 2 + i);
    all.push_back(more.back().get());
    next.push_back(ids[2 + i]);
  }
  const auto batch = decode(decoder, all, next);
  CHECK(near(batch, 0, 83) && near(batch, 1, 1));
  for (int i = 0; i < c.chunk; ++i) CHECK(near(batch, 2 + i, 2 + i));

  // Saved without what follows, and loaded.
  for (int length : {1, 63, 64, 70}) {
    const auto alone = decoder.new_sequence(), loaded = decoder.new_sequence();
    prefill(decoder, *alone, embeddings.data(), length);
    std::vector<std::uint32_t> words(decoder.words(*sequence, length)), same(words.size());
    decoder.save(*sequence, length, words.data());
    decoder.save(*alone, length, same.data());
    CHECK(words == same);
    decoder.load(*loaded, words.data(), words.size(), length);
    CHECK(loaded->cache.length() == length);
    std::vector<float> after[2];
    for (int i = 0; i < 2; ++i) {
      Sequence* continued[] = {i == 0 ? alone.get() : loaded.get()};
      const auto logits = decode(decoder, continued, {{ids[length]}});
      after[i].assign(logits.buffer->data(), logits.buffer->data() + vocabulary);
    }
    CHECK(after[0] == after[1]);
  }
}

void test_decoder_errors() {
  context = "decoder errors";
  ThreadPool pool(2);
  const SmallDecoder small(true, Format::kBf16, false, pool);
  Decoder decoder(small.config, small.weights, pool, kernels());
  Decoder other(small.config, small.weights, pool, kernels());
  const auto sequence = decoder.new_sequence();
  const auto stranger = other.new_sequence();
  std::vector<float> x(201 * small.config.hidden_size);
  Sequence* mine[] = {sequence.get()};
  Sequence* theirs[] = {stranger.get()};
  Sequence* twice[] = {sequence.get(), sequence.get()};
  CHECK_THROWS(prefill(decoder, *sequence, x.data(), 201));
  CHECK_THROWS(prefill(decoder, *sequence, x.data(), 0));
  CHECK_THROWS(prefill(decoder, *stranger, x.data(), 1));
  CHECK_THROWS(decode(decoder, theirs, {{1}}));
  CHECK_THROWS(decode(decoder, mine, {{203}}));
  CHECK_THROWS(decode(decoder, mine, {{-1}}));
  CHECK_THROWS(decode(decoder, twice, (std::vector<std::int64_t>{1, 2})));
  CHECK_THROWS(decoder.step({}));
  const std::int64_t ids[] = {1, 2};
  const auto another = decoder.new_sequence();
  for (const int wanted : {-1, 1, 3}) {
    const Part parts[] = {{sequence.get(), nullptr, ids, 1, 1},
                          {another.get(), nullptr, ids, 2, wanted}};
    CHECK_THROWS(decoder.step(parts));  // only the first may want less, and none more
  }
  CHECK_THROWS(extend(decoder, *sequence, {}));
  std::uint32_t word = 0;
  CHECK_THROWS(decoder.words(*sequence, 1));
  CHECK_THROWS(decoder.save(*sequence, 0, &word));
  CHECK_THROWS(decoder.load(*sequence, &word, 1, 1));
  CHECK_THROWS(decoder.load(*sequence, &word, 0, 0));
  CHECK_THROWS(decoder.load(*sequence, &word, sequence->cache.words(201), 201));
  CHECK_THROWS(decoder.load(*stranger, &word, 1, 1));
  CHECK(sequence->cache.length() == 0);
  prefill(decoder, *sequence, x.data(), 200);
  CHECK_THROWS(decode(decoder, mine, {{1}}));
  auto config = small.config;
  config.hidden_size = 57;
  CHECK_THROWS(Decoder(config, small.weights, pool, kernels()));
  config = small.config;
  config.head_dim = 0;
  CHECK_THROWS(Decoder(config, small.weights, pool, kernels()));
  SmallDecoder split(true, Format::kSplit, false, pool);
  const Packed two_parts(Format::kSplit, split.config.hidden_size,
                         split.weights.layers[0].o.matrix.cols, 32, pool,
                         normal(static_cast<std::size_t>(split.config.hidden_size) *
                                split.weights.layers[0].o.matrix.cols));
  split.weights.layers[0].o = two_parts.linear;  // its lower part would be left out
  CHECK_THROWS(Decoder(split.config, split.weights, pool, kernels()));
}

void test_exact_head() {
  context = "exact head";
  constexpr int kTokens = 5;
  std::vector<float> first;
  for (int threads : {1, 2, 3}) {
    random_bits.seed(7);
    ThreadPool pool(threads);
    SmallDecoder small(true, Format::kBf16, false, pool);
    const auto& c = small.config;
    // "Exact" weights twice as large show which logits they were used for.
    std::vector<float> doubled = small.matrices.back().weights;
    for (auto& weight : doubled) weight *= 2;
    Decoder plain(c, small.weights, pool, kernels());
    small.weights.head_exact =
        PlainMatrix{Dtype::kF32, c.vocab_size, c.hidden_size, doubled.data()};
    Decoder rescoring(c, small.weights, pool, kernels());
    const auto ids = token_ids(kTokens, c.vocab_size);
    const auto before = extend(plain, *plain.new_sequence(), ids);
    const auto after = extend(rescoring, *rescoring.new_sequence(), ids);
    for (int row = 0; row < kTokens; ++row) {
      const float* x = before.buffer->data() + row * c.vocab_size;
      const float* y = after.buffer->data() + row * c.vocab_size;
      std::vector<float> sorted(x, x + c.vocab_size);
      std::sort(sorted.rbegin(), sorted.rend());
      for (int i = 0; i < c.vocab_size; ++i) {
        if (x[i] >= sorted[kRescored - 1]) {
          CHECK(std::fabs(y[i] - 2 * x[i]) < 0.05);  // y's activations are not rounded
        } else {
          CHECK(y[i] == x[i]);
        }
      }
    }
    const float* logits = after.buffer->data();
    if (first.empty()) first.assign(logits, logits + kTokens * c.vocab_size);
    CHECK(std::equal(first.begin(), first.end(), logits));
  }
}

/// The lower part of the matrix is added to the largest logits, no fewer than kRefined, and no
/// other.
void test_refined_head() {
  constexpr int kVocabulary = 100'000, kHidden = 60, kRows = 3;
  random_bits.seed(7);
  std::vector<float> norm(kHidden, 1);
  const auto x = normal(kRows * kHidden);
  const auto source = normal(static_cast<std::size_t>(kVocabulary) * kHidden);
  std::vector<float> first;
  for (int threads : {1, 2, 3}) {
    context = "refined head, " + std::to_string(threads) + " threads";
    ThreadPool pool(threads);
    const Packed packed(Format::kSplit, kVocabulary, kHidden, 32, pool, source);
    Gemm gemm(kernels(), threads, kRows);
    gemm.fit(packed.linear.matrix);
    const Norm normed{norm.data(), nullptr, 1e-6f};
    std::vector<float> rough(kRows * kVocabulary), logits(rough.size());
    Head head(kernels(), normed, packed.linear, {}, kVocabulary, kHidden, threads);
    head.reserve(kRows);
    pool.run([&](Worker& worker) {
      gemm.run(worker, packed.linear, {x.data(), kHidden, kRows, kHidden, normed},
               {Epilogue::Kind::kStore, rough.data(), kVocabulary, kVocabulary});
      head.run(worker, gemm, {x.data(), kHidden, kRows}, logits.data());
    });
    for (int row = 0; row < kRows; ++row) {
      std::vector<float> y(kHidden);
      normed.apply(kernels(), x.data() + row * kHidden, kHidden, y.data());
      float largest = 0;
      for (float each : y) largest = std::max(largest, std::fabs(each));
      int refined = 0;
      float least = INFINITY, most = -INFINITY;  // rough logits that are refined, that are not
      for (int token = 0; token < kVocabulary; ++token) {
        const float before = rough[row * kVocabulary + token];
        const float after = logits[row * kVocabulary + token];
        if (before == after) {
          most = std::max(most, before);
          continue;
        }
        ++refined;
        least = std::min(least, before);
        const float* weights = packed.weights.data() + static_cast<std::size_t>(token) * kHidden;
        double expected = 0, sizes = 0;
        for (int c = 0; c < kHidden; ++c) {
          expected += static_cast<double>(weights[c]) * y[c];
          sizes += std::fabs(weights[c]);
        }
        // Half a step of the activations for each weight's upper part, which is at most three
        // times as large as the weight: 2 beside 0.5 steps, but for those, seldom, near zero.
        CHECK(std::fabs(after - expected) <= largest / 254 * 3 * sizes);
      }
      CHECK(least > most && refined >= kRefined && refined < 2 * kRefined);
    }
    if (first.empty()) first = logits;
    CHECK(first == logits);
  }
}

// --- rows in a file --------------------------------------------------------------------------

/// A matrix in a temporary file, behind some bytes that are not its own.
class MatrixFile {
 public:
  explicit MatrixFile(const PlainMatrix& matrix) : matrix_(matrix) { restore(); }
  ~MatrixFile() { std::fclose(file_); }
  MatrixFile(const MatrixFile&) = delete;
  MatrixFile& operator=(const MatrixFile&) = delete;

  /// Writes what has been cut off.
  void restore() {
    const std::size_t size = Rows(matrix_).row_bytes() * matrix_.rows;
    CHECK(pwrite(fileno(file_), matrix_.data, size, kOffset) == static_cast<long>(size));
  }
  /// Cuts the file off inside of a row.
  void cut(int row) {
    const std::size_t size = Rows(matrix_).row_bytes() * row + 5;
    CHECK(ftruncate(fileno(file_), static_cast<long>(kOffset + size)) == 0);
  }
  Rows rows() const {
    return {matrix_.dtype, matrix_.rows, matrix_.cols, fileno(file_), kOffset, "weights.file"};
  }

 private:
  static constexpr int kOffset = 13;  // aligned to nothing
  PlainMatrix matrix_;
  std::FILE* file_ = std::tmpfile();
};

/// Whether `call` throws a FileError that names the file, its errno being `expected`.
template <class Call>
bool fails(int expected, Call&& call) {
  try {
    call();
  } catch (const FileError& error) {
    return error.code().value() == expected && error.file == "weights.file";
  }
  return false;
}

void test_rows() {
  constexpr int kRows = 40, kCols = 57;
  const auto floats = normal(kRows * kCols);
  std::vector<std::uint16_t> halves(kRows * kCols);
  for (auto& half : halves) half = to_f16(normal(1)[0]);  // a number in bfloat16, too
  for (const auto dtype : {Dtype::kF32, Dtype::kF16, Dtype::kBf16}) {
    context = "rows of dtype " + std::to_string(static_cast<int>(dtype));
    const bool wide = dtype == Dtype::kF32;
    const PlainMatrix matrix{dtype, kRows, kCols,
                             wide ? static_cast<const void*>(floats.data()) : halves.data()};
    auto file = std::make_unique<MatrixFile>(matrix);
    const Rows inside = matrix, outside = file->rows();
    CHECK(outside.rows() == kRows && outside.cols() == kCols && outside.dtype() == dtype);
    std::vector<float> a(kCols), b(kCols), buffer(kCols);
    for (int i = kRows - 1; i >= 0; --i) {
      inside.row(i, a.data(), buffer.data());
      outside.row(i, b.data(), buffer.data());
      CHECK(a == b);
      const void* stored = outside.stored(i, buffer.data());
      CHECK(std::memcmp(inside.stored(i, nullptr), stored, inside.row_bytes()) == 0);
    }
    file->cut(20);
    outside.row(19, b.data(), buffer.data());
    for (const int i : {20, 21, 39}) {
      CHECK(fails(EIO, [&] { outside.row(i, b.data(), buffer.data()); }));
    }
    file->restore();
    file.reset();  // closes its descriptor, of which `outside` has a duplicate
    outside.row(39, b.data(), buffer.data());
    inside.row(39, a.data(), buffer.data());
    CHECK(a == b);
  }
  context = "rows of no file";
  CHECK(fails(EBADF, [] { Rows(Dtype::kF32, 1, 1, -1, 0, "weights.file"); }));
}

/// The same logits from rows in a file; where it is cut short, an error that leaves all as it was.
void test_decoder_with_files(int threads) {
  context = "decoder with files, " + std::to_string(threads) + " threads";
  ThreadPool pool(threads);
  SmallDecoder small(true, Format::kInt4, false, pool);
  const auto& c = small.config;
  const int size = c.vocab_size * c.hidden_size;
  std::vector<std::uint16_t> halves(size);
  for (auto& half : halves) half = to_bf16(normal(1, 0.2f)[0]);
  const PlainMatrix exact{Dtype::kBf16, c.vocab_size, c.hidden_size, halves.data()};
  MatrixFile embedding(small.embedding), head(exact);
  small.weights.head_exact = exact;
  Decoder inside(c, small.weights, pool, kernels());
  small.weights.embedding = embedding.rows();
  small.weights.head_exact = head.rows();
  Decoder outside(c, small.weights, pool, kernels());

  const auto ids = token_ids(20, c.vocab_size);
  const auto first = inside.new_sequence(), second = outside.new_sequence();
  auto same = [&](const Logits& a, const Logits& b) {
    const float* x = a.buffer->data();
    return std::equal(x, x + static_cast<long>(a.rows) * c.vocab_size, b.buffer->data());
  };
  CHECK(same(extend(inside, *first, ids), extend(outside, *second, ids)));

  std::vector<float> x(c.hidden_size * ids.size());
  outside.embed(ids, x.data());
  std::vector<std::unique_ptr<Sequence>> more;
  std::vector<Sequence*> all;
  for (int i = 0; i < c.chunk; ++i) {  // with `second`, more than a chunk takes
    more.push_back(outside.new_sequence());
    all.push_back(more.back().get());
  }
  all.push_back(second.get());
  const std::vector<std::int64_t> zeros(all.size());
  std::vector<std::int64_t> last = zeros;
  last.back() = c.vocab_size - 1;
  Sequence* one[] = {second.get()};
  head.cut(0);
  for (int i = 0; i < 3; ++i) {
    CHECK(fails(EIO, [&] { prefill(outside, *second, x.data(), 20); }));
    CHECK(fails(EIO, [&] { decode(outside, one, {{0}}); }));
    CHECK(fails(EIO, [&] { extend(outside, *second, ids); }));
    CHECK(second->cache.length() == 20);
  }
  head.restore();
  embedding.cut(c.vocab_size - 1);
  CHECK(fails(EIO, [&] { outside.embed(last, x.data()); }));
  CHECK(fails(EIO, [&] { extend(outside, *second, last); }));
  CHECK(fails(EIO, [&] { decode(outside, all, last); }));
  CHECK(second->cache.length() == 20 && more[0]->cache.length() == 0);
  embedding.restore();
  Sequence* other[] = {first.get()};
  CHECK(same(decode(inside, other, {{0}}), decode(outside, one, {{0}})));
}

// --- vision ----------------------------------------------------------------------------------

/// Features of two tiles, from the same random weights in every call.
std::vector<float> features(const std::string& isa, int threads, bool large, Format format) {
  random_bits.seed(11);
  ThreadPool pool(threads);
  VisionConfig c;
  c.hidden_size = large ? 45 : 32;  // heads of 15 channels, or 16
  c.intermediate_size = 70;
  c.num_hidden_layers = 2;
  c.num_attention_heads = large ? 3 : 2;
  c.image_size = 24;
  c.patch_size = 4;
  c.layer_norm = !large;
  c.norm_eps = 1e-6f;
  c.downsample = 2;
  c.swapped_shuffle = large;
  c.text_hidden_size = 40;
  c.projector_norm_eps = 1e-5f;
  std::vector<std::vector<float>> vectors;
  std::vector<Packed> matrices;
  vectors.reserve(1000);
  matrices.reserve(1000);
  auto vector = [&](int n, float mean = 0) {
    vectors.push_back(normal(n, 0.2f, mean));
    return vectors.back().data();
  };
  auto matrix = [&](int rows, int cols, bool bias) {
    matrices.emplace_back(
        format, rows, cols, 32, pool,
        normal(static_cast<std::size_t>(rows) * cols, 1 / std::sqrt(static_cast<float>(cols))));
    Linear linear = matrices.back().linear;
    if (bias) linear.bias = vector(rows);
    return linear;
  };
  VisionWeights w;
  w.patch = matrix(c.hidden_size, c.patch_values(), true);
  w.class_embedding = vector(c.hidden_size);
  w.position_embedding = vector(c.positions() * c.hidden_size);
  for (int i = 0; i < c.num_hidden_layers; ++i) {
    VisionLayer layer;
    layer.norm1 = vector(c.hidden_size, 1);
    layer.norm2 = vector(c.hidden_size, 1);
    if (c.layer_norm) layer.norm1_bias = vector(c.hidden_size);
    if (c.layer_norm) layer.norm2_bias = vector(c.hidden_size);
    layer.qkv = matrix(3 * c.hidden_size, c.hidden_size, !large);
    if (large) layer.q_norm = vector(c.hidden_size, 1);
    if (large) layer.k_norm = vector(c.hidden_size, 1);
    layer.proj = matrix(c.hidden_size, c.hidden_size, true);
    layer.fc1 = matrix(c.intermediate_size, c.hidden_size, true);
    layer.fc2 = matrix(c.hidden_size, c.intermediate_size, true);
    layer.ls1 = vector(c.hidden_size, 0.5f);
    layer.ls2 = vector(c.hidden_size, 0.5f);
    w.layers.push_back(layer);
  }
  w.projector_norm = {vector(c.merged_size(), 1), vector(c.merged_size()), c.projector_norm_eps};
  w.projector_fc1 = matrix(c.text_hidden_size, c.merged_size(), true);
  w.projector_fc2 = matrix(c.text_hidden_size, c.text_hidden_size, true);
  const auto pixels = normal(2 * 3 * static_cast<std::size_t>(c.image_size) * c.image_size);
  VisionEncoder encoder(c, w, pool, kernels(isa));
  const std::size_t tile = static_cast<std::size_t>(c.image_tokens()) * c.text_hidden_size;
  std::vector<float> out(2 * tile), alone(tile);
  encoder.encode(pixels.data(), 2, out.data());
  encoder.encode(pixels.data() + pixels.size() / 2, 1, alone.data());
  CHECK(std::equal(alone.begin(), alone.end(), out.begin() + static_cast<long>(tile)));
  CHECK(distance(out.data(), alone.data(), tile) > 0.1);
  return out;
}

void test_vision(const std::string& isa) {
  for (const bool large : {false, true}) {
    context = "vision " + isa + (large ? ", large" : "");
    const auto precise = features("portable", 1, large, Format::kBf16);
    const auto threads = features(isa, 3, large, Format::kBf16);
    CHECK(distance(threads.data(), precise.data(), precise.size()) < 0.01);
    const auto same = features(isa, 1, large, Format::kBf16);
    CHECK(threads == same);
    const auto rounded = features(isa, 2, large, Format::kInt8);
    CHECK(distance(rounded.data(), precise.data(), precise.size()) < 0.05);
  }
}

void test_measurements() {
  context = "measurements";
  ThreadPool pool(2);
  Buffer<std::uint8_t> memory(1 << 20);
  CHECK(read_bandwidth(pool, kernels(), memory) > 0);
}

}  // namespace

int main() {
  test_team();
  test_team_sleeps_and_wakes();
  test_team_errors();
  test_team_with_two_callers();
  test_floats();
  test_packing();
  test_gptq();
  test_rows();
  test_spare_blocks();
  test_cache();
  for (const auto& isa : instruction_sets()) {
    for (const int threads : {1, 3}) {  // 3: more than there are key/value heads
      for (const auto format : {Format::kInt4, Format::kInt8, Format::kBf16, Format::kSplit}) {
        test_decoder(isa, threads, true, format);
        test_decoder(isa, threads, false, format);
      }
      test_decoder(isa, threads, true, Format::kBf16, CacheFormat::kInt8);
      test_decoder(isa, threads, false, Format::kInt4, CacheFormat::kInt8);
      // A norm takes biases in: they are of the keys, whatever their size.
      test_decoder(isa, threads, true, Format::kBf16, CacheFormat::kInt8, true);
      test_decoder(isa, threads, false, Format::kBf16, CacheFormat::kBf16, true);
      test_decoder(isa, threads, false, Format::kBf16, CacheFormat::kInt8, true);
    }
    test_vision(isa);
  }
  test_decoder_errors();
  test_exact_head();
  test_refined_head();
  for (const int threads : {1, 3}) test_decoder_with_files(threads);
  test_measurements();
  if (failures == 0) std::printf("model_test: all passed\n");
  return failures == 0 ? 0 : 1;
}
