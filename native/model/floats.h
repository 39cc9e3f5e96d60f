// The narrow floating-point types that checkpoints hold, one number at a time.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace edgevl {

/// How the numbers of an unpacked tensor are stored; the names are those of safetensors.
enum class Dtype : std::uint8_t { kBf16, kF16, kF32 };

inline float from_bf16(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to nearest even. NaN stays NaN.
inline std::uint16_t to_bf16(float value) {
  auto bits = std::bit_cast<std::uint32_t>(value);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// IEEE half precision, without branches: the exponent is moved by a multiplication, which also
/// makes subnormal numbers normal; infinity and NaN keep the largest exponent.
inline float from_f16(std::uint16_t bits) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(bits & 0x7fff) << 13;
  const auto value = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const std::uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  return std::bit_cast<float>(value | special | static_cast<std::uint32_t>(bits & 0x8000) << 16);
}

/// Rounds to nearest even; beyond the range becomes infinity, NaN stays NaN.
inline std::uint16_t to_f16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000);
  const float magnitude = std::fabs(value);
  if (!(magnitude < 65520.0f)) {
    return static_cast<std::uint16_t>(sign | (value != value ? 0x7e00 : 0x7c00));
  }
  if (magnitude < 0x1p-14f) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24
    return static_cast<std::uint16_t>(
        sign | (std::bit_cast<std::uint32_t>(magnitude + 0.5f) - 0x3f000000));
  }
  const std::uint32_t rounded = (bits & 0x7fffffff) - (112u << 23) + 0xfff + (bits >> 13 & 1);
  return static_cast<std::uint16_t>(sign | rounded >> 13);
}

}  // namespace edgevl
