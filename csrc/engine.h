// The kernels, written once over a policy `S` that names an instruction set's vectors and table look-up.
//
// S provides: L lanes of float32 in V, arithmetic on V, loads and stores of every type, `Codes` (a codebook in registers)
// with `decode` (64 indices → 64 values in order), and `Boundaries` with `encode` (the nearest code). The translation units
// portable.cpp, avx2.cpp, avx512.cpp and vbmi.cpp include this, each built with its own flags, so everything here has
// internal linkage and uses no standard library templates, which the linker would merge across them.
#pragma once
#include "half.h"
#include "types.h"

#if defined(__GNUC__)
#define OCTAVO_INLINE inline __attribute__((always_inline))
// Into the second-level cache: from there the hardware's own prefetcher and out-of-order execution do.
#define OCTAVO_PREFETCH(p) __builtin_prefetch(p, 0, 2)
#else
#define OCTAVO_INLINE inline
#define OCTAVO_PREFETCH(p) ((void)0)
#endif

namespace octavo {
namespace {

// Bytes ahead of the chunk being decoded. Rows follow each other in memory, so this also starts the next rows, across the page
// ends where the hardware's prefetcher stops. Measured on one core of a Zen 5, 16384 x 4096 from memory, one token of bfloat16, G
// weights/s (a loop that only reads: 35 to 39): none 29, 2048 31, 4096 32, 6144 36, 8192 39, 16384 39, 32768 38. That was into the
// first-level cache, which on a Zen 4 (32 KB of it) the input of wide rows fills already. One core of it, GB/s, into the first / into the
// second level, 8192 ahead: 2048 columns 22.6 / 23.9, 8192 columns 16.4 / 24.2 (only reading: 22.7 / 24.6).
// Into the second level it has not been measured on a Zen 5, and for `transposed` (engine_panel.h) on neither.
constexpr int64_t kPrefetch = 8192;

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The table of kernels that compute codes: it is in `segments` already.
[[maybe_unused]] void prepare_segments(const float*, bool, Table& t) {
  t.fixed_unit = t.segments.unit;
  t.top_word = t.segments.top_word;
}

// The table of kernels that look codes up in memory.
[[maybe_unused]] void prepare_plain(const float* code, bool, Table& t) { std::memcpy(t.code, code, sizeof t.code); }

OCTAVO_INLINE float read(const void* data, DType type, int64_t i) {
  if (type == kFloat32) {
    float x;
    std::memcpy(&x, static_cast<const char*>(data) + 4 * i, 4);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, static_cast<const char*>(data) + 2 * i, 2);
  return type == kFloat16 ? from_float16(h) : from_bfloat16(h);
}

OCTAVO_INLINE void write(void* data, DType type, int64_t i, float x) {
  if (type == kFloat32) {
    std::memcpy(static_cast<char*>(data) + 4 * i, &x, 4);
    return;
  }
  const uint16_t h = type == kFloat16 ? to_float16(x) : to_bfloat16(x);
  std::memcpy(static_cast<char*>(data) + 2 * i, &h, 2);
}

// `n` values of `type`, starting at element `first` → float32. Zeros follow up to a whole vector: `out` has room for a
// multiple of 16 values.
template <class S, DType T>
void widen_as(const void* data, int64_t first, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + S::L <= n; i += S::L) S::store(out + i, S::template load_as<T>(data, first + i));
  if (i < n) S::store(out + i, S::template load_tail<T>(data, first + i, n - i));
}

template <class S>
void widen_run(const void* data, DType type, int64_t first, int64_t n, float* out) {
  if (type == kFloat32) return widen_as<S, kFloat32>(data, first, n, out);
  if (type == kFloat16) return widen_as<S, kFloat16>(data, first, n, out);
  return widen_as<S, kBFloat16>(data, first, n, out);
}

template <class S>
void widen(const void* x, DType type, int64_t tokens, int64_t columns, float* out) {
  const int64_t stride = padded(columns);
  for (int64_t m = 0; m < tokens; m++) {
    widen_run<S>(x, type, m * columns, columns, out + m * stride);
    for (int64_t k = columns; k < stride; k++) out[m * stride + k] = 0.0f;
  }
}

template <class S, DType T>
void narrow_as(const float* values, int64_t count, void* out, int64_t first) {
  constexpr int J = kChunk / S::L;
  int64_t k = 0;
  for (; k + kChunk <= count; k += kChunk) {
    typename S::V v[J];
    for (int j = 0; j < J; j++) v[j] = S::load(values + k + j * S::L);
    S::template store_chunk<T>(out, first + k, v);
  }
  for (; k < count; k++) write(out, T, first + k, values[k]);
}

template <class S>
void narrow(const float* values, int64_t count, void* out, DType type, int64_t first) {
  if (type == kFloat32) return narrow_as<S, kFloat32>(values, count, out, first);
  if (type == kFloat16) return narrow_as<S, kFloat16>(values, count, out, first);
  return narrow_as<S, kBFloat16>(values, count, out, first);
}

// Scales of one row for the chunks [chunk0, chunk1), `per_chunk` of them to each, zero where the row has ended.
template <class S>
void expand_scales(const Scales& s, int64_t row, int64_t columns, int64_t per_chunk, int64_t chunk0, int64_t chunk1,
                   float* out) {
  const DType type = s.half ? kFloat16 : kFloat32;
  const int64_t unit = kChunk / per_chunk, first = row * s.per_row;
  const int64_t begin = chunk0 * per_chunk, end = chunk1 * per_chunk;
  const int64_t filled = least(end, (columns + unit - 1) / unit);
  int64_t i = begin;
  if (s.block == unit) {
    widen_run<S>(s.data, type, first + begin, filled - begin, out);
    i = filled;
  } else {
    for (int64_t b = begin * unit / s.block; i < filled; b++) {
      const float scale = read(s.data, type, first + b);
      // Blocks are whole units, except when the row is a single block.
      const int64_t stop = s.per_row <= 1 ? filled : least(filled, (b + 1) * s.block / unit);
      for (; i < stop; i++) out[i - begin] = scale;
    }
  }
  for (; i < end; i++) out[i - begin] = 0.0f;
}

// The scales of one row after another, times `unit`, each as `expand_scales` gives them for a range of chunks. Where blocks divide chunks and
// rows are whole, scales are read as they are stored, those of several rows at once; a last chunk then sees the next row's scales
// for weights that do not exist, whose input is zero.
template <class S>
class RowScales {
 public:
  RowScales(const Scales& s, int64_t columns, int64_t per_chunk, int64_t chunk0, int64_t chunk1, float* buffer,
            float unit = 1.0f)
      : s_(s), unit_(unit), columns_(columns), per_chunk_(per_chunk), chunk0_(chunk0), chunk1_(chunk1), buffer_(buffer),
        stored_(s.block * per_chunk == kChunk && chunk0 == 0 && chunk1 == chunks_of(columns)),
        step_(stored_ ? 1 + kAtOnce / (s.per_row + 1) : 1) {}

  OCTAVO_INLINE const float* row(int64_t n, int64_t end) {
    if (!stored_) {
      expand_scales<S>(s_, n, columns_, per_chunk_, chunk0_, chunk1_, buffer_);
      multiply((chunk1_ - chunk0_) * per_chunk_);
      return buffer_;
    }
    if (n >= next_) load(n, end);
    return buffer_ + (n - first_) * s_.per_row;
  }

 private:
  static constexpr int64_t kAtOnce = 128;  // no more than the spare part of `scratch_floats`

  void load(int64_t n, int64_t end) {
    first_ = n;
    next_ = least(n + step_, end);
    const int64_t count = (next_ - n) * s_.per_row;
    widen_run<S>(s_.data, s_.half ? kFloat16 : kFloat32, n * s_.per_row, count, buffer_);
    for (int64_t i = count; i < count + per_chunk_; i++) buffer_[i] = 0.0f;
    multiply(count);
  }

  void multiply(int64_t count) {
    if (unit_ == 1.0f) return;
    const typename S::V unit = S::set1(unit_);
    int64_t i = 0;
    for (; i + S::L <= count; i += S::L) S::store(buffer_ + i, S::mul(S::load(buffer_ + i), unit));
    for (; i < count; i++) buffer_[i] *= unit_;
  }

  const Scales s_;
  const float unit_;
  const int64_t columns_, per_chunk_, chunk0_, chunk1_;
  float* const buffer_;
  const bool stored_;
  const int64_t step_;
  int64_t first_ = 0, next_ = 0;
};

// The scale of vector j of chunk c.
template <class S, int PerChunk>
OCTAVO_INLINE typename S::V scale_of(const float* scales, int64_t c, int j) {
  if constexpr (PerChunk == kChunk) return S::load(scales + c * kChunk + j * S::L);
  else return S::set1(scales[c * PerChunk + j * S::L * PerChunk / kChunk]);
}

// The bytes of chunk c of a row: the row itself, or a copy padded with zeros where the row ends.
OCTAVO_INLINE const uint8_t* chunk_of(const uint8_t* row, int64_t c, int64_t columns, uint8_t* tail) {
  const int64_t left = columns - c * kChunk;
  if (left >= kChunk) return row + c * kChunk;
  std::memset(tail, 0, kChunk);
  std::memcpy(tail, row + c * kChunk, static_cast<size_t>(left));
  return tail;
}

// Raw: the values of `decode_piece` lack a factor, which the scales have.
template <class S, int M, int PerChunk, bool Raw>
OCTAVO_INLINE void dot_chunk(const typename S::Codes& codes, const uint8_t* q, const float* scales, int64_t c,
                             const float* x, int64_t stride, typename S::V (&acc)[M]) {
  constexpr int J = kChunk / S::L / S::kPieces;
  typename S::V even[M], odd[M];
  for (int p = 0; p < S::kPieces; p++) {
    typename S::V w[J];
    if constexpr (S::kSegments) S::template decode_piece<Raw>(codes, q + p * J * S::L, w);
    else S::decode(codes, q, w);
    const float* xp = x + c * kChunk + p * J * S::L;
    if constexpr (PerChunk == 1 && M < 4) {
      for (int m = 0; m < M; m++) {
        const float* xm = xp + m * stride;
        even[m] = p ? S::fma(w[0], S::load(xm), even[m]) : S::mul(w[0], S::load(xm));
        odd[m] = p ? S::fma(w[1], S::load(xm + S::L), odd[m]) : S::mul(w[1], S::load(xm + S::L));
        for (int j = 2; j < J; j += 2) {
          even[m] = S::fma(w[j], S::load(xm + j * S::L), even[m]);
          odd[m] = S::fma(w[j + 1], S::load(xm + (j + 1) * S::L), odd[m]);
        }
      }
    } else {
      for (int j = 0; j < J; j++) w[j] = S::mul(w[j], scale_of<S, PerChunk>(scales, c, p * J + j));
      for (int m = 0; m < M; m++)
        for (int j = 0; j < J; j++) acc[m] = S::fma(w[j], S::load(xp + m * stride + j * S::L), acc[m]);
    }
  }
  if constexpr (PerChunk == 1 && M < 4) {
    const typename S::V s = S::set1(scales[c]);
    for (int m = 0; m < M; m++) acc[m] = S::fma(S::add(even[m], odd[m]), s, acc[m]);
  }
}

template <class S, int M, int PerChunk, bool Raw>
void dot_rows(const Packed& w, const Table& table, const float* x, int64_t stride, int64_t token, int64_t row0,
              int64_t row1, const Output& out, float* scratch) {
  const typename S::Codes codes = S::load_codes(table);
  const int64_t chunks = chunks_of(w.columns), full = w.columns / kChunk;
  float unit = 1.0f;
  if constexpr (Raw) unit = S::raw_unit(table);
  RowScales<S> row_scales(w.scales, w.columns, PerChunk, 0, chunks, scratch, unit);
  uint8_t tail[kChunk];
  for (int64_t n = row0; n < row1; n++) {
    const float* scales = row_scales.row(n, row1);
    const uint8_t* row = w.qdata + n * w.columns;
    typename S::V acc[M];
    for (int m = 0; m < M; m++) acc[m] = S::zero();
    for (int64_t c = 0; c < full; c++) {
      OCTAVO_PREFETCH(row + c * kChunk + kPrefetch);
      dot_chunk<S, M, PerChunk, Raw>(codes, row + c * kChunk, scales, c, x, stride, acc);
    }
    if (full < chunks)
      dot_chunk<S, M, PerChunk, Raw>(codes, chunk_of(row, full, w.columns, tail), scales, full, x, stride, acc);
    for (int m = 0; m < M; m++) {
      const float sum = S::sum(acc[m]) + (out.bias ? out.bias[n] : 0.0f);
      write(out.data, out.type, (token + m) * out.stride + n, sum);
    }
  }
}

// Tokens in groups of at most S::kGroup: their accumulators and the codebook fit the registers together. The rows of a task
// stay in the second-level cache from one group to the next.
template <class S, int M, int PerChunk, bool Raw>
void dot_group(const Packed& w, const Table& table, const Tokens& x, int64_t m, int64_t row0, int64_t row1,
               const Output& out, float* scratch) {
  if constexpr (M > 1)
    if (x.count - m < M) return dot_group<S, M - 1, PerChunk, Raw>(w, table, x, m, row0, row1, out, scratch);
  dot_rows<S, M, PerChunk, Raw>(w, table, x.values + m * x.stride, x.stride, m, row0, row1, out, scratch);
}

template <class S, int PerChunk, bool Raw>
void dot_parts(const Packed& w, const Table& table, const Tokens& x, int64_t row0, int64_t row1, const Output& out,
               float* scratch) {
  for (int64_t m = 0; m < x.count; m += S::kGroup)
    dot_group<S, S::kGroup, PerChunk, Raw>(w, table, x, m, row0, row1, out, scratch);
}

template <class S, bool Raw>
void dot_raw(const Packed& w, const Table& table, const Tokens& x, int64_t row0, int64_t row1, const Output& out,
             float* scratch) {
  switch (scales_per_chunk(w.scales)) {
    case 1: return dot_parts<S, 1, Raw>(w, table, x, row0, row1, out, scratch);
    case 2: return dot_parts<S, 2, Raw>(w, table, x, row0, row1, out, scratch);
    case 4: return dot_parts<S, 4, Raw>(w, table, x, row0, row1, out, scratch);
    default: return dot_parts<S, 64, Raw>(w, table, x, row0, row1, out, scratch);
  }
}

template <class S>
void dot(const Packed& w, const Table& table, const Tokens& x, int64_t row0, int64_t row1, const Output& out,
         float* scratch) {
  // A float16 scale times a power of two is exact; a tiny float32 scale might become subnormal.
  if constexpr (S::kSegments)
    if (w.scales.half) return dot_raw<S, true>(w, table, x, row0, row1, out, scratch);
  dot_raw<S, false>(w, table, x, row0, row1, out, scratch);
}

}  // namespace
}  // namespace octavo
