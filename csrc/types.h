// The plain data that the drivers (ops.h) and the kernels of each instruction set share.
//
// A quantized matrix of N rows and K columns in blocks of B:
//   qdata   uint8 [N, K]                    index into the code
//   absmax  float16 | float32 [N, ceil(K/B)]  scale of each run of B weights of a row
//   code    float32 [256]                   ascending
//   weight[n, k] = code[qdata[n, k]] * absmax[n, k / B]
#pragma once
#include <cstddef>
#include <cstdint>

namespace octavo {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Kernels read a row in chunks of 64 weights: one AVX-512 register of bytes, one cache line.
constexpr int64_t kChunk = 64;

constexpr int64_t chunks_of(int64_t columns) { return (columns + kChunk - 1) / kChunk; }
constexpr int64_t padded(int64_t columns) { return chunks_of(columns) * kChunk; }
constexpr size_t size_of(DType type) { return type == kFloat32 ? 4 : 2; }

struct Scales {
  const void* data;
  bool half;         // float16, else float32
  int64_t block;     // weights that share a scale
  int64_t per_row;   // ceil(columns / block)
};

struct Packed {
  const uint8_t* qdata;
  Scales scales;
  int64_t rows, columns;
};

// A codebook of sixteen straight segments: code[16 h + l] = (base[h] + slope[h] l) unit, integers within +-16384 (docs/FORMAT.md).
struct Segments {
  alignas(16) uint8_t base[2][16], slope[2][16];  // the low and the high bytes of 16-bit integers
  alignas(16) int8_t base_byte[16];               // base / step, if `bytes`
  uint8_t step;                                   // 2^-7 in units
  bool bytes;                                     // bases are multiples of 2^-7 and slopes at most 127
  float unit;                                     // 2^-11 to 2^-14
  float top_word;                                 // largest input in fixed point: eight products then stay below 2^31
};

// The published format's dynamic map (docs/FORMAT.md): index 127 + a has the value P(a), 127 - a has -P(a), and P is a straight line
// between two powers of two. Two forms of P, with the error of a rounding:
//   float32   P(a) = constant[k] + slope[k] (a + 1/2), where k are the lowest three bits of the exponent of a + 1/2
//   integers  P(a) = (base[a >> 4] + step[a >> 4] (a & 15) / 16) / 16383, the quotient rounded; for a < 16 `small[a]`
struct Dynamic {
  alignas(32) float constant[8], slope[8];
  alignas(16) uint8_t base[2][16], step[2][16];  // the low and the high bytes of 16-bit integers
  alignas(16) uint8_t small[16];
};

// A codebook in the forms the kernels look it up in; made once a call, read by every thread.
struct alignas(64) Table {
  float code[256];
  // The bits of `code`: plane p holds byte p of every entry (AVX-512 VBMI), word plane p holds 16 bits (AVX-512 BW).
  uint8_t bytes[4][256];
  // The upper three of the code rounded to 24 bits.
  uint8_t rounded[3][256];
  uint16_t words[2][256];
  // Fixed point: code ≈ fixed * fixed_unit with |fixed| <= 16383, and the bytes of `fixed`.
  int16_t fixed[256];
  uint8_t fixed_bytes[2][256];
  // Byte planes of `fixed`, each run of sixteen entries exclusive-or'ed with the run before it in its half (AVX2).
  uint8_t steps[2][256];
  float fixed_unit, top_word;
  bool integers;  // the fixed-point form is exact
  Segments segments;
  Dynamic dynamic;
};

// The 255 midpoints between neighbouring codes, ordered as a binary search meets them: level l has 2^l entries.
struct alignas(64) Search {
  float level[8][128];
};

// Input of a product: `tokens` rows of `padded(columns)` values, zero after `columns`.
struct Tokens {
  int64_t count;
  int64_t stride;         // padded(columns)
  const float* values;    // float32 [count, stride]; null when fixed point is used
  // Fixed point: 16-bit integers in the order the kernel decodes a chunk in, and one float32 unit per chunk. Float32 input is
  // the sum of two planes, [count, 2, stride]: its rounding to 16 bits, and the rounding of what is left.
  int64_t planes;
  const int16_t* fixed;   // [count, planes, stride]
  const float* units;     // [count, planes, stride / 64]
};

// Input of the product of a block of tokens (GEMM): bfloat16 [columns / kGemmColumns, count, kGemmColumns], zero after the
// matrix' columns.
// What a panel meets lies together: rows of x thousands of bytes apart would share few sets of the caches.
struct GemmInput {
  int64_t count;
  const uint16_t* values;
};

// That product takes tasks of kGemmRows rows, in panels of kGemmPanel rows and kGemmColumns columns, and keeps the sums
// of kGemmTokens tokens. Scales are read for kGemmScaled columns at a time. Milliseconds for 24 tokens, one core of a Zen 5:
//   kGemmRows   2048 x 8192   8192 x 2048
//          48   2.89          2.87
//          96   3.42          3.12          (more rows, more pages at a time)
// kGemmColumns of 256, 384, 512: no difference at 32 or at 512 tokens; at 256 a panel is half of the first-level cache.
constexpr int64_t kGemmPanel = 48, kGemmRows = kGemmPanel, kGemmColumns = 256, kGemmScaled = 2048, kGemmTokens = 512;

struct GemmScratch {
  float* scales;     // [kGemmRows / 16, 4 kGemmScaled / 64, 16]: sixteen rows side by side, 4 to a chunk at most
  float* buffer;     // [16, 4 kGemmScaled / 64]
  float* partial;    // [kGemmRows, tokens]: sums over the columns so far
  uint16_t* panel;   // [kGemmColumns / 2, kGemmPanel, 2]
};

// A product by tiles (tiles256.h): kTileRows outputs and kTileColumns of what is summed over. Input lies as for `GemmInput`:
// [columns / kTileColumns, count, kTileColumns], zero after the matrix' columns; as float32, or as integers with a unit for each `run`.
struct TileTokens {
  int64_t count;
  const float* floats;    // null where words are used
  const int16_t* words;
  const float* units;     // [columns / kTileColumns, count, kTileColumns / run]
  int64_t run;            // columns that are summed up in 32 bits: 64, 32 or 16
  int64_t from, to;       // the tokens of a call, kTileTokens at most, or kTransposedTokens
};

// kTileTask rows and kTileTokens tokens make a task; transposed, as many chunks of columns as kTransposedChunks, and kTransposedTokens.
// Transposed, all rows are gone through: fewer tokens and more columns, so that the input is read less often.
constexpr int64_t kTileRows = 16, kTileColumns = 256, kTileTask = 2 * kTileRows, kTileTokens = 512;
constexpr int64_t kTransposedChunks = 4, kTransposedTokens = 256;

struct TileScratch {
  float* sums;            // [kTileTask / kTileRows, tokens, kTileRows], or [4 kTransposedChunks, tokens, kTileRows]
  float* scales;          // [4 kTileColumns / 64, kTileRows]
  float* floats;          // [4, kTileColumns, kTileRows]
  int16_t* words;         // [kTileColumns / 2, kTileRows, 2]; in the place of `floats`
};

struct Output {
  void* data;             // [tokens, stride] of `type`
  DType type;
  int64_t stride;
  const float* bias;      // float32 [rows] or null
};

// Floats of scratch that one thread needs for a matrix of so many columns.
constexpr int64_t scratch_floats(int64_t columns) { return 2 * padded(columns) + 4 * kChunk; }

// One instruction set's kernels. All are pure: they read and write only what they are handed, on one thread.
struct Kernels {
  const char* name;

  // Fills what of the table these kernels read: for exact float32, or for fixed point. `code` may be misaligned.
  void (*prepare)(const float* code, bool fixed, Table&);

  // x [tokens, columns] of `type` → float32 [tokens, padded(columns)].
  void (*widen)(const void* x, DType type, int64_t tokens, int64_t columns, float* out);

  // float32 [count] → out[first:first + count] of `type`.
  void (*narrow)(const float* values, int64_t count, void* out, DType type, int64_t first);

  // The same to fixed point, from the widened values; false if they do not allow it (NaN, infinity). Null: not supported.
  // `top_word` is the integer that the largest input of a chunk becomes.
  bool (*to_fixed)(const float* x, int64_t tokens, int64_t columns, float unit, float top_word, int16_t* fixed, float* units);

  // out[m, n] = sum_k x[m, k] * weight[n, k] + bias[n] for rows [row0, row1).
  void (*dot)(const Packed&, const Table&, const Tokens&, int64_t row0, int64_t row1, const Output&, float* scratch);
  void (*dot_fixed)(const Packed&, const Table&, const Tokens&, int64_t row0, int64_t row1, const Output&,
                    float* scratch);

  // out = x Wᵀ + bias in bfloat16 for rows [row0, row1), kGemmRows at most. Null: not supported.
  void (*gemm)(const Packed&, const Table&, const GemmInput&, int64_t row0, int64_t row1, const Output&,
               const GemmScratch&);

  // sums[m, k - col0] += sum_n x[m, n] * weight[n, k] for all rows and columns [col0, col1); col0 a multiple of 64.
  void (*transposed)(const Packed&, const Table&, const float* x, int64_t x_stride, int64_t tokens, int64_t col0,
                     int64_t col1, float* sums, int64_t sums_stride, float* scratch);

  // weight[row0:row1, col0:col1] → out, rows `stride` elements apart; col0 a multiple of 64.
  void (*dequantize)(const Packed&, const Table&, int64_t row0, int64_t row1, int64_t col0, int64_t col1, void* out,
                     DType type, int64_t stride, float* scratch);

  // Largest magnitude of each block of `rows` rows → float32 [rows, per_row]; false if a weight is not finite.
  bool (*absmax)(const void* weight, DType type, int64_t rows, int64_t columns, int64_t block, float* out,
                 float* scratch);

  // Index of the code nearest to weight / scale, the lower one at a tie → uint8 [rows, columns].
  void (*encode)(const void* weight, DType type, int64_t rows, int64_t columns, const Scales&, const Search&,
                 uint8_t* qdata, float* scratch);

  // Sums over each of the rows [row0, row1) of (weight - code * scale)² and of weight².
  void (*deviate)(const void* weight, DType type, const Packed&, const Table&, int64_t row0, int64_t row1, float* errors,
                  float* powers, float* scratch);

  // counts[bin of weight / scale] += mass of its block. scales, masses: [rows, per_row].
  void (*count)(const void* weight, DType type, int64_t rows, int64_t columns, const Scales&, const int64_t* masses,
                int64_t bins, int64_t* counts, float* scratch);

  // `count` values of x from element `first` on → one token's share of a tile: floats [kTileColumns], or, where `words` is not null,
  // integers up to `top_word` and units [kTileColumns / run]. False if the values do not allow integers (NaN, infinity).
  bool (*tile_input)(const void* x, DType type, int64_t first, int64_t count, int64_t run, float top_word, float* floats,
                     int16_t* words, float* units) = nullptr;

  // out = x Wᵀ + bias for the rows [row0, row1), kTileTask at most; out = x W for one chunk of columns. Null: not supported.
  void (*tile)(const Packed&, const Table&, const TileTokens&, int64_t row0, int64_t row1, const Output&, const TileScratch&) = nullptr;
  void (*tile_transposed)(const Packed&, const Table&, const TileTokens&, int64_t chunk0, int64_t chunk1, const Output&,
                          const TileScratch&) = nullptr;

  // The kernels that compute a codebook of segments whose bases and slopes fit bytes, and of others. Null: these look it up.
  const Kernels* byte_segments = nullptr;
  const Kernels* wide_segments = nullptr;

  // The kernels whose tiles these use, or null.
  const Kernels& (*tiles)() = nullptr;

  // The kernels that compute the dynamic map, or null: these look it up.
  const Kernels* dynamic = nullptr;
};

// How many scales a chunk of 64 weights spans: 1, 2 or 4, or 64 for "one per weight", which serves any block size.
constexpr int64_t scales_per_chunk(const Scales& s) {
  return s.per_row <= 1 || s.block % 64 == 0 ? 1 : s.block % 32 == 0 ? 2 : s.block % 16 == 0 ? 4 : 64;
}

}  // namespace octavo
