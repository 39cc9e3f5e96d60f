// AVX2 with FMA and F16C, and with AVX-VNNI where EDGEVL_AVXVNNI says so: 16 registers of 8 lanes.

#include <immintrin.h>
#include <math.h>

#include <cstddef>
#include <cstdint>

#include "kernels/instruction_sets.h"

namespace edgevl {
namespace {

constexpr int kWidth = 8;
constexpr bool kLanesOfWords = false;
constexpr bool kBroadcastingDot = false;
constexpr bool kPairsOfTokens = false;
#if defined(EDGEVL_AVXVNNI)
constexpr int kTokenBlock = 6;  // by two registers of weights: 12 sums, 2 weights, 1 word
constexpr int kAccumulators = 12;
constexpr int kByteOffset = 128;
constexpr bool kBothNibbles = false;
#else
constexpr int kTokenBlock = 4;  // 8 sums, 4 weights, 2 words, 2 products
constexpr int kAccumulators = 8;
constexpr int kByteOffset = 0;
constexpr bool kBothNibbles = true;
#endif

using Floats = __m256;
struct Ints {
  __m256i bits;
};
struct Bytes {
  __m256i bits;
};
struct Pairs {
  Floats even, odd;
};

inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline Floats load(const float* x, int n) { return _mm256_maskload_ps(x, first(n)); }
inline void store(float* x, Floats y) { _mm256_storeu_ps(x, y); }
inline void store(float* x, Floats y, int n) { _mm256_maskstore_ps(x, first(n), y); }
inline Floats splat(float x) { return _mm256_set1_ps(x); }
inline Ints splat(std::int32_t x) { return {_mm256_set1_epi32(x)}; }

inline Floats add(Floats a, Floats b) { return a + b; }
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.bits, b.bits)}; }
inline Ints subtract(Ints a, Ints b) { return {_mm256_sub_epi32(a.bits, b.bits)}; }
inline Ints shift_left(Ints a, int n) { return {_mm256_slli_epi32(a.bits, n)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Ints larger(Ints a, Ints b) { return {_mm256_max_epi32(a.bits, b.bits)}; }
inline Ints magnitude(Floats x) {
  return {_mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff))};
}
inline Ints to_int(Floats x) { return {_mm256_cvtps_epi32(x)}; }
inline Floats to_float(Ints x) { return _mm256_cvtepi32_ps(x.bits); }
inline Floats nearest(Floats x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats times_power_of_two(Floats x, Floats n) {
  return x * _mm256_castsi256_ps(shift_left(add(to_int(n), splat(127)), 23).bits);
}

inline Floats reciprocal(Floats x) { return splat(1.0f) / x; }
inline float sum(Floats x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
inline std::int32_t sum(Ints x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x.bits), _mm256_extracti128_si256(x.bits, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
inline float largest(Floats x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
inline std::int32_t largest(Ints x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x.bits), _mm256_extracti128_si256(x.bits, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}

inline __m128i load_halves(const void* x) {
  return _mm_loadu_si128(static_cast<const __m128i*>(x));
}
inline Floats load_half(const std::uint8_t* x) { return _mm256_cvtph_ps(load_halves(x)); }
inline Floats load_bf16(const std::uint16_t* x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(x)), 16));
}
inline void store_bytes(std::int8_t* out, Ints x) {
  const __m256i lowest =
      _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1,
                       -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m256i bytes = _mm256_shuffle_epi8(x.bits, lowest);
  _mm_storel_epi64(
      reinterpret_cast<__m128i*>(out),
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}
inline void store_bf16(std::uint16_t* out, Floats x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(up), _mm256_castsi256_ps(quiet),
                                         _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(out),
      _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
}

inline Bytes load_bytes(const std::uint8_t* x) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))};
}
inline Bytes either(Bytes a, Bytes b) { return {_mm256_or_si256(a.bits, b.bits)}; }
inline Bytes low_nibbles(Bytes x) { return {_mm256_and_si256(x.bits, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) {
  return {_mm256_and_si256(_mm256_srli_epi16(x.bits, 4), _mm256_set1_epi8(15))};
}
template <int k>
inline Bytes crumbs(Bytes x) {
  const __m256i doubled =
      k == 0 ? _mm256_slli_epi16(x.bits, 1) : _mm256_srli_epi16(x.bits, k == 0 ? 0 : 2 * k - 1);
  return {_mm256_and_si256(doubled, _mm256_set1_epi8(6))};
}
/// In assembly, so that the word is broadcast once for all registers of weights.
inline Bytes broadcast_bytes(const std::uint32_t* word) {
  Bytes x;
  asm("vpbroadcastd %1, %0" : "=x"(x.bits) : "m"(*word));
  return x;
}
inline void opaque(Bytes& x) { asm volatile("" : "+x"(x.bits)); }
/// Tells GCC to keep sums in a register: it would store a tile's to the stack after every product.
template <class Register>
inline Register held(Register sums) {
  asm("" : "+x"(sums));
  return sums;
}

#if defined(EDGEVL_AVXVNNI)

inline Bytes bytes_int8(const std::uint8_t* x) { return load_bytes(x); }
inline Ints dot4(Ints sums, Bytes weights, Bytes x) {
  return {held(_mm256_dpbusd_avx_epi32(sums.bits, weights.bits, x.bits))};
}

#else

inline Bytes bytes_int8(const std::uint8_t* x) {
  return {_mm256_xor_si256(load_bytes(x).bits, _mm256_set1_epi8(-128))};
}
/// Two neighbours of unsigned times signed bytes, in 16 bits: up to 2 * 127 * 127 they cannot
/// saturate. Full bytes could, so the sign of x goes over to the weights, which are -127 to 127.
inline Ints dot4(Ints sums, Bytes weights, Bytes x) {
  const __m256i size = _mm256_abs_epi8(x.bits);
  const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(weights.bits, x.bits));
  return {held(add(sums, {_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))}).bits)};
}
/// Nibbles are small enough for four products in 16 bits: 4 * 15 * 127.
inline Ints dot8(Ints sums, Bytes low, Bytes high, Bytes x, Bytes y) {
  const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(low.bits, x.bits),
                                        _mm256_maddubs_epi16(high.bits, y.bits));
  return {held(add(sums, {_mm256_madd_epi16(four, _mm256_set1_epi16(1))}).bits)};
}

#endif

inline Pairs split(__m256i words) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(int(0xffff0000))))};
}
inline Pairs load_pairs(const std::uint8_t* x) { return split(load_bytes(x).bits); }
inline Floats load_int8(const std::uint8_t* x) {
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  return {load_int8(x), load_int8(x + kWidth)};
}
inline Pairs broadcast_pairs(const std::uint32_t* word) {
  return split(broadcast_bytes(word).bits);
}
inline Floats dot2(Floats sums, Pairs a, Pairs b) {
  return held(fma(a.even, b.even, fma(a.odd, b.odd, sums)));
}

}  // namespace
}  // namespace edgevl

#include "kernels/kernels.inl"

namespace edgevl {
#if defined(EDGEVL_AVXVNNI)
constexpr Kernels kAvxVnni = table("avxvnni");
#else
constexpr Kernels kAvx2 = table("avx2");
#endif
}  // namespace edgevl
