// Kernels in plain C++, for every processor: eight floats side by side in loops that the compiler can turn into whatever
// vectors the target always has (SSE2, NEON).
#include "engine.h"
#include "engine_panel.h"
#include "engine_quantize.h"
#include "kernels.h"

namespace octavo {
namespace {

struct Portable {
  static constexpr int L = 8;
  static constexpr bool kSegments = false;
  static constexpr int kPieces = 1;  // of a chunk, decoded one after the other
  static constexpr int kGroup = 4;   // tokens that share a decoded chunk
  struct V {
    float f[L];
  };
  using I = uint32_t;

  static OCTAVO_INLINE V zero() { return set1(0.0f); }
  static OCTAVO_INLINE V set1(float x) {
    V v;
    for (int i = 0; i < L; i++) v.f[i] = x;
    return v;
  }
  static OCTAVO_INLINE V load(const float* p) {
    V v;
    std::memcpy(v.f, p, sizeof v.f);
    return v;
  }
  static OCTAVO_INLINE void store(float* p, const V& v) { std::memcpy(p, v.f, sizeof v.f); }
  static OCTAVO_INLINE V add(const V& a, const V& b) {
    V v;
    for (int i = 0; i < L; i++) v.f[i] = a.f[i] + b.f[i];
    return v;
  }
  static OCTAVO_INLINE V mul(const V& a, const V& b) {
    V v;
    for (int i = 0; i < L; i++) v.f[i] = a.f[i] * b.f[i];
    return v;
  }
  static OCTAVO_INLINE V fma(const V& a, const V& b, const V& c) {
    V v;
    for (int i = 0; i < L; i++) v.f[i] = a.f[i] * b.f[i] + c.f[i];
    return v;
  }
  static OCTAVO_INLINE V divide(const V& a, const V& b) {
    V v;
    for (int i = 0; i < L; i++) v.f[i] = b.f[i] > 0.0f ? a.f[i] / b.f[i] : 0.0f;
    return v;
  }
  static OCTAVO_INLINE float sum(const V& v) {
    return ((v.f[0] + v.f[4]) + (v.f[2] + v.f[6])) + ((v.f[1] + v.f[5]) + (v.f[3] + v.f[7]));
  }

  template <DType T>
  static OCTAVO_INLINE V load_as(const void* data, int64_t i) {
    V v;
    for (int l = 0; l < L; l++) v.f[l] = read(data, T, i + l);
    return v;
  }
  template <DType T>
  static OCTAVO_INLINE V load_tail(const void* data, int64_t i, int64_t n) {
    V v = zero();
    for (int64_t l = 0; l < n; l++) v.f[l] = read(data, T, i + l);
    return v;
  }
  template <DType T>
  static OCTAVO_INLINE void store_chunk(void* out, int64_t i, const V (&v)[kChunk / L]) {
    for (int j = 0; j < kChunk / L; j++)
      for (int l = 0; l < L; l++) write(out, T, i + j * L + l, v[j].f[l]);
  }

  struct Codes {
    const float* code;
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) { return {t.code}; }
  static OCTAVO_INLINE void decode(const Codes& codes, const uint8_t* q, V (&out)[kChunk / L]) {
    for (int j = 0; j < kChunk / L; j++)
      for (int l = 0; l < L; l++) out[j].f[l] = codes.code[q[j * L + l]];
  }

  static OCTAVO_INLINE I no_magnitude() { return 0; }
  static OCTAVO_INLINE I larger_magnitude(I a, const V& v) {
    for (int i = 0; i < L; i++) {
      const uint32_t bits = bits_of(v.f[i]) & 0x7fffffffu;
      a = bits > a ? bits : a;
    }
    return a;
  }
  static OCTAVO_INLINE uint32_t largest_magnitude(I a) { return a; }

  struct Boundaries {
    const Search* search;
  };
  static OCTAVO_INLINE Boundaries load_boundaries(const Search& s) { return {&s}; }
  static OCTAVO_INLINE void encode(const Boundaries& m, const V& v, uint8_t* out) {
    for (int i = 0; i < L; i++) {
      unsigned path = 0;
      for (int l = 0; l < 8; l++) path = 2 * path + (m.search->level[l][path] < v.f[i] ? 1u : 0u);
      out[i] = static_cast<uint8_t>(path);
    }
  }

  static OCTAVO_INLINE void bins(const V& v, float half_width, int32_t* out) {
    for (int i = 0; i < L; i++) out[i] = static_cast<int32_t>((v.f[i] + 1.0f) * half_width + 0.5f);
  }
};

}  // namespace

const Kernels& portable_kernels() {
  static constexpr Kernels kernels{
      "portable", prepare_plain, widen<Portable>, narrow<Portable>, nullptr, dot<Portable>, nullptr, nullptr, transposed<Portable>,
      dequantize<Portable>, absmax<Portable>, encode<Portable>, deviate<Portable>, count<Portable>};
  return kernels;
}

}  // namespace octavo
