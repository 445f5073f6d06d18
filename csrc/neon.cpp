// Kernels for 64-bit ARM. A codebook of segments is computed (segments_neon.h). Any other is looked up by TBL, which takes 64
// bytes of table at once.
//
// TBL gives zero for an index outside its table and TBX keeps what was there, so four of them, on indices 64 apart, look 16
// indices up in the 256 bytes of a plane. Tested under an emulator only; its speed has not been measured.
#include "kernels.h"
#include "segments_neon.h"

namespace octavo {
namespace {

// 16 indices (kept 64 apart in i) → their bytes in a plane.
OCTAVO_INLINE uint8x16_t look_up(const uint8_t* plane, const uint8x16_t (&i)[4]) {
  uint8x16_t found = vqtbl4q_u8(vld1q_u8_x4(plane), i[0]);
  for (int part = 1; part < 4; part++) found = vqtbx4q_u8(found, vld1q_u8_x4(plane + 64 * part), i[part]);
  return found;
}

OCTAVO_INLINE void indices_of(const uint8_t* q, uint8x16_t (&i)[4]) {
  i[0] = vld1q_u8(q);
  for (int part = 1; part < 4; part++) i[part] = vsubq_u8(i[part - 1], vdupq_n_u8(64));
}

struct Neon : SimdNeon {
  struct Codes {
    const uint8_t (*planes)[256];
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) { return {t.bytes}; }
  static OCTAVO_INLINE void decode(const Codes& codes, const uint8_t* q, V (&out)[kChunk / L]) {
    for (int g = 0; g < 4; g++) {
      uint8x16_t i[4];
      indices_of(q + 16 * g, i);
      const uint8x16_t b0 = look_up(codes.planes[0], i), b1 = look_up(codes.planes[1], i);
      const uint8x16_t b2 = look_up(codes.planes[2], i), b3 = look_up(codes.planes[3], i);
      const uint16x8_t low0 = vreinterpretq_u16_u8(vzip1q_u8(b0, b1)), low1 = vreinterpretq_u16_u8(vzip2q_u8(b0, b1));
      const uint16x8_t high0 = vreinterpretq_u16_u8(vzip1q_u8(b2, b3)), high1 = vreinterpretq_u16_u8(vzip2q_u8(b2, b3));
      out[4 * g] = vreinterpretq_f32_u16(vzip1q_u16(low0, high0));
      out[4 * g + 1] = vreinterpretq_f32_u16(vzip2q_u16(low0, high0));
      out[4 * g + 2] = vreinterpretq_f32_u16(vzip1q_u16(low1, high1));
      out[4 * g + 3] = vreinterpretq_f32_u16(vzip2q_u16(low1, high1));
    }
  }

  struct FixedCodes {
    const uint8_t (*planes)[256];
  };
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) { return {t.fixed_bytes}; }
  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    for (int g = 0; g < 4; g++) {
      uint8x16_t i[4];
      indices_of(q + 16 * g, i);
      const uint8x16_t b0 = look_up(codes.planes[0], i), b1 = look_up(codes.planes[1], i);
      const int16x8_t w0 = vreinterpretq_s16_u8(vzip1q_u8(b0, b1)), w1 = vreinterpretq_s16_u8(vzip2q_u8(b0, b1));
      for (int m = 0; m < M; m++) {
        const int16_t* xm = x + m * stride + c * kChunk + 16 * g;
        const int16x8_t x0 = vld1q_s16(xm), x1 = vld1q_s16(xm + 8);
        // Four products to a lane stay below 2^31, and no more would.
        int32x4_t sum = vmull_s16(vget_low_s16(w0), vget_low_s16(x0));
        sum = vmlal_high_s16(sum, w0, x0);
        sum = vmlal_s16(sum, vget_low_s16(w1), vget_low_s16(x1));
        sum = vmlal_high_s16(sum, w1, x1);
        const float factor = factors[(m * (stride / kChunk) + c) * PerChunk + g * PerChunk / 4];
        acc[m] = vfmaq_n_f32(acc[m], vcvtq_f32_s32(sum), factor);
      }
    }
  }
};

void prepare_bytes(const float* code, bool fixed, Table& t) {
  std::memcpy(t.code, code, sizeof t.code);
  if (fixed) {
    const float top = float_of(largest_of(t.code, 256));
    round_to_words(t.code, 256, top > 0.0f ? 16383.0f / top : 0.0f, t.fixed);
    t.fixed_unit = top / 16383.0f;
    for (int i = 0; i < 256; i++)
      for (int p = 0; p < 2; p++) t.fixed_bytes[p][i] = static_cast<uint8_t>(static_cast<uint16_t>(t.fixed[i]) >> (8 * p));
    return;
  }
  for (int i = 0; i < 256; i++)
    for (int p = 0; p < 4; p++) t.bytes[p][i] = static_cast<uint8_t>(bits_of(t.code[i]) >> (8 * p));
}

template <bool Bytes>
constexpr Kernels computed() {
  using S = SegmentsNeon<Bytes>;
  return {"neon", prepare_segments, widen<S>, narrow<S>, to_fixed128, dot<S>, dot_fixed<S>, nullptr, transposed<S>, dequantize<S>,
          absmax<S>, encode<S>, deviate<S>, count<S>};
}

constexpr Kernels byte_segments = computed<true>(), wide_segments = computed<false>();

}  // namespace

const Kernels& neon_kernels() {
  static constexpr Kernels kernels{
      "neon", prepare_bytes, widen<Neon>, narrow<Neon>, to_fixed128, dot<Neon>, dot_fixed<Neon>, nullptr, transposed<Neon>,
      dequantize<Neon>, absmax<Neon>, encode<Neon>, deviate<Neon>, count<Neon>, nullptr, nullptr, nullptr, &byte_segments, &wide_segments};
  return kernels;
}

}  // namespace octavo
