// AVX2 vectors (with FMA and F16C) for engine.h, all but the codebook; inputs in fixed point.
#pragma once
#include <immintrin.h>

#include "engine.h"
#include "engine_fixed.h"
#include "engine_panel.h"
#include "engine_quantize.h"

namespace octavo {
namespace {

// The factors of half a chunk's eight lanes: one for the chunk, one for each half, or one for each 128-bit lane.
template <int PerChunk>
OCTAVO_INLINE __m256 part_factor(const float* f, int half) {
  if constexpr (PerChunk == 1) return _mm256_set1_ps(f[0]);
  if constexpr (PerChunk == 2) return _mm256_set1_ps(f[half]);
  return _mm256_set_m128(_mm_set1_ps(f[2 * half + 1]), _mm_set1_ps(f[2 * half]));
}

struct Simd256 {
  static constexpr int L = 8;
  static constexpr bool kSegments = false;
  static constexpr int kPieces = 1;  // of a chunk, decoded one after the other
  static constexpr int kGroup = 4;   // tokens that share a decoded chunk
  using V = __m256;
  using I = __m256i;

  static OCTAVO_INLINE V zero() { return _mm256_setzero_ps(); }
  static OCTAVO_INLINE V set1(float x) { return _mm256_set1_ps(x); }
  static OCTAVO_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static OCTAVO_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static OCTAVO_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static OCTAVO_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static OCTAVO_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static OCTAVO_INLINE V divide(V a, V b) {
    return _mm256_and_ps(_mm256_div_ps(a, b), _mm256_cmp_ps(b, zero(), _CMP_GT_OQ));
  }
  static OCTAVO_INLINE float sum(V v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  template <DType T>
  static OCTAVO_INLINE V load_as(const void* data, int64_t i) {
    const char* p = static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(T));
    if constexpr (T == kFloat32) return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (T == kFloat16) return _mm256_cvtph_ps(h);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }

  // Fewer than L values of type T, and zeros.
  template <DType T>
  static OCTAVO_INLINE V load_tail(const void* data, int64_t i, int64_t n) {
    alignas(32) char values[4 * L] = {};
    std::memcpy(values, static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(T)),
                static_cast<size_t>(n) * size_of(T));
    return load_as<T>(values, 0);
  }

  static OCTAVO_INLINE __m128i to_bfloat16s(V v) {
    const I u = _mm256_castps_si256(v);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
  }

  template <DType T>
  static OCTAVO_INLINE void store_chunk(void* out, int64_t i, const V (&v)[8]) {
    char* p = static_cast<char*>(out) + i * static_cast<int64_t>(size_of(T));
    for (int j = 0; j < 8; j++) {
      if constexpr (T == kFloat32) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * j), _mm256_castps_si256(v[j]));
      } else {
        const __m128i h = T == kFloat16 ? _mm256_cvtps_ph(v[j], _MM_FROUND_TO_NEAREST_INT) : to_bfloat16s(v[j]);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 16 * j), h);
      }
    }
  }

  static OCTAVO_INLINE I no_magnitude() { return _mm256_setzero_si256(); }
  static OCTAVO_INLINE I larger_magnitude(I a, V v) {
    return _mm256_max_epu32(a, _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)));
  }
  static OCTAVO_INLINE uint32_t largest_magnitude(I a) {
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(m));
  }

  // A binary search: the first four levels in registers, the others by gathers.
  struct Boundaries {
    V first, small[3];
    const Search* search;
  };
  static OCTAVO_INLINE Boundaries load_boundaries(const Search& s) {
    return {set1(s.level[0][0]), {load(s.level[1]), load(s.level[2]), load(s.level[3])}, &s};
  }
  static OCTAVO_INLINE I descend(I path, V boundary, V v) {
    // A true comparison is -1.
    return _mm256_sub_epi32(_mm256_add_epi32(path, path), _mm256_castps_si256(_mm256_cmp_ps(boundary, v, _CMP_LT_OQ)));
  }
  static OCTAVO_INLINE void encode(const Boundaries& m, V v, uint8_t* out) {
    I path = descend(_mm256_setzero_si256(), m.first, v);
    for (int l = 0; l < 3; l++) path = descend(path, _mm256_permutevar8x32_ps(m.small[l], path), v);
    for (int l = 4; l < 8; l++) path = descend(path, _mm256_i32gather_ps(m.search->level[l], path, 4), v);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(path), _mm256_extracti128_si256(path, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
  }

  // Sixteen bytes of a table, for pshufb in both of its lanes.
  static OCTAVO_INLINE I lane_table(const void* bytes) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(static_cast<const __m128i*>(bytes)));
  }

  // Half a chunk's integers (of each 16 weights the first eight in `even`) times the inputs of M tokens → their sums.
  template <int M, int PerChunk>
  static OCTAVO_INLINE void add_half(I even, I odd, int half, const float* factors, int64_t c, const int16_t* x, int64_t stride,
                                     V (&acc)[M]) {
    for (int m = 0; m < M; m++) {
      const I* xm = reinterpret_cast<const I*>(x + m * stride + c * kChunk + 32 * half);
      const I sum = _mm256_add_epi32(_mm256_madd_epi16(even, _mm256_loadu_si256(xm)), _mm256_madd_epi16(odd, _mm256_loadu_si256(xm + 1)));
      acc[m] = fma(_mm256_cvtepi32_ps(sum), part_factor<PerChunk>(factors + (m * (stride / kChunk) + c) * PerChunk, half), acc[m]);
    }
  }

  static OCTAVO_INLINE void bins(V v, float half_width, int32_t* out) {
    const V position = add(mul(add(v, set1(1.0f)), set1(half_width)), set1(0.5f));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cvttps_epi32(position));
  }
};

// Largest magnitude of `n` values, a multiple of 8.
OCTAVO_INLINE uint32_t largest_of(const float* values, int64_t n) {
  __m256i magnitude = Simd256::no_magnitude();
  for (int64_t i = 0; i < n; i += 8) magnitude = Simd256::larger_magnitude(magnitude, Simd256::load(values + i));
  return Simd256::largest_magnitude(magnitude);
}

// Sixteen values times `factor`, rounded → int16, in order.
OCTAVO_INLINE __m256i round_to_words(const float* values, __m256 factor) {
  const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(Simd256::load(values), factor));
  const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(Simd256::load(values + 8), factor));
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// As to_fixed512, in the order that `fixed_chunk` unpacks: of each four runs of eight values, first the even ones.
bool to_fixed256(const float* x, int64_t tokens, int64_t columns, float unit, float top_word, int16_t* fixed, float* units) {
  bool usable = true;
  const int64_t chunks = tokens * chunks_of(columns);
  for (int64_t c = 0; c < chunks; c++, x += kChunk, fixed += kChunk) {
    const uint32_t bits = largest_of(x, kChunk);
    const float top = float_of(bits);
    usable = usable && bits < 0x7f800000u && (bits == 0 || top > 0x1p-100f);
    const __m256 factor = _mm256_set1_ps(top > 0.0f ? top_word / top : 0.0f);
    for (int h = 0; h < 2; h++) {
      const __m256i a = round_to_words(x + 32 * h, factor), b = round_to_words(x + 32 * h + 16, factor);
      __m256i* out = reinterpret_cast<__m256i*>(fixed + 32 * h);
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(a, b, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(a, b, 0x31));
    }
    *units++ = top / top_word * unit;
  }
  return usable;
}

}  // namespace
}  // namespace octavo
