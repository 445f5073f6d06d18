// AVX-512 (F, BW, VL, DQ) vectors for engine.h, all but the codebook look-up; and the fixed-point product that
// avx512.cpp and vbmi.cpp share.
#pragma once
#include <immintrin.h>

#include "engine.h"
#include "engine_fixed.h"
#include "engine_panel.h"
#include "engine_quantize.h"

namespace octavo {
namespace {

struct Simd512 {
  static constexpr int L = 16;
  static constexpr bool kSegments = false;
  static constexpr int kPieces = 1;  // of a chunk, decoded one after the other
  static constexpr int kGroup = 4;   // tokens that share a decoded chunk
  using V = __m512;
  using I = __m512i;

  static OCTAVO_INLINE V zero() { return _mm512_setzero_ps(); }
  static OCTAVO_INLINE V set1(float x) { return _mm512_set1_ps(x); }
  static OCTAVO_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static OCTAVO_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static OCTAVO_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static OCTAVO_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static OCTAVO_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static OCTAVO_INLINE float sum(V v) { return _mm512_reduce_add_ps(v); }

  // a / b where b > 0, else 0.
  static OCTAVO_INLINE V divide(V a, V b) {
    return _mm512_maskz_div_ps(_mm512_cmp_ps_mask(b, zero(), _CMP_GT_OQ), a, b);
  }

  template <DType T>
  static OCTAVO_INLINE V load_as(const void* data, int64_t i) {
    if constexpr (T == kFloat32) return _mm512_loadu_ps(static_cast<const char*>(data) + 4 * i);
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(data) + 2 * i));
    if constexpr (T == kFloat16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }

  // Fewer than L values of type T, and zeros.
  template <DType T>
  static OCTAVO_INLINE V load_tail(const void* data, int64_t i, int64_t n) {
    const __mmask16 there = static_cast<__mmask16>((1u << n) - 1u);
    const char* p = static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(T));
    if constexpr (T == kFloat32) return _mm512_maskz_loadu_ps(there, p);
    const __m256i h = _mm256_maskz_loadu_epi16(there, p);
    if constexpr (T == kFloat16) return _mm512_cvtph_ps(h);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }

  // Rounded by integer arithmetic: the conversion instruction would flush subnormal numbers to zero.
  static OCTAVO_INLINE __m256i to_bfloat16s(V v) {
    const I u = _mm512_castps_si512(v);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  }

  template <DType T>
  static OCTAVO_INLINE void store_chunk(void* out, int64_t i, const V (&v)[4]) {
    char* p = static_cast<char*>(out) + i * static_cast<int64_t>(size_of(T));
    for (int j = 0; j < 4; j++) {
      if constexpr (T == kFloat32) {
        _mm512_storeu_ps(p + 64 * j, v[j]);
      } else {
        const __m256i h = T == kFloat16 ? _mm512_cvtps_ph(v[j], _MM_FROUND_TO_NEAREST_INT) : to_bfloat16s(v[j]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * j), h);
      }
    }
  }

  static OCTAVO_INLINE I no_magnitude() { return _mm512_setzero_si512(); }
  static OCTAVO_INLINE I larger_magnitude(I a, V v) {
    return _mm512_max_epu32(a, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  static OCTAVO_INLINE uint32_t largest_magnitude(I a) { return _mm512_reduce_max_epu32(a); }

  // A binary search in registers: level l's 2^l midpoints take one look-up, by the bits found so far.
  struct Boundaries {
    V first, small[4], l5[2], l6[4], l7[8];
  };
  static OCTAVO_INLINE Boundaries load_boundaries(const Search& s) {
    Boundaries m;
    m.first = set1(s.level[0][0]);
    for (int l = 1; l <= 4; l++) m.small[l - 1] = load(s.level[l]);
    for (int i = 0; i < 2; i++) m.l5[i] = load(s.level[5] + L * i);
    for (int i = 0; i < 4; i++) m.l6[i] = load(s.level[6] + L * i);
    for (int i = 0; i < 8; i++) m.l7[i] = load(s.level[7] + L * i);
    return m;
  }
  static OCTAVO_INLINE I descend(I path, V boundary, V v) {
    const I doubled = _mm512_add_epi32(path, path);
    return _mm512_mask_add_epi32(doubled, _mm512_cmp_ps_mask(boundary, v, _CMP_LT_OQ), doubled, _mm512_set1_epi32(1));
  }
  static OCTAVO_INLINE void encode(const Boundaries& m, V v, uint8_t* out) {
    I path = descend(_mm512_setzero_si512(), m.first, v);
    for (int l = 0; l < 4; l++) path = descend(path, _mm512_permutexvar_ps(path, m.small[l]), v);
    path = descend(path, _mm512_permutex2var_ps(m.l5[0], path, m.l5[1]), v);
    const __mmask16 bit5 = _mm512_test_epi32_mask(path, _mm512_set1_epi32(32));
    path = descend(path, _mm512_mask_blend_ps(bit5, _mm512_permutex2var_ps(m.l6[0], path, m.l6[1]),
                                              _mm512_permutex2var_ps(m.l6[2], path, m.l6[3])), v);
    const __mmask16 low = _mm512_test_epi32_mask(path, _mm512_set1_epi32(32));
    const __mmask16 high = _mm512_test_epi32_mask(path, _mm512_set1_epi32(64));
    const V a = _mm512_mask_blend_ps(low, _mm512_permutex2var_ps(m.l7[0], path, m.l7[1]),
                                     _mm512_permutex2var_ps(m.l7[2], path, m.l7[3]));
    const V b = _mm512_mask_blend_ps(low, _mm512_permutex2var_ps(m.l7[4], path, m.l7[5]),
                                     _mm512_permutex2var_ps(m.l7[6], path, m.l7[7]));
    path = descend(path, _mm512_mask_blend_ps(high, a, b), v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(path));
  }

  static OCTAVO_INLINE void bins(V v, float half_width, int32_t* out) {
    const V position = add(mul(add(v, set1(1.0f)), set1(half_width)), set1(0.5f));
    _mm512_storeu_si512(out, _mm512_cvttps_epi32(position));
  }
};

// The code as 16-bit integers of at most 16383, and their unit.
OCTAVO_INLINE void fix_codes(const float* code, Table& t) {
  __m512i magnitude = _mm512_setzero_si512();
  for (int i = 0; i < 256; i += 16) magnitude = Simd512::larger_magnitude(magnitude, _mm512_loadu_ps(code + i));
  const float top = float_of(_mm512_reduce_max_epu32(magnitude));
  const __m512 inverse = _mm512_set1_ps(top > 0.0f ? 16383.0f / top : 0.0f);
  for (int i = 0; i < 256; i += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(code + i), inverse));
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.fixed + i), _mm512_cvtsepi32_epi16(v));
  }
  t.fixed_unit = top / 16383.0f;
}

// Input to fixed point, in the order that the low and high halves of unpacked bytes come in: of the eight runs of eight
// values of a chunk, first the even ones, then the odd ones. Each chunk has its own unit, its largest magnitude / 32767,
// so a value far above the others costs only its own chunk precision. `unit` is that of the code. Not usable where a value
// is NaN, infinite, or so small that the inverse of its unit would overflow.
bool to_fixed512(const float* x, int64_t tokens, int64_t columns, float unit, float top_word, int16_t* fixed, float* units) {
  const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13), odd = _mm512_setr_epi64(2, 3, 6, 7, 10, 11, 14, 15);
  const int64_t chunks = tokens * chunks_of(columns);
  bool usable = true;
  for (int64_t c = 0; c < chunks; c++, x += kChunk, fixed += kChunk) {
    __m512 v[4];
    __m512i magnitude = _mm512_setzero_si512();
    for (int j = 0; j < 4; j++) magnitude = Simd512::larger_magnitude(magnitude, v[j] = _mm512_loadu_ps(x + 16 * j));
    const uint32_t bits = _mm512_reduce_max_epu32(magnitude);
    const float top = float_of(bits);
    usable = usable && bits < 0x7f800000u && (bits == 0 || top > 0x1p-100f);
    const __m512 inverse = _mm512_set1_ps(top > 0.0f ? top_word / top : 0.0f);
    __m256i h[4];
    for (int j = 0; j < 4; j++) h[j] = _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(v[j], inverse)));
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(h[0]), h[1], 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(h[2]), h[3], 1);
    _mm512_storeu_si512(fixed, _mm512_permutex2var_epi64(low, even, high));
    _mm512_storeu_si512(fixed + 32, _mm512_permutex2var_epi64(low, odd, high));
    *units++ = top / top_word * unit;
  }
  return usable;
}

// Factors for the 16 lanes of a chunk's integer sums: lanes 4j..4j+3 hold weights 16j..16j+15.
template <int PerChunk>
OCTAVO_INLINE __m512 lane_factors(const float* factors) {
  if constexpr (PerChunk == 1) return _mm512_set1_ps(*factors);
  const __m512i lanes = PerChunk == 2 ? _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1)
                                   : _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  __m128 four = _mm_setzero_ps();
  std::memcpy(&four, factors, PerChunk * sizeof(float));
  return _mm512_permutexvar_ps(lanes, _mm512_castps128_ps512(four));
}

template <class S, int M, int PerChunk>
OCTAVO_INLINE void fixed_chunk512(const typename S::FixedCodes& codes, const uint8_t* q, const float* factors, int64_t c,
                                  const int16_t* x, int64_t stride, __m512 (&acc)[M]) {
  __m512i low, high;
  S::decode_fixed(codes, q, low, high);
  for (int m = 0; m < M; m++) {
    const int16_t* xm = x + m * stride + c * kChunk;
    // |code| <= 16383 and |x| <= 32767: four products to a lane stay below 2^31.
    __m512i sum = S::madd(_mm512_setzero_si512(), low, _mm512_loadu_si512(xm));
    sum = S::madd(sum, high, _mm512_loadu_si512(xm + 32));
    const __m512 factor = lane_factors<PerChunk>(factors + (m * (stride / kChunk) + c) * PerChunk);
    acc[m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc[m]);
  }
}

}  // namespace
}  // namespace octavo
