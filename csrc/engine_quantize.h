// Kernels that make a quantized matrix, over the policy of engine.h: scales, nearest codes, and the histogram that a
// codebook is fitted to. The arithmetic is that of octavo/ops/reference.py, operation by operation, so that the bytes agree.
#pragma once
#include "engine.h"

namespace octavo {
namespace {

// Row `n` as float32: the row itself, or converted into `buffer`.
template <class S>
OCTAVO_INLINE const float* float_row(const void* weight, DType type, int64_t n, int64_t columns, float* buffer) {
  if (type == kFloat32 && reinterpret_cast<uintptr_t>(weight) % alignof(float) == 0)
    return static_cast<const float*>(weight) + n * columns;
  widen_run<S>(weight, type, n * columns, columns, buffer);
  return buffer;
}

template <class S>
bool absmax(const void* weight, DType type, int64_t rows, int64_t columns, int64_t block, float* out, float* scratch) {
  // Magnitudes compare as integers; NaN and infinity are the largest of all.
  uint32_t largest = 0;
  for (int64_t n = 0; n < rows; n++) {
    const float* row = float_row<S>(weight, type, n, columns, scratch);
    for (int64_t k = 0; k < columns; k += block) {
      const int64_t stop = least(k + block, columns);
      typename S::I magnitude = S::no_magnitude();
      int64_t i = k;
      for (; i + S::L <= stop; i += S::L) magnitude = S::larger_magnitude(magnitude, S::load(row + i));
      uint32_t bits = S::largest_magnitude(magnitude);
      for (; i < stop; i++) {
        const uint32_t b = bits_of(row[i]) & 0x7fffffffu;
        if (b > bits) bits = b;
      }
      if (bits > largest) largest = bits;
      *out++ = float_of(bits);
    }
  }
  return largest < 0x7f800000u;
}

template <class S, int PerChunk>
void encode_rows(const void* weight, DType type, int64_t rows, int64_t columns, const Scales& s, const Search& search,
                 uint8_t* qdata, float* scratch) {
  constexpr int J = kChunk / S::L;
  const typename S::Boundaries boundaries = S::load_boundaries(search);
  const int64_t chunks = chunks_of(columns);
  float* buffer = scratch;
  float* scales = scratch + padded(columns);
  float last[kChunk];
  uint8_t codes[kChunk];
  for (int64_t n = 0; n < rows; n++) {
    const float* row = float_row<S>(weight, type, n, columns, buffer);
    expand_scales<S>(s, n, columns, PerChunk, 0, chunks, scales);
    uint8_t* out = qdata + n * columns;
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t left = least(columns - c * kChunk, kChunk);
      const float* values = row + c * kChunk;
      if (left < kChunk) {
        for (int64_t k = 0; k < kChunk; k++) last[k] = k < left ? values[k] : 0.0f;
        values = last;
      }
      uint8_t* target = left < kChunk ? codes : out + c * kChunk;
      for (int j = 0; j < J; j++)
        S::encode(boundaries, S::divide(S::load(values + j * S::L), scale_of<S, PerChunk>(scales, c, j)), target + j * S::L);
      if (left < kChunk) std::memcpy(out + c * kChunk, codes, static_cast<size_t>(left));
    }
  }
}

template <class S>
void encode(const void* weight, DType type, int64_t rows, int64_t columns, const Scales& s, const Search& search,
            uint8_t* qdata, float* scratch) {
  switch (scales_per_chunk(s)) {
    case 1: return encode_rows<S, 1>(weight, type, rows, columns, s, search, qdata, scratch);
    case 2: return encode_rows<S, 2>(weight, type, rows, columns, s, search, qdata, scratch);
    case 4: return encode_rows<S, 4>(weight, type, rows, columns, s, search, qdata, scratch);
    default: return encode_rows<S, 64>(weight, type, rows, columns, s, search, qdata, scratch);
  }
}

// errors[n], powers[n]: sums over a row of (weight - code * scale)² and of weight².
template <class S, int PerChunk>
void deviate_rows(const void* weight, DType type, const Packed& w, const Table& table, int64_t row0, int64_t row1,
                  float* errors, float* powers, float* scratch) {
  constexpr int J = kChunk / S::L;
  const typename S::Codes codes = S::load_codes(table);
  const int64_t chunks = chunks_of(w.columns);
  float* buffer = scratch;
  float* scales = scratch + padded(w.columns);
  float last[kChunk];
  uint8_t tail[kChunk];
  typename S::V v[J];
  const typename S::V minus = S::set1(-1.0f);
  for (int64_t n = row0; n < row1; n++) {
    const float* row = float_row<S>(weight, type, n, w.columns, buffer);
    expand_scales<S>(w.scales, n, w.columns, PerChunk, 0, chunks, scales);
    typename S::V error = S::zero(), power = S::zero();
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t left = least(w.columns - c * kChunk, kChunk);
      const float* values = row + c * kChunk;
      S::decode(codes, chunk_of(w.qdata + n * w.columns, c, w.columns, tail), v);
      if (left < kChunk) {
        for (int64_t k = 0; k < kChunk; k++) last[k] = k < left ? values[k] : 0.0f;
        // The scales of the last part may reach beyond the row, whose padding decodes to a code that need not be zero.
        float kept[kChunk];
        for (int j = 0; j < J; j++) S::store(kept + j * S::L, v[j]);
        for (int64_t k = left; k < kChunk; k++) kept[k] = 0.0f;
        for (int j = 0; j < J; j++) v[j] = S::load(kept + j * S::L);
        values = last;
      }
      for (int j = 0; j < J; j++) {
        const typename S::V value = S::load(values + j * S::L);
        const typename S::V difference = S::fma(S::mul(v[j], scale_of<S, PerChunk>(scales, c, j)), minus, value);
        error = S::fma(difference, difference, error);
        power = S::fma(value, value, power);
      }
    }
    errors[n - row0] = S::sum(error);
    powers[n - row0] = S::sum(power);
  }
}

template <class S>
void deviate(const void* weight, DType type, const Packed& w, const Table& table, int64_t row0, int64_t row1,
             float* errors, float* powers, float* scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return deviate_rows<S, 1>(weight, type, w, table, row0, row1, errors, powers, scratch);
    case 2: return deviate_rows<S, 2>(weight, type, w, table, row0, row1, errors, powers, scratch);
    case 4: return deviate_rows<S, 4>(weight, type, w, table, row0, row1, errors, powers, scratch);
    default: return deviate_rows<S, 64>(weight, type, w, table, row0, row1, errors, powers, scratch);
  }
}

template <class S>
void count(const void* weight, DType type, int64_t rows, int64_t columns, const Scales& s, const int64_t* masses,
           int64_t bins, int64_t* counts, float* scratch) {
  const float half_width = static_cast<float>(bins - 1) * 0.5f;
  const DType scale_type = s.half ? kFloat16 : kFloat32;
  for (int64_t n = 0; n < rows; n++) {
    const float* row = float_row<S>(weight, type, n, columns, scratch);
    for (int64_t b = 0; b < s.per_row; b++) {
      const int64_t mass = masses[n * s.per_row + b];
      if (mass == 0) continue;
      const float scale = read(s.data, scale_type, n * s.per_row + b);
      const typename S::V divisor = S::set1(scale);
      const int64_t stop = least((b + 1) * s.block, columns);
      int64_t k = b * s.block;
      int32_t bin[kChunk];
      for (; k + kChunk <= stop; k += kChunk) {
        for (int j = 0; j < kChunk; j += S::L)
          S::bins(S::divide(S::load(row + k + j), divisor), half_width, bin + j);
        for (int j = 0; j < kChunk; j++) counts[bin[j]] += mass;
      }
      for (; k < stop; k++) {
        const float value = scale > 0.0f ? row[k] / scale : 0.0f;
        counts[static_cast<int32_t>((value + 1.0f) * half_width + 0.5f)] += mass;
      }
    }
  }
}

}  // namespace
}  // namespace octavo
