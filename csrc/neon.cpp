// Kernels for 64-bit ARM: the codebook looked up by TBL, which takes 64 bytes of table at once.
//
// TBL gives zero for an index outside its table and TBX keeps what was there, so four of them, on indices 64 apart, look 16
// indices up in the 256 bytes of a plane. Tested under an emulator only; its speed has not been measured.
#include <arm_neon.h>

#include "engine.h"
#include "engine_fixed.h"
#include "engine_panel.h"
#include "engine_quantize.h"
#include "kernels.h"

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

struct Neon {
  static constexpr int L = 4;
  static constexpr bool kSegments = false;
  static constexpr int kPieces = 1;  // of a chunk, decoded one after the other
  static constexpr int kGroup = 4;   // tokens that share a decoded chunk
  using V = float32x4_t;
  using I = uint32x4_t;

  static OCTAVO_INLINE V zero() { return vdupq_n_f32(0.0f); }
  static OCTAVO_INLINE V set1(float x) { return vdupq_n_f32(x); }
  static OCTAVO_INLINE V load(const float* p) { return vld1q_f32(p); }
  static OCTAVO_INLINE void store(float* p, V v) { vst1q_f32(p, v); }
  static OCTAVO_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
  static OCTAVO_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
  static OCTAVO_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static OCTAVO_INLINE float sum(V v) { return vaddvq_f32(v); }
  static OCTAVO_INLINE V divide(V a, V b) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(vdivq_f32(a, b)), vcgtq_f32(b, zero())));
  }

  // Loads by bytes: the addresses need not be aligned to anything.
  template <DType T>
  static OCTAVO_INLINE V load_as(const void* data, int64_t i) {
    const uint8_t* p = static_cast<const uint8_t*>(data) + i * static_cast<int64_t>(size_of(T));
    if constexpr (T == kFloat32) return vreinterpretq_f32_u8(vld1q_u8(p));
    else if constexpr (T == kFloat16) return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p)));
    else return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
  }
  template <DType T>
  static OCTAVO_INLINE V load_tail(const void* data, int64_t i, int64_t n) {
    char values[4 * L] = {};
    std::memcpy(values, static_cast<const char*>(data) + i * static_cast<int64_t>(size_of(T)),
                static_cast<size_t>(n) * size_of(T));
    return load_as<T>(values, 0);
  }

  static OCTAVO_INLINE uint16x4_t to_bfloat16s(V v) {
    const I u = vreinterpretq_u32_f32(v);
    const I odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    return vshrn_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  }
  template <DType T>
  static OCTAVO_INLINE void store_chunk(void* out, int64_t i, const V (&v)[kChunk / L]) {
    uint8_t* p = static_cast<uint8_t*>(out) + i * static_cast<int64_t>(size_of(T));
    for (int j = 0; j < kChunk / L; j++, p += L * size_of(T)) {
      if constexpr (T == kFloat32) vst1q_u8(p, vreinterpretq_u8_f32(v[j]));
      else if constexpr (T == kFloat16) vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(v[j])));
      else vst1_u8(p, vreinterpret_u8_u16(to_bfloat16s(v[j])));
    }
  }

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
  template <int M, int Parts>
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
        const float factor = factors[(m * (stride / kChunk) + c) * Parts + g * Parts / 4];
        acc[m] = vfmaq_n_f32(acc[m], vcvtq_f32_s32(sum), factor);
      }
    }
  }

  static OCTAVO_INLINE I no_magnitude() { return vdupq_n_u32(0); }
  static OCTAVO_INLINE I larger_magnitude(I a, V v) {
    return vmaxq_u32(a, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu)));
  }
  static OCTAVO_INLINE uint32_t largest_magnitude(I a) { return vmaxvq_u32(a); }

  struct Middles {
    const Search* search;
  };
  static OCTAVO_INLINE Middles load_middles(const Search& s) { return {&s}; }
  static OCTAVO_INLINE void encode(const Middles& m, V v, uint8_t* out) {
    float values[L];
    store(values, v);
    for (int i = 0; i < L; i++) {
      unsigned path = 0;
      for (int l = 0; l < 8; l++) path = 2 * path + (m.search->level[l][path] < values[i] ? 1u : 0u);
      out[i] = static_cast<uint8_t>(path);
    }
  }

  static OCTAVO_INLINE void bins(V v, float half_width, int32_t* out) {
    vst1q_s32(out, vcvtq_s32_f32(add(mul(add(v, set1(1.0f)), set1(half_width)), set1(0.5f))));
  }
};

OCTAVO_INLINE uint32_t largest_of(const float* values, int64_t n) {
  uint32x4_t magnitude = Neon::no_magnitude();
  for (int64_t i = 0; i < n; i += 4) magnitude = Neon::larger_magnitude(magnitude, Neon::load(values + i));
  return Neon::largest_magnitude(magnitude);
}

OCTAVO_INLINE void round_to_words(const float* values, int64_t n, float factor, int16_t* out) {
  for (int64_t i = 0; i < n; i += 4)
    vst1_s16(out + i, vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(Neon::load(values + i), factor))));
}

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

bool to_fixed128(const float* x, int64_t tokens, int64_t columns, float unit, float top_word, int16_t* fixed, float* units) {
  bool usable = true;
  const int64_t chunks = tokens * chunks_of(columns);
  for (int64_t c = 0; c < chunks; c++, x += kChunk, fixed += kChunk) {
    const uint32_t bits = largest_of(x, kChunk);
    const float top = float_of(bits);
    usable = usable && bits < 0x7f800000u && (bits == 0 || top > 0x1p-100f);
    round_to_words(x, kChunk, top > 0.0f ? top_word / top : 0.0f, fixed);
    *units++ = top / top_word * unit;
  }
  return usable;
}

}  // namespace

const Kernels& neon_kernels() {
  static constexpr Kernels kernels{
      "neon", prepare_bytes, widen<Neon>, narrow<Neon>, to_fixed128, dot<Neon>, dot_fixed<Neon>, nullptr, transposed<Neon>,
      dequantize<Neon>, absmax<Neon>, encode<Neon>, deviate<Neon>, count<Neon>, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return kernels;
}

}  // namespace octavo
