// The product in 16-bit fixed point: as fast as the byte planes of the codebook can be looked up.
//
// The code becomes integers of at most 16383 (segments are integers already), each chunk of 64 inputs integers of at most 32767 with a unit of its own, so
// four products add up in 32 bits. Against float64 this errs less than rounding the weights to bfloat16 or float16 does. Float32
// input, times a codebook of segments, is two planes of integers, each like a token of its own, that are added at the end. The
// policy provides `FixedCodes`, and `fixed_chunk` that adds one chunk's products, times their factors, to the sums of M tokens.
#pragma once
#include "engine.h"

namespace octavo {
namespace {

// The products of scales and units, so that one factor is left for the loop over chunks: of M tokens, [M, chunks * PerChunk].
// Measured on one core of a Zen 4, from cache, one token: 27.7 G weights/s instead of 24.4.
template <class S, int M, int PerChunk>
class Factors {
 public:
  // They lie in the scratch behind what RowScales uses of it.
  Factors(const float* units, int64_t columns, float* scratch)
      : count_(chunks_of(columns) * PerChunk), units_(units), factors_(scratch + padded(columns) + 2 * kChunk) {
    if constexpr (PerChunk > 1) {
      float* repeated = factors_ + M * count_;
      for (int64_t i = 0; i < M * count_; i++) repeated[i] = units[i / PerChunk];
      units_ = repeated;
    }
  }

  OCTAVO_INLINE const float* row(const float* scales) const {
    for (int m = 0; m < M; m++) {
      const float* u = units_ + m * count_;
      float* out = factors_ + m * count_;
      int64_t i = 0;
      for (; i + S::L <= count_; i += S::L) S::store(out + i, S::mul(S::load(scales + i), S::load(u + i)));
      for (; i < count_; i++) out[i] = scales[i] * u[i];
    }
    return factors_;
  }

 private:
  const int64_t count_;
  const float* units_;
  float* const factors_;
};

template <class S, int M, int PerChunk>
void dot_fixed_rows(const Packed& w, const Table& table, const Tokens& x, int64_t token, int64_t row0, int64_t row1,
                    const Output& out, float* scratch) {
  const typename S::FixedCodes codes = S::load_fixed_codes(table);
  const int64_t chunks = chunks_of(w.columns), full = w.columns / kChunk;
  const int16_t* fixed = x.fixed + token * x.stride;
  RowScales<S> row_scales(w.scales, w.columns, PerChunk, 0, chunks, scratch);
  const Factors<S, M, PerChunk> row_factors(x.units + token * chunks, w.columns, scratch);
  uint8_t tail[kChunk];
  for (int64_t n = row0; n < row1; n++) {
    const float* factors = row_factors.row(row_scales.row(n, row1));
    const uint8_t* row = w.qdata + n * w.columns;
    typename S::V acc[M];
    for (int m = 0; m < M; m++) acc[m] = S::zero();
    for (int64_t c = 0; c < full; c++) {
      OCTAVO_PREFETCH(row + c * kChunk + kPrefetch);
      S::template fixed_chunk<M, PerChunk>(codes, row + c * kChunk, factors, c, fixed, x.stride, acc);
    }
    if (full < chunks)
      S::template fixed_chunk<M, PerChunk>(codes, chunk_of(row, full, w.columns, tail), factors, full, fixed, x.stride, acc);
    const float bias = out.bias ? out.bias[n] : 0.0f;
    if (x.planes == 2)
      for (int m = 0; m + 1 < M; m += 2)
        write(out.data, out.type, (token + m) / 2 * out.stride + n, S::sum(S::add(acc[m], acc[m + 1])) + bias);
    else
      for (int m = 0; m < M; m++) write(out.data, out.type, (token + m) * out.stride + n, S::sum(acc[m]) + bias);
  }
}

template <class S, int M, int PerChunk>
void dot_fixed_group(const Packed& w, const Table& table, const Tokens& x, int64_t m, int64_t row0, int64_t row1,
                     const Output& out, float* scratch) {
  if constexpr (M > 1)
    if (x.count * x.planes - m < M) return dot_fixed_group<S, M - 1, PerChunk>(w, table, x, m, row0, row1, out, scratch);
  dot_fixed_rows<S, M, PerChunk>(w, table, x, m, row0, row1, out, scratch);
}

template <class S, int PerChunk>
void dot_fixed_parts(const Packed& w, const Table& table, const Tokens& x, int64_t row0, int64_t row1,
                     const Output& out, float* scratch) {
  for (int64_t m = 0; m < x.count * x.planes; m += S::kGroup)
    dot_fixed_group<S, S::kGroup, PerChunk>(w, table, x, m, row0, row1, out, scratch);
}

// Only for matrices whose `scales_per_chunk` is 1, 2 or 4.
template <class S>
void dot_fixed(const Packed& w, const Table& table, const Tokens& x, int64_t row0, int64_t row1, const Output& out,
               float* scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return dot_fixed_parts<S, 1>(w, table, x, row0, row1, out, scratch);
    case 2: return dot_fixed_parts<S, 2>(w, table, x, row0, row1, out, scratch);
    default: return dot_fixed_parts<S, 4>(w, table, x, row0, row1, out, scratch);
  }
}

}  // namespace
}  // namespace octavo
