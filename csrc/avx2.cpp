// Kernels for AVX2 with FMA and F16C. A codebook of segments is computed (segments256.h), and so is the dynamic map
// (dynamic256.h). Any other is looked up: by gathers for exact float32, in registers for fixed point.
//
// pshufb looks a byte up among sixteen by the low four bits of an index, and gives zero where the index's top bit is set. Taking 16
// off the indices again and again, with saturation, turns those below a run of sixteen entries negative: at step h only indices
// from 16 h on still count. The table of a step is the exclusive or of a run with the one before, so the steps of an index add up
// (by exclusive or) to the entry of its own run. Indices from 128 on start negative: their turn comes with the top bit flipped.
//
//   step     index        pshufb gives          sum so far
//   0        0x25 (37)    run0[5]               run0[5]
//   1        0x15 (21)    run1[5] ^ run0[5]     run1[5]
//   2        0x05 (5)     run2[5] ^ run1[5]     run2[5], which is entry 37
//   3 to 7   0xf5 ...     0 (top bit is set)    run2[5]
#include "dynamic256.h"
#include "kernels.h"
#include "tiles256.h"

namespace octavo {
namespace {

struct Avx2 : Simd256 {
  struct Codes {
    const float* code;
  };
  static OCTAVO_INLINE Codes load_codes(const Table& t) { return {t.code}; }
  static OCTAVO_INLINE void decode(const Codes& codes, const uint8_t* q, V (&out)[8]) {
    for (int j = 0; j < 8; j++) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q + 8 * j));
      out[j] = _mm256_i32gather_ps(codes.code, _mm256_cvtepu8_epi32(bytes), 4);
    }
  }

  struct FixedCodes {
    const uint8_t (*steps)[256];
  };
  static OCTAVO_INLINE FixedCodes load_fixed_codes(const Table& t) { return {t.steps}; }

  template <int M, int PerChunk>
  static OCTAVO_INLINE void fixed_chunk(const FixedCodes& codes, const uint8_t* q, const float* factors,
                                        int64_t c, const int16_t* x, int64_t stride, V (&acc)[M]) {
    I low[2] = {}, high[2] = {}, bytes[2];
    for (int h = 0; h < 2; h++) bytes[h] = _mm256_loadu_si256(reinterpret_cast<const I*>(q + 32 * h));
    for (int half = 0; half < 2; half++) {
      I i[2];
      for (int h = 0; h < 2; h++) i[h] = half ? _mm256_xor_si256(bytes[h], _mm256_set1_epi8(-128)) : bytes[h];
      for (int step = 8 * half; step < 8 * half + 8; step++) {
        const I l = run_of(codes.steps[0], step), u = run_of(codes.steps[1], step);
        for (int h = 0; h < 2; h++) {
          low[h] = _mm256_xor_si256(low[h], _mm256_shuffle_epi8(l, i[h]));
          high[h] = _mm256_xor_si256(high[h], _mm256_shuffle_epi8(u, i[h]));
          i[h] = _mm256_subs_epi8(i[h], _mm256_set1_epi8(16));
        }
      }
    }
    for (int h = 0; h < 2; h++) {
      // Lanes of 128 bits: each holds sixteen weights, the first eight in `even`.
      const I even = _mm256_unpacklo_epi8(low[h], high[h]), odd = _mm256_unpackhi_epi8(low[h], high[h]);
      add_half<M, PerChunk>(even, odd, h, factors, c, x, stride, acc);
    }
  }
  static OCTAVO_INLINE I run_of(const uint8_t* steps, int step) {
    return lane_table(steps + 16 * step);
  }
};

void prepare_steps(const float* code, bool fixed, Table& t) {
  std::memcpy(t.code, code, sizeof t.code);
  if (!fixed) return;
  const float top = float_of(largest_of(t.code, 256));
  const __m256 factor = _mm256_set1_ps(top > 0.0f ? 16383.0f / top : 0.0f);
  for (int i = 0; i < 256; i += 16)
    _mm256_store_si256(reinterpret_cast<__m256i*>(t.fixed + i), round_to_words(t.code + i, factor));
  for (int i = 0; i < 256; i++) {
    // The first run of each half stands for itself.
    const unsigned entry = static_cast<uint16_t>(t.fixed[i]);
    const unsigned before = i % 128 < 16 ? 0u : static_cast<uint16_t>(t.fixed[i - 16]);
    t.steps[0][i] = static_cast<uint8_t>(entry ^ before);
    t.steps[1][i] = static_cast<uint8_t>((entry ^ before) >> 8);
  }
  t.fixed_unit = top / 16383.0f;
}

template <bool Bytes>
constexpr Kernels computed() {
  using S = Segments256<Bytes>;
  return {"avx2", prepare_segments, widen<S>, narrow<S>, to_fixed256, dot<S>, dot_fixed<S>, nullptr, transposed<S>, dequantize<S>,
          absmax<S>, encode<S>, deviate<S>, count<S>, tile_input<S>, tile_rows<S>, tile_transposed<S>};
}

// What needs exact values, or decodes once for a block of tokens, looks them up.
constexpr Kernels dynamic_map{
    "avx2", prepare_dynamic, widen<Avx2>, narrow<Avx2>, to_fixed256, dot<Dynamic256>, dot_fixed<Dynamic256>, nullptr, transposed<Avx2>,
    dequantize<Avx2>, absmax<Avx2>, encode<Avx2>, deviate<Avx2>, count<Avx2>};

constexpr Kernels byte_segments = computed<true>(), wide_segments = computed<false>();

}  // namespace

const Kernels& avx2_kernels() {
  static constexpr Kernels kernels{
      "avx2", prepare_steps, widen<Avx2>, narrow<Avx2>, to_fixed256, dot<Avx2>, dot_fixed<Avx2>, nullptr, transposed<Avx2>,
      dequantize<Avx2>, absmax<Avx2>, encode<Avx2>, deviate<Avx2>, count<Avx2>, nullptr, nullptr, nullptr, &byte_segments, &wide_segments, avx2_kernels, &dynamic_map};
  return kernels;
}

}  // namespace octavo
