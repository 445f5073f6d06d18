// Kernels for AVX-512 with VBMI and VNNI (Intel Ice Lake and later, AMD Zen 4 and later): the codebook lives in registers.
// Built a second time, by vbmi_bf16.cpp, for processors that also round to bfloat16 in one instruction (AVX512_BF16).
//
// A byte plane of the codebook, 256 bytes, is four registers. vpermi2b looks 64 indices up in two of them by the lower
// seven bits; once for each half, where the top bit says so, gives the plane's bytes for all 64 weights. Two planes
// give 16-bit fixed point, four planes exact float32; unpacking interleaves them.
#include "kernels.h"
#include "segments512.h"
#if defined(OCTAVO_BF16)
#include "gemm_bf16.h"
#endif

namespace octavo {
namespace {

// Each look-up writes only where its half of the plane is meant, over the indices themselves: no blend. Measured on one core of a
// Zen 4, from cache: 24.4 G weights/s instead of 21.8.
OCTAVO_INLINE __m512i look_up(const __m512i* plane, __m512i indices, __mmask64 upper_half) {
  const __m512i lower = _mm512_mask2_permutex2var_epi8(plane[0], indices, _knot_mask64(upper_half), plane[1]);
  return _mm512_mask2_permutex2var_epi8(plane[2], lower, upper_half, plane[3]);
}

OCTAVO_INLINE void split_words(Table& t) {
  for (int i = 0; i < 256; i += 32) {
    const __m512i words = _mm512_load_si512(t.fixed + i);
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.fixed_bytes[0] + i), _mm512_cvtepi16_epi8(words));
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.fixed_bytes[1] + i),
                       _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8)));
  }
}

void prepare_bytes(const float* code, bool fixed, Table& t) {
  if (fixed) {
    fix_codes(code, t);
    split_words(t);
    return;
  }
  for (int i = 0; i < 256; i += 16) {
    const __m512i bits = _mm512_loadu_si512(code + i);
    for (int p = 0; p < 4; p++)
      _mm_store_si128(reinterpret_cast<__m128i*>(t.bytes[p] + i), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8 * p)));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_set1_epi32(0x80));
    for (int p = 0; p < 3; p++)
      _mm_store_si128(reinterpret_cast<__m128i*>(t.rounded[p] + i),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(rounded, 8 * p + 8)));
  }
}

// Segments are integers: looked up exactly.
void prepare_integers(const float* code, bool fixed, Table& t) {
  if (!fixed) return prepare_bytes(code, false, t);
  prepare_segments(code, fixed, t);
  const __m512 inverse = _mm512_set1_ps(1.0f / t.fixed_unit);
  for (int i = 0; i < 256; i += 16) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(code + i), inverse));
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.fixed + i), _mm512_cvtepi32_epi16(v));
  }
  split_words(t);
}

struct Vbmi : Simd512 {
  struct Codes {
    __m512i plane[4][4];
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) {
    Codes codes;
    for (int p = 0; p < 4; p++)
      for (int i = 0; i < 4; i++) codes.plane[p][i] = _mm512_load_si512(t.bytes[p] + 64 * i);
    return codes;
  }

  // Unpacking works within 128-bit lanes; transposing the chunk's 4x4 groups of four indices first leaves it in order.
  static OCTAVO_INLINE void decode(const Codes& codes, const uint8_t* q, V (&out)[4]) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i i = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(q));
    const __mmask64 upper = _mm512_movepi8_mask(i);
    const __m512i b0 = look_up(codes.plane[0], i, upper), b1 = look_up(codes.plane[1], i, upper);
    const __m512i b2 = look_up(codes.plane[2], i, upper), b3 = look_up(codes.plane[3], i, upper);
    const __m512i low0 = _mm512_unpacklo_epi8(b0, b1), low1 = _mm512_unpackhi_epi8(b0, b1);
    const __m512i high0 = _mm512_unpacklo_epi8(b2, b3), high1 = _mm512_unpackhi_epi8(b2, b3);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
  }

  struct FixedCodes {
    __m512i plane[2][4];
  };
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) {
    FixedCodes codes;
    for (int p = 0; p < 2; p++)
      for (int i = 0; i < 4; i++) codes.plane[p][i] = _mm512_load_si512(t.fixed_bytes[p] + 64 * i);
    return codes;
  }
  static OCTAVO_INLINE void decode_fixed(const FixedCodes& codes, const uint8_t* q, __m512i& low, __m512i& high) {
    const __m512i i = _mm512_loadu_si512(q);
    const __mmask64 upper = _mm512_movepi8_mask(i);
    const __m512i b0 = look_up(codes.plane[0], i, upper), b1 = look_up(codes.plane[1], i, upper);
    low = _mm512_unpacklo_epi8(b0, b1);
    high = _mm512_unpackhi_epi8(b0, b1);
  }
  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    fixed_chunk512<Vbmi, M, PerChunk>(codes, q, factors, c, x, stride, acc);
  }
  static OCTAVO_INLINE __m512i madd(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }

#if defined(OCTAVO_BF16)
  // For what is rounded to bfloat16 next, three bytes do.
  struct RoundedCodes {
    __m512i plane[3][4];
  };
  static OCTAVO_INLINE RoundedCodes load_rounded_codes(const Table& t) {
    RoundedCodes codes;
    for (int p = 0; p < 3; p++)
      for (int i = 0; i < 4; i++) codes.plane[p][i] = _mm512_load_si512(t.rounded[p] + 64 * i);
    return codes;
  }
  // out[j] holds, in its 128-bit lane L, the values of indices 16 L + 4 j to 16 L + 4 j + 3.
  static OCTAVO_INLINE void decode_rounded(const RoundedCodes& codes, __m512i i, V (&out)[4]) {
    const __mmask64 upper = _mm512_movepi8_mask(i);
    const __m512i b1 = look_up(codes.plane[0], i, upper), b2 = look_up(codes.plane[1], i, upper);
    const __m512i b3 = look_up(codes.plane[2], i, upper), none = _mm512_setzero_si512();
    const __m512i low0 = _mm512_unpacklo_epi8(none, b1), low1 = _mm512_unpackhi_epi8(none, b1);
    const __m512i high0 = _mm512_unpacklo_epi8(b2, b3), high1 = _mm512_unpackhi_epi8(b2, b3);
    out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low0, high0));
    out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low0, high0));
    out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low1, high1));
    out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low1, high1));
  }

  template <DType T>
  static OCTAVO_INLINE void store_chunk(void* out, int64_t i, const V (&v)[4]) {
    constexpr int kSubnormal = 0x20;
    const __mmask16 subnormal = _mm512_fpclass_ps_mask(v[0], kSubnormal) | _mm512_fpclass_ps_mask(v[1], kSubnormal) |
                                _mm512_fpclass_ps_mask(v[2], kSubnormal) | _mm512_fpclass_ps_mask(v[3], kSubnormal);
    // The instruction flushes subnormal numbers to zero, which the format does not.
    if (T != kBFloat16 || subnormal) return Simd512::store_chunk<T>(out, i, v);
    char* p = static_cast<char*>(out) + 2 * i;
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[1], v[0])));
    _mm512_storeu_si512(p + 64, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[3], v[2])));
  }
#endif
};

}  // namespace

#if defined(OCTAVO_BF16)
const Kernels& vbmi_bf16_kernels() {
  constexpr const char* name = "vbmi_bf16";
#else
const Kernels& vbmi_kernels() {
  constexpr const char* name = "vbmi";
#endif
#if defined(OCTAVO_BF16)
  constexpr auto product = gemm<Vbmi>;
#else
  constexpr auto product = nullptr;
#endif
  // A look-up in registers is faster than computing in fixed point, and slower in float32 where base and slope are bytes. Measured
  // on one core of a Zen 4, 16384 x 4096, one token, G weights/s, looked up / computed: bfloat16 22.8 / 20.1, float32 10.8 / 12.5.
  using Computed = Segments512<true>;
  static constexpr Kernels bytes{
      name, prepare_integers, widen<Vbmi>, narrow<Vbmi>, to_fixed512, dot<Computed>, dot_fixed<Vbmi>, nullptr, transposed<Computed>,
      dequantize<Computed>, absmax<Vbmi>, encode<Vbmi>, deviate<Computed>, count<Vbmi>};
  static constexpr Kernels wide{
      name, prepare_integers, widen<Vbmi>, narrow<Vbmi>, to_fixed512, dot<Vbmi>, dot_fixed<Vbmi>, nullptr, transposed<Vbmi>,
      dequantize<Vbmi>, absmax<Vbmi>, encode<Vbmi>, deviate<Vbmi>, count<Vbmi>};
  static constexpr Kernels kernels{
      name, prepare_bytes, widen<Vbmi>, narrow<Vbmi>, to_fixed512, dot<Vbmi>, dot_fixed<Vbmi>, product, transposed<Vbmi>,
      dequantize<Vbmi>, absmax<Vbmi>, encode<Vbmi>, deviate<Vbmi>, count<Vbmi>, nullptr, nullptr, nullptr, &bytes, &wide, avx2_kernels};
  return kernels;
}

}  // namespace octavo
