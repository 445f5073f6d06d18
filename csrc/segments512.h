// AVX-512 (BW): a codebook of sixteen segments, computed, 64 weights at a time. See segments256.h for how.
#pragma once
#include "simd512.h"

namespace octavo {
namespace {

template <bool Bytes>
struct Segments512 : Simd512 {
  static constexpr bool kSegments = true;
  static constexpr int kGroup = 8;

  struct Codes {
    I base, slope, base_high, slope_high, step;
    V unit;
  };
  using FixedCodes = Codes;
  static OCTAVO_INLINE I lane_table(const void* bytes) {
    return _mm512_broadcast_i32x4(_mm_load_si128(static_cast<const __m128i*>(bytes)));
  }
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    const Segments& s = t.segments;
    return {lane_table(Bytes ? static_cast<const void*>(s.base_byte) : s.base[0]), lane_table(s.slope[0]),
            lane_table(s.base[1]), lane_table(s.slope[1]), _mm512_set1_epi8(static_cast<char>(s.step)),
            set1(s.unit * 0x1p-16f)};
  }
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) { return load_codes(t); }
  static float raw_unit(const Table& t) { return t.segments.unit * 0x1p-16f; }

  // 64 indices → their integers: of each 16 indices the first eight in `even`, the others in `odd`.
  static OCTAVO_INLINE void integers(const Codes& c, I q, I& even, I& odd) {
    const I mask = _mm512_set1_epi8(15);
    const I l = _mm512_and_si512(q, mask), h = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
    const I base = _mm512_shuffle_epi8(c.base, h), slope = _mm512_shuffle_epi8(c.slope, h);
    if constexpr (Bytes) {
      even = _mm512_maddubs_epi16(_mm512_unpacklo_epi8(l, c.step), _mm512_unpacklo_epi8(slope, base));
      odd = _mm512_maddubs_epi16(_mm512_unpackhi_epi8(l, c.step), _mm512_unpackhi_epi8(slope, base));
    } else {
      const I none = _mm512_setzero_si512();
      const I base_high = _mm512_shuffle_epi8(c.base_high, h), slope_high = _mm512_shuffle_epi8(c.slope_high, h);
      even = _mm512_add_epi16(_mm512_unpacklo_epi8(base, base_high),
                              _mm512_mullo_epi16(_mm512_unpacklo_epi8(slope, slope_high), _mm512_unpacklo_epi8(l, none)));
      odd = _mm512_add_epi16(_mm512_unpackhi_epi8(base, base_high),
                             _mm512_mullo_epi16(_mm512_unpackhi_epi8(slope, slope_high), _mm512_unpackhi_epi8(l, none)));
    }
  }

  // 64 indices → 64 values in order; with `Raw` 2^16 / unit times as large, which saves a multiplication.
  template <bool Raw>
  static OCTAVO_INLINE void decode_piece(const Codes& c, const uint8_t* q, V (&out)[4]) {
    // Unpacking works within 128-bit lanes; transposing the chunk's 4x4 groups of four indices first leaves it in order.
    const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), none = _mm512_setzero_si512();
    I even, odd;
    integers(c, _mm512_permutexvar_epi32(order, _mm512_loadu_si512(q)), even, odd);
    out[0] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(none, even));
    out[1] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(none, even));
    out[2] = _mm512_cvtepi32_ps(_mm512_unpacklo_epi16(none, odd));
    out[3] = _mm512_cvtepi32_ps(_mm512_unpackhi_epi16(none, odd));
    if constexpr (!Raw)
      for (int j = 0; j < 4; j++) out[j] = mul(out[j], c.unit);
  }
  static OCTAVO_INLINE void decode(const Codes& c, const uint8_t* q, V (&out)[4]) { decode_piece<false>(c, q, out); }

  static OCTAVO_INLINE void decode_fixed(const FixedCodes& c, const uint8_t* q, I& low, I& high) {
    integers(c, _mm512_loadu_si512(q), low, high);
  }
  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    fixed_chunk512<Segments512, M, PerChunk>(codes, q, factors, c, x, stride, acc);
  }
  static OCTAVO_INLINE I madd(I sum, I a, I b) {
#if defined(__AVX512VNNI__)
    return _mm512_dpwssd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
  }
};

template <bool Bytes>
constexpr Kernels segments512_kernels(const char* name) {
  using S = Segments512<Bytes>;
  return {name,          prepare_segments, widen<Simd512>,  narrow<Simd512>, to_fixed512,    dot<S>,  dot_fixed<S>, nullptr, transposed<S>,
          dequantize<S>, absmax<Simd512>,  encode<Simd512>, deviate<S>,      count<Simd512>};
}

}  // namespace
}  // namespace octavo
