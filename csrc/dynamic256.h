// AVX2: the published format's dynamic map, computed; see `Dynamic` in types.h for the two forms.
//
// Measured on one core of a Zen 4 beside other work, 8192 x 4096, processor time, G weights per second, looked up / computed:
//   tokens     1             2             4
//   float32    3.07 / 5.45   2.83 / 4.69   2.49 / 3.55
//   bfloat16   3.72 / 6.90   3.41 / 5.90   3.08 / 4.61
//   float16    3.68 / 6.73   3.41 / 5.73   3.07 / 4.58
#pragma once
#include "simd256.h"

namespace octavo {
namespace {

struct Dynamic256 : Simd256 {
  // For products alone, which ask `decode_piece` for values; de-quantizing looks the exact ones up (avx2.cpp).
  static constexpr bool kSegments = true;
  static constexpr int kPieces = 2;  // of 32 weights

  struct Codes {
    V constant, slope;
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    return {_mm256_load_ps(t.dynamic.constant), _mm256_load_ps(t.dynamic.slope)};
  }
  static float raw_unit(const Table&) { return 1.0f; }

  // 32 indices → 32 values in order.
  template <bool Raw>
  static OCTAVO_INLINE void decode_piece(const Codes& c, const uint8_t* q, V (&out)[4]) {
    for (int j = 0; j < 4; j++) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 8 * j));
      const I s = _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(127));
      const V a = add(_mm256_cvtepi32_ps(_mm256_abs_epi32(s)), set1(0.5f));
      const I k = _mm256_srli_epi32(_mm256_castps_si256(a), 23);  // the permutations read the lowest three bits
      const V p = fma(_mm256_permutevar8x32_ps(c.slope, k), a, _mm256_permutevar8x32_ps(c.constant, k));
      out[j] = _mm256_xor_ps(p, _mm256_and_ps(_mm256_castsi256_ps(s), set1(-0.0f)));
    }
  }

  struct FixedCodes {
    I base[2], step[2], small;
  };
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) {
    const Dynamic& d = t.dynamic;
    return {{lane_table(d.base[0]), lane_table(d.base[1])}, {lane_table(d.step[0]), lane_table(d.step[1])}, lane_table(d.small)};
  }

  // 32 indices → their integers: of each 16 indices the first eight in `even`, the others in `odd`.
  //
  //   index      0x7d                 0xff
  //   s          -2                   127, saturated
  //   a          2                    127: h = 7, l = 15, and half a step more for this index alone
  //   pshufb     small[2]             base[7], step[7]
  //   pmulhrsw   0                    15.5 step / 16
  //   psignw     -small[2]            base[7] + 15.5 step / 16
  static OCTAVO_INLINE void integers(const FixedCodes& c, I q, I& even, I& odd) {
    const I s = _mm256_adds_epi8(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), _mm256_set1_epi8(1)), a = _mm256_abs_epi8(s);
    const I h = _mm256_and_si256(_mm256_srli_epi16(a, 4), _mm256_set1_epi8(7));
    const I half = _mm256_and_si256(_mm256_cmpeq_epi8(q, _mm256_set1_epi8(-1)), _mm256_set1_epi8(4));
    const I eighths = _mm256_or_si256(_mm256_and_si256(_mm256_slli_epi16(a, 3), _mm256_set1_epi8(0x78)), half);
    // From 16 on the index' top bit is set, and pshufb gives zero.
    const I small = _mm256_shuffle_epi8(c.small, _mm256_adds_epu8(a, _mm256_set1_epi8(0x70)));
    const I base = _mm256_or_si256(_mm256_shuffle_epi8(c.base[0], h), small), base_high = _mm256_shuffle_epi8(c.base[1], h);
    const I step = _mm256_shuffle_epi8(c.step[0], h), step_high = _mm256_shuffle_epi8(c.step[1], h);
    const I none = _mm256_setzero_si256();
    even = _mm256_add_epi16(_mm256_unpacklo_epi8(base, base_high),
                            _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(none, eighths), _mm256_unpacklo_epi8(step, step_high)));
    odd = _mm256_add_epi16(_mm256_unpackhi_epi8(base, base_high),
                           _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(none, eighths), _mm256_unpackhi_epi8(step, step_high)));
    even = _mm256_sign_epi16(even, _mm256_unpacklo_epi8(s, s));
    odd = _mm256_sign_epi16(odd, _mm256_unpackhi_epi8(s, s));
  }

  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    for (int h = 0; h < 2; h++) {
      I even, odd;
      integers(codes, _mm256_loadu_si256(reinterpret_cast<const I*>(q + 32 * h)), even, odd);
      add_half<M, PerChunk>(even, odd, h, factors, c, x, stride, acc);
    }
  }
};

[[maybe_unused]] void prepare_dynamic(const float* code, bool, Table& t) {
  std::memcpy(t.code, code, sizeof t.code);
  t.fixed_unit = 1.0f / 16383.0f;
}

}  // namespace
}  // namespace octavo
