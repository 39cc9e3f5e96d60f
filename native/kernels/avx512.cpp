// AVX-512 with VNNI, and with BF16 where EDGEVL_AVX512BF16 says so: 32 registers of 16 lanes.

#if defined(__GNUC__) && !defined(__clang__)
// GCC's own header leaves what an unmasked instruction merges with uninitialized, and warns of it.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <immintrin.h>
#include <math.h>

#include <cstddef>
#include <cstdint>

#include "kernels/instruction_sets.h"

namespace edgevl {
namespace {

constexpr int kTokenBlock = 12;  // by two registers of weights: 24 sums, 4 weights, 1 word, 1 mask
constexpr int kWidth = 16;
constexpr int kAccumulators = 24;
constexpr int kByteOffset = 128;
constexpr bool kBothNibbles = false;
constexpr bool kLanesOfWords = false;
constexpr bool kBroadcastingDot = true;
constexpr bool kPairsOfTokens = false;

using Floats = __m512;
struct Ints {
  __m512i bits;
};
struct Bytes {
  __m512i bits;
};

inline __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline Floats load(const float* x, int n) { return _mm512_maskz_loadu_ps(first(n), x); }
inline void store(float* x, Floats y) { _mm512_storeu_ps(x, y); }
inline void store(float* x, Floats y, int n) { _mm512_mask_storeu_ps(x, first(n), y); }
inline Floats splat(float x) { return _mm512_set1_ps(x); }
inline Ints splat(std::int32_t x) { return {_mm512_set1_epi32(x)}; }

inline Floats add(Floats a, Floats b) { return a + b; }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.bits, b.bits)}; }
inline Ints subtract(Ints a, Ints b) { return {_mm512_sub_epi32(a.bits, b.bits)}; }
inline Ints shift_left(Ints a, int n) { return {__m512i(__v16su(a.bits) << n)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.bits, b.bits)}; }
inline Ints magnitude(Floats x) {
  return {_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff))};
}
inline Ints to_int(Floats x) { return {_mm512_cvtps_epi32(x)}; }
inline Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x.bits); }
inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline Floats reciprocal(Floats x) {
  const Floats near = _mm512_rcp14_ps(x);
  return near * _mm512_fnmadd_ps(x, near, splat(2.0f));
}
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline std::int32_t sum(Ints x) { return _mm512_reduce_add_epi32(x.bits); }
inline float largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline std::int32_t largest(Ints x) { return _mm512_reduce_max_epi32(x.bits); }

inline Floats load_half(const std::uint8_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Floats load_bf16(const std::uint16_t* x) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(shift_left({_mm512_cvtepu16_epi32(halves)}, 16).bits);
}
inline void store_bytes(std::int8_t* out, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(x.bits));
}

inline Floats load_int8(const std::uint8_t* x) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
inline Bytes load_bytes(const std::uint8_t* x) { return {_mm512_loadu_si512(x)}; }
inline Bytes bytes_int8(const std::uint8_t* x) { return load_bytes(x); }
inline Bytes either(Bytes a, Bytes b) { return {_mm512_or_si512(a.bits, b.bits)}; }
inline Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.bits, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) {
  return {_mm512_and_si512(_mm512_srli_epi16(x.bits, 4), _mm512_set1_epi8(15))};
}
template <int k>
inline Bytes crumbs(Bytes x) {
  const __m512i doubled =
      k == 0 ? _mm512_slli_epi16(x.bits, 1) : _mm512_srli_epi16(x.bits, k == 0 ? 0 : 2 * k - 1);
  return {_mm512_and_si512(doubled, _mm512_set1_epi8(6))};
}
/// In assembly, so that the word is broadcast once for all registers of weights. Left to itself,
/// GCC gives every product a load of its own, or keeps a tile's sums in two places and spills them.
inline Bytes broadcast_bytes(const std::uint32_t* word) {
  Bytes x;
  asm("vpbroadcastd %1, %0" : "=v"(x.bits) : "m"(*word));
  return x;
}
inline Ints dot4(Ints sums, Bytes weights, Bytes x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums.bits) : "v"(weights.bits), "v"(x.bits));
  return sums;
}
/// Broadcast by the product itself.
inline Ints dot4(Ints sums, Bytes weights, const std::uint32_t* word) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums.bits) : "v"(weights.bits), "m"(*word));
  return sums;
}
inline void opaque(Bytes& x) { asm volatile("" : "+v"(x.bits)); }

#if defined(EDGEVL_AVX512BF16)

struct Pairs {
  __m512i bits;
};
inline Pairs load_pairs(const std::uint8_t* x) { return {_mm512_loadu_si512(x)}; }
/// The low halves of the floats are zero: nothing is rounded.
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  const __m512i first = _mm512_castps_si512(load_int8(x));
  const __m512i second = _mm512_castps_si512(load_int8(x + kWidth));
  return {_mm512_or_si512(_mm512_srli_epi32(first, 16), second)};
}
inline Pairs broadcast_pairs(const std::uint32_t* word) { return {broadcast_bytes(word).bits}; }
inline Floats dot2(Floats sums, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a.bits), "v"(b.bits));
  return sums;
}
inline void store_bf16(std::uint16_t* out, Floats x) {
  const __m256bh halves = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(out, &halves, sizeof halves);
}

#else

struct Pairs {
  Floats even, odd;
};
inline Pairs split(__m512i words) {
  return {_mm512_castsi512_ps(shift_left({words}, 16).bits),
          _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(int(0xffff0000))))};
}
inline Pairs load_pairs(const std::uint8_t* x) { return split(_mm512_loadu_si512(x)); }
inline Pairs load_int8_pairs(const std::uint8_t* x) {
  return {load_int8(x), load_int8(x + kWidth)};
}
inline Pairs broadcast_pairs(const std::uint32_t* word) {
  return split(broadcast_bytes(word).bits);
}
inline Floats dot2(Floats sums, Pairs a, Pairs b) {
  return fma(a.even, b.even, fma(a.odd, b.odd, sums));
}
inline void store_bf16(std::uint16_t* out, Floats x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i chosen = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, up, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(chosen));
}

#endif

}  // namespace
}  // namespace edgevl

#include "kernels/kernels.inl"

namespace edgevl {
#if defined(EDGEVL_AVX512BF16)
constexpr Kernels kAvx512Bf16 = table("avx512bf16");
#else
constexpr Kernels kAvx512 = table("avx512");
#endif
}  // namespace edgevl
