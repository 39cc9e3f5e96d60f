#include "model/pack.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

namespace edgevl {
namespace {

using std::size_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

// The 32-bit word of a line is put together with shifts, so the layout's byte order is the
// machine's.
static_assert(std::endian::native == std::endian::little);

/// Sizes beyond this are mistakes; within it, no product of ours overflows.
constexpr int kMaxSize = 1 << 24;

int panels_of(int rows) { return (rows + kLanes - 1) / kLanes; }

void check_place(const Matrix& matrix, int rows, int cols, Place place) {
  const Matrix padded = describe(matrix.format, rows, cols, matrix.group);
  const long long last = place.first + static_cast<long long>(panels_of(rows) - 1) * place.step;
  if (place.first < 0 || place.step < 1 || last >= matrix.panels()) {
    throw std::invalid_argument("panel " + std::to_string(last) + " is not in a matrix of " +
                                std::to_string(matrix.panels()) + " panels");
  }
  if (padded.cols != matrix.cols) {
    throw std::invalid_argument(std::to_string(cols) + " columns do not fit a matrix of " +
                                std::to_string(matrix.cols));
  }
}

/// Added and taken away again, rounds |x| < 2^22 to nearest even: what is beyond the mantissa falls
/// off. It vectorizes on every machine, which std::nearbyint does not.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

float largest_magnitude(const float* x, int n) {
  float largest = 0;
  for (int i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

/// Eight numbers side by side; compilers make of it what the machine has.
using Eight [[gnu::vector_size(32)]] = float;

float total(const Eight& x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/// The scale of a group of 4-bit numbers that gives the least squared error among some candidates.
///
/// Candidates take the largest magnitude to 7 .. 9.2 steps below zero, where there is one step more
/// than above; those beyond 8 clip it, to round the others better. For given integers q the best
/// scale is sum(xq) / sum(qq), which takes sum(xq)^2 / sum(qq) off the squared error. For normally
/// distributed weights in groups of 128, the error is 9.7 % of their size, where a largest
/// magnitude at 7 steps gives 11.7 %; thirty candidates give 9.7 % too. n is a multiple of 8.
float int4_scale(const float* x, int n) {
  float peak = 0;
  for (int i = 0; i < n; ++i) {
    if (std::fabs(x[i]) > std::fabs(peak)) peak = x[i];
  }
  if (std::fabs(peak) < std::numeric_limits<float>::min()) return 0;
  const Eight low = Eight{} - 8, high = Eight{} + 7;
  float best_gain = -1, best_scale = 0;
  for (const float steps : {7.0f, 7.5f, 8.0f, 8.5f, 9.2f}) {
    const float inverse = -steps / peak;
    Eight xq = {}, qq = {};
    for (int i = 0; i < n; i += 8) {
      Eight value;
      std::memcpy(&value, x + i, sizeof value);
      Eight q = value * inverse;
      q = q > low ? q : low;
      q = q < high ? q : high;
      q = (q + kRound) - kRound;
      xq += value * q;
      qq += q * q;
    }
    const float products = total(xq), squares = total(qq);
    const float gain = products * products / squares;  // the peak is not rounded to zero
    if (gain > best_gain) {
      best_gain = gain;
      best_scale = products / squares;
    }
  }
  return best_scale;
}

/// Codes x / scale, rounded and clamped, as unsigned numbers around `zero`.
void quantize(const float* x, int n, float scale, float low, float high, float zero,
              uint8_t* codes) {
  const float inverse = scale == 0 ? 0 : 1 / scale;
  for (int i = 0; i < n; ++i) {
    const float q = std::min(std::max(low, x[i] * inverse), high);  // NaN becomes low
    codes[i] = static_cast<uint8_t>(static_cast<int>((q + kRound) - kRound + zero));
  }
}

/// Packs rows as int4: `lane`'s part of a panel.
void pack_int4_row(const float* x, const Matrix& matrix, int lane, uint8_t* panel, uint8_t* codes) {
  for (int g = 0; g < matrix.groups(); ++g) {
    const float* group = x + g * matrix.group;
    const uint16_t half = to_f16(int4_scale(group, matrix.group));
    reinterpret_cast<uint16_t*>(panel)[g * kLanes + lane] = half;
    quantize(group, matrix.group, from_f16(half), -8, 7, 8, codes + g * matrix.group);
  }
  uint8_t* line = panel + matrix.scale_bytes() + 4 * lane;
  for (int c = 0; c < matrix.cols; c += 8, line += kLineBytes) {
    for (int t = 0; t < 4; ++t)
      line[t] = static_cast<uint8_t>(codes[c + t] | codes[c + 4 + t] << 4);
  }
}

void pack_int8_row(const float* x, const Matrix& matrix, int lane, uint8_t* panel, uint8_t* codes) {
  const float scale = largest_magnitude(x, matrix.cols) / 127;
  reinterpret_cast<float*>(panel)[lane] = scale;
  quantize(x, matrix.cols, scale, -127, 127, 128, codes);
  uint8_t* line = panel + matrix.scale_bytes() + 4 * lane;
  for (int c = 0; c < matrix.cols; c += 4, line += kLineBytes) std::memcpy(line, codes + c, 4);
}

void pack_bf16_row(const float* x, const Matrix& matrix, int lane, uint8_t* panel) {
  auto* word = reinterpret_cast<uint32_t*>(panel) + lane;
  for (int c = 0; c < matrix.cols; c += 2, word += kLanes) {
    *word = to_bf16(x[c]) | static_cast<uint32_t>(to_bf16(x[c + 1])) << 16;
  }
}

/// Packs a row as kSplit: `lane`'s part of a panel, and its lower parts.
///
/// Scales take a group's largest magnitude to 9.4 of the 8 steps there are on either side. So few
/// weights are clipped, and the upper parts alone are 39 % off (root mean square, a trained model's
/// output layer), where 7.5 steps leave 47 % and 11.5 leave 36 %, with 12, 12 and 16 % for both.
void pack_split_row(const float* x, const Matrix& matrix, int lane, uint8_t* panel, uint8_t* lower,
                    uint8_t* codes) {
  constexpr float kSteps = 7.5f / 0.8f;
  std::memset(lower, 0, matrix.lower_bytes());
  for (int g = 0; g < matrix.groups(); ++g) {
    const float* group = x + g * matrix.group;
    const float step = largest_magnitude(group, matrix.group) / kSteps;
    const uint16_t half = to_f16(2 * step);  // of an upper part
    reinterpret_cast<uint16_t*>(panel)[g * kLanes + lane] = half;
    reinterpret_cast<uint16_t*>(lower)[g] = half;
    // A number lies half a step above its code less 8.
    const float scale = 0.5f * from_f16(half), inverse = scale == 0 ? 0 : 1 / scale;
    for (int c = 0; c < matrix.group; ++c) {
      const float code = std::min(std::max(0.0f, group[c] * inverse + 8), 15.0f);  // NaN becomes 0
      codes[g * matrix.group + c] = static_cast<uint8_t>(code);
    }
  }
  uint8_t* line = panel + matrix.scale_bytes() + 4 * lane;
  for (int c = 0; c < matrix.cols; ++c) {
    line[static_cast<size_t>(c / 16) * kLineBytes + c % 4] |= codes[c] >> 2 << c % 16 / 4 * 2;
  }
  auto* words = reinterpret_cast<uint32_t*>(lower + matrix.lower_scale_bytes());
  for (int c = 0; c < matrix.cols; ++c) {
    words[c / 256 * kLanes + c % kLanes] |= static_cast<uint32_t>(codes[c] & 3) << c % 256 / 16 * 2;
  }
}

/// Spreads four nibbles over four bytes.
uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ff;
  return (nibbles | nibbles << 4) & 0x0f0f0f0f;
}

void pack_gptq_panel(const GptqMatrix& source, const Matrix& matrix, int first_row,
                     uint8_t* panel) {
  const int rows = std::min(kLanes, source.rows - first_row);
  auto* scales = reinterpret_cast<uint16_t*>(panel);
  for (int g = 0; g < matrix.groups(); ++g) {
    const size_t at = static_cast<size_t>(g) * source.rows + first_row;
    for (int r = 0; r < rows; ++r) {
      scales[g * kLanes + r] = source.scale_dtype == Dtype::kF16
                                   ? static_cast<const uint16_t*>(source.scales)[at + r]
                                   : to_f16(static_cast<const float*>(source.scales)[at + r]);
    }
  }
  auto* line = reinterpret_cast<uint32_t*>(panel + matrix.scale_bytes());
  std::fill_n(line, matrix.cols / 8 * kLanes, 0x88888888);  // zeros
  for (int i = 0; i < source.cols / 8; ++i, line += kLanes) {
    const uint32_t* words = source.words + static_cast<size_t>(i) * source.rows + first_row;
    for (int r = 0; r < rows; ++r)
      line[r] = spread(words[r] & 0xffff) | spread(words[r] >> 16) << 4;
  }
}

void unpack_row(const Matrix& matrix, int row, int cols, float* out) {
  const uint8_t* panel = matrix.panel(row / kLanes);
  const uint8_t* lines = panel + matrix.scale_bytes();
  const int lane = row % kLanes;
  for (int c = 0; c < cols; ++c) {
    switch (matrix.format) {
      case Format::kInt4: {
        const uint8_t byte = lines[static_cast<size_t>(c / 8) * kLineBytes + 4 * lane + c % 4];
        const int code = (c % 8 < 4 ? byte : byte >> 4) & 15;
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel);
        out[c] = static_cast<float>(code - 8) * from_f16(scales[c / matrix.group * kLanes + lane]);
        break;
      }
      case Format::kSplit: {
        const uint8_t byte = lines[static_cast<size_t>(c / 16) * kLineBytes + 4 * lane + c % 4];
        const int upper = byte >> c % 16 / 4 * 2 & 3;
        const auto* words =
            reinterpret_cast<const uint32_t*>(matrix.lower(row) + matrix.lower_scale_bytes());
        const int lower = words[c / 256 * kLanes + c % kLanes] >> c % 256 / 16 * 2 & 3;
        const float scale =
            from_f16(reinterpret_cast<const uint16_t*>(panel)[c / matrix.group * kLanes + lane]);
        out[c] = scale * (static_cast<float>(2 * upper - 3) + 0.5f * (lower - 1.5f));
        break;
      }
      case Format::kInt8: {
        const uint8_t byte = lines[static_cast<size_t>(c / 4) * kLineBytes + 4 * lane + c % 4];
        out[c] = static_cast<float>(byte - 128) * reinterpret_cast<const float*>(panel)[lane];
        break;
      }
      case Format::kBf16: {
        const auto* halves = reinterpret_cast<const uint16_t*>(lines);
        out[c] = from_bf16(halves[static_cast<size_t>(c / 2) * 2 * kLanes + 2 * lane + c % 2]);
        break;
      }
    }
  }
}

}  // namespace

Format parse_format(const std::string& name) {
  if (name == "int4") return Format::kInt4;
  if (name == "int8") return Format::kInt8;
  if (name == "bf16") return Format::kBf16;
  if (name == "split") return Format::kSplit;
  throw std::invalid_argument("format is '" + name + "': give int4, int8, bf16 or split");
}

Dtype parse_dtype(const std::string& name) {
  if (name == "BF16") return Dtype::kBf16;
  if (name == "F16") return Dtype::kF16;
  if (name == "F32") return Dtype::kF32;
  throw std::invalid_argument("dtype is '" + name + "': give BF16, F16 or F32");
}

Matrix describe(Format format, int rows, int cols, int group, const uint8_t* data) {
  if (rows < 1 || rows > kMaxSize || cols < 1 || cols > kMaxSize) {
    throw std::invalid_argument("a matrix of " + std::to_string(rows) + " x " +
                                std::to_string(cols) + ": sizes go from 1 to " +
                                std::to_string(kMaxSize));
  }
  if (format == Format::kBf16) return {format, rows, (cols + 1) / 2 * 2, 0, data};
  const int unit = format == Format::kSplit ? 16 : format == Format::kInt4 ? 8 : 4;
  if (group < unit || group > kMaxSize || group % unit != 0) {
    throw std::invalid_argument("group is " + std::to_string(group) + ": give a multiple of " +
                                std::to_string(unit));
  }
  return {format, rows, (cols + group - 1) / group * group, group, data};
}

void PlainMatrix::row(int index, float* out) const {
  const size_t at = static_cast<size_t>(index) * cols;
  const auto* halves = static_cast<const uint16_t*>(data) + (dtype == Dtype::kF32 ? 0 : at);
  switch (dtype) {
    case Dtype::kBf16:
      for (int c = 0; c < cols; ++c) out[c] = from_bf16(halves[c]);
      break;
    case Dtype::kF16:
      for (int c = 0; c < cols; ++c) out[c] = from_f16(halves[c]);
      break;
    case Dtype::kF32: std::memcpy(out, static_cast<const float*>(data) + at, sizeof(float) * cols);
  }
}

void pack(const PlainMatrix& source, const Matrix& matrix, uint8_t* out, Place place,
          ThreadPool& pool) {
  check_place(matrix, source.rows, source.cols, place);
  std::vector<std::vector<float>> rows(pool.size(), std::vector<float>(matrix.cols, 0.0f));
  std::vector<std::vector<uint8_t>> codes(pool.size(), std::vector<uint8_t>(matrix.cols));
  pool.run([&](Worker& worker) {
    auto& x = rows[worker.rank()];
    uint8_t* code = codes[worker.rank()].data();
    worker.each(panels_of(source.rows), [&](int i) {
      const size_t index = place.first + static_cast<size_t>(i) * place.step;
      uint8_t* panel = out + index * matrix.panel_bytes();
      const bool split = matrix.format == Format::kSplit;
      std::memset(panel, 0, split ? matrix.panel_bytes() : matrix.scale_bytes());
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = i * kLanes + lane;
        if (row < source.rows) {
          source.row(row, x.data());
        } else {
          std::fill(x.begin(), x.begin() + source.cols, 0.0f);
        }
        switch (matrix.format) {
          case Format::kInt4: pack_int4_row(x.data(), matrix, lane, panel, code); break;
          case Format::kInt8: pack_int8_row(x.data(), matrix, lane, panel, code); break;
          case Format::kBf16: pack_bf16_row(x.data(), matrix, lane, panel); break;
          case Format::kSplit: {
            uint8_t* lower =
                out + matrix.panels_bytes() + (index * kLanes + lane) * matrix.lower_bytes();
            pack_split_row(x.data(), matrix, lane, panel, lower, code);
            break;
          }
        }
      }
    });
  });
}

void pack(const GptqMatrix& source, const Matrix& matrix, uint8_t* out, Place place,
          ThreadPool& pool) {
  check_place(matrix, source.rows, source.cols, place);
  if (matrix.format != Format::kInt4 || matrix.group != source.group || source.cols % 8 != 0) {
    throw std::invalid_argument("GPTQ weights need int4, columns in eights, and their own group");
  }
  pool.run([&](Worker& worker) {
    worker.each(panels_of(source.rows), [&](int i) {
      uint8_t* panel =
          out + (place.first + static_cast<size_t>(i) * place.step) * matrix.panel_bytes();
      std::memset(panel, 0, matrix.scale_bytes());
      pack_gptq_panel(source, matrix, i * kLanes, panel);
    });
  });
}

void unpack(const Matrix& matrix, int cols, float* out) {
  for (int row = 0; row < matrix.rows; ++row) {
    unpack_row(matrix, row, cols, out + static_cast<size_t>(row) * cols);
  }
}

}  // namespace edgevl
