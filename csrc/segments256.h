// AVX2: a codebook of sixteen segments, computed. code[16 h + l] = (base[h] + slope[h] l) unit; see docs/FORMAT.md.
//
// Thirty-two indices become 16-bit integers. pshufb looks base and slope up by the high four bits; pmaddubsw multiplies
// pairs of bytes and adds the two products, here (l, step) times (slope, base / step):
//
//   index      0x83            h = 8, l = 3
//   looked up  base / step     2   (a signed byte)
//              slope           40
//   pmaddubsw  3 * 40 + 64 * 2 = 248 units
//
// Where bases or slopes take more than a byte (`Bytes` false), two look-ups each, pmullw and an addition do the same.
#pragma once
#include "simd256.h"

namespace octavo {
namespace {

template <bool Bytes>
struct Segments256 : Simd256 {
  static constexpr bool kSegments = true;
  static constexpr int kPieces = 2;  // of 32 weights
  static constexpr int kGroup = 8;

  struct Codes {
    I base, slope, base_high, slope_high, step;
    V unit;
  };
  using FixedCodes = Codes;
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    const Segments& s = t.segments;
    return {lane_table(Bytes ? static_cast<const void*>(s.base_byte) : s.base[0]), lane_table(s.slope[0]),
            lane_table(s.base[1]), lane_table(s.slope[1]), _mm256_set1_epi8(static_cast<char>(s.step)),
            set1(s.unit * 0x1p-16f)};
  }
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) { return load_codes(t); }

  // 32 indices → their integers: of each 16 indices the first eight in `even`, the others in `odd`.
  static OCTAVO_INLINE void integers(const Codes& c, I q, I& even, I& odd) {
    const I mask = _mm256_set1_epi8(15);
    const I l = _mm256_and_si256(q, mask), h = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
    const I base = _mm256_shuffle_epi8(c.base, h), slope = _mm256_shuffle_epi8(c.slope, h);
    if constexpr (Bytes) {
      even = _mm256_maddubs_epi16(_mm256_unpacklo_epi8(l, c.step), _mm256_unpacklo_epi8(slope, base));
      odd = _mm256_maddubs_epi16(_mm256_unpackhi_epi8(l, c.step), _mm256_unpackhi_epi8(slope, base));
    } else {
      const I none = _mm256_setzero_si256();
      const I base_high = _mm256_shuffle_epi8(c.base_high, h), slope_high = _mm256_shuffle_epi8(c.slope_high, h);
      even = _mm256_add_epi16(_mm256_unpacklo_epi8(base, base_high),
                              _mm256_mullo_epi16(_mm256_unpacklo_epi8(slope, slope_high), _mm256_unpacklo_epi8(l, none)));
      odd = _mm256_add_epi16(_mm256_unpackhi_epi8(base, base_high),
                             _mm256_mullo_epi16(_mm256_unpackhi_epi8(slope, slope_high), _mm256_unpackhi_epi8(l, none)));
    }
  }

  // 32 indices → 32 values in order; with `Raw` 2^16 / unit times as large, which saves a multiplication.
  template <bool Raw>
  static OCTAVO_INLINE void decode_piece(const Codes& c, const uint8_t* q, V (&out)[4]) {
    // Unpacking works within 128-bit lanes: the even groups of four indices into the lower lane, the odd ones into the upper.
    const I order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), none = _mm256_setzero_si256();
    I even, odd;
    integers(c, _mm256_permutevar8x32_epi32(_mm256_loadu_si256(reinterpret_cast<const I*>(q)), order), even, odd);
    // An integer in the upper half of 32 bits is 2^16 times as large, sign and all.
    out[0] = _mm256_cvtepi32_ps(_mm256_unpacklo_epi16(none, even));
    out[1] = _mm256_cvtepi32_ps(_mm256_unpackhi_epi16(none, even));
    out[2] = _mm256_cvtepi32_ps(_mm256_unpacklo_epi16(none, odd));
    out[3] = _mm256_cvtepi32_ps(_mm256_unpackhi_epi16(none, odd));
    if constexpr (!Raw)
      for (int j = 0; j < 4; j++) out[j] = mul(out[j], c.unit);
  }
  static OCTAVO_INLINE void decode(const Codes& c, const uint8_t* q, V (&out)[8]) {
    V half[4];
    for (int p = 0; p < 2; p++) {
      decode_piece<false>(c, q + 32 * p, half);
      for (int j = 0; j < 4; j++) out[4 * p + j] = half[j];
    }
  }
  static float raw_unit(const Table& t) { return t.segments.unit * 0x1p-16f; }

  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    I even[2], odd[2];
    for (int h = 0; h < 2; h++)
      integers(codes, _mm256_loadu_si256(reinterpret_cast<const I*>(q + 32 * h)), even[h], odd[h]);
    for (int m = 0; m < M; m++) {
      const I* xm = reinterpret_cast<const I*>(x + m * stride + c * kChunk);
      const float* f = factors + (m * (stride / kChunk) + c) * PerChunk;
      // Eight products to a lane stay below 2^31 (Segments::top_word).
      I sum[2];
      for (int h = 0; h < 2; h++)
        sum[h] = _mm256_add_epi32(_mm256_madd_epi16(even[h], _mm256_loadu_si256(xm + 2 * h)),
                                  _mm256_madd_epi16(odd[h], _mm256_loadu_si256(xm + 2 * h + 1)));
      if constexpr (PerChunk == 1) {
        acc[m] = fma(_mm256_cvtepi32_ps(_mm256_add_epi32(sum[0], sum[1])), set1(f[0]), acc[m]);
      } else {
        for (int h = 0; h < 2; h++) acc[m] = fma(_mm256_cvtepi32_ps(sum[h]), part_factor<PerChunk>(f, h), acc[m]);
      }
    }
  }
};

}  // namespace
}  // namespace octavo
