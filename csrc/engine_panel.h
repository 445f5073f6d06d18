// Kernels that need the weights themselves, over the policy of engine.h: de-quantizing a range of rows and columns, and
// the product with the transposed matrix.
#pragma once
#include "engine.h"

namespace octavo {
namespace {

// Where a piece of every row is read, rows ahead are fetched. Measured on one core of a Zen 5, 16384 x 4096 from memory, the
// transposed product of one token, G weights/s: none 3.4, 4 rows 8.8, 8 rows 7.0, 16 rows 8.4, 32 rows 9.3.
constexpr int64_t kRowsAhead = 16;

template <class S, DType T, int PerChunk>
void dequantize_rows(const Packed& w, const Table& table, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                     void* out, int64_t stride, float* scratch) {
  constexpr int J = kChunk / S::L;
  const typename S::Codes codes = S::load_codes(table);
  const int64_t chunk0 = col0 / kChunk, chunk1 = chunks_of(col1);
  const int64_t ahead = chunk0 == 0 && col1 == w.columns ? kPrefetch : kRowsAhead * w.columns;
  RowScales<S> row_scales(w.scales, w.columns, PerChunk, chunk0, chunk1, scratch);
  uint8_t tail[kChunk];
  float last[kChunk];
  typename S::V v[J];
  for (int64_t n = row0; n < row1; n++) {
    const float* scales = row_scales.row(n, row1);
    const uint8_t* row = w.qdata + n * w.columns;
    const int64_t base = (n - row0) * stride - col0;
    for (int64_t c = chunk0; c < chunk1; c++) {
      OCTAVO_PREFETCH(row + c * kChunk + ahead);
      S::decode(codes, chunk_of(row, c, w.columns, tail), v);
      for (int j = 0; j < J; j++) v[j] = S::mul(v[j], scale_of<S, PerChunk>(scales, c - chunk0, j));
      if ((c + 1) * kChunk <= col1) {
        S::template store_chunk<T>(out, base + c * kChunk, v);
      } else {
        for (int j = 0; j < J; j++) S::store(last + j * S::L, v[j]);
        for (int64_t k = c * kChunk; k < col1; k++) write(out, T, base + k, last[k - c * kChunk]);
      }
    }
  }
}

template <class S, DType T>
void dequantize_as(const Packed& w, const Table& table, int64_t row0, int64_t row1, int64_t col0, int64_t col1,
                   void* out, int64_t stride, float* scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return dequantize_rows<S, T, 1>(w, table, row0, row1, col0, col1, out, stride, scratch);
    case 2: return dequantize_rows<S, T, 2>(w, table, row0, row1, col0, col1, out, stride, scratch);
    case 4: return dequantize_rows<S, T, 4>(w, table, row0, row1, col0, col1, out, stride, scratch);
    default: return dequantize_rows<S, T, 64>(w, table, row0, row1, col0, col1, out, stride, scratch);
  }
}

template <class S>
void dequantize(const Packed& w, const Table& table, int64_t row0, int64_t row1, int64_t col0, int64_t col1, void* out,
                DType type, int64_t stride, float* scratch) {
  if (type == kFloat32) return dequantize_as<S, kFloat32>(w, table, row0, row1, col0, col1, out, stride, scratch);
  if (type == kFloat16) return dequantize_as<S, kFloat16>(w, table, row0, row1, col0, col1, out, stride, scratch);
  return dequantize_as<S, kBFloat16>(w, table, row0, row1, col0, col1, out, stride, scratch);
}

// The sums stay in the first-level cache while the rows pass by: a task takes all rows and a few hundred columns.
template <class S, int PerChunk>
void transposed_parts(const Packed& w, const Table& table, const float* x, int64_t x_stride, int64_t tokens,
                      int64_t col0, int64_t col1, float* sums, int64_t sums_stride, float* scratch) {
  constexpr int J = kChunk / S::L;
  const typename S::Codes codes = S::load_codes(table);
  const int64_t chunk0 = col0 / kChunk, chunk1 = chunks_of(col1);
  RowScales<S> row_scales(w.scales, w.columns, PerChunk, chunk0, chunk1, scratch);
  uint8_t tail[kChunk];
  typename S::V v[J];
  for (int64_t n = 0; n < w.rows; n++) {
    const float* scales = row_scales.row(n, w.rows);
    const uint8_t* row = w.qdata + n * w.columns;
    for (int64_t c = chunk0; c < chunk1; c++) {
      OCTAVO_PREFETCH(row + c * kChunk + kRowsAhead * w.columns);
      S::decode(codes, chunk_of(row, c, w.columns, tail), v);
      for (int j = 0; j < J; j++) v[j] = S::mul(v[j], scale_of<S, PerChunk>(scales, c - chunk0, j));
      for (int64_t m = 0; m < tokens; m++) {
        const typename S::V xm = S::set1(x[m * x_stride + n]);
        float* sum = sums + m * sums_stride + (c - chunk0) * kChunk;
        for (int j = 0; j < J; j++) S::store(sum + j * S::L, S::fma(v[j], xm, S::load(sum + j * S::L)));
      }
    }
  }
}

template <class S>
void transposed(const Packed& w, const Table& table, const float* x, int64_t x_stride, int64_t tokens, int64_t col0,
                int64_t col1, float* sums, int64_t sums_stride, float* scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return transposed_parts<S, 1>(w, table, x, x_stride, tokens, col0, col1, sums, sums_stride, scratch);
    case 2: return transposed_parts<S, 2>(w, table, x, x_stride, tokens, col0, col1, sums, sums_stride, scratch);
    case 4: return transposed_parts<S, 4>(w, table, x, x_stride, tokens, col0, col1, sums, sums_stride, scratch);
    default: return transposed_parts<S, 64>(w, table, x, x_stride, tokens, col0, col1, sums, sums_stride, scratch);
  }
}

}  // namespace
}  // namespace octavo
