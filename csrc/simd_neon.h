// 64-bit ARM vectors for engine.h, all but the codebook; inputs in fixed point.
#pragma once
#include <arm_neon.h>

#include "engine.h"
#include "engine_fixed.h"
#include "engine_panel.h"
#include "engine_quantize.h"

namespace octavo {
namespace {

struct SimdNeon {
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

  static OCTAVO_INLINE I no_magnitude() { return vdupq_n_u32(0); }
  static OCTAVO_INLINE I larger_magnitude(I a, V v) {
    return vmaxq_u32(a, vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fffffffu)));
  }
  static OCTAVO_INLINE uint32_t largest_magnitude(I a) { return vmaxvq_u32(a); }

  struct Boundaries {
    const Search* search;
  };
  static OCTAVO_INLINE Boundaries load_boundaries(const Search& s) { return {&s}; }
  static OCTAVO_INLINE void encode(const Boundaries& m, V v, uint8_t* out) {
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
  uint32x4_t magnitude = SimdNeon::no_magnitude();
  for (int64_t i = 0; i < n; i += 4) magnitude = SimdNeon::larger_magnitude(magnitude, SimdNeon::load(values + i));
  return SimdNeon::largest_magnitude(magnitude);
}

OCTAVO_INLINE void round_to_words(const float* values, int64_t n, float factor, int16_t* out) {
  for (int64_t i = 0; i < n; i += 4)
    vst1_s16(out + i, vqmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(SimdNeon::load(values + i), factor))));
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
}  // namespace octavo
