// Plain C++, for any processor: lanes are loops, which the compiler turns into what there is.

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "kernels/instruction_sets.h"

namespace edgevl {
namespace {

constexpr int kTokenBlock = 4;
constexpr int kWidth = 16;
constexpr int kAccumulators = 4;
constexpr int kByteOffset = 128;
constexpr bool kBothNibbles = false;
constexpr bool kLanesOfWords = false;
constexpr bool kBroadcastingDot = false;
constexpr bool kPairsOfTokens = false;

// Lanes are loops, whose unrolling made this file as large as all others together.
#define EDGEVL_UNROLL
#define EDGEVL_EACH(i, n) for (int i = 0; i < (n); ++i)

struct Floats {
  float at[kWidth];
};
struct Ints {
  std::int32_t at[kWidth];
};
struct Bytes {
  std::uint8_t at[4 * kWidth];
};
struct Pairs {
  float even[kWidth], odd[kWidth];
};

inline Floats load(const float* x, int n) {
  Floats y;
  EDGEVL_EACH(i, kWidth) y.at[i] = i < n ? x[i] : 0.0f;
  return y;
}
inline Floats load(const float* x) { return load(x, kWidth); }
inline void store(float* x, Floats y, int n) { EDGEVL_EACH(i, n) x[i] = y.at[i]; }
inline void store(float* x, Floats y) { store(x, y, kWidth); }

inline Floats splat(float x) {
  Floats y;
  EDGEVL_EACH(i, kWidth) y.at[i] = x;
  return y;
}
inline Ints splat(std::int32_t x) {
  Ints y;
  EDGEVL_EACH(i, kWidth) y.at[i] = x;
  return y;
}

inline Floats operator+(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] += b.at[i];
  return a;
}
inline Floats operator-(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] -= b.at[i];
  return a;
}
inline Floats operator*(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] *= b.at[i];
  return a;
}
inline Floats operator/(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] /= b.at[i];
  return a;
}
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats add(Floats a, Floats b) { return a + b; }

// Sums may pass through values beyond int32 on their way to one within: they wrap around.
inline std::int32_t wrap(std::uint32_t x) { return std::int32_t(x); }
inline Ints add(Ints a, Ints b) {
  EDGEVL_EACH(i, kWidth) a.at[i] = wrap(std::uint32_t(a.at[i]) + std::uint32_t(b.at[i]));
  return a;
}
inline Ints subtract(Ints a, Ints b) {
  EDGEVL_EACH(i, kWidth) a.at[i] = wrap(std::uint32_t(a.at[i]) - std::uint32_t(b.at[i]));
  return a;
}
inline Ints shift_left(Ints a, int bits) {
  EDGEVL_EACH(i, kWidth) a.at[i] = wrap(std::uint32_t(a.at[i]) << bits);
  return a;
}

inline Floats larger(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
  return a;
}
inline Floats smaller(Floats a, Floats b) {
  EDGEVL_EACH(i, kWidth) a.at[i] = a.at[i] < b.at[i] ? a.at[i] : b.at[i];
  return a;
}
inline Ints larger(Ints a, Ints b) {
  EDGEVL_EACH(i, kWidth) a.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
  return a;
}

inline Ints bits_of(Floats x) {
  Ints y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
inline Floats floats_of(Ints x) {
  Floats y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
inline Ints magnitude(Floats x) {
  Ints y = bits_of(x);
  EDGEVL_EACH(i, kWidth) y.at[i] &= 0x7fffffff;
  return y;
}
/// Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits; unlike a cast, it is
/// defined for every x, and right for |x| up to 2^22.
inline Ints to_int(Floats x) {
  return subtract(bits_of(x + splat(12582912.0f)), splat(0x4b400000));
}
inline Floats to_float(Ints x) {
  Floats y;
  EDGEVL_EACH(i, kWidth) y.at[i] = float(x.at[i]);
  return y;
}
inline Floats nearest(Floats x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }
inline Floats times_power_of_two(Floats x, Floats n) {
  return x * floats_of(shift_left(add(to_int(n), splat(127)), 23));
}

inline Floats reciprocal(Floats x) { return splat(1.0f) / x; }

inline float sum(Floats x) {
  float total = 0;
  EDGEVL_EACH(i, kWidth) total += x.at[i];
  return total;
}
inline std::int32_t sum(Ints x) {
  std::uint32_t total = 0;
  EDGEVL_EACH(i, kWidth) total += std::uint32_t(x.at[i]);
  return wrap(total);
}
inline float largest(Floats x) {
  float y = x.at[0];
  EDGEVL_EACH(i, kWidth) y = x.at[i] > y ? x.at[i] : y;
  return y;
}
inline std::int32_t largest(Ints x) {
  std::int32_t y = x.at[0];
  EDGEVL_EACH(i, kWidth) y = x.at[i] > y ? x.at[i] : y;
  return y;
}

inline Floats load_bf16(const std::uint16_t* x) {
  Ints y;
  EDGEVL_EACH(i, kWidth) y.at[i] = wrap(std::uint32_t(x[i]) << 16);
  return floats_of(y);
}
/// Exact, denormals too: the exponent is put right by a multiplication; infinity and NaN apart.
inline Floats load_half(const std::uint8_t* x) {
  Ints y;
  EDGEVL_EACH(i, kWidth) {
    const std::uint32_t half = x[2 * i] | std::uint32_t(x[2 * i + 1]) << 8;
    std::uint32_t bits = (half & 0x7fff) << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    __builtin_memcpy(&bits, &value, 4);
    if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000 | (half & 0x3ff) << 13;
    y.at[i] = wrap(bits | (half & 0x8000) << 16);
  }
  return floats_of(y);
}
inline void store_bytes(std::int8_t* out, Ints x) {
  EDGEVL_EACH(i, kWidth) out[i] = std::int8_t(x.at[i]);
}
inline void store_bf16(std::uint16_t* out, Floats x) {
  const Ints y = bits_of(x);
  EDGEVL_EACH(i, kWidth) {
    const std::uint32_t bits = std::uint32_t(y.at[i]);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out[i] = std::uint16_t((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

inline Bytes load_bytes(const std::uint8_t* x) {
  Bytes y;
  __builtin_memcpy(&y, x, sizeof y);
  return y;
}
inline Bytes bytes_int8(const std::uint8_t* x) { return load_bytes(x); }
inline Bytes broadcast_bytes(const std::uint32_t* word) {
  Bytes y;
  EDGEVL_EACH(i, kWidth) __builtin_memcpy(y.at + 4 * i, word, 4);
  return y;
}
inline Bytes either(Bytes a, Bytes b) {
  EDGEVL_EACH(i, 4 * kWidth) a.at[i] |= b.at[i];
  return a;
}
inline Bytes low_nibbles(Bytes x) {
  EDGEVL_EACH(i, 4 * kWidth) x.at[i] &= 15;
  return x;
}
inline Bytes high_nibbles(Bytes x) {
  EDGEVL_EACH(i, 4 * kWidth) x.at[i] >>= 4;
  return x;
}
template <int k>
inline Bytes crumbs(Bytes x) {
  EDGEVL_EACH(i, 4 * kWidth) x.at[i] = std::uint8_t(2 * (x.at[i] >> 2 * k & 3));
  return x;
}
inline Ints dot4(Ints sums, const Bytes& weights, const Bytes& x) {
  EDGEVL_EACH(i, kWidth) {
    std::int32_t product = 0;
    EDGEVL_EACH(k, 4) product += weights.at[4 * i + k] * std::int8_t(x.at[4 * i + k]);
    sums.at[i] = wrap(std::uint32_t(sums.at[i]) + std::uint32_t(product));
  }
  return sums;
}
inline void opaque(Bytes& x) { asm volatile("" : "+m"(x)); }

inline Pairs load_pairs(const std::uint8_t* x) {
  Pairs y;
  EDGEVL_EACH(i, kWidth) {
    std::uint32_t word;
    __builtin_memcpy(&word, x + 4 * i, 4);
    const std::uint32_t even = word << 16, odd = word & 0xffff0000;
    __builtin_memcpy(&y.even[i], &even, 4);
    __builtin_memcpy(&y.odd[i], &odd, 4);
  }
  return y;
}
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  Pairs y;
  EDGEVL_EACH(i, kWidth) {
    y.even[i] = std::int8_t(x[i]);
    y.odd[i] = std::int8_t(x[kWidth + i]);
  }
  return y;
}
inline Pairs broadcast_pairs(const std::uint32_t* word) {
  std::uint32_t words[kWidth];
  EDGEVL_EACH(i, kWidth) words[i] = *word;
  return load_pairs(reinterpret_cast<const std::uint8_t*>(words));
}
inline Floats dot2(Floats sums, const Pairs& a, const Pairs& b) {
  EDGEVL_EACH(i, kWidth) sums.at[i] += a.odd[i] * b.odd[i] + a.even[i] * b.even[i];
  return sums;
}

}  // namespace
}  // namespace edgevl

#include "kernels/kernels.inl"

namespace edgevl {
constexpr Kernels kPortable = table("portable");
}
