// How weights, activations and the key/value cache lie in memory. One layout for every instruction
// set, so that a packed model can be kept in a file and mapped by any machine.
//
// Everything is built from lines of 64 bytes: 16 lanes of 32 bits. A lane belongs to one output row
// (weights), one position (keys) or one channel (values), and holds what is multiplied with one
// 32-bit word of the other operand: four int8, or two bfloat16.

#pragma once

#include <cstddef>
#include <cstdint>

namespace edgevl {

constexpr int kLanes = 16;
constexpr int kLineBytes = 64;

/// How the numbers of a weight matrix are stored.
enum class Format : std::uint8_t {
  kInt4,  ///< symmetric, -8..7, a scale for each row and group of columns
  kInt8,  ///< symmetric, -127..127, a scale for each row
  kBf16,
  kSplit,  ///< 4 bits with a scale for each row and group of columns, in two parts of 2 bits
};

/// A weight matrix [rows, cols], cut into panels of 16 rows that lie one after the other.
///
/// A panel is one sequential stream:
/// - kInt4: `groups` times 16 float16 scales, then cols / 8 lines; byte 4 r + t of line i has
///   w[r][8 i + t] + 8 in its low and w[r][8 i + 4 + t] + 8 in its high nibble;
/// - kInt8: 16 float32 scales, then cols / 4 lines; byte 4 r + t of line i is w[r][4 i + t] + 128;
/// - kBf16: cols / 2 lines; half-word 2 r + t of line i is w[r][2 i + t];
/// - kSplit: `groups` times 16 float16 scales, then cols / 16 lines; byte 4 r + t of line i has the
///   upper part of w[r][16 i + 4 j + t] in its bits 2 j and 2 j + 1, j from 0 to 3.
///
/// Scales come padded to whole lines. Rows are padded to pairs of panels and columns to a multiple
/// of `group` (kBf16: of 2), with zeros; columns of kSplit, which has none, with what is nearest.
///
/// A number of kSplit is its scale times (2 upper - 3) + (lower - 1.5) / 2, both parts from 0 to 3.
/// The panels alone are a matrix of 2 bits, which a product is taken with; what the lower parts add
/// is computed for the rows where it matters. They follow the panels row by row: once more the
/// row's `groups` scales, padded to whole lines, and 16 words for each 256 columns begun, of which
/// word l has the lower part of column 16 j + l in its bits 2 j and 2 j + 1.
struct Matrix {
  Format format = Format::kBf16;
  int rows = 0;   ///< output features, not padded
  int cols = 0;   ///< input features, padded
  int group = 0;  ///< columns that share a scale of the activations and, in kInt4 and kSplit, of
                  ///< the weights; divides cols; a multiple of 8 (kInt4), 4 (kInt8) or 16 (kSplit);
                  ///< not used by kBf16
  const std::uint8_t* data = nullptr;  ///< 64-byte aligned

  [[gnu::always_inline]] int panels() const { return (rows + 2 * kLanes - 1) / (2 * kLanes) * 2; }
  [[gnu::always_inline]] int groups() const { return format == Format::kBf16 ? 1 : cols / group; }
  [[gnu::always_inline]] std::size_t scale_bytes() const {
    switch (format) {
      case Format::kInt4:
      case Format::kSplit: return (std::size_t(groups()) * 32 + 63) / 64 * 64;
      case Format::kInt8: return 64;
      default: return 0;
    }
  }
  [[gnu::always_inline]] std::size_t panel_bytes() const {
    constexpr int kColumnsPerLine[] = {8, 4, 2, 16};
    return scale_bytes() + std::size_t(cols / kColumnsPerLine[int(format)]) * kLineBytes;
  }
  /// Bytes that a product reads.
  std::size_t panels_bytes() const { return panels() * panel_bytes(); }
  std::size_t bytes() const {
    return panels_bytes() + (format == Format::kSplit ? panels() * kLanes * lower_bytes() : 0);
  }
  [[gnu::always_inline]] const std::uint8_t* panel(int index) const {
    return data + index * panel_bytes();
  }
  /// The lower parts of a row of kSplit.
  [[gnu::always_inline]] const std::uint8_t* lower(int row) const {
    return data + panels() * panel_bytes() + row * lower_bytes();
  }
  [[gnu::always_inline]] std::size_t lower_bytes() const {
    return lower_scale_bytes() + std::size_t(cols + 255) / 256 * kLineBytes;
  }
  [[gnu::always_inline]] std::size_t lower_scale_bytes() const {
    return (std::size_t(groups()) * 2 + 63) / 64 * 64;
  }
};

/// A block of tokens ready to be multiplied with a matrix: their words side by side, so that one
/// broadcast a token and line feeds the multipliers.
struct Block {
  int tokens = 0;  ///< at most Kernels::token_block
  int cols = 0;    ///< padded, as the matrix's
  int group = 0;   ///< as the matrix's; not used for bfloat16
  std::uint32_t* words =
      nullptr;                   ///< [cols / 4][tokens] four int8, or [cols / 2][tokens] bf16 pairs
  float* scales = nullptr;       ///< int8: [groups][tokens]
  std::int32_t* sums = nullptr;  ///< int8: [groups][tokens], sum of the group's int8 values
};

/// Positions in one block of the key/value cache.
constexpr int kCacheBlock = 64;

/// How the numbers of a key/value cache are stored.
enum class CacheFormat : std::uint8_t {
  kBf16,
  kInt8,  ///< symmetric, -127..127, a scale for each position and head
};

/// Words of one head's keys, or of its values, in one cache block. `head_dim` is padded to 16.
///
/// Keys: [kCacheBlock / 16][head_dim / 2][16], the pair of two channels of a position.
/// Values: [kCacheBlock / 2][head_dim], the pair of a channel at two positions.
///
/// kBf16: a pair is a word. kInt8: kCacheBlock float32 scales come first, then pairs of two bytes.
/// They lie as they are computed with, so that no two instruction sets share a cache: for each
/// register of lanes, the first bytes of all its pairs, then the second ones.
constexpr std::size_t cache_words(int head_dim, CacheFormat format = CacheFormat::kBf16) {
  const std::size_t pairs = std::size_t(kCacheBlock) / 2 * ((head_dim + 15) / 16 * 16);
  return format == CacheFormat::kBf16 ? pairs : kCacheBlock + pairs / 2;
}

/// Most channels and positions of a head that is multiplied in INT8: 255 * 127 for each position
/// fit into 31 bits.
constexpr int kMaxInt8Channels = 256, kMaxInt8Positions = 1 << 16;

/// Keys and values of one head that are multiplied in INT8, where those of a whole sequence are
/// there at once. Keys have a scale for each position, values a scale and a mean for each channel.
class Int8Head {
 public:
  /// In 64-byte aligned memory of `bytes`.
  [[gnu::always_inline]] Int8Head(std::uint8_t* data, int positions, int head_dim)
      : data_(data),
        positions_(padded(positions)),
        key_cols_((head_dim + 3) / 4 * 4),
        channels_((head_dim + kLanes - 1) / kLanes * kLanes) {}

  static std::size_t bytes(int positions, int head_dim) {
    const Int8Head head(nullptr, positions, head_dim);
    return head.values_at() + static_cast<std::size_t>(head.positions_) * head.channels_;
  }

  /// Positions, padded to whole cache blocks; those that pad have values of zero.
  [[gnu::always_inline]] int positions() const { return positions_; }
  /// Channels of the values, padded.
  [[gnu::always_inline]] int channels() const { return channels_; }

  /// [positions]
  [[gnu::always_inline]] float* key_scales() const { return reinterpret_cast<float*>(data_); }
  /// The block of activations that 16 keys are, as `Kernels::quantize` makes them.
  [[gnu::always_inline]] Block keys(int group) const {
    const int first = group * kLanes;
    auto* sums = reinterpret_cast<std::int32_t*>(key_scales() + positions_);
    auto* words = reinterpret_cast<std::uint32_t*>(sums + positions_);
    return {kLanes,
            key_cols_,
            key_cols_,
            words + static_cast<std::size_t>(first) * key_cols_ / 4,
            key_scales() + first,
            sums + first};
  }
  /// [channels]
  [[gnu::always_inline]] float* value_scales() const {
    return reinterpret_cast<float*>(data_ + values_at()) - 2 * channels_;
  }
  [[gnu::always_inline]] float* value_means() const { return value_scales() + channels_; }
  /// [positions / 4][channels], the int8 of a channel at four positions, less its mean.
  [[gnu::always_inline]] std::uint32_t* values() const {
    return reinterpret_cast<std::uint32_t*>(data_ + values_at());
  }

 private:
  [[gnu::always_inline]] static int padded(int positions) {
    return (positions + kCacheBlock - 1) / kCacheBlock * kCacheBlock;
  }
  [[gnu::always_inline]] std::size_t values_at() const {
    return static_cast<std::size_t>(positions_) * (8 + key_cols_) + 8 * channels_;
  }

  std::uint8_t* data_;
  int positions_, key_cols_, channels_;
};

}  // namespace edgevl
