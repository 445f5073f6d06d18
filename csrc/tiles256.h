// AVX2: the product of a block of tokens (GEMM) with a codebook of segments. Weights are decoded once, straight into the layout that is multiplied,
// and nothing is packed a second time, which a library's matmul does with what it is handed.
//
// A tile is 16 rows of weights and kTileColumns columns in the first-level cache. Two forms:
//   floats   [columns][16]        weights times their scales; exact float32
//   words    [columns / 2][16][2] the segments' integers; inputs are integers too, with a unit for each run of columns that is summed
//                                 up in 32 bits. pmaddwd does two products where a fused multiply-add does one.
// The transposed product has tiles of floats alone, whose 16 "rows" are columns of the matrix and whose "columns" are its rows.
#pragma once
#include "segments256.h"

namespace octavo {
namespace {

constexpr int kTileVectors = 2;                     // of 8 rows
constexpr int64_t kTileWeights = kTileRows * kTileColumns;

// 16-bit elements of eight registers, transposed within their 128-bit lanes.
OCTAVO_INLINE void transpose_words(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi16(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi16(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      r[i + 2 * j] = _mm256_unpacklo_epi32(t[i + j], t[i + j + 2]);
      r[i + 2 * j + 1] = _mm256_unpackhi_epi32(t[i + j], t[i + j + 2]);
    }
  for (int j = 0; j < 4; j++) {
    t[2 * j] = _mm256_unpacklo_epi64(r[j], r[j + 4]);
    t[2 * j + 1] = _mm256_unpackhi_epi64(r[j], r[j + 4]);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

// One chunk of eight rows → store(pair, integers), 32 times: the integers of columns 2 pair and 2 pair + 1, side by side, of each row.
// A pair of columns is a 16-bit element, so transposing gives registers that hold one pair of eight rows in each lane.
template <class S, class Store>
OCTAVO_INLINE void pairs_of_chunk(const typename S::Codes& codes, const uint8_t* const (&rows)[8], Store&& store) {
  for (int half = 0; half < 2; half++) {
    __m256i r[8];
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i] + 32 * half));
    transpose_words(r);
    for (int u = 0; u < 8; u++) {
      __m256i even, odd;  // rows 0 to 3 and 4 to 7, of pair u in the lower lane and of pair 8 + u in the upper
      S::integers(codes, r[u], even, odd);
      store(16 * half + u, _mm256_permute2x128_si256(even, odd, 0x20));
      store(16 * half + 8 + u, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

// Addresses of eight rows at a chunk; of rows that do not exist, of the last one; of a chunk that ends early, of padded copies.
OCTAVO_INLINE void rows_of(const Packed& w, int64_t row, int64_t chunk, uint8_t (&tails)[8][kChunk], const uint8_t* (&rows)[8]) {
  for (int i = 0; i < 8; i++)
    rows[i] = chunk_of(w.qdata + least(row + i, w.rows - 1) * w.columns, chunk, w.columns, tails[i]);
}

// Scales of 16 rows for the chunks [chunk0, chunk1), `per_chunk` of them to each, times `unit` → out[part][16]; zero for rows that do not exist.
template <class S>
void tile_scales(const Packed& w, int64_t row, int64_t per_chunk, int64_t chunk0, int64_t chunk1, float unit, float* out) {
  float one[4 * kTileColumns / kChunk + 16];
  const int64_t count = (chunk1 - chunk0) * per_chunk;
  for (int64_t i = 0; i < kTileRows; i++) {
    if (row + i < w.rows) expand_scales<S>(w.scales, row + i, w.columns, per_chunk, chunk0, chunk1, one);
    for (int64_t k = 0; k < count; k++) out[k * kTileRows + i] = row + i < w.rows ? one[k] * unit : 0.0f;
  }
}

// Sixteen rows' chunks [chunk0, chunk1) → store(chunk, eight rows 0 or 1, pair, integers), as `pairs_of_chunk` gives them.
template <class S, class Store>
OCTAVO_INLINE void pairs_of_rows(const typename S::Codes& codes, const Packed& w, int64_t row, int64_t chunk0, int64_t chunk1,
                                 Store&& store) {
  uint8_t tails[8][kChunk];
  const uint8_t* rows[8];
  for (int64_t c = 0; c < chunk1 - chunk0; c++)
    for (int v = 0; v < kTileVectors; v++) {
      rows_of(w, row + 8 * v, chunk0 + c, tails, rows);
      pairs_of_chunk<S>(codes, rows, [&](int pair, __m256i integers) { store(c, v, pair, integers); });
    }
}

template <class S>
void pack_floats(const typename S::Codes& codes, const Packed& w, int64_t row, int64_t per_chunk, int64_t chunk0, int64_t chunk1,
                 const float* scales, float* tile) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  pairs_of_rows<S>(codes, w, row, chunk0, chunk1, [&](int64_t c, int v, int pair, __m256i integers) {
    // An integer in the upper half of 32 bits is 2^16 times as large, sign and all.
    const __m256 s = S::load(scales + (c * per_chunk + pair * per_chunk / 32) * kTileRows + 8 * v);
    float* out = tile + (c * kChunk + 2 * pair) * kTileRows + 8 * v;
    S::store(out, S::mul(_mm256_cvtepi32_ps(_mm256_slli_epi32(integers, 16)), s));
    S::store(out + kTileRows, S::mul(_mm256_cvtepi32_ps(_mm256_and_si256(integers, upper)), s));
  });
}

template <class S>
void pack_words(const typename S::Codes& codes, const Packed& w, int64_t row, int64_t chunk0, int64_t chunk1, int16_t* tile) {
  pairs_of_rows<S>(codes, w, row, chunk0, chunk1, [&](int64_t c, int v, int pair, __m256i integers) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile + (c * kChunk + 2 * pair) * kTileRows + 16 * v), integers);
  });
}

// Rows [row0, row1) of one chunk of columns, times their scales → four tiles of 16 columns, `stride` floats apart.
template <class S, int PerChunk>
void pack_transposed(const typename S::Codes& codes, const Packed& w, int64_t row0, int64_t row1, int64_t chunk, float* tiles,
                     int64_t stride) {
  uint8_t tail[kChunk];
  float scales[kChunk];
  for (int64_t n = row0; n < row1; n++, tiles += kTileRows) {
    expand_scales<S>(w.scales, n, w.columns, PerChunk, chunk, chunk + 1, scales);
    __m256 v[8];
    S::decode(codes, chunk_of(w.qdata + n * w.columns, chunk, w.columns, tail), v);
    for (int j = 0; j < 8; j++)
      S::store(tiles + j / 2 * stride + j % 2 * 8, S::mul(v[j], scale_of<S, PerChunk>(scales, 0, j)));
  }
}

// sums[m][16] += a tile of floats times M tokens' inputs x[m][kTileColumns].
template <int M>
OCTAVO_INLINE void multiply_floats(const float* tile, const float* x, int64_t columns, float* sums) {
  __m256 acc[M][kTileVectors];
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kTileVectors; v++) acc[m][v] = _mm256_loadu_ps(sums + m * kTileRows + 8 * v);
  for (int64_t k = 0; k < columns; k++) {
    const __m256 w0 = _mm256_loadu_ps(tile + k * kTileRows), w1 = _mm256_loadu_ps(tile + k * kTileRows + 8);
    for (int m = 0; m < M; m++) {
      const __m256 xm = _mm256_broadcast_ss(x + m * kTileColumns + k);
      acc[m][0] = _mm256_fmadd_ps(w0, xm, acc[m][0]);
      acc[m][1] = _mm256_fmadd_ps(w1, xm, acc[m][1]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < kTileVectors; v++) _mm256_storeu_ps(sums + m * kTileRows + 8 * v, acc[m][v]);
}

// The same with a tile of words and integers x[m][kTileColumns]: each run of `run` columns is summed up in 32 bits, and counts its
// rows' scales [16] and its tokens' units x_units[m][kTileColumns / run].
template <int M>
OCTAVO_INLINE void multiply_words(const int16_t* tile, const float* scales, const int16_t* x, const float* x_units, int64_t columns,
                                  int64_t run, float* sums) {
  const int64_t runs = columns / run, per_token = kTileColumns / run;
  for (int64_t r = 0; r < runs; r++) {
    __m256i acc[M][kTileVectors];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < kTileVectors; v++) acc[m][v] = _mm256_setzero_si256();
    const __m256i* w = reinterpret_cast<const __m256i*>(tile + r * run * kTileRows);
    const int16_t* xr = x + r * run;
    for (int64_t pair = 0; pair < run / 2; pair++) {
      const __m256i w0 = _mm256_loadu_si256(w + 2 * pair), w1 = _mm256_loadu_si256(w + 2 * pair + 1);
      for (int m = 0; m < M; m++) {
        int32_t two;
        std::memcpy(&two, xr + m * kTileColumns + 2 * pair, 4);
        const __m256i xm = _mm256_set1_epi32(two);
        acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(w0, xm));
        acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(w1, xm));
      }
    }
    const __m256 s0 = _mm256_loadu_ps(scales + r * kTileRows), s1 = _mm256_loadu_ps(scales + r * kTileRows + 8);
    for (int m = 0; m < M; m++) {
      const __m256 unit = _mm256_broadcast_ss(x_units + m * per_token + r);
      float* sum = sums + m * kTileRows;
      _mm256_storeu_ps(sum, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[m][0]), _mm256_mul_ps(s0, unit), _mm256_loadu_ps(sum)));
      _mm256_storeu_ps(sum + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[m][1]), _mm256_mul_ps(s1, unit), _mm256_loadu_ps(sum + 8)));
    }
  }
}

// f(first token, constant M) for all tokens [0, count), in groups of nearly the same size, `Most` at most.
template <int Most, class F>
OCTAVO_INLINE void in_groups(int64_t count, F&& f) {
  const int64_t groups = (count + Most - 1) / Most;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = g * count / groups, m = (g + 1) * count / groups - first;
    if (m == 6) f.template operator()<6>(first);
    else if (m == 5) f.template operator()<5>(first);
    else if (m == 4) f.template operator()<4>(first);
    else if (m == 3) f.template operator()<3>(first);
    else if (m == 2) f.template operator()<2>(first);
    else f.template operator()<1>(first);
  }
}

template <class S>
bool tile_input(const void* x, DType type, int64_t first, int64_t count, int64_t run, float top_word, float* floats, int16_t* words,
                float* units) {
  float buffer[kTileColumns];
  float* values = words ? buffer : floats;
  widen_run<S>(x, type, first, count, values);
  for (int64_t k = count; k < kTileColumns; k++) values[k] = 0.0f;
  if (!words) return true;
  bool usable = true;
  for (int64_t r = 0; r < kTileColumns / run; r++) {
    const uint32_t bits = largest_of(values + r * run, run);
    const float top = float_of(bits);
    usable = usable && bits < 0x7f800000u && (bits == 0 || top > 0x1p-100f);
    const __m256 factor = _mm256_set1_ps(top > 0.0f ? top_word / top : 0.0f);
    for (int64_t k = r * run; k < (r + 1) * run; k += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + k), round_to_words(values + k, factor));
    units[r] = top / top_word;
  }
  return usable;
}

struct FloatTile {
  const float* tile;
  const float* x;
  int64_t columns;
  float* sums;
  template <int M>
  void operator()(int64_t first) const {
    multiply_floats<M>(tile, x + first * kTileColumns, columns, sums + first * kTileRows);
  }
};

struct WordTile {
  const int16_t* tile;
  const float* scales;
  const int16_t* x;
  const float* units;
  int64_t columns, run;
  float* sums;
  template <int M>
  void operator()(int64_t first) const {
    multiply_words<M>(tile, scales, x + first * kTileColumns, units + first * (kTileColumns / run), columns, run,
                      sums + first * kTileRows);
  }
};

// Sums of `count` tokens and up to 16 outputs, plus bias → the output.
template <class S>
void store_sums(const float* sums, int64_t count, int64_t token, int64_t row, int64_t rows, const Output& out) {
  const bool whole = rows == kTileRows;
  for (int64_t m = 0; m < count; m++) {
    const int64_t at = (token + m) * out.stride + row;
    const float* values = sums + m * kTileRows;
    float biased[kTileRows];
    if (out.bias) {
      for (int64_t i = 0; i < rows; i++) biased[i] = values[i] + out.bias[row + i];
      values = biased;
    }
    if (whole && out.type == kFloat32) std::memcpy(static_cast<char*>(out.data) + 4 * at, values, 4 * kTileRows);
    else if (whole)
      for (int v = 0; v < kTileVectors; v++) {
        const __m256 f = S::load(values + 8 * v);
        const __m128i h = out.type == kFloat16 ? _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT) : S::to_bfloat16s(f);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<char*>(out.data) + 2 * (at + 8 * v)), h);
      }
    else
      for (int64_t i = 0; i < rows; i++) write(out.data, out.type, at + i, values[i]);
  }
}

// out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] for the rows [row0, row1) and the tokens [x.from, x.to).
template <class S>
void tile_rows(const Packed& w, const Table& table, const TileTokens& x, int64_t row0, int64_t row1, const Output& out,
               const TileScratch& scratch) {
  const typename S::Codes codes = S::load_codes(table);
  const int64_t chunks = chunks_of(w.columns), chunks_per_tile = kTileColumns / kChunk;
  // Words: a scale for each run. Floats: the factor that `pack_floats` leaves out is in the scales.
  const int64_t per_chunk = x.words ? kChunk / x.run : scales_per_chunk(w.scales);
  const float unit = x.words ? table.segments.unit : S::raw_unit(table);
  const int64_t tiles = (row1 - row0 + kTileRows - 1) / kTileRows, count = x.to - x.from;
  std::memset(scratch.sums, 0, static_cast<size_t>(tiles * count * kTileRows) * 4);
  for (int64_t chunk0 = 0; chunk0 < chunks; chunk0 += chunks_per_tile) {
    const int64_t chunk1 = least(chunk0 + chunks_per_tile, chunks), columns = (chunk1 - chunk0) * kChunk;
    const int64_t first = chunk0 / chunks_per_tile * x.count + x.from;  // of x's rows
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t row = row0 + t * kTileRows;
      float* sums = scratch.sums + t * count * kTileRows;
      tile_scales<S>(w, row, per_chunk, chunk0, chunk1, unit, scratch.scales);
      if (x.words) {
        pack_words<S>(codes, w, row, chunk0, chunk1, scratch.words);
        in_groups<4>(count, WordTile{scratch.words, scratch.scales, x.words + first * kTileColumns,
                                     x.units + first * (kTileColumns / x.run), columns, x.run, sums});
      } else {
        pack_floats<S>(codes, w, row, per_chunk, chunk0, chunk1, scratch.scales, scratch.floats);
        in_groups<6>(count, FloatTile{scratch.floats, x.floats + first * kTileColumns, columns, sums});
      }
    }
  }
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t row = row0 + t * kTileRows;
    store_sums<S>(scratch.sums + t * count * kTileRows, count, x.from, row, least(kTileRows, row1 - row), out);
  }
}

// out[m, k] = sum_n x[m, n] * weight[n, k] for the chunks [chunk0, chunk1) of columns k and the tokens [x.from, x.to).
template <class S, int PerChunk>
void tile_transposed_chunks(const Packed& w, const Table& table, const TileTokens& x, int64_t chunk0, int64_t chunk1,
                            const Output& out, const TileScratch& scratch) {
  const typename S::Codes codes = S::load_codes(table);
  constexpr int64_t tiles = kChunk / kTileRows;  // of a chunk
  const int64_t count = x.to - x.from, sums_of_tile = count * kTileRows;
  std::memset(scratch.sums, 0, static_cast<size_t>((chunk1 - chunk0) * tiles * sums_of_tile) * 4);
  for (int64_t row = 0; row < w.rows; row += kTileColumns) {
    const int64_t rows = least(kTileColumns, w.rows - row), first = row / kTileColumns * x.count + x.from;
    for (int64_t chunk = chunk0; chunk < chunk1; chunk++) {
      pack_transposed<S, PerChunk>(codes, w, row, row + rows, chunk, scratch.floats, kTileWeights);
      float* sums = scratch.sums + (chunk - chunk0) * tiles * sums_of_tile;
      for (int64_t t = 0; t < tiles && chunk * kChunk + t * kTileRows < w.columns; t++)
        in_groups<6>(count, FloatTile{scratch.floats + t * kTileWeights, x.floats + first * kTileColumns, rows,
                                      sums + t * sums_of_tile});
    }
  }
  for (int64_t column = chunk0 * kChunk; column < least(chunk1 * kChunk, w.columns); column += kTileRows)
    store_sums<S>(scratch.sums + (column / kTileRows - chunk0 * tiles) * sums_of_tile, count, x.from, column,
                  least(kTileRows, w.columns - column), out);
}

template <class S>
void tile_transposed(const Packed& w, const Table& table, const TileTokens& x, int64_t chunk0, int64_t chunk1, const Output& out,
                     const TileScratch& scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return tile_transposed_chunks<S, 1>(w, table, x, chunk0, chunk1, out, scratch);
    case 2: return tile_transposed_chunks<S, 2>(w, table, x, chunk0, chunk1, out, scratch);
    default: return tile_transposed_chunks<S, 4>(w, table, x, chunk0, chunk1, out, scratch);
  }
}

}  // namespace
}  // namespace octavo
