// NEON with dot products, and with matrix products (I8MM, BF16) where EDGEVL_NEON_I8MM says so: 32
// registers of 4 lanes.

#include <arm_neon.h>
#include <math.h>

#include <cstddef>
#include <cstdint>

#include "kernels/instruction_sets.h"

namespace edgevl {
namespace {

constexpr int kTokenBlock = 12;  // by two registers of weights: 24 sums, 4 weights, 3 of words
constexpr int kWidth = 4;
constexpr int kAccumulators = 24;
constexpr int kByteOffset = 0;
constexpr bool kBothNibbles = false;
constexpr bool kLanesOfWords = true;
#if defined(EDGEVL_NEON_I8MM)
constexpr bool kBroadcastingDot = false;
constexpr bool kPairsOfTokens = true;
#else
constexpr bool kBroadcastingDot = false;
constexpr bool kPairsOfTokens = false;
#endif

using Floats = float32x4_t;
using Ints = int32x4_t;
using Bytes = int8x16_t;

inline Floats load(const float* x) { return vld1q_f32(x); }
inline Floats load(const float* x, int n) {
  float part[4] = {0, 0, 0, 0};
  for (int i = 0; i < n; ++i) part[i] = x[i];
  return vld1q_f32(part);
}
inline void store(float* x, Floats y) { vst1q_f32(x, y); }
inline void store(float* x, Floats y, int n) {
  float part[4];
  vst1q_f32(part, y);
  for (int i = 0; i < n; ++i) x[i] = part[i];
}
inline Floats splat(float x) { return vdupq_n_f32(x); }
inline Ints splat(std::int32_t x) { return vdupq_n_s32(x); }

inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }
inline Ints subtract(Ints a, Ints b) { return vsubq_s32(a, b); }
inline Ints shift_left(Ints a, int n) { return vshlq_s32(a, vdupq_n_s32(n)); }
inline Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
inline Floats larger(Floats a, Floats b) { return vmaxq_f32(a, b); }  // NaN wins on either side
inline Floats smaller(Floats a, Floats b) { return vminq_f32(a, b); }
inline Ints larger(Ints a, Ints b) { return vmaxq_s32(a, b); }
inline Ints magnitude(Floats x) { return vreinterpretq_s32_f32(vabsq_f32(x)); }
inline Ints to_int(Floats x) { return vcvtnq_s32_f32(x); }
inline Floats to_float(Ints x) { return vcvtq_f32_s32(x); }
inline Floats nearest(Floats x) { return vrndnq_f32(x); }
inline Floats times_power_of_two(Floats x, Floats n) {
  return x * vreinterpretq_f32_s32(shift_left(add(to_int(n), splat(127)), 23));
}
inline Floats reciprocal(Floats x) { return splat(1.0f) / x; }
inline float sum(Floats x) { return vaddvq_f32(x); }
inline std::int32_t sum(Ints x) { return vaddvq_s32(x); }
inline float largest(Floats x) { return vmaxvq_f32(x); }
inline std::int32_t largest(Ints x) { return vmaxvq_s32(x); }

inline Floats load_half(const std::uint8_t* x) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(x)));
}
inline Floats load_bf16(const std::uint16_t* x) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16));
}
inline void store_bytes(std::int8_t* out, Ints x) {
  const int16x4_t halves = vmovn_s32(x);
  const std::int32_t word =
      vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(halves, halves))), 0);
  __builtin_memcpy(out, &word, 4);
}
inline void store_bf16(std::uint16_t* out, Floats x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  vst1_u16(out, vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), up, quiet), 16));
}

inline Bytes load_bytes(const std::uint8_t* x) { return vreinterpretq_s8_u8(vld1q_u8(x)); }
/// Products are of signed bytes: the offset goes.
inline Bytes bytes_int8(const std::uint8_t* x) {
  return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(x), vdupq_n_u8(128)));
}
inline Bytes either(Bytes a, Bytes b) { return vorrq_s8(a, b); }
inline Bytes low_nibbles(Bytes x) { return vandq_s8(x, vdupq_n_s8(15)); }
inline Bytes high_nibbles(Bytes x) {
  return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x), 4));
}
template <int k>
inline Bytes crumbs(Bytes x) {
  const uint8x16_t bits = vreinterpretq_u8_s8(x);
  uint8x16_t doubled;
  if constexpr (k == 0) {
    doubled = vshlq_n_u8(bits, 1);
  } else {
    doubled = vshrq_n_u8(bits, 2 * k - 1);
  }
  return vreinterpretq_s8_u8(vandq_u8(doubled, vdupq_n_u8(6)));
}
inline Bytes broadcast_bytes(const std::uint32_t* word) {
  return vreinterpretq_s8_u32(vld1q_dup_u32(word));
}
inline Ints dot4(Ints sums, Bytes weights, Bytes x) { return vdotq_s32(sums, weights, x); }
template <int k>
inline Ints dot4_lane(Ints sums, Bytes weights, Bytes x) {
  return vdotq_laneq_s32(sums, weights, x, k);
}
inline void opaque(Bytes& x) { asm volatile("" : "+w"(x)); }

#if defined(EDGEVL_NEON_I8MM)

struct Pairs {
  bfloat16x8_t halves;
};
inline Pairs load_pairs(const std::uint8_t* x) { return {vreinterpretq_bf16_u8(vld1q_u8(x))}; }
/// The low halves of the floats are zero: nothing is rounded.
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  const int16x8_t both = vmovl_s8(vreinterpret_s8_u8(vld1_u8(x)));
  const uint32x4_t first = vreinterpretq_u32_f32(to_float(vmovl_s16(vget_low_s16(both))));
  const uint32x4_t second = vreinterpretq_u32_f32(to_float(vmovl_high_s16(both)));
  return {vreinterpretq_bf16_u32(vsriq_n_u32(second, first, 16))};
}
inline Pairs broadcast_pairs(const std::uint32_t* word) {
  return {vreinterpretq_bf16_u32(vld1q_dup_u32(word))};
}
inline Floats dot2(Floats sums, Pairs a, Pairs b) { return vbfdotq_f32(sums, a.halves, b.halves); }
template <int k>
inline Floats dot2_lane(Floats sums, Pairs a, Pairs b) {
  return vbfdotq_laneq_f32(sums, a.halves, b.halves, k);
}

/// Sums of pairs of tokens and pairs of rows. SMMLA multiplies two tokens with two rows, 8 columns
/// of each: two words of each, from two lines (kInt8) or from the bits of one (kInt4, kSplit).
template <int T, int R>
struct PairSums {
  static constexpr int kPairs = (T + 1) / 2;
  Ints at[kPairs][2 * R];

  /// Adds the products of two words of R registers with words[T] and more[T].
  inline __attribute__((always_inline)) void add_products(const Bytes (&one)[R],
                                                          const Bytes (&two)[R],
                                                          const std::uint32_t* words,
                                                          const std::uint32_t* more) {
    Bytes rows[2 * R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Ints a = vreinterpretq_s32_s8(one[r]), b = vreinterpretq_s32_s8(two[r]);
      rows[2 * r] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
      rows[2 * r + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
#pragma GCC unroll 8
    for (int p = 0; p < kPairs; ++p) {
      const bool whole = 2 * p + 1 < T;  // or else the token without a partner is taken twice
      const uint32x2_t a = whole ? vld1_u32(words + 2 * p) : vld1_dup_u32(words + 2 * p);
      const uint32x2_t b = whole ? vld1_u32(more + 2 * p) : vld1_dup_u32(more + 2 * p);
      const Bytes x = vreinterpretq_s8_u32(vcombine_u32(vzip1_u32(a, b), vzip2_u32(a, b)));
#pragma GCC unroll 16
      for (int q = 0; q < 2 * R; ++q) at[p][q] = vmmlaq_s32(at[p][q], x, rows[q]);
    }
  }

  inline __attribute__((always_inline)) void add_to(Ints (&sums)[T][R]) const {
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const int64x2_t a = vreinterpretq_s64_s32(at[t / 2][2 * r]);
        const int64x2_t b = vreinterpretq_s64_s32(at[t / 2][2 * r + 1]);
        const int64x2_t rows = t % 2 == 0 ? vzip1q_s64(a, b) : vzip2q_s64(a, b);
        sums[t][r] = vaddq_s32(sums[t][r], vreinterpretq_s32_s64(rows));
      }
    }
  }
};

template <int T, int R>
inline __attribute__((always_inline)) void add_int4_pairs(Ints (&sums)[T][R],
                                                          const std::uint8_t* const (&source)[R],
                                                          int lines, const std::uint32_t* words) {
  PairSums<T, R> pairs = {};
  for (int i = 0; i < lines; ++i, words += 2 * T) {
    Bytes low[R], high[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Bytes both = load_bytes(source[r] + i * kLineBytes);
      low[r] = low_nibbles(both);
      high[r] = high_nibbles(both);
    }
    pairs.add_products(low, high, words, words + T);
  }
  pairs.add_to(sums);
}

template <int T, int R>
inline __attribute__((always_inline)) void add_split_pairs(Ints (&sums)[T][R],
                                                           const std::uint8_t* const (&source)[R],
                                                           int lines, const std::uint32_t* words) {
  PairSums<T, R> pairs = {};
  for (int i = 0; i < lines; ++i, words += 4 * T) {
    Bytes part[4][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Bytes line = load_bytes(source[r] + i * kLineBytes);
      part[0][r] = crumbs<0>(line);
      part[1][r] = crumbs<1>(line);
      part[2][r] = crumbs<2>(line);
      part[3][r] = crumbs<3>(line);
    }
    pairs.add_products(part[0], part[1], words, words + T);
    pairs.add_products(part[2], part[3], words + 2 * T, words + 3 * T);
  }
  pairs.add_to(sums);
}

template <int T, int R>
inline __attribute__((always_inline)) void add_int8_pairs(Ints (&sums)[T][R],
                                                          const std::uint8_t* const (&source)[R],
                                                          int lines, const std::uint32_t* words) {
  PairSums<T, R> pairs = {};
  for (int i = 0; i < lines; i += 2, words += 2 * T) {
    const bool two = i + 1 < lines;
    Bytes weights[R], next[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      weights[r] = bytes_int8(source[r] + i * kLineBytes);
      next[r] = two ? bytes_int8(source[r] + (i + 1) * kLineBytes) : vdupq_n_s8(0);
    }
    pairs.add_products(weights, next, words, two ? words + T : words);
  }
  pairs.add_to(sums);
}

#else

struct Pairs {
  Floats even, odd;
};
inline Pairs split(uint32x4_t words) {
  return {vreinterpretq_f32_u32(vshlq_n_u32(words, 16)),
          vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)))};
}
inline Pairs load_pairs(const std::uint8_t* x) { return split(vreinterpretq_u32_u8(vld1q_u8(x))); }
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  const int16x8_t both = vmovl_s8(vreinterpret_s8_u8(vld1_u8(x)));
  return {to_float(vmovl_s16(vget_low_s16(both))), to_float(vmovl_high_s16(both))};
}
inline Pairs broadcast_pairs(const std::uint32_t* word) { return split(vld1q_dup_u32(word)); }
inline Floats dot2(Floats sums, Pairs a, Pairs b) {
  return fma(a.even, b.even, fma(a.odd, b.odd, sums));
}
template <int k>
inline Floats dot2_lane(Floats sums, Pairs a, Pairs b) {
  return vfmaq_laneq_f32(vfmaq_laneq_f32(sums, a.odd, b.odd, k), a.even, b.even, k);
}

#endif

}  // namespace
}  // namespace edgevl

#include "kernels/kernels.inl"

namespace edgevl {
#if defined(EDGEVL_NEON_I8MM)
constexpr Kernels kNeonI8mm = table("neon_i8mm");
#else
constexpr Kernels kNeon = table("neon");
#endif
}  // namespace edgevl
