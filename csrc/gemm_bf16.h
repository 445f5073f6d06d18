// The product of a block of tokens in bfloat16 (GEMM), for AVX512_BF16 with VBMI: weights are de-quantized once, straight into the
// layout that vdpbf16ps multiplies, and nothing is packed a second time, which PyTorch's matmul does with what it is handed.
//
// A panel is 48 rows of weights and kGemmColumns columns in the first-level cache: for each pair of columns three vectors, one for
// sixteen rows, a lane holding one row's two weights. Eight tokens' pairs are broadcast against them, so 24 sums stay in
// registers. Weights are rounded to bfloat16 as `dequantize` rounds them, sums are float32.
#pragma once
#include "simd512.h"

namespace octavo {
namespace {

constexpr int kGroup = 16;                       // rows of a vector
constexpr int kVectors = kGemmPanel / kGroup;    // vectors of a panel
constexpr int kTile = 8;                         // tokens multiplied at a time

// Sixteen vectors of sixteen 32-bit elements → their transpose.
OCTAVO_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  // Now r[4 i + c] holds, in its 128-bit lane L, column 4 L + c of rows 4 i to 4 i + 3.
  for (int c = 0; c < 4; c++) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    t[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    t[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
  for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Rows are taken in this order, so that looking up, unpacking and rounding leave them in their own.
constexpr int kOrder[kGroup] = {0, 8, 2, 10, 1, 9, 3, 11, 4, 12, 6, 14, 5, 13, 7, 15};

// Scales of sixteen rows for the chunks [chunk0, chunk1), `per_chunk` of them to each → out[part][row in kOrder]; zero for rows from
// `row1` on. `buffer` has room for sixteen rows of them, each rounded up to sixteen.
template <class S>
void group_scales(const Scales& s, int64_t columns, int64_t per_chunk, int64_t row, int64_t row1, int64_t chunk0,
                  int64_t chunk1, float* out, float* buffer) {
  const int64_t count = (chunk1 - chunk0) * per_chunk, stride = (count + 15) / 16 * 16;
  for (int i = 0; i < kGroup; i++) {
    float* target = buffer + i * stride;
    const int64_t n = row + kOrder[i];
    if (n < row1) expand_scales<S>(s, n, columns, per_chunk, chunk0, chunk1, target);
    for (int64_t k = n < row1 ? count : 0; k < stride; k++) target[k] = 0.0f;
  }
  for (int64_t k = 0; k < count; k += 16) {
    __m512i r[16];
    for (int i = 0; i < kGroup; i++) r[i] = _mm512_loadu_si512(buffer + i * stride + k);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (k + i) * 16, r[i]);
  }
}

// Sixteen rows and one chunk of columns → 32 pairs of columns, each a vector; `step` 16-bit values from one pair to the next.
template <class S, int PerChunk>
OCTAVO_INLINE void pair_chunk(const typename S::RoundedCodes& codes, __m512i (&indices)[kGroup], const float* scales,
                              uint16_t* out, int64_t step) {
  transpose(indices);
  for (int part = 0; part < PerChunk; part++) {
    const __m512 all = _mm512_loadu_ps(scales + 16 * part);
    const __m512 s0 = _mm512_permute_ps(all, 0x00), s1 = _mm512_permute_ps(all, 0x55);
    const __m512 s2 = _mm512_permute_ps(all, 0xaa), s3 = _mm512_permute_ps(all, 0xff);
    for (int i = part * 16 / PerChunk; i < (part + 1) * 16 / PerChunk; i++) {
      __m512 v[4];
      S::decode_rounded(codes, indices[i], v);
      const __m512 a = reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(v[1], s1), _mm512_mul_ps(v[0], s0)));
      const __m512 b = reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(_mm512_mul_ps(v[3], s3), _mm512_mul_ps(v[2], s2)));
      _mm512_storeu_ps(out + 2 * i * step, _mm512_shuffle_ps(a, b, 0x88));
      _mm512_storeu_ps(out + (2 * i + 1) * step, _mm512_shuffle_ps(a, b, 0xdd));
    }
  }
}

// Rows [row, row1), sixteen at most, and chunks [chunk0, chunk1) → one vector's slice of a panel.
template <class S, int PerChunk>
void pair_rows(const typename S::RoundedCodes& codes, const Packed& w, int64_t row, int64_t row1, int64_t chunk0,
               int64_t chunk1, int64_t ahead, const float* scales, uint16_t* out, int64_t step) {
  const int64_t full = row + kGroup <= row1 ? least(chunk1, w.columns / kChunk) : chunk0;
  const uint8_t* from[kGroup];
  for (int i = 0; i < kGroup; i++) from[i] = w.qdata + (row + kOrder[i]) * w.columns + chunk0 * kChunk;
  __m512i indices[kGroup];
  int64_t c = chunk0;
  for (; c < full; c++, scales += PerChunk * 16, out += kChunk / 2 * step) {
    for (int i = 0; i < kGroup; i++) {
      indices[i] = _mm512_loadu_si512(from[i]);
      // Into the second-level cache: a set of the first would not hold sixteen rows.
      OCTAVO_PREFETCH(from[i] + ahead);
      from[i] += kChunk;
    }
    pair_chunk<S, PerChunk>(codes, indices, scales, out, step);
  }
  for (; c < chunk1; c++, scales += PerChunk * 16, out += kChunk / 2 * step) {
    const int64_t left = least(w.columns - c * kChunk, kChunk);
    const __mmask64 there = left < kChunk ? (uint64_t{1} << left) - 1u : ~uint64_t{0};
    for (int i = 0; i < kGroup; i++) {
      const __mmask64 mask = row + kOrder[i] < row1 ? there : 0;
      indices[i] = _mm512_maskz_loadu_epi8(mask, w.qdata + least(row + kOrder[i], row1 - 1) * w.columns + c * kChunk);
    }
    pair_chunk<S, PerChunk>(codes, indices, scales, out, step);
  }
}

OCTAVO_INLINE __m512i broadcast_pair(const uint16_t* x) {
  int32_t pair;
  std::memcpy(&pair, x, 4);
  return _mm512_set1_epi32(pair);
}

// sums[m][v] (+)= the panel's first `pairs` pairs times those of M tokens.
template <int V, int M>
OCTAVO_INLINE void multiply(const uint16_t* panel, const uint16_t* x, int64_t pairs, __m512 (&sums)[M][V]) {
  for (int64_t k = 0; k < pairs; k++) {
    __m512bh w[V];
    for (int v = 0; v < V; v++) w[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + (k * V + v) * 32));
    for (int m = 0; m < M; m++) {
      const __m512bh xm = reinterpret_cast<__m512bh>(broadcast_pair(x + m * kGemmColumns + 2 * k));
      for (int v = 0; v < V; v++) sums[m][v] = _mm512_dpbf16_ps(sums[m][v], xm, w[v]);
    }
  }
}

struct Block {
  const uint16_t* panel;
  int64_t pairs;
  bool last;           // of the columns
  int64_t row, rows;   // of the panel, at most 16 V
};

// One panel times M tokens: sums go on from `partial`, and back there or to the output.
template <int V, int M>
void multiply_tile(const Block& b, const uint16_t* x, int64_t token, const Output& out, float* partial) {
  __m512 sums[M][V];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) sums[m][v] = _mm512_loadu_ps(partial + (m * V + v) * 16);
  multiply<V, M>(b.panel, x, b.pairs, sums);
  for (int m = 0; m < M; m++)
    for (int v = 0; v < V; v++) _mm512_storeu_ps(partial + (m * V + v) * 16, sums[m][v]);
  if (!b.last) return;
  for (int v = 0; v < V; v++) {
    const int64_t left = b.rows - 16 * v;
    const __mmask16 there = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
    const __m512 bias = out.bias ? _mm512_maskz_loadu_ps(there, out.bias + b.row + 16 * v) : _mm512_setzero_ps();
    for (int m = 0; m < M; m++) {
      const __m256i h = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(_mm512_loadu_ps(partial + (m * V + v) * 16), bias)));
      char* target = static_cast<char*>(out.data) + 2 * ((token + m) * out.stride + b.row + 16 * v);
      _mm256_mask_storeu_epi16(target, there, h);
    }
  }
}

// All tokens [token0, token1), in tiles of nearly the same size.
template <int V>
void multiply_panel(const Block& b, const uint16_t* x, int64_t token0, int64_t token1, const Output& out, float* partial) {
  const int64_t count = token1 - token0, tiles = (count + kTile - 1) / kTile;
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t first = token0 + t * count / tiles, m = token0 + (t + 1) * count / tiles - first;
    const uint16_t* values = x + first * kGemmColumns;
    float* own = partial + (first - token0) * V * 16;
    switch (m) {
      case 8: multiply_tile<V, 8>(b, values, first, out, own); break;
      case 7: multiply_tile<V, 7>(b, values, first, out, own); break;
      case 6: multiply_tile<V, 6>(b, values, first, out, own); break;
      case 5: multiply_tile<V, 5>(b, values, first, out, own); break;
      case 4: multiply_tile<V, 4>(b, values, first, out, own); break;
      case 3: multiply_tile<V, 3>(b, values, first, out, own); break;
      case 2: multiply_tile<V, 2>(b, values, first, out, own); break;
      default: multiply_tile<V, 1>(b, values, first, out, own); break;
    }
  }
}

template <class S, int PerChunk>
void gemm_blocks(const Packed& w, const Table& table, const GemmInput& x, int64_t row0, int64_t row1, const Output& out,
                const GemmScratch& scratch) {
  const typename S::RoundedCodes codes = S::load_rounded_codes(table);
  const int64_t chunks = chunks_of(w.columns), per_panel = kGemmColumns / kChunk, per_scales = kGemmScaled / kChunk;
  constexpr int64_t group = per_scales * PerChunk * kGroup;  // scales of sixteen rows
  for (int64_t token0 = 0; token0 < x.count; token0 += kGemmTokens) {
    const int64_t token1 = least(token0 + kGemmTokens, x.count);
    std::memset(scratch.partial, 0, static_cast<size_t>((row1 - row0 + kGroup - 1) / kGroup * kGroup * (token1 - token0)) * 4);
    for (int64_t chunk0 = 0; chunk0 < chunks; chunk0 += per_panel) {
      const int64_t chunk1 = least(chunk0 + per_panel, chunks), scaled = chunk0 % per_scales;
      // What these rows, or those of the next task, need next.
      const int64_t ahead = chunk1 < chunks ? kGemmColumns : kGemmRows * w.columns - chunk0 * kChunk;
      if (scaled == 0)
        for (int64_t row = row0, g = 0; row < row1; row += kGroup, g++)
          group_scales<S>(w.scales, w.columns, PerChunk, row, row1, chunk0, least(chunk0 + per_scales, chunks),
                          scratch.scales + g * group, scratch.buffer);
      const int64_t groups = (row1 - row0 + kGroup - 1) / kGroup, panels = (groups + kVectors - 1) / kVectors;
      for (int64_t p = 0; p < panels; p++) {
        // Panels of nearly the same height: a single vector's sums would wait for each other.
        const int64_t first = p * groups / panels, row = row0 + first * kGroup;
        const int vectors = static_cast<int>((p + 1) * groups / panels - first);
        const int64_t rows = least(row1 - row, vectors * kGroup);
        for (int v = 0; v < vectors; v++) {
          const float* scales = scratch.scales + ((row - row0) / kGroup + v) * group + scaled * PerChunk * kGroup;
          pair_rows<S, PerChunk>(codes, w, row + v * kGroup, row1, chunk0, chunk1, ahead, scales, scratch.panel + 32 * v,
                              32 * vectors);
        }
        const Block block{scratch.panel, (chunk1 - chunk0) * kChunk / 2, chunk1 == chunks, row, rows};
        float* partial = scratch.partial + (row - row0) * (token1 - token0);
        const uint16_t* values = x.values + chunk0 / per_panel * x.count * kGemmColumns;
        if (vectors == 3) multiply_panel<3>(block, values, token0, token1, out, partial);
        else if (vectors == 2) multiply_panel<2>(block, values, token0, token1, out, partial);
        else multiply_panel<1>(block, values, token0, token1, out, partial);
      }
    }
  }
}

// Only for matrices whose `scales_per_chunk` is 1, 2 or 4.
template <class S>
void gemm(const Packed& w, const Table& table, const GemmInput& x, int64_t row0, int64_t row1, const Output& out,
          const GemmScratch& scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return gemm_blocks<S, 1>(w, table, x, row0, row1, out, scratch);
    case 2: return gemm_blocks<S, 2>(w, table, x, row0, row1, out, scratch);
    default: return gemm_blocks<S, 4>(w, table, x, row0, row1, out, scratch);
  }
}

}  // namespace
}  // namespace octavo
