// Kernels for AVX-512 without VBMI (Skylake-X, Cascade Lake): the codebook in registers as 16-bit words.
//
// vpermi2w looks 32 indices up in 64 words; four of them and three blends cover the 256 entries. Measured on Zen 5 at
// 16 G weights/s a thread for float32 (two word planes), where gathers reach 3.7.
#include "kernels.h"
#include "segments512.h"

namespace octavo {
namespace {

OCTAVO_INLINE __m512i look_up(const __m512i* plane, __m512i indices, __mmask32 bit6, __mmask32 bit7) {
  const __m512i a = _mm512_permutex2var_epi16(plane[0], indices, plane[1]);
  const __m512i b = _mm512_permutex2var_epi16(plane[2], indices, plane[3]);
  const __m512i c = _mm512_permutex2var_epi16(plane[4], indices, plane[5]);
  const __m512i d = _mm512_permutex2var_epi16(plane[6], indices, plane[7]);
  return _mm512_mask_blend_epi16(bit7, _mm512_mask_blend_epi16(bit6, a, b), _mm512_mask_blend_epi16(bit6, c, d));
}

void prepare_words(const float* code, bool fixed, Table& t) {
  if (fixed) return fix_codes(code, t);
  for (int i = 0; i < 256; i += 16) {
    const __m512i bits = _mm512_loadu_si512(code + i);
    for (int p = 0; p < 2; p++)
      _mm256_store_si256(reinterpret_cast<__m256i*>(t.words[p] + i),
                         _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16 * p)));
  }
}

struct Avx512 : Simd512 {
  struct Codes {
    __m512i plane[2][8];
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    Codes codes;
    for (int p = 0; p < 2; p++)
      for (int i = 0; i < 8; i++) codes.plane[p][i] = _mm512_load_si512(t.words[p] + 32 * i);
    return codes;
  }
  static OCTAVO_INLINE void decode(const Codes& codes, const uint8_t* q, V (&out)[4]) {
    // Within each half of 32 weights, so that unpacking the two planes leaves them in order.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    for (int half = 0; half < 2; half++) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + 32 * half));
      const __m512i i = _mm512_permutexvar_epi64(order, _mm512_cvtepu8_epi16(bytes));
      const __mmask32 bit6 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(64));
      const __mmask32 bit7 = _mm512_test_epi16_mask(i, _mm512_set1_epi16(128));
      const __m512i low = look_up(codes.plane[0], i, bit6, bit7), high = look_up(codes.plane[1], i, bit6, bit7);
      out[2 * half] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, high));
      out[2 * half + 1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, high));
    }
  }

  struct FixedCodes {
    __m512i plane[8];
  };
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) {
    FixedCodes codes;
    for (int i = 0; i < 8; i++) codes.plane[i] = _mm512_load_si512(t.fixed + 32 * i);
    return codes;
  }
  static OCTAVO_INLINE __m512i fixed_of(const FixedCodes& codes, __m256i bytes) {
    const __m512i i = _mm512_cvtepu8_epi16(bytes);
    return look_up(codes.plane, i, _mm512_test_epi16_mask(i, _mm512_set1_epi16(64)),
                   _mm512_test_epi16_mask(i, _mm512_set1_epi16(128)));
  }
  static OCTAVO_INLINE void decode_fixed(const FixedCodes& codes, const uint8_t* q, __m512i& low, __m512i& high) {
    // The order of to_fixed512: even runs of eight, then odd ones.
    const __m512i i = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_loadu_si512(q));
    low = fixed_of(codes, _mm512_castsi512_si256(i));
    high = fixed_of(codes, _mm512_extracti64x4_epi64(i, 1));
  }
  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    fixed_chunk512<Avx512, M, PerChunk>(codes, q, factors, c, x, stride, acc);
  }
  static OCTAVO_INLINE __m512i madd(__m512i sum, __m512i a, __m512i b) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
  }
};

}  // namespace

const Kernels& avx512_kernels() {
  static constexpr Kernels bytes = segments512_kernels<true>("avx512"), wide = segments512_kernels<false>("avx512");
  static constexpr Kernels kernels{
      "avx512", prepare_words, widen<Avx512>, narrow<Avx512>, to_fixed512, dot<Avx512>, dot_fixed<Avx512>, nullptr, transposed<Avx512>,
      dequantize<Avx512>, absmax<Avx512>, encode<Avx512>, deviate<Avx512>, count<Avx512>, nullptr, nullptr, nullptr, &bytes, &wide, avx2_kernels};
  return kernels;
}

}  // namespace octavo
