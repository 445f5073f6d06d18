// 64-bit ARM: a codebook of sixteen segments, computed. code[16 h + l] = (base[h] + slope[h] l) unit; see docs/FORMAT.md.
//
// TBL looks the bytes of base and slope up by the high four bits of sixteen indices; UMLAL adds slope times l to the base, eight at a time.
#pragma once
#include "simd_neon.h"

namespace octavo {
namespace {

template <bool Bytes>
struct SegmentsNeon : SimdNeon {
  static constexpr bool kSegments = true;
  static constexpr int kPieces = 2;  // of 32 weights
  static constexpr int kGroup = 8;

  struct Codes {
    uint8x16_t base[2], slope[2];
    V unit;
  };
  using FixedCodes = Codes;
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    const Segments& s = t.segments;
    return {{vld1q_u8(s.base[0]), vld1q_u8(s.base[1])}, {vld1q_u8(s.slope[0]), vld1q_u8(s.slope[1])}, set1(s.unit)};
  }
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) { return load_codes(t); }
  static float raw_unit(const Table& t) { return t.segments.unit; }

  // 16 indices → their integers in order. Sums of unsigned integers wrap to the signed result.
  static OCTAVO_INLINE void integers(const Codes& c, uint8x16_t q, int16x8_t& low, int16x8_t& high) {
    const uint8x16_t l = vandq_u8(q, vdupq_n_u8(15)), h = vshrq_n_u8(q, 4);
    const uint8x16_t b0 = vqtbl1q_u8(c.base[0], h), b1 = vqtbl1q_u8(c.base[1], h), s0 = vqtbl1q_u8(c.slope[0], h);
    uint16x8_t even = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), odd = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
    if constexpr (Bytes) {
      even = vmlal_u8(even, vget_low_u8(s0), vget_low_u8(l));
      odd = vmlal_high_u8(odd, s0, l);
    } else {
      const uint8x16_t s1 = vqtbl1q_u8(c.slope[1], h);
      even = vmlaq_u16(even, vreinterpretq_u16_u8(vzip1q_u8(s0, s1)), vmovl_u8(vget_low_u8(l)));
      odd = vmlaq_u16(odd, vreinterpretq_u16_u8(vzip2q_u8(s0, s1)), vmovl_high_u8(l));
    }
    low = vreinterpretq_s16_u16(even);
    high = vreinterpretq_s16_u16(odd);
  }

  // 32 indices → 32 values in order; with `Raw` 1 / unit times as large, which saves a multiplication.
  template <bool Raw>
  static OCTAVO_INLINE void decode_piece(const Codes& c, const uint8_t* q, V (&out)[8]) {
    for (int g = 0; g < 2; g++) {
      int16x8_t half[2];
      integers(c, vld1q_u8(q + 16 * g), half[0], half[1]);
      for (int i = 0; i < 2; i++) {
        out[4 * g + 2 * i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(half[i])));
        out[4 * g + 2 * i + 1] = vcvtq_f32_s32(vmovl_high_s16(half[i]));
      }
    }
    if constexpr (!Raw)
      for (int j = 0; j < 8; j++) out[j] = mul(out[j], c.unit);
  }
  static OCTAVO_INLINE void decode(const Codes& c, const uint8_t* q, V (&out)[16]) {
    V half[8];
    for (int p = 0; p < 2; p++) {
      decode_piece<false>(c, q + 32 * p, half);
      for (int j = 0; j < 8; j++) out[8 * p + j] = half[j];
    }
  }

  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    // Eight products to a lane stay below 2^31 (Segments::top_word): those of 32 weights, or of the 16 that share a scale.
    constexpr int kRun = PerChunk == 4 ? 16 : 32;
    for (int run = 0; run < kChunk / kRun; run++) {
      int16x8_t w[kRun / 8];
      for (int i = 0; i < kRun / 16; i++) integers(codes, vld1q_u8(q + kRun * run + 16 * i), w[2 * i], w[2 * i + 1]);
      for (int m = 0; m < M; m++) {
        const int16_t* xm = x + m * stride + c * kChunk + kRun * run;
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 0; i < kRun / 8; i++) {
          const int16x8_t xi = vld1q_s16(xm + 8 * i);
          sum = vmlal_s16(sum, vget_low_s16(w[i]), vget_low_s16(xi));
          sum = vmlal_high_s16(sum, w[i], xi);
        }
        const float factor = factors[(m * (stride / kChunk) + c) * PerChunk + run * PerChunk * kRun / kChunk];
        acc[m] = vfmaq_n_f32(acc[m], vcvtq_f32_s32(sum), factor);
      }
    }
  }
};

}  // namespace
}  // namespace octavo
