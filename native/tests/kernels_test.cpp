// Every instruction set that this machine has, against double-precision references that are written
// straight from layout.h and from the formulas. Prints what failed; the exit status is 1 then.
//
// Usage: kernels_test [instruction set ...]

#include "kernels/kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using namespace edgevl;

namespace {

int failures = 0;
std::string context;  // what is being tested, for messages
std::mt19937 random_bits(20240501);

#define CHECK(condition)                          \
  do {                                            \
    if (!(condition)) fail(#condition, __LINE__); \
  } while (false)

void fail(const std::string& what, int line) {
  if (++failures > 40) return;
  std::printf("FAILED %s: %s (line %d)\n", context.c_str(), what.c_str(), line);
}

/// |actual - expected| <= tolerance, and not where anything is NaN.
void check_near(const char* what, double actual, double expected, double tolerance, int line) {
  if (std::abs(actual - expected) <= tolerance) return;
  char text[200];
  std::snprintf(text, sizeof text, "%s: %.9g instead of %.9g, tolerance %.3g", what, actual,
                expected, tolerance);
  fail(text, line);
}
#define CHECK_NEAR(actual, expected, tolerance) \
  check_near(#actual, (actual), (expected), (tolerance), __LINE__)

/// Half the distance of neighbouring float32 numbers, relative: what one rounding may add.
constexpr double kRounding = 1.0 / (1 << 24);
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- numbers and buffers ---

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random_bits);
}
int whole(int low, int high) { return std::uniform_int_distribution<int>(low, high)(random_bits); }

std::vector<float> floats(int n, float size = 1) {
  std::vector<float> x(n);
  for (float& value : x) value = uniform(-size, size);
  return x;
}

/// Exactly `n` elements, 64-byte aligned, so that the address sanitizer sees a step too far.
template <class T>
struct Aligned {
  explicit Aligned(std::size_t n)
      : size(n), data(static_cast<T*>(operator new(n * sizeof(T), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(data), 0x5a, n * sizeof(T));  // finite as float and as bfloat16
  }
  ~Aligned() { operator delete(data, std::align_val_t(64)); }
  Aligned(const Aligned&) = delete;
  T& operator[](std::size_t i) { return data[i]; }
  std::size_t size;
  T* data;
};

std::uint32_t bits(float x) {
  std::uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
float from_bits(std::uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
/// bfloat16 of a number, nearest even.
std::uint16_t bf16(float x) {
  return std::uint16_t((bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16);
}
float bf16_value(std::uint16_t x) { return from_bits(std::uint32_t(x) << 16); }
float rounded(float x) { return bf16_value(bf16(x)); }

/// A float16 scale: the bits of a normal number, or of a subnormal one, and its value.
struct Half {
  std::uint16_t bits;
  double value;
};
Half random_half() {
  const int mantissa = whole(0, 1023), exponent = whole(0, 9) == 0 ? 0 : whole(3, 12);
  const double value =
      exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return {std::uint16_t(exponent << 10 | mantissa), value};
}

// --- activations ---

struct Activations {
  Activations(const Kernels& k, Format format, int tokens, int cols, int padded, int group,
              const std::vector<float>& x)
      : groups(format == Format::kBf16 ? 1 : padded / group),
        words(std::size_t(padded) / (format == Format::kBf16 ? 2 : 4) * tokens),
        scales(std::size_t(groups) * tokens),
        sums(std::size_t(groups) * tokens) {
    block = {tokens, padded, group, words.data, scales.data, sums.data};
    (format == Format::kBf16 ? k.round : k.quantize)(x.data(), cols, cols, block);
  }
  int int8(int token, int col) {
    return std::int8_t(words[std::size_t(col / 4) * block.tokens + token] >> 8 * (col % 4));
  }
  float half(int token, int col) {
    return bf16_value(
        std::uint16_t(words[std::size_t(col / 2) * block.tokens + token] >> 16 * (col % 2)));
  }
  int groups;
  Aligned<std::uint32_t> words;
  Aligned<float> scales;
  Aligned<std::int32_t> sums;
  Block block;
};

void test_quantize(const Kernels& k) {
  for (int group : {4, 8, 12, 32, 64, 128, 1000}) {
    for (int cols : {1, 7, 8, 100, 128, 1000}) {
      const int padded = (cols + group - 1) / group * group;
      for (int tokens : {1, 2, k.token_block}) {
        context = std::string(k.name) + " quantize group " + std::to_string(group) + " cols " +
                  std::to_string(cols) + " tokens " + std::to_string(tokens);
        std::vector<float> x = floats(tokens * cols, uniform(0.01f, 30));
        // Halves of a quantum, to see ties go to even; zeros only; very small numbers.
        if (cols >= 8)
          for (int i = 0; i < cols; ++i) x[i] = i == 0 ? 127 : (i % 250 - 125) + 0.5f;
        if (tokens > 1)
          for (int i = 0; i < cols; ++i) x[cols + i] = cols == 8 ? 1e-38f : 0;
        Activations a(k, Format::kInt8, tokens, cols, padded, group, x);
        for (int t = 0; t < tokens; ++t) {
          for (int g = 0; g < a.groups; ++g) {
            float most = 0;
            for (int c = g * group; c < std::min(cols, (g + 1) * group); ++c) {
              most = std::max(most, std::abs(x[t * cols + c]));
            }
            if (most < 1e-30f) most = 0;
            const float inverse = most == 0 ? 0 : 127.0f / most;
            int total = 0, wrong = 0;
            for (int c = g * group; c < (g + 1) * group; ++c) {
              const int q = c < cols ? int(std::nearbyint(x[t * cols + c] * inverse)) : 0;
              total += q;
              wrong += a.int8(t, c) != q;
            }
            CHECK(wrong == 0);
            CHECK(a.sums[g * tokens + t] == total);
            CHECK(a.scales[g * tokens + t] == most / 127.0f);
          }
        }
      }
    }
  }
}

void test_round(const Kernels& k) {
  for (int cols : {1, 2, 7, 8, 31, 100, 1000}) {
    for (int tokens : {1, k.token_block}) {
      context = std::string(k.name) + " round cols " + std::to_string(cols);
      std::vector<float> x = floats(tokens * cols, 100);
      x[0] = from_bits(0x3f808000);                // a tie, to even: down
      if (cols > 1) x[1] = from_bits(0x3f818000);  // a tie, to even: up
      if (cols > 2) x[2] = from_bits(0x7fffffff);  // NaN with all bits set
      if (cols > 3) x[3] = -kInfinity;
      const int padded = (cols + 15) / 2 * 2;
      Activations a(k, Format::kBf16, tokens, cols, padded, 0, x);
      for (int t = 0; t < tokens; ++t) {
        for (int c = 0; c < padded; ++c) {
          const float value = c < cols ? x[t * cols + c] : 0;
          if (std::isnan(value)) {
            CHECK(std::isnan(a.half(t, c)));
          } else {
            CHECK(a.half(t, c) == (std::isinf(value) ? value : rounded(value)));
          }
        }
      }
    }
  }
}

// --- matrix products ---

/// Random weights packed as layout.h says, and their parts.
struct Weights {
  Weights(Format format, int rows, int cols, int group) {
    matrix.format = format;
    matrix.rows = rows;
    matrix.group = group;
    const int multiple = format == Format::kBf16 ? 2 : group;
    matrix.cols = (cols + multiple - 1) / multiple * multiple;
    const int padded_rows = matrix.panels() * kLanes;
    number.resize(std::size_t(padded_rows) * matrix.cols);
    scale.resize(std::size_t(padded_rows) * matrix.groups(), 1);
    data = std::make_unique<Aligned<std::uint8_t>>(matrix.bytes());
    std::memset(data->data, 0, data->size);
    matrix.data = data->data;
    for (int r = 0; r < padded_rows; ++r) {
      std::uint8_t* panel = data->data + r / kLanes * matrix.panel_bytes();
      std::uint8_t* lines = panel + matrix.scale_bytes();
      const int lane = r % kLanes;
      if (format == Format::kInt8) {
        const float value = uniform(0.001f, 0.1f);
        scale_of(r, 0) = value;
        for (int g = 1; g < matrix.groups(); ++g) scale_of(r, g) = value;
        std::memcpy(panel + 4 * lane, &value, 4);
      } else if (format == Format::kInt4 || format == Format::kSplit) {
        for (int g = 0; g < matrix.groups(); ++g) {
          // Numbers of kSplit are never zero: rows that pad it have scales of zero.
          const Half value = format == Format::kInt4 || r < rows ? random_half() : Half{0, 0};
          scale_of(r, g) = value.value;
          std::memcpy(panel + 2 * (g * kLanes + lane), &value.bits, 2);
          if (format == Format::kSplit) std::memcpy(lower(r) + 2 * g, &value.bits, 2);
        }
      }
      for (int c = 0; c < matrix.cols; ++c) {
        const bool real = r < rows && c < cols;
        double& w = number[std::size_t(r) * matrix.cols + c];
        if (format == Format::kInt4) {
          w = real ? whole(-8, 7) : 0;
          lines[c / 8 * 64 + 4 * lane + c % 4] |= int(w + 8) << (c % 8 < 4 ? 0 : 4);
        } else if (format == Format::kSplit) {
          const int upper = r % 3 == 0 ? 3 : whole(0, 3), part = whole(0, 3);
          w = 2 * upper - 3;
          lines[c / 16 * 64 + 4 * lane + c % 4] |= upper << c % 16 / 4 * 2;
          std::uint32_t word;
          std::uint8_t* at = lower(r) + matrix.lower_scale_bytes() + c / 256 * 64 + c % 16 * 4;
          std::memcpy(&word, at, 4);
          word |= std::uint32_t(part) << c % 256 / 16 * 2;
          std::memcpy(at, &word, 4);
          rest.resize(number.size());
          rest[std::size_t(r) * matrix.cols + c] = (part - 1.5) / 2;
        } else if (format == Format::kInt8) {
          // Runs of the largest numbers would saturate 16-bit sums.
          w = real ? (r % 3 == 0 ? (r % 2 ? 127 : -127) : whole(-127, 127)) : 0;
          lines[c / 4 * 64 + 4 * lane + c % 4] = std::uint8_t(w + 128);
        } else {
          const std::uint16_t half = real ? bf16(uniform(-1, 1)) : 0;
          w = bf16_value(half);
          std::memcpy(lines + c / 2 * 64 + 4 * lane + 2 * (c % 2), &half, 2);
        }
      }
    }
  }
  std::uint8_t* lower(int row) { return data->data + (matrix.lower(row) - matrix.data); }
  double& scale_of(int row, int group) { return scale[std::size_t(row) * matrix.groups() + group]; }

  Matrix matrix;
  std::vector<double> number, scale;
  std::vector<double> rest;  ///< kSplit: what the lower parts add to `number`
  std::unique_ptr<Aligned<std::uint8_t>> data;
};

/// Checks one output against the product of what the block holds with what the weights mean.
///
/// Integer sums are exact. With n groups, a term is rounded when it becomes a float, and by two
/// scales; adding up n terms rounds n times, and rows of kInt8 are scaled after that: all roundings
/// together are less than (n + 4) * kRounding of the sum of the terms' magnitudes, to first order.
/// Products of bfloat16 are exact in float32, and n of them are added with fewer than n + 1
/// roundings, in whatever order.
void check_product(Weights& w, Activations& a, int row, int token, float actual) {
  const Matrix& m = w.matrix;
  double expected = 0, magnitude = 0;
  int terms = 0;
  if (m.format == Format::kBf16) {
    for (int c = 0; c < m.cols; ++c) {
      const double term = w.number[std::size_t(row) * m.cols + c] * a.half(token, c);
      expected += term;
      magnitude += std::abs(term);
    }
    terms = m.cols;
  } else {
    for (int g = 0; g < m.groups(); ++g) {
      double exact = 0;
      for (int c = g * m.group; c < (g + 1) * m.group; ++c) {
        exact += w.number[std::size_t(row) * m.cols + c] * a.int8(token, c);
      }
      const double term = exact * w.scale_of(row, g) * a.scales[g * a.block.tokens + token];
      expected += term;
      magnitude += std::abs(term);
    }
    terms = m.groups();
  }
  CHECK_NEAR(actual, expected, (terms + 5) * kRounding * magnitude);
}

/// The lower parts of kSplit, beside float64. Each of 16 sums is of n terms, a term is rounded
/// three times and the 16 are added up: less than (n + 19) roundings of the terms' magnitudes.
void test_lower_parts(const Kernels& k) {
  for (int cols : {1, 15, 16, 100, 128, 250, 256, 300, 896}) {
    for (int group : {16, 64, 128, 1024}) {
      context = std::string(k.name) + " lower parts, cols " + std::to_string(cols) + " group " +
                std::to_string(group);
      Weights w(Format::kSplit, 40, cols, group);
      const Matrix& m = w.matrix;
      const std::vector<float> x = floats(cols, 3);
      for (int row = 0; row < m.rows; ++row) {
        double expected = 0, magnitude = 0;
        for (int c = 0; c < cols; ++c) {
          const double rest = w.rest[std::size_t(row) * m.cols + c];
          const double term = rest * w.scale_of(row, c / m.group) * x[c];
          expected += term;
          magnitude += std::abs(term);
        }
        const int terms = (cols + 15) / 16;
        CHECK_NEAR(k.lower(m, row, x.data(), cols), expected, (terms + 19) * kRounding * magnitude);
      }
    }
  }
}

void test_largest(const Kernels& k) {
  for (int n : {1, 3, 16, 17, 64, 100}) {
    context = std::string(k.name) + " largest of " + std::to_string(n);
    std::vector<float> x = floats(n, 3);
    CHECK(k.largest(x.data(), n) == *std::max_element(x.begin(), x.end()));
    for (int at = 0; at < n; ++at) {
      std::vector<float> y(n, -2.0f);
      y[at] = -1.0f;
      CHECK(k.largest(y.data(), n) == -1.0f);
    }
  }
}

void test_products(const Kernels& k) {
  const char* const names[] = {"int4", "int8", "bf16", "split"};
  for (Format format : {Format::kInt4, Format::kInt8, Format::kBf16, Format::kSplit}) {
    for (int cols : {1, 7, 8, 40, 100, 128, 200, 1000}) {
      const int all = (cols + 7) / 8 * 8;
      for (int group : {8, 32, 64, 128, all}) {
        if (format == Format::kBf16 && group != all) continue;
        if (format == Format::kSplit && group % 16 != 0) continue;
        for (int rows : {1, 16, 17, 40, 64}) {
          if (cols == 1000 && rows > 40) continue;
          Weights w(format, rows, cols, group);
          const Matrix& m = w.matrix;
          for (int tokens = 1; tokens <= k.token_block; ++tokens) {
            if (rows != 40 && tokens != 1 && tokens != k.token_block) continue;
            context = std::string(k.name) + " " + names[int(format)] + " rows " +
                      std::to_string(rows) + " cols " + std::to_string(cols) + " group " +
                      std::to_string(group) + " tokens " + std::to_string(tokens);
            std::vector<float> x = floats(tokens * cols, 3);
            // The largest numbers with one sign: sums of 16 bits would saturate.
            for (int c = 0; c < cols; ++c) x[c] = tokens % 2 ? 3 : -3;
            Activations a(k, format, tokens, cols, m.cols, m.group, x);
            if (tokens == 1) {
              for (int panel = 0; panel < m.panels(); ++panel) {
                Aligned<float> out(kLanes);
                k.row[int(format)](m, m.panel(panel), a.block, out.data);
                for (int r = 0; r < kLanes; ++r) {
                  check_product(w, a, panel * kLanes + r, 0, out[r]);
                }
              }
            }
            for (int panel = 0; panel < m.panels(); panel += 2) {
              Aligned<float> out(tokens * 32);
              k.tile[int(format)](m, m.panel(panel), a.block, out.data);
              for (int t = 0; t < tokens; ++t) {
                for (int r = 0; r < 32; ++r) {
                  check_product(w, a, panel * kLanes + r, t, out[t * 32 + r]);
                }
              }
              // A token alone gives the same bits: generation does not depend on how tokens come.
              const int last = tokens - 1;
              const std::vector<float> own(x.begin() + last * cols, x.end());
              Activations alone(k, format, 1, cols, m.cols, m.group, own);
              for (int i = 0; i < 2; ++i) {
                Aligned<float> row(kLanes);
                k.row[int(format)](m, m.panel(panel + i), alone.block, row.data);
                for (int r = 0; r < kLanes; ++r) {
                  CHECK(row[r] == out[last * 32 + i * kLanes + r]);
                }
              }
            }
          }
        }
      }
    }
  }
}

/// NaN and infinity in an activation reach every output of their token, and no other token's.
void test_damage(const Kernels& k) {
  for (Format format : {Format::kInt4, Format::kInt8, Format::kBf16, Format::kSplit}) {
    for (float damage : {kNan, -kNan, kInfinity, -kInfinity}) {
      context = std::string(k.name) + " damaged activations, format " + std::to_string(int(format));
      Weights w(format, 32, 128, 64);
      for (int tokens : {1, k.token_block}) {
        std::vector<float> x = floats(tokens * 128);
        x[(tokens - 1) * 128 + 70] = damage;
        Activations a(k, format, tokens, 128, 128, 64, x);
        Aligned<float> out(tokens * 32), row(kLanes);
        k.tile[int(format)](w.matrix, w.matrix.data, a.block, out.data);
        for (int t = 0; t < tokens; ++t) {
          for (int r = 0; r < 32; ++r) CHECK(std::isfinite(out[t * 32 + r]) == (t < tokens - 1));
        }
        if (tokens == 1) {
          k.row[int(format)](w.matrix, w.matrix.data, a.block, row.data);
          for (int r = 0; r < kLanes; ++r) CHECK(!std::isfinite(row[r]));
        }
      }
    }
  }
}

// --- attention ---

/// How attention is computed.
struct Kind {
  const char* name;
  CacheFormat format;
};

/// Numbers as a cache holds them.
std::vector<double> stored(bool int8, const std::vector<float>& x) {
  float most = 0;
  for (float value : x) most = std::max(most, std::abs(value));
  std::vector<double> result;
  for (float value : x) {
    const double whole = std::nearbyint(value * (127.0f / most));
    result.push_back(int8 ? whole * (most / 127.0f) : rounded(value));
  }
  return result;
}

struct Cache {
  Cache(const Kernels& k, const Kind& kind, int positions, int head_dim) : kind(kind) {
    for (int p = 0; p < positions; ++p) {
      keys.push_back(floats(head_dim, 1.5f));
      values.push_back(floats(head_dim));
    }
    for (int b = 0; b * kCacheBlock < positions; ++b) {
      for (auto* blocks : {&key_blocks, &value_blocks}) {
        blocks->push_back(
            std::make_unique<Aligned<std::uint32_t>>(cache_words(head_dim, kind.format)));
      }
      key_pointers.push_back(key_blocks[b]->data);
      value_pointers.push_back(value_blocks[b]->data);
    }
    store(k, head_dim);
  }
  /// In an order of its own, as threads would.
  void store(const Kernels& k, int head_dim) {
    const int format = int(kind.format);
    for (int p = int(keys.size()) - 1; p >= 0; --p) {
      const int b = p / kCacheBlock, at = p % kCacheBlock;
      k.store_key[format](keys[p].data(), head_dim, at, key_blocks[b]->data);
      k.store_values[format](values[p].data(), 0, 1, head_dim, at, value_blocks[b]->data);
    }
  }
  Kind kind;
  std::vector<std::vector<float>> keys, values;
  std::vector<std::unique_ptr<Aligned<std::uint32_t>>> key_blocks, value_blocks;
  std::vector<const std::uint32_t*> key_pointers, value_pointers;
};

/// Biases of some pairs of channels, ten times as large as the keys.
struct Biases {
  Biases(int count, int head_dim, int positions) : count(count), values(floats(2 * count, 15)) {
    const int half = head_dim / 2;
    for (int i = 0; i < count; ++i) pairs.push_back(half - 1 - i * half / count);
    for (int position = 0; position < positions; position += kLanes) {
      for (int i = 0; i < half; ++i) {
        const auto angle = [&](int lane) {
          return (position + lane) * std::pow(0.01, double(i) / half);
        };
        for (int lane = 0; lane < kLanes; ++lane) rotary.push_back(float(std::cos(angle(lane))));
        for (int lane = 0; lane < kLanes; ++lane) rotary.push_back(float(std::sin(angle(lane))));
      }
    }
  }
  KeyBiases get() const { return {count, pairs.data(), values.data(), rotary.data()}; }
  /// Of pair i at a position: those of its two channels, rotated.
  std::array<double, 2> at(int i, int position, int head_dim) const {
    const float* line =
        rotary.data() + (position / kLanes * (head_dim / 2) + pairs[i]) * 2 * kLanes;
    const double cos = line[position % kLanes], sin = line[kLanes + position % kLanes];
    const double a = values[2 * i], b = values[2 * i + 1];
    return {a * cos - b * sin, b * cos + a * sin};
  }
  int count;
  std::vector<int> pairs;
  std::vector<float> values;
  std::vector<float> rotary;
};

/// Gives attention random queries that see so many positions, and places for the results.
void add_rows(Attention& a, const std::vector<int>& visible, std::vector<std::vector<float>>& query,
              std::vector<std::vector<float>>& out) {
  for (std::size_t t = 0; t < visible.size(); ++t) {
    query.push_back(floats(a.head_dim, 2));
    out.emplace_back(a.head_dim);
    a.query[t] = query[t].data();
    a.out[t] = out[t].data();
    a.visible[t] = visible[t];
  }
}

/// Attention of rows that see so many positions, against double precision.
///
/// Errors: a weight, which brings the scale of an int8 value, is rounded to bfloat16 (2^-8); a
/// score of head_dim exact products is rounded once a product, and with biases four times a pair,
/// then scaled, once or twice, which moves its exponential by as much, relative; the exponential
/// itself is good to 4e-7; float sums over the positions round once a position.
void check_attention(const Kernels& k, const Kind& kind, int head_dim,
                     const std::vector<int>& visible, int bias_count = 0) {
  const int rows = int(visible.size());
  const int most = *std::max_element(visible.begin(), visible.end());
  context = std::string(k.name) + kind.name + " attention head_dim " + std::to_string(head_dim) +
            " biases " + std::to_string(bias_count) + " rows " + std::to_string(rows) +
            " visible " + std::to_string(visible[0]) + " .. " + std::to_string(most);
  Cache cache(k, kind, most + 3, head_dim);
  // A position too few or too many shows.
  for (int v : visible) {
    for (int p : {v - 1, v}) {
      for (float& value : cache.values[p]) value = value < 0 ? -40 : 40;
    }
  }
  cache.store(k, head_dim);
  std::vector<std::vector<double>> keys, values;
  const bool int8_values = kind.format == CacheFormat::kInt8;
  for (const auto& key : cache.keys) keys.push_back(stored(int8_values, key));
  for (const auto& value : cache.values) values.push_back(stored(int8_values, value));

  std::vector<std::vector<float>> query, out;
  Aligned<float> scratch(attention_scratch(rows, most));
  Attention a{cache.key_pointers.data(),
              cache.value_pointers.data(),
              head_dim,
              rows,
              1 / std::sqrt(float(head_dim)),
              {},
              {},
              {},
              scratch.data};
  const Biases biases(bias_count, head_dim, (most / kCacheBlock + 1) * kCacheBlock);
  a.biases = biases.get();
  add_rows(a, visible, query, out);
  k.attend[int(kind.format)](a);
  for (int t = 0; t < rows; ++t) {  // alone, a row gives the same bits
    std::vector<float> alone(head_dim);
    Attention one = a;
    one.rows = 1;
    one.query[0] = query[t].data();
    one.out[0] = alone.data();
    one.visible[0] = visible[t];
    k.attend[int(kind.format)](one);
    CHECK(alone == out[t]);
  }

  for (int t = 0; t < rows; ++t) {
    const std::vector<double> asked = stored(false, query[t]);
    std::vector<double> weight(visible[t]);
    double top = -1e300, largest_term = 0;
    for (int p = 0; p < visible[t]; ++p) {
      double score = 0, magnitude = 0;
      for (int c = 0; c < head_dim; ++c) {
        const double term = asked[c] * keys[p][c] * a.scale;
        score += term;
        magnitude += std::abs(term);
      }
      for (int i = 0; i < bias_count; ++i) {
        const auto bias = biases.at(i, p, head_dim);
        for (int half : {0, 1}) {
          const double term =
              query[t][half * head_dim / 2 + biases.pairs[i]] * bias[half] * a.scale;
          score += term;
          magnitude += 2 * std::abs(term);  // which has two terms of its own
        }
      }
      weight[p] = score;
      top = std::max(top, score);
      largest_term = std::max(largest_term, magnitude);
    }
    double total = 0;
    for (double& w : weight) total += w = std::exp(w - top);
    const double relative = 1.0 / 256 +
                            2 * (head_dim + 4 * bias_count + 8) * kRounding * largest_term + 1e-6 +
                            2 * visible[t] * kRounding;
    for (int c = 0; c < head_dim; ++c) {
      double expected = 0, magnitude = 0;
      for (int p = 0; p < visible[t]; ++p) {
        const double term = weight[p] / total * values[p][c];
        expected += term;
        magnitude += std::abs(term);
      }
      CHECK_NEAR(out[t][c], expected, relative * magnitude);
    }
  }
}

void test_attention(const Kernels& k, const Kind& kind) {
  const auto check = [&](int head_dim, const std::vector<int>& visible) {
    check_attention(k, kind, head_dim, visible);
  };
  for (int head_dim : {2, 6, 16, 30, 32, 64, 80, 96, 128, 200}) {
    for (int visible : {1, 2, 15, 17, 63, 64, 65, 200}) check(head_dim, {visible});
    std::vector<int> block;
    for (int t = 0; t < k.token_block; ++t) block.push_back(60 + t);  // causal, over a block's end
    check(head_dim, block);
  }
  for (int visible = 1; visible <= 200; ++visible) check(30, {visible, 201 - visible});
  for (int rows = 1; rows <= k.token_block; ++rows) {
    std::vector<int> visible(rows, 100);
    check(128, visible);  // the heads of a group: all see the same
    for (int t = 0; t < rows; ++t) visible[t] = 1 + t * 7;
    check(64, visible);
  }
  check(128, {1000});
  check(64, std::vector<int>(k.token_block, 1000));
  check(80, {1000, 1, 63, 64});
  for (int head_dim : {2, 6, 30, 64, 128, 200}) {
    for (int count : {1, 3, 40}) {  // 40: more than are taken at once
      for (int rows = 1; rows <= k.token_block && count <= head_dim / 2; ++rows) {
        std::vector<int> visible(rows);
        for (int t = 0; t < rows; ++t) visible[t] = 130 - 20 * (t % 6);
        check_attention(k, kind, head_dim, visible, count);
      }
    }
  }

  // Scores so far apart that all but one weight vanish, and damage that must show.
  context = std::string(k.name) + kind.name + " attention, extremes";
  const auto attend = k.attend[int(kind.format)];
  Cache cache(k, kind, 70, 32);
  for (float& value : cache.keys[40]) value = 100;
  for (float& value : cache.keys[41]) value = 0;
  cache.store(k, 32);
  std::vector<float> query(32, 100.0f), out(32);
  Aligned<float> scratch(attention_scratch(1, 70));
  Attention a{cache.key_pointers.data(),
              cache.value_pointers.data(),
              32,
              1,
              1,
              {query.data()},
              {70},
              {out.data()},
              scratch.data};
  attend(a);
  // The scale of an int8 value is rounded to bfloat16 with its weight, here 1.
  const bool int8_values = kind.format == CacheFormat::kInt8;
  const double relative = int8_values ? 1.0 / 256 : 0;
  const std::vector<double> value = stored(int8_values, cache.values[40]);
  for (int c = 0; c < 32; ++c) CHECK_NEAR(out[c], value[c], relative * std::abs(value[c]) + 1e-6);
  query[3] = kNan;
  attend(a);
  for (int c = 0; c < 32; ++c) CHECK(std::isnan(out[c]));
  query[3] = 100;
  for (float damage : {kInfinity, kNan}) {
    cache.keys[69][5] = damage;
    cache.store(k, 32);
    attend(a);
    for (int c = 0; c < 32; ++c) CHECK(!std::isfinite(out[c]));
    cache.keys[69][5] = 0;
    cache.values[40][5] = damage;
    cache.store(k, 32);
    attend(a);
    CHECK(!std::isfinite(out[5]));
    cache.values[40][5] = 0;
  }
}

/// A head in INT8 of random keys and values, all of which have something in common.
struct Int8Sequence {
  Int8Sequence(const Kernels& k, int positions, int head_dim, float spread)
      : positions(positions), head_dim(head_dim), memory(Int8Head::bytes(positions, head_dim)) {
    for (int p = 0; p < positions; ++p) {
      keys.push_back(floats(head_dim, spread));
      values.push_back(floats(head_dim));
      for (float& x : keys.back()) x += 3;
      for (float& x : values.back()) x -= 5;
    }
    store(k);
  }
  void store(const Kernels& k) {
    const int stride = 2 * head_dim + 1;  // as in a row of queries, keys and values
    std::vector<float> rows(static_cast<std::size_t>(positions + kLanes) * stride);
    for (int p = 0; p < positions; ++p) {
      std::copy_n(keys[p].data(), head_dim, rows.data() + p * stride);
      std::copy_n(values[p].data(), head_dim, rows.data() + p * stride + head_dim);
    }
    k.quantize_head(rows.data(), rows.data() + head_dim, stride, positions, head_dim, head());
  }
  Int8Head head() const { return {memory.data, positions, head_dim}; }
  double key(int position, int channel) const {
    const Block block = head().keys(position / kLanes);
    const int lane = position % kLanes;
    const auto* word =
        reinterpret_cast<const std::int8_t*>(block.words + channel / 4 * kLanes + lane);
    return double(word[channel % 4]) * block.scales[lane];
  }
  /// Less its mean.
  double value(int position, int channel) const {
    const std::uint32_t* word = head().values() + position / 4 * head().channels() + channel;
    return double(reinterpret_cast<const std::int8_t*>(word)[position % 4]) *
           head().value_scales()[channel];
  }
  std::vector<std::vector<float>> keys, values;
  int positions, head_dim;
  Aligned<std::uint8_t> memory;
};

/// What an INT8 head holds: half a step from what it is made of, and as much as float sums of so
/// many positions may be off.
void check_int8_head(const Int8Sequence& s) {
  for (int c = 0; c < s.head_dim; ++c) {
    double key_mean = 0, mean = 0, reach = 0, most = 0;
    for (int p = 0; p < s.positions; ++p) {
      key_mean += s.keys[p][c] / double(s.positions);
      mean += s.values[p][c] / double(s.positions);
      most = std::max({most, std::abs(double(s.keys[p][c])), std::abs(double(s.values[p][c]))});
    }
    const double sums = 2 * s.positions * kRounding * most;
    CHECK_NEAR(s.head().value_means()[c], mean, sums);
    for (int p = 0; p < s.positions; ++p) reach = std::max(reach, std::abs(s.values[p][c] - mean));
    CHECK_NEAR(s.head().value_scales()[c], reach / 127, sums);
    for (int p = 0; p < s.positions; ++p) {
      CHECK_NEAR(s.value(p, c), s.values[p][c] - mean, reach / 254 + 3 * sums);
      const double step = s.head().key_scales()[p];
      CHECK_NEAR(s.key(p, c), s.keys[p][c] - key_mean, step / 2 + 2 * sums);
    }
  }
  for (int p = s.positions; p < s.head().positions(); ++p) {
    for (int c = 0; c < s.head_dim; ++c) CHECK(s.value(p, c) == 0);
  }
}

/// Attention of rows to an INT8 head, against double precision with the numbers it holds.
///
/// Errors: a weight is rounded by half of one of `steps` to the largest, or of steps^2 where the
/// weights' squares are too few for that; an exponential is good to 8e-5, and takes over what its
/// score is off: a product of integers, exact, with two scales and their product rounded.
void check_int8_attention(const Kernels& k, int head_dim, const std::vector<int>& visible,
                          float spread) {
  const int rows = int(visible.size());
  const int most = *std::max_element(visible.begin(), visible.end());
  const bool all_signed = !std::strcmp(k.name, "avx2") || std::strstr(k.name, "neon");
  const int steps = all_signed ? 127 : 255;
  context = std::string(k.name) + " INT8 attention head_dim " + std::to_string(head_dim) +
            " rows " + std::to_string(rows) + " visible " + std::to_string(visible[0]) + " .. " +
            std::to_string(most) + " spread " + std::to_string(spread);
  const Int8Sequence s(k, most, head_dim, spread);
  check_int8_head(s);
  std::vector<std::vector<float>> query, out;
  Aligned<float> scratch(attention_scratch(rows, most));
  Attention a{};
  a.head_dim = head_dim;
  a.rows = rows;
  a.scale = 1 / std::sqrt(float(head_dim));
  a.scratch = scratch.data;
  add_rows(a, visible, query, out);
  k.attend_int8(a, s.head());

  for (int t = 0; t < rows; ++t) {
    const std::vector<double> asked = stored(true, query[t]);
    std::vector<double> weight(visible[t]);
    double top = -1e300, farthest = 0, total = 0, squares = 0;
    for (int p = 0; p < visible[t]; ++p) {
      for (int c = 0; c < head_dim; ++c) weight[p] += asked[c] * s.key(p, c) * a.scale;
      top = std::max(top, weight[p]);
      farthest = std::max(farthest, std::abs(weight[p]));
    }
    for (double& w : weight) {
      total += w = std::exp(w - top);
      squares += w * w;
    }
    const double least = visible[t] / (12 * 0.015 * 0.015) / steps / steps;
    const double step = squares < 0.99 * least ? 1.0 / steps / steps : 1.0 / steps;
    const double relative = 2 * (8e-5 + 8 * kRounding * farthest) + 2 * visible[t] * kRounding;
    for (int c = 0; c < head_dim; ++c) {
      double expected = 0, magnitude = 0, all = 0;
      for (int p = 0; p < visible[t]; ++p) {
        expected += weight[p] / total * s.value(p, c);
        magnitude += weight[p] / total * std::abs(s.value(p, c));
        all += std::abs(s.value(p, c));
      }
      const double mean = s.head().value_means()[c];
      const double error = step / 2 * all / total + relative * magnitude;
      CHECK_NEAR(out[t][c], expected + mean, 1.01 * error + 4 * kRounding * std::abs(mean));
    }
  }
}

void test_int8_attention(const Kernels& k) {
  // From all weights alike to all but a few nearly none.
  for (float spread : {0.1f, 1.0f, 4.0f}) {
    for (int head_dim : {2, 6, 16, 30, 32, 64, 80, 96, 128, 200, 256}) {
      for (int visible : {1, 2, 15, 17, 63, 64, 65, 200}) {
        check_int8_attention(k, head_dim, {visible}, spread);
      }
    }
    for (int rows = 1; rows <= k.token_block; ++rows) {
      std::vector<int> visible(rows, 100);
      check_int8_attention(k, 64, visible, spread);
      for (int t = 0; t < rows; ++t) visible[t] = 1 + t * 7;
      check_int8_attention(k, 80, visible, spread);
    }
    check_int8_attention(k, 64, std::vector<int>(k.token_block, 1000), spread);
  }

  context = std::string(k.name) + " INT8 attention, a row alone and among others";
  constexpr int kDim = 32, kSize = 70;
  Int8Sequence s(k, kSize, kDim, 1);
  Aligned<float> scratch(attention_scratch(k.token_block, kSize));
  std::vector<float> peaked(kDim, 40.0f), flat(kDim, 0.1f), out(kDim), alone(kDim), other(kDim);
  Attention a{};
  a.head_dim = kDim;
  a.rows = k.token_block;
  a.scale = 1;
  a.scratch = scratch.data;
  for (int t = 0; t < a.rows; ++t) {
    a.query[t] = t == 0 ? flat.data() : peaked.data();
    a.out[t] = t == 0 ? out.data() : other.data();
    a.visible[t] = kSize;
  }
  k.attend_int8(a, s.head());
  a.rows = 1;
  a.out[0] = alone.data();
  k.attend_int8(a, s.head());
  CHECK(out == alone);

  // However large scores are, the largest weight is one: no byte has a step more.
  context = std::string(k.name) + " INT8 attention, large scores";
  for (float size : {1e3f, 1e4f, 1e5f, 3e6f}) {
    for (float part : {0.5f, 0.7f, 0.9f, 1.0f, 1.3f}) {
      Int8Sequence large(k, kSize, kDim, 0.01f);
      for (float& x : large.keys[40]) x += size * part;
      large.store(k);
      std::vector<float> ones(kDim, 1.0f);
      a.query[0] = ones.data();
      a.rows = 1;
      a.out[0] = alone.data();
      k.attend_int8(a, large.head());
      for (int c = 0; c < kDim; ++c) {
        const double expected = large.value(40, c) + large.head().value_means()[c];
        CHECK_NEAR(alone[c], expected, 1e-3 * std::abs(expected));
      }
    }
  }
  a.query[0] = flat.data();

  // Damage must show.
  context = std::string(k.name) + " INT8 attention, damage";
  flat[3] = kNan;
  k.attend_int8(a, s.head());
  for (float x : alone) CHECK(std::isnan(x));
  flat[3] = 0.1f;
  for (float damage : {kInfinity, kNan}) {
    s.keys[69][5] = damage;
    s.store(k);
    k.attend_int8(a, s.head());
    for (float x : alone) CHECK(!std::isfinite(x));
    s.keys[69][5] = 0;
    s.values[40][5] = damage;
    s.store(k);
    k.attend_int8(a, s.head());
    CHECK(!std::isfinite(alone[5]));
    s.values[40][5] = 0;
  }
}

/// What a position writes: the bytes that are the same afterwards, whatever was there before. No
/// two positions write the same ones, so that threads may store them at once.
void test_positions_are_apart(const Kernels& k, const Kind& kind) {
  const CacheFormat format = kind.format;
  for (int head_dim : {2, 30, 64, 80}) {
    const std::size_t words = cache_words(head_dim, format);
    const std::size_t least = head_dim * (format == CacheFormat::kInt8 ? 1 : 2);
    const auto store_key = k.store_key[int(format)];
    const auto store_values = k.store_values[int(format)];
    for (const bool is_key : {true, false}) {
      const auto store = [&](const float* x, int position, std::uint32_t* block) {
        is_key ? store_key(x, head_dim, position, block)
               : store_values(x, 0, 1, head_dim, position, block);
      };
      context =
          std::string(k.name) + kind.name + " positions, head_dim " + std::to_string(head_dim);
      std::vector<int> writers(4 * words);
      for (int position = 0; position < kCacheBlock; ++position) {
        const std::vector<float> x = floats(head_dim);
        Aligned<std::uint32_t> zeros(words), ones(words);
        std::memset(static_cast<void*>(zeros.data), 0, 4 * words);
        std::memset(static_cast<void*>(ones.data), 0xff, 4 * words);
        store(x.data(), position, zeros.data);
        store(x.data(), position, ones.data);
        std::size_t written = 0;
        for (std::size_t i = 0; i < 4 * words; ++i) {
          const auto* one = reinterpret_cast<const std::uint8_t*>(zeros.data) + i;
          const auto* other = reinterpret_cast<const std::uint8_t*>(ones.data) + i;
          writers[i] += *one == *other;
          written += *one == *other;
        }
        CHECK(written >= least);
      }
      CHECK(*std::max_element(writers.begin(), writers.end()) == 1);
    }
    // Several values at once are stored as one after the other.
    for (int first : {0, 1, 14}) {
      for (int count : {1, 2, 3, 8, 17}) {
        const int stride = head_dim + 5;
        const std::vector<float> x = floats(count * stride);
        Aligned<std::uint32_t> together(words), singly(words);
        for (auto* block : {&together, &singly}) {
          std::memset(static_cast<void*>(block->data), 0xff, 4 * words);
        }
        store_values(x.data(), stride, count, head_dim, first, together.data);
        for (int i = 0; i < count; ++i) {
          store_values(x.data() + i * stride, 0, 1, head_dim, first + i, singly.data);
        }
        CHECK(std::memcmp(together.data, singly.data, 4 * words) == 0);
      }
    }
  }
}

// --- element by element ---

void test_norms(const Kernels& k, int n) {
  const std::vector<float> x = floats(n, 4), weight = floats(n, 2), bias = floats(n, 2);
  std::vector<float> out(n);
  double squares = 0, total = 0, variance = 0;
  for (float value : x) total += value;
  for (float value : x) squares += double(value) * value;
  for (float value : x) variance += (value - total / n) * (value - total / n);
  // Sums of n positive terms, halved by the square root, and a handful of roundings.
  const double relative = (n / 2 + 6) * kRounding;
  context = std::string(k.name) + " rms_norm " + std::to_string(n);
  k.rms_norm(x.data(), weight.data(), n, 1e-6f, out.data());
  for (int i = 0; i < n; ++i) {
    const double expected = x[i] / std::sqrt(squares / n + 1e-6f) * weight[i];
    CHECK_NEAR(out[i], expected, relative * std::abs(expected));
  }
  context = std::string(k.name) + " layer_norm " + std::to_string(n);
  k.layer_norm(x.data(), weight.data(), bias.data(), n, 1e-6f, out.data());
  const double deviation = std::sqrt(variance / n + 1e-6f);
  for (int i = 0; i < n; ++i) {
    // The mean, of n terms up to 4, is as wrong as n roundings make it.
    const double normal = (x[i] - total / n) / deviation;
    const double wrong = relative * std::abs(normal) + 4 * (n + 2) * kRounding / deviation;
    CHECK_NEAR(out[i], normal * weight[i] + bias[i],
               wrong * (std::abs(weight[i]) + 1) + 2 * kRounding * std::abs(bias[i]) + 1e-7);
  }
  std::vector<float> copy = x;
  copy[n / 2] = kNan;
  k.rms_norm(copy.data(), weight.data(), n, 1e-6f, out.data());
  CHECK(std::isnan(out[0]) && std::isnan(out[n - 1]));
  k.layer_norm(copy.data(), weight.data(), bias.data(), n, 1e-6f, out.data());
  CHECK(std::isnan(out[0]) && std::isnan(out[n - 1]));
}

/// What follows a tile, with and without a bias and a scale.
void test_epilogue(const Kernels& k, Epilogue::Kind kind, int tokens, int width, bool with) {
  constexpr int kColumns = 2 * kLanes, kStride = kColumns + 3;
  const bool swiglu = kind == Epilogue::Kind::kSwiglu;
  if (swiglu) width = std::min(width, kLanes);
  context = std::string(k.name) + " epilogue " + std::to_string(static_cast<int>(kind)) + ", " +
            std::to_string(tokens) + " x " + std::to_string(width) + (with ? " with bias" : "");
  const std::vector<float> values = floats(tokens * kColumns, 12);
  Aligned<float> y(tokens * kColumns);
  std::copy(values.begin(), values.end(), y.data);
  const float special[] = {-150, 150, 0, kNan, -1e20f, 1e20f};
  for (int i = 0; i < std::min(6, width); ++i) y.data[i] = special[i];
  const auto bias = floats(kColumns, with ? 2 : 0), scale = floats(width, 2);
  const auto before = floats(tokens * kStride, 3);
  auto out = before;
  k.apply_epilogue(y.data, tokens,
                   {kind, with ? bias.data() : nullptr, with ? scale.data() : nullptr, out.data(),
                    kStride, width});
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < kStride; ++c) {
      const float old = before[t * kStride + c], found = out[t * kStride + c];
      if (c >= width) {
        CHECK(found == old);
        continue;
      }
      // The sum with the bias is rounded; what is made of it, in double precision.
      const float sum = y.data[t * kColumns + c] + (with ? bias[c] : 0.0f);
      const double factor = with ? scale[c] : 1.0f;
      if (std::isnan(sum)) {
        CHECK(std::isnan(found));
      } else if (kind == Epilogue::Kind::kStore) {
        CHECK(found == sum);
      } else if (kind == Epilogue::Kind::kAdd) {
        CHECK_NEAR(found, old + factor * sum,
                   kRounding * (std::abs(factor * sum) + std::abs(old + factor * sum)) * 1.01);
      } else if (kind == Epilogue::Kind::kGelu) {
        const double expected = 0.5 * sum * std::erfc(-sum / std::sqrt(2.0));
        CHECK_NEAR(found, expected, 1e-6 + 1e-6 * std::abs(expected));
      } else {
        const float up = y.data[t * kColumns + kLanes + c] + (with ? bias[kLanes + c] : 0.0f);
        const double expected = sum / (1 + std::exp(-double(sum))) * up;
        // The argument of the exponential is rounded: |x| * kRounding more. The sigmoid does not go
        // below 2^-126.
        CHECK_NEAR(found, expected,
                   1e-6 * (1 + std::abs(sum)) * std::abs(expected) +
                       std::abs(double(sum) * up) * 0x1p-125);
      }
    }
  }
}

void test_elements(const Kernels& k, int n) {
  const std::string length = " " + std::to_string(n);
  std::vector<float> x = floats(n, 12), scale = floats(n, 2);

  context = std::string(k.name) + " dot_bf16" + length;
  std::vector<std::uint16_t> row(n);
  double expected = 0, magnitude = 0;
  for (int i = 0; i < n; ++i) {
    row[i] = bf16(scale[i]);
    expected += double(bf16_value(row[i])) * x[i];
    magnitude += std::abs(double(bf16_value(row[i])) * x[i]);
  }
  CHECK_NEAR(k.dot_bf16(row.data(), x.data(), n), expected, (n + 1) * kRounding * magnitude);
  x[n - 1] = kNan;
  CHECK(std::isnan(k.dot_bf16(row.data(), x.data(), n)));
}

void test_rotate(const Kernels& k, int head_dim) {
  context = std::string(k.name) + " rotate " + std::to_string(head_dim);
  const int half = head_dim / 2;
  const std::vector<float> before = floats(head_dim, 3);
  std::vector<float> x = before, cos(half), sin(half);
  for (int i = 0; i < half; ++i) {
    const float angle = uniform(0, 6);
    cos[i] = std::cos(angle);
    sin[i] = std::sin(angle);
  }
  k.rotate(x.data(), cos.data(), sin.data(), head_dim);
  for (int i = 0; i < half; ++i) {
    const double a = before[i], b = before[half + i];
    const double tolerance = 3 * kRounding * (std::abs(a) + std::abs(b));
    CHECK_NEAR(x[i], a * cos[i] - b * sin[i], tolerance);
    CHECK_NEAR(x[half + i], b * cos[i] + a * sin[i], tolerance);
  }
}

void test_machine(const Kernels& k) {
  context = std::string(k.name) + " read, multiply";
  Aligned<std::uint8_t> data(1024);
  std::memset(data.data, 0, 1024);
  const std::uint64_t nothing = k.read(data.data, 1024);
  for (int i : {0, 255, 256, 1023}) {
    data[i] = 0;
  }
  CHECK(k.read(data.data, 1024) == nothing);
  std::memset(data.data + 768, 255, 256);
  CHECK(k.read(data.data, 1024) != nothing);
  const double products = double(k.multiply());
  CHECK(products > 0.5e8 && products < 2e8);
}

void test_dispatch() {
  context = "dispatch";
  const std::vector<std::string> names = instruction_sets();
  CHECK(!names.empty() && names.back() == "portable");
  for (const std::string& name : names) CHECK(kernels(name).name == name);
  unsetenv("EDGEVL_ISA");
  CHECK(kernels().name == names.front());
  setenv("EDGEVL_ISA", "portable", 1);
  CHECK(kernels().name == std::string("portable"));
  CHECK(kernels(names.front()).name == names.front());
  setenv("EDGEVL_ISA", "sse9", 1);
  bool refused = false;
  try {
    kernels();
  } catch (const std::invalid_argument& error) {
    refused = std::string(error.what()).find("sse9") != std::string::npos;
  }
  CHECK(refused);
  unsetenv("EDGEVL_ISA");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) {
    test_dispatch();
    names = instruction_sets();
  }
  for (const std::string& name : names) {
    const int before = failures;
    const Kernels& k = kernels(name);
    test_quantize(k);
    test_round(k);
    test_products(k);
    test_lower_parts(k);
    test_largest(k);
    test_damage(k);
    for (const Kind& kind :
         {Kind{" bf16 cache", CacheFormat::kBf16}, Kind{" int8 cache", CacheFormat::kInt8}}) {
      test_attention(k, kind);
      test_positions_are_apart(k, kind);
    }
    test_int8_attention(k);
    for (int n : {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 64, 65, 100, 1024}) {
      test_norms(k, n);
      test_elements(k, n);
    }
    for (int head_dim : {2, 6, 16, 32, 34, 64, 80, 96, 128}) test_rotate(k, head_dim);
    for (const auto kind : {Epilogue::Kind::kStore, Epilogue::Kind::kAdd, Epilogue::Kind::kGelu,
                            Epilogue::Kind::kSwiglu}) {
      for (int tokens : {1, 5, k.token_block}) {
        for (int width : {1, 7, 8, 16, 17, 31, 32}) {
          test_epilogue(k, kind, tokens, width, false);
          test_epilogue(k, kind, tokens, width, true);
        }
      }
    }
    test_machine(k);
    std::printf("%s: %s\n", name.c_str(), failures == before ? "passed" : "FAILED");
  }
  if (failures > 40) std::printf("%d failures in all\n", failures);
  return failures == 0 ? 0 : 1;
}
